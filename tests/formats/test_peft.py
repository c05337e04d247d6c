"""PEFT folders: the outputs that PEFT itself gives, both ways; every folder that cannot be used is told in one line."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.config import AdapterConfig, matching
from mergekit_bert.adapters.delta import Dense, LowRank
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.encoder.places import minilm_folder
from mergekit_bert.errors import CompositionError, MbertError, ModelFileError, TrainingError
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.formats.inputs import read_inputs
from mergekit_bert.formats.peft_format import read_peft, write_peft
from mergekit_bert.models.composition import Composition, Merged
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import dense64, one_line, random_adapter, renamed, same_adapter, same_tensors
from tests.formats.peft_folders import M, Q, edit, make, shell, tensors, weights
from tests.tiny import tiny_rows

OTHERS = ("roberta", "distilbert", "electra", "deberta-v2", "modernbert")
QUERY = {"distilbert": "q_lin", "deberta-v2": "query_proj", "modernbert": "Wqkv"}
WIDE = {"distilbert": "lin1", "modernbert": "Wi"}
HEADS = {"deberta-v2": ["pooler"], "modernbert": ["head"]}
ROOT = Path(__file__).parents[2]


def reload(folder: Path, base: Path, task: Task) -> Any:
    """A folder as PEFT reads it; nothing in it may be missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(shell(base, task), folder).eval()


def peft_outputs(model: Any, encoder: Encoder, task: Task) -> np.ndarray:
    tokens = tokenise(tiny_rows(task, 6), task, encoder.tokenizer, encoder.max_length, encoder.pad_token)
    with torch.no_grad():
        outputs: np.ndarray = model(**tokens.batch(list(range(6))).padded()).logits.numpy()
    return outputs


def same_outputs(model: Any, ours: Composition, encoder: Encoder, task: Task) -> bool:
    """Whether PEFT's and mbert's outputs agree to 1e-5, and are not all the same."""
    theirs = peft_outputs(model, encoder, task)
    found = Predictor(ours, encoder).outputs(task.name, tiny_rows(task, 6))
    assert np.ptp(theirs, axis=0).max() > 1e-4
    np.testing.assert_allclose(found, theirs, atol=1e-5 * max(1.0, float(np.abs(theirs).max())), rtol=0)
    return True


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"QUERY": 5, "WIDE": 2}, "alpha_pattern": {".*QUERY": 11, "WIDE": 1}},
    "biases": {"bias": "all"},
    "biases of LoRA": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "everything": {
        "use_dora": True,
        "use_rslora": True,
        "bias": "all",
        "rank_pattern": {"QUERY": 1},
        "fan_in_fan_out": True,
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
    },
}


def options_for(architecture: str, kind: str) -> dict[str, Any]:
    query, wide = QUERY.get(architecture, "query"), WIDE.get(architecture, "intermediate.dense")
    text = json.dumps(KINDS[kind]).replace("QUERY", query).replace("WIDE", wide)
    return {"target_modules": [query, wide], "modules_to_save": HEADS.get(architecture), **json.loads(text)}


@pytest.mark.parametrize(
    ("architecture", "kind", "name"),
    [
        *(("bert", kind, "sst") for kind in KINDS),
        ("bert", "lora", "sts"),
        *((architecture, "everything", "sst") for architecture in OTHERS),
        *((architecture, "patterns", "sts") for architecture in OTHERS),
    ],
)
def test_a_folder_of_pefts_gives_pefts_outputs(
    tiny_folders: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path, architecture: str, kind: str, name: str
) -> None:
    encoder, base, task = encoders[architecture], tiny_folders[architecture], get_task(name)
    model = make(tmp_path / name, base, task, **options_for(architecture, kind))
    ours = read_peft(tmp_path / name, encoder)
    assert isinstance(ours, Adapter)
    assert ours.type == ("dora" if kind in ("dora", "everything") else "lora")
    assert same_outputs(model, ours, encoder, task)


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "modernbert"])
def test_modules_saved_whole_are_changes_too(
    tiny_folders: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path, architecture: str
) -> None:
    encoder, base, task = encoders[architecture], tiny_folders[architecture], get_task("sst")
    norm = next(name for name, one in encoder.model.named_modules() if "norm" in type(one).__name__.lower())
    wide = WIDE.get(architecture, "intermediate.dense")
    saved = [f"{shell(base, task).base_model_prefix}.{norm}", wide, *HEADS.get(architecture, ())]
    query = QUERY.get(architecture, "query")
    model = make(tmp_path / "sst", base, task, target_modules=[query], modules_to_save=saved, bias="all")
    ours = read_peft(tmp_path / "sst", encoder)
    assert isinstance(ours, Merged)
    kinds = {site.rpartition(".")[2]: type(delta) for site, delta in ours.deltas.items()}
    assert kinds == {query: LowRank, wide.rpartition(".")[2]: Dense}
    assert same_outputs(model, ours, encoder, task)


