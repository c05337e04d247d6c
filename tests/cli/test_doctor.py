"""``mbert doctor`` from the command line: what it prints, writes, refuses, and how it ends."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.composing.methods import ties
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert, unchanged
from tests.corpus import read_tsv, write_corpus

FEW = ("--methods", "fedavg,ties")


@pytest.fixture(scope="module")
def home(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters and a probe in ``adapters/``, rows in ``data/``."""
    folder = tmp_path_factory.mktemp("doctor")
    for place, task in enumerate(("sst", "sts")):
        one = random_adapter(bert, task, start=3 * place, seed=place, targets="qv")
        write_adapter(folder / f"adapters/{task}.safetensors", one)
    write_adapter(folder / "adapters/sst.probe.safetensors", random_adapter(bert, "sst", kind="probe"))
    write_corpus(folder / "data", ("sst", "sts"), train=12)
    return folder


def test_it_prints_invariants_and_pairs_and_writes_nothing(home: Path) -> None:
    with unchanged(home):
        done = mbert("doctor", *FEW, here=home)
    assert done.code == 0, done.err
    assert done.out.count("holds") == 5
    assert "VIOLATED" not in done.out
    assert "interference" not in done.out
    assert "room in the basis: 8 more adapters" in done.out
    hint = "hint: give real rows, --data DIR, for a verdict"
    assert hint in done.out
    assert "verdict" not in done.out.replace(hint, "")


def test_rows_add_interference_and_the_files_hold_what_is_shown(home: Path, tmp_path: Path) -> None:
    out = ("--json", tmp_path / "d.json", "--picture", tmp_path / "d.png")
    done = mbert(
        "doctor", "adapters/sst.safetensors", "adapters/sts.safetensors", *FEW, "--data", "data", *out, here=home
    )
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "d.json").read_text())
    table = [re.split(r"\s{2,}", line.strip()) for line in done.out.splitlines()]
    header = next(cells for cells in table if cells[:2] == ["task", "merged with"])
    shown = next(cells for cells in table if cells[:2] == ["sst", "sts"])
    keys = {"output change": "answers", "predicted loss": "expected"}
    for name, value in zip(header[2:], shown[2:], strict=True):
        assert float(value) == pytest.approx(told["matrices"][keys.get(name, name)][0][1], abs=6e-4), name
    assert keys.keys() <= set(header)
    for verdict in told["verdicts"]:
        assert verdict["value"] == told["expected"][{"in all": verdict["by"]}.get(verdict["name"], verdict["name"])]
        assert f"{verdict['value']:.3f}" in done.out
        assert verdict["word"] in done.out
    assert all(one["kept"] for one in told["invariants"])
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_plain_texts_give_what_rows_of_a_folder_give(home: Path, tmp_path: Path) -> None:
    for task in ("sst", "sts"):
        rows, columns = read_tsv(home / f"data/{task}/train.tsv"), mb.get_task(task).text
        (tmp_path / task).write_text("".join("\t".join(row[one] for one in columns) + "\n" for row in rows))
    texts = [word for task in ("sst", "sts") for word in ("--texts", f"{task}={tmp_path / task}")]
    shown = [mbert("doctor", *FEW, "--rows", "5", *words, here=home) for words in (texts, ("--data", "data"))]
    assert shown[0].code == 0, shown[0].err
    assert shown[0].out == shown[1].out
    assert "interference" in shown[0].out
    fewer = mbert("doctor", *FEW, "--rows", "4", *texts, here=home)
    assert fewer.out != shown[0].out


def test_what_exists_is_overwritten_by_force_alone(home: Path, tmp_path: Path) -> None:
    for option in ("--json", "--picture"):
        path = tmp_path / f"there{option}"
        path.write_text("mine")
        done = mbert("doctor", *FEW, option, path, here=home)
        assert done.code == 1
        assert str(path) in done.err
        assert "--force" in done.err
        assert "invariant" not in done.out, "the error comes before any work"
        assert path.read_text() == "mine"
        assert mbert("doctor", *FEW, option, path, "--force", here=home).code == 0
        assert path.read_bytes() != b"mine"


def test_a_violated_invariant_is_exit_code_one_after_all_output(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = ties.RECORD.merge
    monkeypatch.setattr(ties, "RECORD", dataclasses.replace(ties.RECORD, merge=lambda site: merge(site).scaled(1.01)))
    done = mbert("doctor", *FEW, here=home)
    assert done.code == 1
    assert "VIOLATED" in done.out
    assert "for a verdict" in done.out
    assert "error" not in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "tees"), "did you mean 'ties'"),
        (("--data", "nowhere"), "nowhere"),
        (("adapters/sst.safetensors", "adapters/sst.probe.safetensors"), "two adapters of it"),
        (("none.safetensors",), "none.safetensors"),
        (("--rows", "9"), "--rows: neither --data nor --texts"),
        (("--texts", "para=x"), "task of --texts: 'para'"),
        (("--texts", "sst"), "--texts: 'sst'; expected TASK=FILE"),
    ],
)
def test_what_it_cannot_do_is_told_in_one_line(home: Path, words: tuple[str, ...], message: str) -> None:
    done = mbert("doctor", *words, here=home)
    assert done.code == 1
    assert message in done.err
    assert done.err.count("error: ") == 1


def test_of_two_adapters_of_a_task_one_is_kept(bert: mb.Encoder, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    mb.save(random_adapter(bert, "sst", start=20, seed=9), other)
    words = ("doctor", "adapters/sst.safetensors", "adapters/sts.safetensors", other, "--methods", "fedavg")
    refused = mbert(*words, here=home)
    assert refused.code == 1
    assert f"--keep {other}" in refused.err
    kept = mbert(*words, "--keep", other, here=home)
    assert kept.code == 0, kept.err
    assert [line.split()[:2] for line in kept.out.splitlines()].count(["sst", "sts"]) == 1
