"""Loading from folders that nobody vouches for: nothing runs, nothing fills the memory, every failure is one line."""

import io
import json
import os
import pickle
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergekit_bert as mb
from mergekit_bert.encoder.folder import load_folder, read_folder
from mergekit_bert.encoder.load import load_encoder
from mergekit_bert.encoder.pretrained import one_line, open_pretrained, told_as
from mergekit_bert.encoder.stored import open_encoder
from mergekit_bert.errors import CompositionError, EncoderError, MbertWarning, ModelFileError
from tests.encoder.evil import MARK, Spoil, code, distributed, pickled, says
from tests.tiny import ARCHITECTURES, write_tiny


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny BERT to spoil."""
    return Path(shutil.copytree(tiny_folders["bert"], tmp_path / "bert"))


def refused(folder: Path, message: str) -> None:
    """Check that the folder is refused as a base, loaded or stored, in one line and at once; that nothing ran."""
    for load in (load_encoder, open_encoder, lambda path: open_pretrained(path, "x").load()):
        start = time.monotonic()
        with pytest.raises(EncoderError, match=message) as caught:
            load(folder)
        assert time.monotonic() - start < 20
        assert str(caught.value).isprintable()
    assert not (folder.parent / MARK).exists()


CODE: dict[str, tuple[Spoil, str]] = {
    "code for a known kind": (code(), r"its config.json asks for code of its own \(auto_map\)"),
    "code for a kind of its own": (code(model_type="evil"), "asks for code of its own"),
    "code deep inside": (says(sub=[{"auto_map": {"AutoConfig": "evil.C"}}]), "asks for code of its own"),
    "code of the tokenizer": (code("tokenizer_config.json"), "its tokenizer_config.json asks for code of its own"),
    "code of the tokenizer, as it was": (
        says("tokenizer_config.json", auto_map=["evil.T", None]),
        "its tokenizer_config.json asks for code of its own",
    ),
    "code in the tokens": (code("special_tokens_map.json"), "its special_tokens_map.json asks for code of its own"),
    "a pickle": (pickled, r"no model.safetensors, but pytorch_model.bin, a pickle, which can run code; .*convert it"),
    "a quantizer": (says(quantization_config={"quant_method": "awq"}), "asks for quantised weights"),
    "other weights": (says(transformers_weights="../x.safetensors"), "asks for weights under another name"),
    "patches": (says(fusion_config={"x": True}), "asks for changed modules"),
    "a kernel": (says(attn_implementation="kernels-community/x"), r"a kernel \(attn_implementation: 'kernels-comm"),
    "a kernel, inner name": (says(_attn_implementation_internal="a/b:c"), "asks for a kernel"),
    "a kernel for a part": (says(_attn_implementation={"": "a/b"}), "asks for a kernel"),
    "a kernel of experts": (says(experts_implementation="a/b"), "asks for a kernel"),
    "a base elsewhere": (says("adapter_config.json", base_model_name_or_path="evil/base"), "it is a PEFT adapter"),
}


@pytest.mark.parametrize("name", CODE)
def test_what_would_run_or_fetch_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spoil, message = CODE[name]
    spoil(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    refused(folder, message)
    assert sys.stdin.read() == "y\ny\ny\n"  # nobody was asked


def test_the_evil_is_evil(folder: Path) -> None:
    """The same folders, trusted, do write the mark: else the tests above would show nothing."""
    code(model_type="evil")(folder)
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (folder.parent / MARK).is_file()
    (folder.parent / MARK).unlink()
    pickled(folder)
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (folder.parent / MARK).is_dir()


@pytest.mark.parametrize(
    "spoil",
    [
        distributed,
        says(quantization_config=None, auto_map=None, fusion_config={}),
        says(attn_implementation="flash_attention_2"),
        says(configuration_files=["config.4.0.0.json"]),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(pickle.dumps(os.getcwd)),
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x"}}'),
        *(
            says("tokenizer_config.json", **{key: value})
            for key in ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "gguf_file", "vocab")
            for value in ("/dev/zero", "pipe")
        ),
    ],
)
def test_what_is_not_followed_changes_nothing(
    folder: Path, bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch, spoil: Spoil
) -> None:
    os.mkfifo(folder.parent / "pipe")
    monkeypatch.chdir(folder.parent)
    spoil(folder)
    (folder / "config.4.0.0.json").write_text('{"model_type": "evil"}')
    found = load_encoder(folder)
    assert (found.fingerprint, found.tokenizer_fingerprint) == (bert.fingerprint, bert.tokenizer_fingerprint)
    assert found.config._attn_implementation != "flash_attention_2"
    assert not (folder.parent / MARK).exists()


SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 in config.json; expected at most"),
    "some layers": ({"num_hidden_layers": 1000}, "asks for more layers than its 39 tensors make"),
    "layers as they are not": ({"num_hidden_layers": "1000000000"}, "cannot be loaded"),
    "a vocabulary": ({"vocab_size": 2**40}, "vocab_size is 1099511627776 in config.json"),
    "some vocabulary": ({"vocab_size": 60000}, r"has shape \(23, 32\); expected \(60000, 32\)"),
    "a width": ({"hidden_size": 2**31}, "hidden_size is 2147483648 in config.json"),
    "some width": ({"hidden_size": 60000}, r"has shape \(23, 32\); expected \(23, 60000\)"),
    "positions": ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776 in config.json"),
    "some positions": ({"max_position_embeddings": 2**30}, r"has shape \(40, 32\); expected \(1073741824, 32\)"),
    "labels": ({"num_labels": 10**9}, "num_labels is 1000000000 in config.json"),
    "heads": ({"num_attention_heads": 10**30}, "num_attention_heads is 1000000000000000000000000000000 in config"),
    "a negative width": ({"hidden_size": -1}, "cannot be loaded"),
    "nothing": ({"num_attention_heads": 0}, "cannot be loaded"),
}


@pytest.mark.parametrize("headless", [False, True], ids=["whole", "without a pooler"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_the_weights_do_not_have_are_refused_at_once(folder: Path, name: str, headless: bool) -> None:
    values, message = SIZES[name]
    says(**values)(folder)
    if headless:
        _keep(folder, "pooler")
        message = message.replace("39", "37")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def _keep(folder: Path, *without: str) -> None:
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not any(part in name for part in without)}
    save_file(kept, path, {"format": "pt"})


def test_what_is_missing_may_not_be_larger_than_what_is_there(folder: Path) -> None:
    _keep(folder, "word_embeddings")
    with pytest.warns(MbertWarning, match="lacks embeddings.word_embeddings.weight"):
        assert load_encoder(folder).weights["embeddings.word_embeddings.weight"].shape == (23, 32)
    says(vocab_size=65000)(folder)
    with pytest.warns(MbertWarning, match="lacks embeddings.word_embeddings.weight"):
        load_encoder(folder)  # 8 MiB
    _keep(folder, "word_embeddings", "position_embeddings")
    says(max_position_embeddings=2**30)(folder)
    refused(folder, "config.json describes a model with 3[0-9]+ values that are not among the [0-9]+ of its weights")


def test_an_empty_tensor_makes_no_size_plausible(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"x": torch.empty(0, 2**40)}, path, {"format": "pt"})
    says(vocab_size=2**40)(folder)
    refused(folder, "vocab_size is 1099511627776 in config.json")


def test_a_bloated_header_is_refused(folder: Path) -> None:
    path, count = folder / "model.safetensors", 400_000
    entries = ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(count))
    path.write_bytes(len(entries := f"{{{entries}}}").to_bytes(8, "little") + entries.encode())
    refused(folder, "a header of [0-9]+ bytes")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_built_well_within_the_limits(tmp_path: Path, architecture: str) -> None:
    found = open_pretrained(write_tiny(tmp_path, architecture), "x")
    assert found.shell().config.model_type == found.config.model_type
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"unheard_of": 10**12})
    )
    open_pretrained(tmp_path, "x").load()


@pytest.mark.parametrize(
    "error",
    [
        RecursionError(),
        MemoryError(),
        OverflowError("a\nb\x1b[31m"),
        TypeError(),
        AttributeError("x" * 10**6),
    ],
)
@pytest.mark.parametrize("where", ["AutoTokenizer.from_pretrained", "AutoModelForSequenceClassification.from_config"])
def test_whatever_transformers_raises_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(f"transformers.{where}", fail)
    with pytest.raises(EncoderError, match="it cannot be loaded") as caught:
        load_encoder(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_panic_is_caught_and_an_interrupt_is_not() -> None:
    class Panic(BaseException):
        pass

    with pytest.raises(EncoderError, match=r"x: it cannot be loaded \(Panic\)"), one_line("x"):
        raise Panic
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt), one_line("x"):
            raise interrupt


def test_a_tokenizer_that_fails_at_work_is_refused(folder: Path) -> None:
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "none", "type_id": 0}}], "pair": []}
    says("tokenizer.json", post_processor={**template, "special_tokens": {}})(folder)
    with pytest.raises(EncoderError, match="it cannot be loaded"):
        load_encoder(folder)


def test_another_kind_of_error_says_the_same() -> None:
    with pytest.raises(CompositionError, match=r"^a: b; expected c; d$"), told_as(CompositionError):
        raise EncoderError("a", "b", "c", "d")


def test_the_way_to_convert_a_pickle_works(folder: Path, bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="convert it") as caught:
        load_encoder(folder)
    script = str(caught.value).split('python -c "')[1].split('"')[0]
    monkeypatch.setattr(sys, "argv", ["-c", str(folder), str(folder.parent / "new")])
    exec(script, {})
    found = load_encoder(folder.parent / "new")
    assert (found.fingerprint, found.tokenizer_fingerprint) == (bert.fingerprint, bert.tokenizer_fingerprint)


def test_a_whole_model_s_folder_is_vetted_too(folder: Path, bert: mb.Encoder, sst: mb.Task) -> None:
    base = {"name": "x", "fingerprint": bert.fingerprint, "tokenizer_fingerprint": bert.tokenizer_fingerprint}
    record = {"format": 1, "task": sst.to_json(), "max_length": 40, "base": base}
    (folder / "mbert.json").write_text(json.dumps(record))
    code(model_type="evil")(folder)
    with pytest.raises(ModelFileError, match="asks for code of its own"):
        load_folder(read_folder(folder))
    assert not (folder.parent / MARK).exists()