def test_dora_is_its_formula(tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path) -> None:
    make(tmp_path / "sst", tiny_folders["bert"], get_task("sst"), target_modules="all-linear", use_dora=True)
    ours = read_peft(tmp_path / "sst", bert)
    assert isinstance(ours, Adapter)
    stored = load_file(tmp_path / "sst/adapter_model.safetensors")
    for site, delta in ours.deltas().items():
        name = f"base_model.model.bert.{site}"
        weight = bert.model.get_parameter(f"{site}.weight").double()
        for row in range(3):
            turned = weight[row] + 5 / 3 * stored[f"{name}.lora_B.weight"][row].double() @ (
                stored[f"{name}.lora_A.weight"].double()
            )
            length = float(stored[f"{name}.lora_magnitude_vector"][row])
            torch.testing.assert_close(
                weight[row] + delta.dense()[row], length * turned / turned.square().sum().sqrt(), atol=1e-6, rtol=1e-5
            )
    assert "pooler.dense" in ours.sites
    write_model(tmp_path / "m.safetensors", ours)
    again = read_model(tmp_path / "m.safetensors")
    assert isinstance(again, Adapter)
    assert same_adapter(again, ours)
    found = again.on(bert).deltas()
    assert all(torch.equal(found[site].dense(), delta.dense()) for site, delta in ours.deltas().items())


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("architecture", ["bert", *OTHERS])
def test_a_dora_becomes_a_folder_that_peft_reads_and_comes_back(
    tiny_folders: dict[str, Path],
    encoders: dict[str, Encoder],
    tmp_path: Path,
    architecture: str,
    patterns: bool,
) -> None:
    encoder, base, task = encoders[architecture], tiny_folders[architecture], get_task("sst")
    query = QUERY.get(architecture, "query")
    options: dict[str, Any] = {"rank_stabilized": True, "rank_pattern": {query: 5}} if patterns else {}
    one = random_adapter(encoder, task, kind="dora", train_bias=True, **options)
    write_peft(tmp_path / "p", dataclasses.replace(one, weights=None), encoder)
    told = json.loads((tmp_path / "p/adapter_config.json").read_text())
    assert (told["peft_type"], told["use_dora"]) == ("LORA", True)
    model = reload(tmp_path / "p", base, task)
    assert same_outputs(model, one, encoder, task)
    back = read_peft(tmp_path / "p", encoder)
    assert isinstance(back, Adapter)
    assert (back.type, type(back.config), back.config) == ("dora", type(one.config), one.config)
    assert all(same_tensors(back.tensors[site], found) for site, found in one.tensors.items())


WRITTEN: dict[str, dict[str, Any]] = {
    "orthogonal basis": {},
    "trained factors": {"basis": "random", "rank_stabilized": True},
    "few sites": {"basis": "random", "targets": "qv"},
    "patterns": {
        "basis": "random",
        "rank_pattern": {r".*\.0\..*(query|q_lin|query_proj|Wqkv)": 5, r"dense|lin\d|Wo": 2},
        "alpha_pattern": {r"(encoder|transformer|layers)\..*1\..*": 3.0, r"dense|lin\d|Wo": 7.0},
    },
    "biases": {"train_bias": True},
    "biases of few sites": {"train_bias": True, "targets": "qv", "basis": "random"},
    "norms": {"train_layernorm": True},
    "biases and norms": {"train_bias": True, "train_layernorm": True},
}


