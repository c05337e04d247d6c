"""PEFT folders of strangers: no record of mbert's, perhaps no head; what a merge of them is, computed by PEFT."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.kind import KINDS, HubFields
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import task_from_hub
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.pretrained import quiet_transformers
from mergekit_bert.errors import CompositionError, DataError, ModelFileError
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.formats.inputs import read_inputs
from mergekit_bert.formats.peft import open_peft
from mergekit_bert.formats.peft_format import read_peft
from mergekit_bert.formats.peft_task import task_of
from mergekit_bert.models.composition import Merged
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert
from tests.formats.peft_folders import edit
from tests.tiny import WORDS

QUERY = {"distilbert": "q_lin", "deberta-v2": "query_proj", "modernbert": "Wqkv"}
WIDE = {"distilbert": "lin1", "modernbert": "Wi"}
HEADS = {"deberta-v2": ["pooler"], "modernbert": ["head"]}
LABELS = {"bert": 3, "roberta": 2, "distilbert": 4, "electra": 2, "deberta-v2": 3, "modernbert": 2}
TEXTS = tuple((" ".join(WORDS[place : place + 4]),) for place in range(6))
ROWS = Rows(TEXTS, None, "plain")


def foreign(
    folder: Path,
    base: Path,
    outputs: int,
    seed: int = 0,
    loader: Any = AutoModelForSequenceClassification,
    spread: float = 0.2,
    **options: Any,
) -> Any:
    """A PEFT model of its own kind with random values wherever it is trained, saved to ``folder``."""
    with torch.random.fork_rng(), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        sizes = {"num_labels": outputs} if loader is AutoModelForSequenceClassification else {}
        whole = loader.from_pretrained(base, attn_implementation="eager", **sizes)
        model = peft.get_peft_model(whole, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **options})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(spread * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    return model


def targets(architecture: str) -> list[str]:
    return [QUERY.get(architecture, "query"), WIDE.get(architecture, "intermediate.dense")]


def products(model: Any) -> dict[str, Tensor]:
    """PEFT's own change of every layer it adapts, by the layer's name in the encoder."""
    inner = model.get_base_model()
    prefix = f"{inner.base_model_prefix}."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").double()
        for name, module in inner.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def transformers_outputs(model: Any, changes: dict[str, Tensor], encoder: Encoder) -> np.ndarray:
    """What ``model``, its LoRA taken off, answers under its own head when ``changes`` are added to the encoder."""
    inner = model.unload()
    with torch.no_grad():
        for site, change in changes.items():
            inner.base_model.get_submodule(site).weight.add_(change.float())
        task = task_from_hub("any", HubFields({0: "a", 1: "b"}))
        tokens = tokenise(ROWS, task, encoder.tokenizer, encoder.max_length, encoder.pad_token)
        outputs: np.ndarray = inner(**tokens.batch(list(range(len(TEXTS)))).padded()).logits.numpy()
    return outputs


@pytest.mark.parametrize("architecture", LABELS)
def test_a_merge_of_two_folders_gives_the_sum_of_pefts_changes_under_each_head(
    tiny_folders: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path, architecture: str
) -> None:
    base, encoder = tiny_folders[architecture], encoders[architecture]
    options = {"task_type": "SEQ_CLS", "target_modules": targets(architecture)}
    options["modules_to_save"] = HEADS.get(architecture)
    one = foreign(tmp_path / "tone", base, LABELS[architecture], **options)
    two = foreign(tmp_path / "length-of", base, 1, seed=1, **{**options, "use_rslora": True, "r": 2})
    merged = mb.merge([tmp_path / "tone", tmp_path / "length-of"], "task_arithmetic", base=base)
    assert isinstance(merged, Merged)
    changes = {site: 0.4 * (delta + products(two)[site]) for site, delta in products(one).items()}
    tone, length = merged.tasks
    assert (tone.name, tone.kind, tone.metrics) == ("tone", "classify", ("accuracy",))
    assert tone.labels == tuple(f"LABEL_{place}" for place in range(LABELS[architecture]))
    assert (length.name, length.kind, length.range) == ("length-of", "regress", None)
    write_model(tmp_path / "m.safetensors", merged)
    predictor = Predictor(read_model(tmp_path / "m.safetensors"), encoder)
    for task, model in ((tone, one), (length, two)):
        expected = transformers_outputs(model, changes, encoder)
        assert np.ptp(expected, axis=0).max() > 1e-4
        np.testing.assert_allclose(predictor.outputs(task.name, ROWS), expected, atol=2e-5, rtol=1e-4)
    values = [answer.value for answer in predictor.predict("length-of", [text for (text,) in TEXTS])]
    np.testing.assert_allclose(values, transformers_outputs(two, {}, encoder)[:, 0], atol=2e-5, rtol=1e-4)


def test_the_command_line_merges_them_without_a_task(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_folders["bert"]
    for place, name in enumerate(("tone", "topic")):
        foreign(tmp_path / name, base, 2 + place, place, task_type="SEQ_CLS", target_modules=["query"])
    done = mbert(
        *("merge", "tone", "topic", "--method", "task_arithmetic", "--base", str(base), "--out", "m.safetensors"),
        here=tmp_path,
    )
    assert (done.code, done.err) == (0, "")
    merged = mb.load(tmp_path / "m.safetensors")
    assert isinstance(merged, Merged)
    assert {task.name: len(task.labels) for task in merged.tasks} == {"tone": 2, "topic": 3}
    done = mbert("predict", "m.safetensors", "--task", "topic", "a good film", "--base", str(base), here=tmp_path)
    assert done.code == 0
    assert "LABEL_" in done.out


def test_a_regression_without_a_range_is_exported_as_it_is(
    tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path
) -> None:
    foreign(tmp_path / "far", tiny_folders["bert"], 1, task_type="SEQ_CLS", target_modules=["query"], spread=3.0)
    adapter = read_peft(tmp_path / "far", bert)
    values = [one.value for one in Predictor(adapter, bert).predict("far", [text for (text,) in TEXTS])]
    assert max(map(abs, values)) > 1  # beyond the range 0…1, and kept
    (folder,) = mb.export(mb.merge([adapter], "task_arithmetic"), tmp_path / "dense", base=bert)  # it compares outputs
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"


SAID: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = {
    "of the folder": ({"id2label": {"0": "no", "1": "yes"}}, {}, "classify", ("no", "yes")),
    "of the base": ({}, {"id2label": {0: "bad", 1: "fine"}}, "classify", ("bad", "fine")),
    "of the folder first": ({"id2label": {"1": "b", "0": "a"}}, {"id2label": {0: "x", 1: "y"}}, "classify", ("a", "b")),
    "of another number": ({"id2label": {"0": "only"}}, {"id2label": {}}, "classify", ("LABEL_0", "LABEL_1")),
    "alike": ({"id2label": {"0": "x", "1": "x"}}, {}, "classify", ("LABEL_0", "LABEL_1")),
    "of several at once": (
        {"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification", "architectures": ["X"]},
        {},
        "multilabel",
        ("a", "b"),
    ),
    "unfit for a cell": (
        {"id2label": {"0": "a|b", "1": "c"}, "problem_type": "multi_label_classification"},
        {},
        "multilabel",
        ("LABEL_0", "LABEL_1"),
    ),
}


@pytest.fixture(scope="module")
def two_labels(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "tone"
    foreign(path, tiny_folders["bert"], 2, task_type="SEQ_CLS", target_modules=["query"])
    return path


def linked(folder: Path, at: Path) -> Path:
    """A folder of its own with the same files."""
    at.mkdir()
    for file in folder.iterdir():
        (at / file.name).symlink_to(file)
    return at


@pytest.mark.parametrize("name", SAID)
def test_labels_are_those_that_somebody_wrote(
    two_labels: Path, bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    beside, of_base, kind, labels = SAID[name]
    path = linked(two_labels, tmp_path / "tone")
    if beside:
        (path / "config.json").write_text(json.dumps(beside))
    for key, value in of_base.items():
        monkeypatch.setattr(bert.config, key, value)
    task = task_of(open_peft(path), bert)
    assert task is not None
    assert (task.kind, task.labels) == (kind, labels)


class Coded(type(KINDS.get("classify"))):  # type: ignore[misc]
    """A kind of another package, which writes its labels into a field of its own."""

    name = "coded"

    def from_hub(self, fields: HubFields) -> dict[str, Any] | None:
        labels = fields.more.get("codes")
        return {"labels": tuple(labels)} if isinstance(labels, list) else None


@pytest.mark.parametrize("written_in", ["the folder", "the base"])
def test_a_kind_of_another_package_reads_what_it_wrote(
    two_labels: Path, bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_in: str
) -> None:
    """Although a classification would take the rest of the configuration."""
    monkeypatch.setattr(KINDS, "_added", {"coded": Coded()})
    path, codes = linked(two_labels, tmp_path / "tone"), ["x1", "x2"]
    if written_in == "the folder":
        (path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}, "codes": codes}))
    else:
        monkeypatch.setattr(bert.config, "codes", codes, raising=False)
    task = task_of(open_peft(path), bert)
    assert task is not None
    assert (task.kind, task.labels, task.metrics) == ("coded", ("x1", "x2"), ("accuracy",))
    (path / "config.json").unlink(missing_ok=True)
    (path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}, "codes": ["x", "x"]}))
    with pytest.raises(DataError, match=r"labels is .*; expected two or more different labels"):
        task_of(open_peft(path), bert)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("my.model v2", "my_model_v2"), ("2026-run", "task_2026-run"), ("ünï", "ünï"), ("sst2", "sst2")],
)
def test_a_task_is_named_like_the_folder(
    two_labels: Path, bert: Encoder, tmp_path: Path, name: str, expected: str
) -> None:
    (tmp_path / name).symlink_to(two_labels)  # as a snapshot of the Hub, whose own name is a number
    task = task_of(open_peft(tmp_path / name), bert)
    assert task is not None
    assert task.name == expected


BROKEN: dict[str, tuple[str, type[Exception], str]] = {
    "no JSON": ("{", ModelFileError, r"config.json, line 1: not JSON"),
    "labels that are no mapping": ('{"id2label": ["a"]}', ModelFileError, r"config.json: broken .id2label"),
    "a label that steers": ('{"id2label": {"0": "a", "1": "\\u001b"}}', ModelFileError, "config.json: broken"),
    "a place that is no number": ('{"id2label": {"x": "a", "y": "b"}}', ModelFileError, "config.json: broken"),
    "a type that is a number": ('{"problem_type": 3}', ModelFileError, "config.json: broken .problem_type"),
    "a type of nobody": (
        '{"problem_type": "ranking", "id2label": {"0": "a", "1": "b"}}',
        DataError,
        "task 'tone': 2 outputs, problem_type 'ranking'; expected outputs of a task of kind classify or",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_said_of_labels_is_checked(two_labels: Path, bert: Encoder, tmp_path: Path, name: str) -> None:
    text, kind, message = BROKEN[name]
    path = linked(two_labels, tmp_path / "tone")
    (path / "config.json").write_text(text)
    with pytest.raises(kind, match=message):
        read_peft(path, bert)


def test_a_folder_named_like_a_built_in_task_with_another_head_can_be_renamed(
    two_labels: Path, bert: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "sst").symlink_to(two_labels)
    with pytest.raises(CompositionError, match=r"a head of 2 outputs; expected 5, .* or rename the folder"):
        read_inputs(tmp_path / "sst", bert)


def test_two_folders_of_one_name_are_told_apart_by_renaming(
    tiny_folders: dict[str, Path], two_labels: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "out").symlink_to(two_labels)
    linked(two_labels, tmp_path / "one/again")
    linked(two_labels, tmp_path / "two/again")
    words = ("merge", "one/again", "two/again", "--base", str(tiny_folders["bert"]))
    done = mbert(*words, here=tmp_path)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "task 'again': two adapters of it" in done.err
    assert "rename a folder" in done.err


BODIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "features": ("bert", AutoModel, {"task_type": "FEATURE_EXTRACTION"}),
    "features of all layers": ("bert", AutoModel, {"target_modules": "all-linear"}),
    "features with biases, and a pooler": ("roberta", AutoModel, {"bias": "all", "target_modules": "all-linear"}),
    "features by DoRA": ("electra", AutoModel, {"use_dora": True}),
    "a masked language model": ("bert", AutoModelForMaskedLM, {}),
    "a masked language model of another make": ("distilbert", AutoModelForMaskedLM, {}),
    "a classifier whose head was not saved": ("deberta-v2", AutoModelForSequenceClassification, {}),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_folder_without_a_head_is_merged_as_a_body(
    tiny_folders: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path, name: str
) -> None:
    architecture, loader, options = BODIES[name]
    base, encoder = tiny_folders[architecture], encoders[architecture]
    body = foreign(tmp_path / "dom", base, 2, loader=loader, **{"target_modules": targets(architecture), **options})
    one = random_adapter(encoder, "sst")
    (found,) = read_inputs(tmp_path / "dom", encoder)
    merged = mb.merge([one, found], "task_arithmetic", {"sst": 0.5, "dom": -2.0})
    assert isinstance(merged, Merged)
    assert [task.name for task in merged.tasks] == ["sst"]
    plain = mb.merge([one], "task_arithmetic", {"sst": 0.5})
    assert isinstance(plain, Merged)
    with torch.no_grad():
        whole = body.merge_and_unload()
    inner = getattr(whole, whole.base_model_prefix, whole)
    after, before = dict(inner.named_parameters()), dict(encoder.model.named_parameters())
    moved = {site for site in merged.deltas if f"{site}.weight" in after}
    assert moved == set(merged.deltas)
    for site, delta in merged.deltas.items():
        change = (after[f"{site}.weight"] - before[f"{site}.weight"]).double()
        expected = plain.deltas[site].dense().double() - 2 * change
        torch.testing.assert_close(delta.dense().double(), expected, atol=1e-5, rtol=1e-4)
    for parameter, shift in merged.shifts.items():
        torch.testing.assert_close(shift, -2 * (after[parameter] - before[parameter]), atol=1e-5, rtol=1e-4)
    assert not any(site.startswith("pooler.") for site in merged.deltas)
    assert merged.own.keys() == {"sst"}


@pytest.fixture(scope="module")
def body(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("body") / "domain"
    foreign(path, tiny_folders["bert"], 0, loader=AutoModel, target_modules=["query"])
    return path


def test_a_merge_with_a_body_is_a_file_like_any_other(body: Path, bert: Encoder, tmp_path: Path) -> None:
    inputs = [random_adapter(bert, "sst"), body, random_adapter(bert, "sts", start=3)]
    merged = mb.merge(inputs, "ties", base=bert, private=2)
    assert isinstance(merged, Merged)
    assert merged.weights.keys() == {"sst", "domain", "sts"}
    assert merged.bodies.keys() == {"domain"}
    write_model(tmp_path / "m.safetensors", merged)
    again = read_model(tmp_path / "m.safetensors")
    assert isinstance(again, Merged)
    assert (again.weights, again.bodies) == (merged.weights, merged.bodies)
    write_model(tmp_path / "n.safetensors", again)
    assert (tmp_path / "n.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert mb.describe(tmp_path / "m.safetensors")["bodies"].keys() == {"domain"}
    more = mb.merge([again, random_adapter(bert, "para", start=6)], "fedavg", {"sst+sts": 1.0, "para": 1.0})
    assert isinstance(more, Merged)
    write_model(tmp_path / "o.safetensors", more)
    assert mb.describe(tmp_path / "o.safetensors")["bodies"].keys() == {"domain"}
    np.testing.assert_array_equal(
        Predictor(again, bert).outputs("sst", ROWS), Predictor(merged, bert).outputs("sst", ROWS)
    )


def alone(body: Path, bert: Encoder) -> object:
    return mb.merge([body], "task_arithmetic", base=bert)


def twice(body: Path, bert: Encoder) -> object:
    return mb.merge([random_adapter(bert, "sst"), body, body], "task_arithmetic", base=bert)


def side_by_side(body: Path, bert: Encoder) -> object:
    return mb.merge([random_adapter(bert, "sst"), body], "ensemble", base=bert)


def measured(body: Path, bert: Encoder) -> object:
    return mb.merge([random_adapter(bert, "sst"), body], "regmean", base=bert, data="synthetic")


def as_a_model(body: Path, bert: Encoder) -> object:
    return read_peft(body, bert)


REFUSED: list[tuple[Callable[[Path, Encoder], object], str]] = [
    (alone, "merge: no head in any of domain; expected at least one input with a task; train one with its head's"),
    (twice, "adapter 'domain': two adapters of it"),
    (side_by_side, "input 'domain': not a single adapter"),
    (measured, "method regmean: gram of domain missing, and it has no task to measure it on"),
    (as_a_model, "no head; expected the whole head of bert"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=lambda one: getattr(one, "__name__", ""))
def test_what_needs_a_task_refuses_a_body(
    body: Path, bert: Encoder, call: Callable[[Path, Encoder], object], message: str
) -> None:
    with pytest.raises(CompositionError, match=message):
        call(body, bert)


def test_rows_of_other_tasks_serve_a_merge_with_a_body(body: Path, bert: Encoder, tmp_path: Path) -> None:
    """Methods that learn, a calibration and the doctor go by the tasks that there are."""
    one = random_adapter(bert, "sst")
    (two,) = read_inputs(body, bert)
    for method in ("distill", "adamerging"):
        merged = mb.merge([one, two], method, base=bert, data="synthetic", rows=8, options={"steps": 2})
        assert isinstance(merged, Merged)
        assert merged.weights.keys() == {"sst", "domain"}
    scaled = mb.calibrate(merged, "sample", steps=["scales"], rows=8, inputs=[one, two], base=bert)
    assert scaled.bodies == merged.bodies
    found = mb.doctor([one, two], methods=["task_arithmetic", "ties"], base=bert)
    assert [check.name for check in found.invariants.checks if not check.holds] == []


def test_half_a_head_is_no_body(tiny_folders: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path) -> None:
    base, encoder = tiny_folders["distilbert"], encoders["distilbert"]
    foreign(tmp_path / "x", base, 2, target_modules=["q_lin"], modules_to_save=["pre_classifier"])
    with pytest.raises(CompositionError, match=r"no 'classifier\.bias'; expected the whole head of distilbert"):
        read_inputs(tmp_path / "x", encoder)
    names = load_file(tmp_path / "x/adapter_model.safetensors")
    assert any("pre_classifier" in name for name in names)


def test_lora_in_a_head_is_no_body(tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path) -> None:
    foreign(tmp_path / "x", tiny_folders["bert"], 2, target_modules=["query", "classifier"])
    with pytest.raises(ModelFileError, match="LoRA at 'classifier' of the head"):
        read_inputs(tmp_path / "x", bert)


def test_a_record_of_ones_own_comes_before_the_folders_name(bert: Encoder, two_labels: Path, tmp_path: Path) -> None:
    path = linked(two_labels, tmp_path / "tone")
    edit(base_model_name_or_path=None)(path)
    own = task_from_hub("mine", HubFields({0: "a", 1: "b"}))
    found = read_peft(path, bert, own)
    assert isinstance(found, Adapter)
    assert found.tasks == (own,)
