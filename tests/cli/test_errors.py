"""Whatever a user gets wrong is exit code 1 and one line: where, what was found, what was expected, what to do."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import Done, mbert, unchanged
from tests.corpus import write_corpus

QUICK = ("--epochs", "1", "--batch-size", "8", "--hold-out", "0.2", "--precision", "fp32", "--rank", "3")


@dataclass(frozen=True)
class Place:
    """A folder in which adapters have been trained, and the base they were trained on."""

    folder: Path
    base: Path
    other_base: Path

    def mbert(self, *words: str | Path, stdin: bytes = b"") -> Done:
        """A command in the folder; BASE and OTHER stand for the two bases."""
        known = {"BASE": self.base, "OTHER": self.other_base}
        return mbert(*(known.get(str(word), word) for word in words), stdin=stdin, here=self.folder)


@pytest.fixture(scope="module")
def place(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    write_corpus(folder / "data", ("sst", "sts"))
    found = Place(folder, tiny_folders["bert"], tiny_folders["electra"])
    for task, *more in (
        ("sst",),
        ("sts",),
        ("sst", "--basis", "random", "--out", "random/sst.safetensors"),
        ("sts", "--basis", "random", "--out", "random/sts.safetensors"),
        ("sst", "--out", "again/sst.safetensors"),
        ("sst", "--base", "OTHER", "--out", "electra/sst.safetensors"),
        ("sts", "--out", "alone/sts.safetensors"),
    ):
        base = () if "--base" in more else ("--base", "BASE")
        done = found.mbert("train-adapter", "--task", task, *base, *QUICK, *more)
        assert done.code == 0, done.err
    assert found.mbert("merge").code == 0
    assert found.mbert("merge", "--method", "ensemble", "--out", "routed.safetensors").code == 0
    (folder / "file").write_text("just a file")
    (folder / "bad.tsv").write_text("sentence\tlabel\ngood\t9\n")
    (folder / "garbage.safetensors").write_bytes(b"\x00garbage" * 40)
    (folder / "cut.safetensors").write_bytes((folder / "merged.safetensors").read_bytes()[:-100])
    (folder / "odd.yml").write_text("name: odd\nkind: rank\ntext: a\nmetric: f1\n")
    (folder / "mixed.jsonl").write_text('{"task": "sst", "sentence": "good"}\n{"task": "para", "sentence": "good"}\n')
    (folder / "short.jsonl").write_text('{"task": "sts", "sentence1": "good"}\n')
    (folder / "laughs.yml").write_text("name: &a [x]\nlabels: [*a, *a]\n")
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "steer.tsv").write_text("\x1b[2J\ngood\n")
    (folder / "empty").mkdir()
    (folder / "labels/sst").mkdir(parents=True)
    (folder / "labels/sst/train.tsv").write_text("sentence\tlabel\n" + "good\t1\n" * 9 + "bad\t9\n")
    (folder / "columns/sst").mkdir(parents=True)
    (folder / "columns/sst/train.csv").write_text("text,stars\ngood,1\n")
    return found


FAR = str(10**400)
TRAIN = ("train-adapter", "--task", "sst", "--base", "BASE", *QUICK, "--out", "new/x.safetensors")
TUNE = ("finetune", "--task", "sst", "--base", "BASE", "--epochs", "1", "--out", "new/x")
MERGE = ("merge", "--out", "m.safetensors")
SST, STS = "adapters/sst.safetensors", "adapters/sts.safetensors"

ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown task": (("train-adapter", "--task", "ssst"), r"task: 'ssst'; expected one of .*; did you mean 'sst'\?"),
    "one file for two tasks": (
        (*TRAIN, "--task", "sts"),
        r"--out: one file for 2 tasks; expected one task, or no --out",
    ),
    "request for another task": (
        ("predict", "routed.safetensors", "--input", "mixed.jsonl"),
        r"mixed.jsonl, line 2: task 'para'; expected one of sst, sts; correct the line",
    ),
    "request without its text": (
        ("predict", "routed.safetensors", "--input", "short.jsonl"),
        r"short.jsonl, line 1: no column 'sentence2' \(found: task, sentence1\)",
    ),
    "unknown task to tell": (("tasks", "sstt"), r"task: 'sstt'; .*; did you mean 'sst'\?"),
    "task that contradicts itself": (
        ("tasks", "odd.yml"),
        r"odd.yml, line 2: kind is 'rank'; expected one of classify",
    ),
    "missing task file": (
        ("train-adapter", "--task", "none.yml"),
        r"none.yml: no such file; expected a task's YAML file",
    ),
    "unknown base": ((*TRAIN, "--base", "no/such-base"), r"base 'no/such-base': it cannot be loaded \(.*\); .*--base"),
    "base that is no model": ((*TRAIN, "--base", "empty"), r"base 'empty': no config.json; expected a folder of"),
    "unknown type": (
        (*TRAIN, "--type", "lore"),
        r"adapter type: 'lore'; expected one of .*; did you mean 'lora'",
    ),
    "probe with a rank": (
        (*TRAIN, "--type", "probe", "--rank", "4"),
        r"--rank: an option that --type probe does not have; expected no options; drop --rank",
    ),
    "output of another suffix": (
        (*TRAIN, "--out", "new/x"),
        r"new/x: no suffix; expected a file name that ends in .safetensors",
    ),
    "merge into another suffix": (
        ("merge", "--out", "m.bin"),
        r"m.bin: the suffix '.bin'; expected a file name that ends in .safetensors",
    ),
    "model folder named as a file": (
        (*TUNE, "--out", "x.safetensors"),
        r"x.safetensors: a file name; expected a folder",
    ),
    "base that is no folder": (
        (*TRAIN, "--base", "./none"),
        r"base './none': no such folder; expected 'minilm', a fol",
    ),
    "unknown basis": ((*TRAIN, "--basis", "orthogonl"), r"basis: 'orthogonl'; .*; did you mean 'orthogonal'\?"),
    "unknown precision": ((*TRAIN, "--precision", "fp23"), r"precision: 'fp23'; .*; did you mean 'fp32'\?"),
    "unknown targets": ((*TRAIN, "--targets", "kv"), r"targets 'kv': no linear layer of base .* matches; .*--targets"),
    "targets that are no pattern": ((*TRAIN, "--targets", "(("), r"targets '\(\(': not a pattern"),
    "rank 0": ((*TRAIN, "--rank", "0"), r"--rank: 0; expected a whole number from 1 to 65536; correct --rank"),
    "rank beyond the basis": ((*TRAIN, "--rank", "33"), r"basis.json: .*33 free rows in a run; use a smaller --rank"),
    "no epochs": ((*TRAIN, "--epochs", "0"), r"--epochs: 0; expected a whole number from 1 to 1000000000"),
    "rate that is no number": ((*TUNE, "--lr", "nan"), r"--lr: nan; expected a positive number"),
    "epochs without end": ((*TRAIN, "--epochs", FAR), r"--epochs: 10+…; expected a whole number from 1 to 1000000000"),
    "a far seed": ((*TUNE, "--seed", FAR), r"--seed: 10+…; expected a whole number from 0 to 9223372036854775807"),
    "threads without end": ((*TUNE, "--threads", FAR), r"--threads: 10+…; expected a whole number from 1 to 1024"),
    "a rate without end": ((*TUNE, "--lr", "1e400"), r"--lr: inf; expected a positive number up to 1e\+09"),
    "decay without end": ((*TUNE, "--weight-decay", "inf"), r"--weight-decay: inf; expected a number from 0 to 1e\+09"),
    "a huge rank": ((*TRAIN, "--rank", "65537"), r"--rank: 65537; expected a whole number from 1 to 65536"),
    "a far rank": ((*TRAIN, "--rank", FAR), r"--rank: 10+…; expected a whole number from 1 to 65536"),
    "alpha without end": ((*TRAIN, "--alpha", "1e400"), r"--alpha: inf; expected a positive number up to 1e\+06"),
    "dropout that is no number": ((*TRAIN, "--dropout", "nan"), r"--dropout: nan; expected a number from 0 to below 1"),
    "hold out all": ((*TUNE, "--hold-out", "1"), r"--hold-out: 1.0; expected a share between 0 and 1"),
    "missing data": ((*TRAIN, "--data", "none"), r"none: no such folder; expected a folder that holds sst/train.tsv"),
    "data without the task": ((*TUNE, "--data", "empty"), r"empty/sst: no file for the split 'train'"),
    "bad label": ((*TRAIN, "--data", "labels"), r"train.tsv, line 11: label '9'; expected one of 0, 1, 2, 3, 4"),
    "wrong columns": ((*TRAIN, "--data", "columns"), r"train.csv: no column 'sentence' \(found: text, stars\)"),
    "output exists": ((*TRAIN, "--out", SST), r"adapters/sst.safetensors: it exists already; .*--force"),
    "output folder exists": ((*TUNE, "--out", "empty"), r"empty: it exists already; .*--force"),
    "output below a file": ((*TRAIN, "--out", "file/x.safetensors"), r"file/\S+: (not a directory|file exists); "),
    "folder below a file": ((*TUNE, "--out", "file/x"), r"file/\S+: not a directory; "),
    "nowhere to write": ((*TUNE, "--out", "/proc/none/x"), r"/proc/none\S*: no such file or directory; "),
    "unknown method": (
        ("merge", "--method", "fedavgg", "--out", "m.safetensors"),
        r"merge method: 'fedavgg'; .*fedavg'\?",
    ),
    "orthoada without a shared basis": (
        ("merge", "random/sst.safetensors", "random/sts.safetensors", "--method", "orthoada", "--out", "m.safetensors"),
        r"orthoada: sst, sts trained without an orthogonal basis; .*--basis orthogonal .*--method fedavg",
    ),
    "orthoada with colliding rows": (
        ("merge", "again/sst.safetensors", "alone/sts.safetensors", "--method", "orthoada", "--out", "m.safetensors"),
        r"orthoada: sst \(rows 0–2\) and sts \(rows 0–2\) collide in the basis",
    ),
    "two adapters of a task": (
        ("merge", SST, "again/sst.safetensors", "--out", "m.safetensors"),
        r"task 'sst': two adapters of it, adapters/sst.safetensors and again/sst.safetensors; .*--keep",
    ),
    "other bases": (
        ("merge", "electra/sst.safetensors", STS, "--out", "m.safetensors"),
        r"adapters 'sst' and 'sts': different bases",
    ),
    "weights without a number": (
        ("merge", "--weights", "sst", "--out", "m.safetensors"),
        r"--weights: 'sst'; expected name=num",
    ),
    "weights with words": (
        ("merge", "--weights", "sst=much", "--out", "m.safetensors"),
        r"--weights: 'sst=much'; expected name",
    ),
    "weights that are infinite": (
        ("merge", "--weights", "sst=inf", "--out", "m.safetensors"),
        r"--weights: 'sst=inf'; ",
    ),
    **{
        f"weights of {text[:9]}": (
            (*MERGE, "--weights", f"sst={text}"),
            rf"--weights: 'sst={text[:9]}.*; expected {told}",
        )
        for text, told in (
            *((text, "name=number, separated by commas") for text in ("nan", "-inf", "1e400", FAR)),
            *((text, r"a number within ±1e\+06") for text in ("10000001", "-1000001")),
        )
    },
    **{
        f"an option of {text[:9]}": (
            (*MERGE, "--method", "ctm", "--set", f"{name}={text}"),
            rf"option '{name}' of ctm: .*; expected a",
        )
        for name, text in (
            *(("rank", text) for text in ("inf", "nan", "1e400", "-1", "1.5", FAR, "9" * 5000)),
            *(("beta", text) for text in ("infinity", "1e999", "-0.1", FAR + "9")),
        )
    },
    **{
        f"a size of {text[:9]}": (
            (*MERGE, "--size", text),
            r"--size: .*; expected a positive number of MiB up to 1e\+09",
        )
        for text in ("inf", "nan", "1e400", "0", "-1", FAR)
    },
    "a far rank of a merge": ((*MERGE, "--rank", FAR), r"--rank: 10+…; expected a whole number from 1 to 65536"),
    "a far residual": ((*MERGE, "--private", FAR), r"--private: 10+…; expected a whole number from 0 to 65536"),
    "a far seed of a merge": ((*MERGE, "--method", "dare", "--seed", FAR), r"--seed: 10+…; expected a whole number"),
    "a task that laughs": (("tasks", "laughs.yml"), r"laughs.yml, line 1: an anchor or alias; "),
    "a recipe that laughs": ((*MERGE, "--recipe", "laughs.yml"), r"laughs.yml, line 1: an anchor or alias; "),
    "a deep request": (("predict", "routed.safetensors", "--input", "deep.jsonl"), r"deep.jsonl, line 1: nested too"),
    "a row that steers": (
        ("predict", SST, "--input", "steer.tsv"),
        r"steer.tsv: no column 'sentence' \(found: \\x1b\[2J\)",
    ),
    "weights twice": (
        ("merge", "--weights", "sst=1,sst=2", "--out", "m.safetensors"),
        r"--weights: 'sst=2'; .*once",
    ),
    "weights of nobody": (
        ("merge", "--weights", "para=1", "--out", "m.safetensors"),
        r"--weights: 'para'; expected .*sst",
    ),
    "weights of an ensemble": (
        ("merge", "--method", "ensemble", "--weights", "sst=1", "--out", "m.safetensors"),
        r"--weights: weights for an ensemble; ",
    ),
    "merging a merged file with a part of it": (
        ("merge", "merged.safetensors", SST, "--out", "m.safetensors"),
        r"task 'sst': two adapters of it, merged.safetensors and ",
    ),
    "merging nothing": (("merge", "none.safetensors", "--out", "m.safetensors"), r"none.safetensors: no such file"),
    "merged file exists": (
        ("merge", "--out", "routed.safetensors"),
        r"routed.safetensors: it exists already; .*--fo",
    ),
    "dense folder exists": (
        ("merge", "--out", "m", "--dense", "labels"),
        r"labels/sst: it exists already; expected a new path; .*--force",
    ),
    "file that is garbage": (("inspect", "garbage.safetensors"), r"garbage.safetensors: not readable as safetensors"),
    "file that is cut short": (("eval", "cut.safetensors"), r"cut.safetensors: not readable as safetensors"),
    "foreign file": (("inspect", "FOREIGN"), r"model.safetensors: a foreign header \(metadata keys: format\)"),
    "file that is text": (("predict", "file", "good"), r"file: not readable as safetensors"),
    "missing file": (("inspect", "none.safetensors"), r"none.safetensors: no such file; expected a .safetensors file"),
    "folder given as file": (("eval", "adapters"), r"adapters/mbert.json: no such file; expected a model folder"),
    "base given as model": (("inspect", "BASE"), r"mbert.json: no such file; expected a model folder of mbert"),
    "adapter is a folder": (
        ("merge", "adapters", "--out", "m.safetensors"),
        r"adapters: it is a folder with neither adapter_config.json",
    ),
    "other base": (("eval", SST, "--base", "OTHER"), r"adapters/sst.safetensors: made for base .*; .*--base it was"),
    "eval of a missing task": (
        ("eval", "merged.safetensors", "--task", "para"),
        r"--task: 'para'; expected one of sst",
    ),
    "eval without rows": (("eval", "merged.safetensors", "--data", "labels"), r"no file for the split 'dev'"),
    "figures exist": (("eval", "merged.safetensors", "--json", "file"), r"file: it exists already; .*--force"),
    "table exists": (("eval", "merged.safetensors", "--markdown", "file"), r"file: it exists already; .*--force"),
    "predict without a task": (
        ("predict", "merged.safetensors", "good"),
        r"--task: none, but the model has several; expected one of sst, sts; give --task",
    ),
    "predict with one text of two": (
        ("predict", STS, "good"),
        r"arguments, row 1: 1 texts in a row; expected 2 for 'sts'",
    ),
    "predict twice": (("predict", SST, "good", "--input", "bad.tsv"), r"texts and --input; expected one of them"),
    "predict from a missing file": (("predict", SST, "--input", "none.tsv"), r"none.tsv: no such file"),
    "predict from a text file": (("predict", SST, "--input", "file"), r"file: suffix ''; expected one of .tsv"),
    "predict from other columns": (
        ("predict", STS, "--input", "bad.tsv"),
        r"bad.tsv: no column 'sentence1' \(found:",
    ),
    "predict from nothing": (("predict", SST), r"standard input: it is empty"),
    "predictions exist": (("predict", SST, "good", "--out", "file"), r"file: it exists already; .*--force"),
    "sample below a file": (("sample", "file/corpus"), r"file/corpus\S*: not a directory; "),
    "quickstart without rows": (
        ("quickstart", "--data", "none", "--base", "BASE", "--out", "new"),
        r"none: no such f",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_nothing_is_touched(place: Place, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_bert.data import sample

    monkeypatch.setattr(sample, "generate", lambda task, split: [(("A.",) if task == "sst" else ("A.", "B."), "1")])
    words, message = ERRORS[case]
    words = tuple(str(place.base / "model.safetensors") if word == "FOREIGN" else word for word in words)
    new = place.folder / "new"
    with unchanged(place.folder):
        done = place.mbert(*words)
        left = {path.name for path in new.rglob("*")}
        shutil.rmtree(new, ignore_errors=True)
    assert left <= {"basis.json.lock"}  # the ledger may have been opened
    assert done.code == 1
    assert re.fullmatch(r"error: \S.*; expected .*; .*\n|error: .*; check the path and the disk\n", done.err), done.err
    assert re.search(message, done.err), done.err
    assert done.out == ""


def test_force_overwrites(place: Place) -> None:
    before = (place.folder / "routed.safetensors").read_bytes()
    try:
        done = place.mbert("merge", "--out", "routed.safetensors", "--force")
        assert (done.code, done.err) == (0, "")
        assert (place.folder / "routed.safetensors").read_bytes() != before
    finally:
        (place.folder / "routed.safetensors").write_bytes(before)


def test_no_text_at_all_is_told_at_a_terminal(place: Place) -> None:
    done = mbert("predict", SST, here=place.folder, terminal=True)
    assert (done.code, "no texts; expected sentence as arguments" in done.err) == (1, True)


def test_the_installed_program_ends_with_these_codes_and_no_traceback(place: Place) -> None:
    program = "from mergekit_bert.cli import main; main()"
    for words, code, out, err in (
        (["tasks"], 0, "sst", ""),
        (["inspect", SST], 0, "rank", ""),
        (["inspect", "none.safetensors"], 1, "", "error: none.safetensors: no such file; "),
        (["inspect"], 2, "", "Missing argument"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=place.folder,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == code, done.stderr
        assert out in done.stdout
        assert err in done.stderr
        assert "Traceback" not in done.stderr
        assert code != 1 or done.stderr.count("\n") == 1


def test_an_input_is_never_overwritten(place: Place) -> None:
    with unchanged(place.folder):
        done = place.mbert("merge", "--method", "fedavg", "--out", SST, "--force")
    assert done.code == 1
    assert "it is one of the inputs; expected another file" in done.err


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"sentence\ngood\n\xff\n", r"standard input, line 3: a byte that is not UTF-8 \(.*\); expected UTF-8 text; "),
        ("sentence\ngood".encode("utf-16"), r"standard input, line 1: a byte that is not UTF-8"),
        (b'sentence\n"good\n', r"standard input, line 2: a bad line \(a quote that is never closed\); "),
        (b"sentence\n" + b"x" * 9_000_000, r"standard input, line 2: more than 8,388,608 bytes; "),
        (b"sentence\n" + b"x" * 3_000_000, r"standard input, line 2: 3,000,000 characters in column 'sentence'; "),
        (b"\x1b[2J\n", r"standard input: no column 'sentence' \(found: \\x1b\[2J\); "),
    ],
)
def test_hostile_standard_input_is_one_line(place: Place, stdin: bytes, message: str) -> None:
    done = place.mbert("predict", SST, stdin=stdin)
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(rf"error: {message}.*\n", done.err), done.err


@pytest.mark.parametrize("option", ["--rows", "--search", "--search-rows", "--calibrate-rows"])
def test_a_count_without_end_is_a_wrong_use(place: Place, option: str) -> None:
    done = place.mbert("merge", option, FAR)
    assert done.code == 2
    assert "Traceback" not in done.err