def close_adapters(one: Adapter, two: Adapter, exact_head: bool) -> None:
    """Factors and records the same to the bit; shifts, and heads that were scaled, to rounding."""
    bare = {"shifts": {}, "head": {}}
    assert same_adapter(dataclasses.replace(one, **bare), dataclasses.replace(two, **bare))
    assert one.shifts.keys() == {name for name, shift in two.shifts.items() if name in one.shifts}
    for name, shift in two.shifts.items():
        torch.testing.assert_close(shift, one.shifts.get(name, torch.zeros_like(shift)), atol=1e-6, rtol=0)
    for name, value in one.head.items():
        torch.testing.assert_close(two.head[name], value, atol=0 if exact_head else 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "kind", "name"),
    [
        *(("bert", kind, "sst") for kind in WRITTEN),
        ("bert", "trained factors", "sts"),
        *((architecture, "biases and norms", "sst") for architecture in OTHERS),
        *((architecture, "patterns", "sts") for architecture in OTHERS),
    ],
)
def test_a_written_folder_gives_mberts_outputs_in_peft_and_comes_back(
    tiny_folders: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path, architecture: str, kind: str, name: str
) -> None:
    encoder, path = encoders[architecture], tmp_path / "mine"
    one = random_adapter(encoder, name, spread=0.1, **WRITTEN[kind])
    assert write_peft(path, one, encoder) == [path]
    assert same_outputs(reload(path, tiny_folders[architecture], one.task), one, encoder, one.task)
    two = read_peft(path, encoder)
    assert isinstance(two, Adapter)
    close_adapters(one, two, exact_head=name == "sst")


def test_without_shifts_the_same_bytes_come_back(bert: Encoder, tmp_path: Path) -> None:
    one = random_adapter(bert, "para", seed=3)
    write_peft(tmp_path / "p", one, bert)
    two = read_peft(tmp_path / "p", bert)
    assert isinstance(two, Adapter)
    assert two.basis == one.basis is not None
    assert two.sha256() == one.sha256()
    write_peft(tmp_path / "q", two, bert)
    for file in ("adapter_config.json", "adapter_model.safetensors", "mbert.json"):
        assert (tmp_path / "p" / file).read_bytes() == (tmp_path / "q" / file).read_bytes()


