"""``mbert convert``: from an adapter to PEFT and back, and what it says where it cannot."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mergekit_bert as mb
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.formats.file import write_model
from tests.adapters.helpers import random_adapter, same_adapter
from tests.cli.command import mbert, unchanged


@pytest.fixture
def here(bert: mb.Encoder, tmp_path: Path) -> Path:
    """A folder with adapters of two tasks, a low-rank merge, a dense merge, and an ensemble."""
    one, two = random_adapter(bert, "sst"), random_adapter(bert, "sts", start=3, seed=1)
    write_adapter(tmp_path / "sst.safetensors", one)
    write_adapter(tmp_path / "sts.safetensors", two)
    write_adapter(tmp_path / "probe.safetensors", random_adapter(bert, kind="probe"))
    write_model(tmp_path / "merged.safetensors", mb.merge([one, two]))
    write_model(tmp_path / "ensemble.safetensors", mb.merge([one, two], "ensemble"))
    return tmp_path


def logits(folder: Path, text: tuple[str, ...], base: str | None = None) -> list[float]:
    """What transformers, with PEFT where there is a base, says about ``text``."""
    labels = 5 if folder.name == "sst" else 1
    whole = AutoModelForSequenceClassification.from_pretrained(base or folder, num_labels=labels)
    model = (peft.PeftModel.from_pretrained(whole, folder) if base else whole).eval()
    inputs = AutoTokenizer.from_pretrained(base or folder)(*text, return_tensors="pt")
    with torch.no_grad():
        found: list[float] = model(**inputs).logits[0].tolist()
    return found


def test_an_adapter_to_peft_and_back_is_the_same_file(here: Path) -> None:
    done = mbert("convert", "sst.safetensors", "--to", "peft", "--out", "peft/sst", here=here)
    assert (done.code, done.out, done.err) == (0, "wrote peft/sst\n", "")
    assert sorted(path.name for path in (here / "peft/sst").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "mbert.json",
    ]
    done = mbert("convert", "peft/sst", "--to", "mbert", "--out", "again.safetensors", here=here)
    assert (done.code, done.out) == (0, "wrote again.safetensors\n")
    assert (here / "again.safetensors").read_bytes() == (here / "sst.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["merged", "ensemble"])
def test_models_of_several_tasks_are_a_folder_a_task(here: Path, bert: mb.Encoder, name: str) -> None:
    done = mbert("convert", f"{name}.safetensors", "--to", "peft", "--out", "p", here=here)
    assert (done.code, done.out) == (0, "wrote p/sst\nwrote p/sts\n")
    predictor = mb.predictor(here / f"{name}.safetensors")
    for task, text in (("sst", ("good film",)), ("sts", ("the cat sees", "a dog"))):
        (answer,) = predictor.predict(task, [text])
        assert answer.outputs == pytest.approx(logits(here / "p" / task, text, str(bert.name)), abs=2e-4)


def test_a_peft_folder_becomes_a_plain_model(here: Path, bert: mb.Encoder) -> None:
    assert mbert("convert", "sts.safetensors", "--to", "peft", "--out", "p", here=here).code == 0
    done = mbert("convert", "p", "--to", "hf", "--out", "whole", here=here)
    assert (done.code, done.out) == (0, "wrote whole/sts\n")
    text = ("the cat sees", "a dog")
    assert logits(here / "whole/sts", text) == pytest.approx(logits(here / "p", text, str(bert.name)), abs=2e-4)


def test_a_folder_of_pefts_own_with_a_task_of_ones_own(here: Path, tiny_folders: dict[str, Path]) -> None:
    (here / "mood.yml").write_text(
        "name: mood\nkind: classify\ntext: text\nlabels: [sad, glad, none]\nmetric: accuracy\n"
    )
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folders["bert"], num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(here / "dora")
    words = ("convert", "dora", "--to", "mbert", "--out", "m.safetensors", "--base", tiny_folders["bert"])
    done = mbert(*words, "--task", "mood.yml", here=here)
    assert (done.code, done.err) == (0, "")
    found = json.loads(mbert("inspect", "m.safetensors", "--json", here=here).out)
    assert (found["kind"], found["parts"]["mood"]["type"]) == ("adapter", "dora")
    assert {(site["rank"], site["norm"]) for site in found["sites"].values()} == {(None, None)}
    assert mbert("inspect", "m.safetensors", here=here).code == 0
    assert mbert("predict", "m.safetensors", "good film", here=here).out.startswith("text\t")


def test_merge_takes_peft_folders(here: Path) -> None:
    assert mbert("convert", "sts.safetensors", "--to", "peft", "--out", "p", here=here).code == 0
    for files, out in ((("sst.safetensors", "sts.safetensors"), "one"), (("sst.safetensors", "p"), "two")):
        done = mbert("merge", *files, "--out", f"{out}.safetensors", here=here)
        assert done.code == 0, done.err
    one, two = (load_file(here / f"{out}.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6 if ".head." in name else 0, rtol=0)


ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "format": (
        ("sst.safetensors", "--to", "pef", "--out", "x"),
        "format: 'pef'; expected .* did you mean 'peft'",
    ),
    "suffix": (("sst.safetensors", "--to", "mbert", "--out", "x"), "x: no suffix; expected a file name"),
    "folder": (
        ("sst.safetensors", "--to", "peft", "--out", "x.safetensors"),
        "x.safetensors: a file name; expected a folder",
    ),
    "task": (
        ("sst.safetensors", "--to", "peft", "--out", "x", "--task", "sst"),
        "--task: a task for sst.safetensors",
    ),
    "probe": (("probe.safetensors", "--to", "peft", "--out", "x"), "type probe, which PEFT does not have; .*--to hf"),
    "none": (("none.safetensors", "--to", "peft", "--out", "x"), "none.safetensors: no such file"),
    "base": (("sst.safetensors", "--to", "peft", "--out", "x", "--base", "none/such"), "base 'none/such'"),
    "there": (("sst.safetensors", "--to", "mbert", "--out", "sts.safetensors"), "sts.safetensors: it exists already"),
    "foreign": (("sst.safetensors", "--to", "peft", "--out", "mine", "--force"), "mine: it exists already"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_changes_nothing(here: Path, name: str) -> None:
    words, message = ERRORS[name]
    (here / "mine").mkdir()
    (here / "mine/notes.txt").write_text("mine")
    with unchanged(here):
        done = mbert("convert", *words, here=here)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith("error: ")
    assert re.search(message, done.err), done.err


def test_force_replaces_a_folder_of_its_kind(here: Path) -> None:
    for words in ((), ("--force",)):
        assert mbert("convert", "sst.safetensors", "--to", "peft", "--out", "p", *words, here=here).code == 0
        again = mbert("convert", "sst.safetensors", "--to", "peft", "--out", "p", here=here)
        assert (again.code, "p: it exists already" in again.err) == (1, True)
    moved = shutil.move(here / "p", here / "q")
    assert mbert("convert", Path(moved).name, "--to", "mbert", "--out", "q.safetensors", here=here).code == 0
    assert same_adapter(read_adapter(here / "q.safetensors"), read_adapter(here / "sst.safetensors"))