def test_a_folder_that_was_trained_on_is_not_taken_for_what_was_written(
    tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path
) -> None:
    one = random_adapter(bert, "sst")
    write_peft(tmp_path / "p", one, bert)
    model = peft.PeftModel.from_pretrained(shell(tiny_folders["bert"], one.task), tmp_path / "p", is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.add_(0.1)
    model.eval().save_pretrained(tmp_path / "p")
    two = read_peft(tmp_path / "p", bert)
    assert isinstance(two, Adapter)
    assert (two.basis, two.config.basis, two.scores) == (None, "random", {})
    assert "examples" not in two.training
    assert (two.task.name, two.max_length) == ("sst", one.max_length)
    assert same_outputs(model, two, bert, one.task)


def test_merged_low_rank_models_are_a_folder_a_task(
    tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path
) -> None:
    one = random_adapter(bert, "sst", rank=2, targets="qv", train_layernorm=True)
    two = random_adapter(bert, "sts", rank=3, start=4, seed=1)
    merged = mb.merge([one, two], "fedavg")
    paths = write_peft(tmp_path / "out", merged, bert)
    assert paths == [tmp_path / "out/sst", tmp_path / "out/sts"]
    for path, task in zip(paths, merged.tasks, strict=True):
        assert same_outputs(reload(path, tiny_folders["bert"], task), merged, bert, task)
        back = read_peft(path, bert)
        assert isinstance(back, Adapter)
        write_adapter(tmp_path / "again.safetensors", back)
        assert same_adapter(back, read_adapter(tmp_path / "again.safetensors"))
        assert back.training["method"] == "fedavg"
        assert back.config.at("encoder.layer.0.attention.self.query").rank == 5
        assert back.config.at("encoder.layer.0.output.dense").rank == 3
        part = merged.part(task.name)
        for site, delta in back.deltas().items():
            torch.testing.assert_close(delta.dense(), part.deltas[site].dense(), atol=1e-6, rtol=1e-5)
    ensemble = mb.merge([one, two], "ensemble")
    for path, task in zip(write_peft(tmp_path / "apart", ensemble, bert), ensemble.tasks, strict=True):
        assert same_outputs(reload(path, tiny_folders["bert"], task), ensemble, bert, task)


def test_a_folder_merges_with_an_adapter_to_the_dense_sum(
    tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path
) -> None:
    folder = tmp_path / "sts"
    make(folder, tiny_folders["bert"], get_task("sts"), target_modules=["query", "output.dense"], use_rslora=True)
    write_adapter(tmp_path / "sst.safetensors", random_adapter(bert, "sst"))
    one = read_adapter(tmp_path / "sst.safetensors")
    stored = load_file(folder / "adapter_model.safetensors")
    (other,) = read_inputs(folder, str(tiny_folders["bert"]))
    assert other.adapter is not None
    assert other.base == dataclasses.replace(one.base, name=other.base.name)
    weights = {"sst": 0.7, "sts": -0.3}
    merged = mb.merge([tmp_path / "sst.safetensors", folder], "task_arithmetic", weights, base=tiny_folders["bert"])
    assert isinstance(merged, Merged)
    for site, own in dense64(one).items():
        if site.startswith("pooler"):
            continue
        expected, name = 0.7 * own, f"base_model.model.bert.{site}"
        if f"{name}.lora_A.weight" in stored:
            product = stored[f"{name}.lora_B.weight"].double() @ stored[f"{name}.lora_A.weight"].double()
            expected -= 0.3 * 5 / 3**0.5 * product
        torch.testing.assert_close(merged.deltas[site].dense().double(), expected, atol=1e-5, rtol=1e-5)


def test_folders_of_one_base_load_it_once(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str | Path) -> Encoder:
        loaded.append(str(name))
        return load_encoder(name)

    monkeypatch.setattr("mergekit_bert.api.load_encoder", load)
    for name in ("sst", "sts", "para"):
        make(tmp_path / name, tiny_folders["bert"], get_task(name), target_modules=["query"])
    monkeypatch.setenv("MBERT_ALLOWED_BASES", f"another, {tiny_folders['bert']}")
    merged = mb.merge(
        [tmp_path / name for name in ("sst", "sts", "para")], "fedavg", dict.fromkeys(("sst", "sts", "para"), 1.0)
    )
    assert list(merged.weights) == ["sst", "sts", "para"]
    assert loaded == [str(tiny_folders["bert"])]


def test_minilm_both_ways(tmp_path: Path) -> None:
    encoder, base, task = load_encoder("minilm"), minilm_folder(), get_task("sts")
    rows = ["A man plays a guitar.", "Somebody is making music.", "The stock market fell sharply on Friday."]
    inputs = encoder.tokenizer(rows, rows[::-1], padding=True, return_tensors="pt")
    pairs = list(zip(rows, rows[::-1], strict=True))

    def check(model: Any, ours: Composition) -> None:
        with torch.no_grad():
            theirs = model(**inputs).logits[:, 0].tolist()
        found = [one.outputs[0] for one in Predictor(ours, encoder).predict("sts", pairs)]
        assert found == pytest.approx(theirs, abs=1e-5 * max(map(abs, theirs)))

    model = make(tmp_path / "sts", base, task, target_modules="all-linear", rank_pattern={"query": 4}, bias="all")
    check(model, read_peft(tmp_path / "sts", encoder))
    one = random_adapter(encoder, "sts", spread=0.01)
    write_peft(tmp_path / "mine", one, encoder)
    check(reload(tmp_path / "mine", base, task), one)
    config = json.loads((tmp_path / "mine/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    found = read_peft(tmp_path / "mine")
    assert found.base == one.base


BROKEN: dict[str, tuple[Callable[[Path], object], type[MbertError], str]] = {
    "IA3": (edit(peft_type="IA3"), ModelFileError, r"adapter_config.json: peft_type is 'IA3'; expected one of LORA"),
    "no kind": (edit(peft_type=None), ModelFileError, "peft_type is None; expected one of LORA"),
    "prompts": (edit(peft_type="PROMPT_TUNING"), ModelFileError, "peft_type is 'PROMPT_TUNING'"),
    "PiSSA": (edit(init_lora_weights="pissa_niter_4"), ModelFileError, "init_lora_weights is 'pissa_niter_4'"),
    "a bias of LoRA's own": (edit(lora_bias=True), ModelFileError, "lora_bias is True; expected LoRA without further"),
    "a future setting": (edit(use_xlora={"depth": 2}), ModelFileError, "use_xlora is {'depth': 2}"),
    "a strange bias": (edit(bias="boft_only"), ModelFileError, "broken .bias: input should be 'none', 'all' or"),
    "a rank that is no number": (edit(r="3"), ModelFileError, "broken .r: input should be a valid integer"),
    "another rank": (
        edit(r=4),
        ModelFileError,
        r"are \{A \(3, 32\), B \(32, 3\)\}; expected \{A \(4, 32\), B \(32, 4\)",
    ),
    "a rank of nothing": (edit(r=0), ModelFileError, "broken .r: input should be greater than or equal to 1"),
    "a broken pattern": (edit(rank_pattern={"(": 3}), ModelFileError, r"adapter_config.json: broken"),
    "a pattern list": (edit(alpha_pattern=["query"]), ModelFileError, "broken .alpha_pattern: input should be"),
    "an alpha that is no number": (edit(lora_alpha="much"), ModelFileError, "broken .lora_alpha: input should be"),
    "DoRA without magnitudes": (edit(use_dora=True), ModelFileError, r"expected \{A .*, m \(32,\)\}"),
    "no configuration": (
        lambda path: (path / "adapter_config.json").write_text("{"),
        ModelFileError,
        "line 1: not JSON .Expecting",
    ),
    "a list": (lambda path: (path / "adapter_config.json").write_text("[]"), ModelFileError, "a list, not an obj"),
    "no weights": (weights(Path.unlink), ModelFileError, r"adapter_model.safetensors: no such file"),
    "a pickle": (
        weights(lambda file: file.rename(file.with_name("adapter_model.bin"))),
        ModelFileError,
        "weights in a pickle, adapter_model.bin, .*; expected adapter_model.safetensors; .*save it again",
    ),
    "cut short": (
        weights(lambda file: file.write_bytes(file.read_bytes()[:-8])),
        ModelFileError,
        "not readable as safetensors",
    ),
    "not finite": (
        tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan)),
        ModelFileError,
        "holds NaN or values beyond",
    ),
    "no LoRA": (
        tensors(lambda t: [t.pop(name) for name in list(t) if "lora" in name]),
        ModelFileError,
        "no LoRA tensors",
    ),
    "half of a site": (
        tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
        ModelFileError,
        r"are \{A \(3, 32\)\}; expected",
    ),
    "a site that is not there": (
        tensors(lambda t: t.update({f"{M}bert.encoder.layer.7.x.lora_A.weight": t.pop(f"{Q}.lora_A.weight")})),
        ModelFileError,
        "LoRA at 'bert.encoder.layer.7.x'; expected linear layers of .*`base`",
    ),
    "LoRA in the head": (
        tensors(lambda t: t.update({f"{M}classifier.lora_A.weight": torch.ones(3, 32)})),
        ModelFileError,
        "LoRA at 'classifier' of the head; .*modules_to_save",
    ),
    "LoRA on embeddings": (
        tensors(lambda t: t.update({f"{M}bert.embeddings.word_embeddings.lora_embedding_A": torch.ones(3, 32)})),
        ModelFileError,
        "tensor 'bert.embeddings.word_embeddings.lora_embedding_A' of shape",
    ),
    "a foreign tensor": (
        tensors(lambda t: t.update({"x.y": torch.ones(2)})),
        ModelFileError,
        r"tensor 'x.y' of shape \(2,\); expected tensors of",
    ),
    "a resized vocabulary": (
        tensors(lambda t: t.update({f"{M}bert.embeddings.word_embeddings.weight": torch.ones(99, 32)})),
        ModelFileError,
        r"word_embeddings.weight' of shape \(99, 32\)",
    ),
    "no head": (
        tensors(lambda t: [t.pop(name) for name in list(t) if "classifier" in name]),
        CompositionError,
        r"no head; expected the whole head of bert .*modules_to_save=\[classifier\]",
    ),
    "half a head": (
        tensors(lambda t: t.pop(f"{M}classifier.bias")),
        CompositionError,
        "no 'classifier.bias'; expected",
    ),
    "a head of another task": (
        lambda path: path.rename(path.with_name("para")),
        CompositionError,
        "a head of 5 outputs; expected 2, which task 'para' has; name the task",
    ),
}
BASELESS: dict[str, tuple[Callable[[Path], object], type[MbertError], str]] = {
    "no base": (edit(base_model_name_or_path=None), CompositionError, "base None, .*; name its base with `base`"),
    "a base that is gone": (
        edit(base_model_name_or_path="/no/such"),
        ModelFileError,
        "names the base '/no/such', which a file may not choose; .*name it with `base`",
    ),
    "a folder that nothing is known of": (
        lambda path: None,
        ModelFileError,
        "names the base '.*bert', which a file may not choose; .*name it with `base`",
    ),
    "a revision": (edit(revision="v2"), CompositionError, "revision 'v2'; .*`base`"),
}


@pytest.fixture(scope="module")
def plain(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "sst"
    make(path, tiny_folders["bert"], get_task("sst"), target_modules=["query"])
    return path


@pytest.mark.parametrize("name", [*BROKEN, *BASELESS])
def test_what_cannot_be_used_is_told_in_one_line(plain: Path, bert: Encoder, tmp_path: Path, name: str) -> None:
    change, kind, message = {**BROKEN, **BASELESS}[name]
    path = Path(shutil.copytree(plain, tmp_path / "sst"))
    read_peft(path, bert)
    change(path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(kind, match=message) as caught:
        read_peft(path, bert if name in BROKEN else None)
    assert one_line(caught.value)


def test_the_base_and_the_task_can_be_named(plain: Path, bert: Encoder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(plain, tmp_path / "mine"))
    edit(base_model_name_or_path=None, revision="v2")(path)
    own = dataclasses.replace(get_task("sst"), name="my-own")
    assert read_peft(path, bert, own).tasks == (own,)
    assert read_peft(path, str(bert.name), own).tasks == (own,)


def test_a_folder_with_a_record_keeps_its_base(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    write_peft(tmp_path / "p", random_adapter(encoders["bert"]), encoders["bert"])
    with pytest.raises(ModelFileError, match="made for base"):
        read_peft(tmp_path / "p", encoders["minilm"])
    for text, found in (
        ("{", "not JSON"),
        ('{"format": 2}', "broken .format"),
        ('{"format": 1}', "broken .kind: fiel"),
    ):
        (tmp_path / "p/mbert.json").write_text(text)
        with pytest.raises(ModelFileError, match=f"mbert.json.*: {found}"):
            read_peft(tmp_path / "p", encoders["bert"])


def test_a_peft_folder_is_not_taken_for_a_model_folder(bert: Encoder, tmp_path: Path) -> None:
    write_peft(tmp_path / "p", random_adapter(bert), bert)
    with pytest.raises(ModelFileError, match=r"a PEFT folder; .*mbert convert .*p --to mbert"):
        read_model(tmp_path / "p")


def test_a_peft_folder_is_loaded_and_described_like_a_file(bert: Encoder, tmp_path: Path) -> None:
    adapter, rows = random_adapter(bert), tiny_rows(get_task("sst"), 6)
    write_peft(tmp_path / "p", adapter, bert)
    model = mb.load(tmp_path / "p", base=bert.name)
    expected = Predictor(adapter, bert).outputs("sst", rows)
    np.testing.assert_allclose(mb.predictor(model, base=bert).outputs("sst", rows), expected, atol=1e-5)
    np.testing.assert_allclose(mb.predictor(tmp_path / "p", base=bert.name).outputs("sst", rows), expected, atol=1e-5)
    assert mb.describe(tmp_path / "p", base=bert.name)["role"] == "adapter"


def test_what_peft_has_no_place_for_is_refused(bert: Encoder, tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="type probe, which PEFT does not have"):
        write_peft(tmp_path / "p", random_adapter(bert, kind="probe"), bert)
    merged = mb.merge([random_adapter(bert, "sst")], "task_arithmetic")
    assert isinstance(merged, Merged)
    full = {site: Dense(delta.dense()) for site, delta in merged.deltas.items()}
    with pytest.raises(CompositionError, match="a dense Delta; expected low-rank ones, for PEFT; give `rank=R`"):
        write_peft(tmp_path / "p", dataclasses.replace(merged, deltas=full), bert)
    assert not any(tmp_path.iterdir())


def test_what_is_there_is_kept_unless_it_is_such_a_folder_and_forced(bert: Encoder, tmp_path: Path) -> None:
    one = random_adapter(bert)
    write_peft(tmp_path / "p", one, bert)
    with pytest.raises(MbertError, match="it exists already"):
        write_peft(tmp_path / "p", one, bert)
    write_peft(tmp_path / "p", renamed(one, "other"), bert, force=True)
    assert read_peft(tmp_path / "p", bert).tasks[0].name == "other"
    (tmp_path / "q").mkdir()
    (tmp_path / "q/mine.txt").write_text("mine")
    with pytest.raises(MbertError, match="it exists already"):
        write_peft(tmp_path / "q", one, bert, force=True)
    assert (tmp_path / "q/mine.txt").read_text() == "mine"


def test_a_folder_that_is_not_right_after_writing_is_withdrawn(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_bert.formats.peft_writing.scale_head", lambda model, task: None)
    with pytest.raises(ModelFileError, match="after saving its outputs differ"):
        write_peft(tmp_path / "p", random_adapter(bert, "sts"), bert)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "patterns",
    [
        {"query": 5},
        {"self.query": 5, "query": 2},
        {"query": 2, "self.query": 5},
        {r".*\.0\..*": 4, "dense": 2},
        {"uery": 5},
        {"encoder.layer.1.output.dense": 6},
        {"^encoder": 5, "layer.0.output.dense|key": 9},
        {},
    ],
)
def test_patterns_match_as_in_peft(bert: Encoder, patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    config = AdapterConfig(rank=3, basis="random", rank_pattern=patterns)
    back = AdapterConfig.from_json(json.loads(json.dumps(config.to_json(), sort_keys=True)))
    for site in (name for name, _ in bert.model.named_modules()):
        expected = patterns.get(get_pattern_key(patterns.keys(), site), 3)
        assert matching(patterns, site, 3) == config.at(site).rank == back.at(site).rank == expected


def test_patterns_change_nothing_where_there_are_none(tmp_path: Path) -> None:
    assert not {"rank_pattern", "alpha_pattern"} & AdapterConfig().to_json().keys()
    one = AdapterConfig(alpha_pattern={"query": 2.0})
    assert one.to_json()["alpha_pattern"] == [["query", 2.0]]
    assert one.at("a.query").scale == 2 / 12
    assert one.at("a.key") == AdapterConfig()
    found = sorted((ROOT / "adapters").glob("*.safetensors"))
    if not found:
        pytest.skip("not run from a source tree")
    for path in found:
        adapter = read_adapter(path)
        assert adapter.sha256() == mb.describe(path)["sha256"]
        write_adapter(tmp_path / path.name, adapter)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"query": 0}}, "`rank`: 0"),
        ({"alpha_pattern": {"query": -1.0}}, "`alpha`: -1.0"),
        ({"rank_pattern": {"(": 2}}, "`targets`: '[(]'"),
        ({"rank_pattern": {"query": 2}, "basis": "orthogonal"}, "`basis`: orthogonal with a rank_pattern"),
    ],
)
def test_patterns_out_of_range_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        AdapterConfig(**{"basis": "random", **options})


def test_an_adapter_with_patterns_is_a_file_like_any_other(bert: Encoder, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"self.query": 5, "query": 2}, "alpha_pattern": {"key": 9.0}}
    one = random_adapter(bert, basis="random", **patterns)
    write_adapter(tmp_path / "x.safetensors", one)
    two = read_adapter(tmp_path / "x.safetensors")
    assert same_adapter(one, two)
    assert two.config == one.config
    delta = two.deltas()["encoder.layer.0.attention.self.key"]
    values = one.tensors["encoder.layer.0.attention.self.key"]
    torch.testing.assert_close(delta.dense(), 9 / 3 * values["B"] @ values["A"])
    assert two.tensors["encoder.layer.0.attention.self.query"]["A"].shape[0] == 5


def test_patterns_can_be_trained(bert: Encoder, tmp_path: Path) -> None:
    task, config = get_task("sst"), AdapterConfig(rank=2, targets="qv", basis="random", rank_pattern={"query": 3})
    made = train_adapter(
        bert,
        task,
        tiny_rows(task, 24),
        tmp_path / "x.safetensors",
        "lora",
        config,
        mb.TrainConfig(epochs=1, batch_size=8, hold_out=0.2, precision="fp32"),
    )
    ranks = {site.rpartition(".")[2]: values["A"].shape[0] for site, values in made.tensors.items()}
    assert ranks == {"query": 3, "value": 2}
    assert same_adapter(made, read_adapter(tmp_path / "x.safetensors"))
