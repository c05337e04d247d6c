"""The whole chain on a tiny base: train, fine-tune, merge, evaluate, predict, inspect, and write dense folders."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from mergekit_bert.composing.method import METHODS
from tests import tiny
from tests.cli.command import Done, mbert, unchanged
from tests.corpus import read_tsv, write_corpus, write_rows

QUICK = ("--epochs", "1", "--batch-size", "8", "--hold-out", "0.2", "--precision", "fp32")
METHOD_NAMES = [*METHODS.names(), "ensemble"]


@pytest.fixture(scope="module")
def base(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["bert"]


@pytest.fixture(scope="module")
def home(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the chain has been run up to one merged file for every method."""
    folder = tmp_path_factory.mktemp("home")
    write_corpus(folder / "data", ("sst", "sts"))
    common = ("--base", base, *QUICK)
    for task in ("sst", "sts"):
        done = mbert("train-adapter", "--task", task, *common, "--rank", "3", here=folder)
        assert (done.code, f"wrote adapters/{task}.safetensors" in done.out) == (0, True), done.err
    assert mbert("train-adapter", "--task", "sst", "--type", "probe", *common, here=folder).code == 0
    assert mbert("finetune", "--task", "sst", *common, here=folder).code == 0
    for method in METHOD_NAMES:
        needs = set(METHODS.get(method).needs) - {"basis"} if method != "ensemble" else set()
        rows = ("--data", "data", "--rows", "8", "--base", base) if needs else ()
        done = mbert("merge", "--method", method, *rows, "--out", f"{method}.safetensors", here=folder)
        assert done.code == 0, done.err
    return folder


def test_training_wrote_what_it_said(home: Path) -> None:
    for name in ("adapters/sst", "adapters/sts", "adapters/sst.probe"):
        assert (home / f"{name}.safetensors").is_file()
        assert {"log.jsonl", "manifest.json"} <= {path.name for path in (home / f"{name}.run").iterdir()}
        assert json.loads((home / f"{name}.scores.json").read_text())["scores"]
    assert (home / "models/sst/model.safetensors").is_file()
    assert json.loads((home / "models/sst.scores.json").read_text())["role"] == "full"


def test_training_tells_how_it_went(home: Path, base: Path) -> None:
    done = mbert("train-adapter", "--task", "sts", "--base", base, *QUICK, "--out", "other/a.safetensors", here=home)
    told = json.loads((home / "other/a.run/manifest.json").read_text())
    assert done.code == 0
    held = told["history"][0]["held_out_pearson"]
    assert f"48 rows, best epoch 1 of 1 (held-out pearson {held:.3f})" in done.out
    assert f"trained {told['parameters']['trainable']:,} of {told['parameters']['total']:,} parameters" in done.out
    recorded = json.loads((home / "other/a.scores.json").read_text())["scores"]
    for score in recorded:
        assert f"dev {score['metric']} {score['value']:.3f} (" in done.out


def test_tasks_are_listed_and_shown() -> None:
    done = mbert("tasks")
    assert done.code == 0
    assert {"sst", "para", "sts", "cfimdb"} <= set(done.out.split())
    assert json.loads(mbert("tasks", "sts").out)["range"] == [0.0, 5.0]


def numbers(text: str) -> list[float]:
    found = []
    for word in text.replace("|", " ").split():
        try:
            found.append(float(word))
        except ValueError:
            continue
    return found


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_eval_tells_the_same_on_the_terminal_in_json_and_in_markdown(home: Path, method: str) -> None:
    out = [f"{method}.json", f"{method}.md"]
    done = mbert("eval", f"{method}.safetensors", "--json", out[0], "--markdown", out[1], here=home)
    assert done.code == 0, done.err
    told = json.loads((home / out[0]).read_text())
    assert [(score["task"], score["metric"]) for score in told["scores"]] == [
        ("sst", "accuracy"),
        ("sst", "f1"),
        ("sts", "pearson"),
        ("sts", "spearman"),
    ]
    by_name = {(score["task"], score["metric"]): score for score in told["scores"]}
    accuracy, pearson = by_name["sst", "accuracy"], by_name["sts", "pearson"]
    assert told["overall"] == pytest.approx((accuracy["value"] + (pearson["value"] + 1) / 2) / 2)
    for score in told["scores"]:
        assert score["ci_low"] <= score["ci_high"]
        assert score["n"] == 30
    assert accuracy["adapter"] == json.loads((home / "adapters/sst.scores.json").read_text())["scores"][0]["value"]
    assert accuracy["full"] is not None
    assert pearson["full"] is None
    assert pearson["retention_full"] is None
    if accuracy["full"]:
        assert accuracy["retention_full"] == pytest.approx(100 * accuracy["value"] / accuracy["full"])
    assert "missing: mbert finetune --task sts" in done.out
    assert "missing: mbert train-adapter --type probe --task sts" in done.out
    assert "finetune --task sst" not in done.out
    markdown = (home / out[1]).read_text()
    assert MarkdownIt("commonmark").enable("table").parse(markdown)[0].type == "table_open"
    table = [line for line in done.out.splitlines() if line.strip().startswith(("sst", "sts", "overall"))]
    assert numbers("\n".join(table)) == numbers("\n".join(markdown.splitlines()[2:]))
    assert [round(score["value"], 3) for score in told["scores"]] == [numbers(line)[0] for line in table[:4]]
    for task in ("sst", "sts"):
        assert len(read_tsv(home / f"{method}.predictions/{task}.tsv")) == 30
    if method == "ensemble":
        assert all(math.isclose(score["value"], score["adapter"]) for score in told["scores"])


def test_eval_can_be_asked_for_one_task(home: Path) -> None:
    done = mbert("eval", "fedavg.safetensors", "--task", "sst", "--json", "one.json", "--predictions", "p", here=home)
    assert done.code == 0
    assert {score["task"] for score in json.loads((home / "one.json").read_text())["scores"]} == {"sst"}
    assert [path.name for path in (home / "p").iterdir()] == ["sst.tsv"]


def table_of(done: Done) -> list[dict[str, str]]:
    assert done.code == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out), delimiter="\t"))


@pytest.mark.parametrize("file", ["fedavg.safetensors", "ensemble.safetensors", "adapters/sts.safetensors"])
def test_predicting_by_arguments_file_and_standard_input_is_the_same(home: Path, file: str, tmp_path: Path) -> None:
    from mergekit_bert.data.task import get_task

    path = write_rows(tmp_path / "rows.tsv", get_task("sts"), 5, 3, labelled=False)
    given = read_tsv(path)
    by_file = table_of(mbert("predict", file, "--task", "sts", "--input", path, here=home))
    by_stream = table_of(mbert("predict", file, "--task", "sts", stdin=path.read_bytes(), here=home))
    assert by_file == by_stream
    assert [row["sentence1"] for row in by_file] == [row["sentence1"] for row in given]
    for row, found in zip(given, by_file, strict=True):
        alone = table_of(mbert("predict", file, row["sentence1"], row["sentence2"], "--task", "sts", here=home))
        assert alone[0]["sentence2"] == row["sentence2"]
        assert float(alone[0]["prediction"]) == pytest.approx(float(found["prediction"]), abs=2e-4)
        assert 0 <= float(found["prediction"]) <= 5


def test_predictions_of_labels_have_names_and_probabilities(home: Path) -> None:
    (row,) = table_of(mbert("predict", "models/sst", "good film", here=home))
    names = ["very negative", "negative", "neutral", "positive", "very positive"]
    assert list(row) == ["sentence", "prediction", "name", "probability"]
    assert row["name"] == names[int(row["prediction"])]
    assert 0.2 <= float(row["probability"]) <= 1


@pytest.mark.parametrize("text", ["tab\there", 'a "quote"', "two\nlines", "carriage\rreturn", "émoji 🎉", " ", ""])
def test_a_prediction_reads_back_whatever_the_text(home: Path, text: str, tmp_path: Path) -> None:
    done = mbert("predict", "models/sst", "--out", tmp_path / "p.tsv", "--", text, here=home)
    assert (done.code, done.out) == (0, "")
    assert [row["sentence"] for row in read_tsv(tmp_path / "p.tsv")] == [text]
    again = mbert("predict", "models/sst", "--input", tmp_path / "p.tsv", here=home)
    assert [row["sentence"] for row in table_of(again)] == [text]


def test_inspect_tells_a_person_and_a_program(home: Path) -> None:
    for file in ("adapters/sst.safetensors", "adapters/sst.probe.safetensors", "models/sst", "ensemble.safetensors"):
        done = mbert("inspect", file, here=home)
        told = json.loads(mbert("inspect", file, "--json", here=home).out)
        assert done.code == 0
        assert told["sha256"][:16] in done.out
        assert "sst" in done.out
    assert told["kind"] == "ensemble"


def test_a_merge_tells_its_weights(home: Path) -> None:
    words = ("adapters/sst.safetensors", "adapters/sts.safetensors", "--weights", "sst=2,sts=-0.5")
    done = mbert("merge", *words, "--method", "fedavg", "--out", "weighed.safetensors", here=home)
    assert done.code == 0
    assert "sst × 2, sts × -0.5" in done.out
    assert json.loads(mbert("inspect", "weighed.safetensors", "--json", here=home).out)["weights"] == {
        "sst": 2.0,
        "sts": -0.5,
    }


def test_dense_folders_predict_what_the_merged_file_does(home: Path) -> None:
    done = mbert("merge", "--out", "with-dense.safetensors", "--dense", "dense", here=home)
    assert done.code == 0, done.err
    for task, texts in (("sst", ["good film"]), ("sts", ["a cat", "the dog"])):
        assert f"wrote dense/{task}" in done.out
        merged = table_of(mbert("predict", "with-dense.safetensors", "--task", task, *texts, here=home))[0]
        dense = table_of(mbert("predict", f"dense/{task}", *texts, here=home))[0]
        key = "probability" if task == "sst" else "prediction"
        assert float(dense[key]) == pytest.approx(float(merged[key]), abs=2e-4)


def test_of_two_adapters_of_a_task_one_is_kept(home: Path) -> None:
    words = ("merge", "adapters/sts.safetensors", "other2/a.safetensors", "--method", "fedavg", "--out")
    base = json.loads(mbert("inspect", "adapters/sts.safetensors", "--json", here=home).out)["base"]["name"]
    mbert("train-adapter", "--task", "sts", "--base", base, *QUICK, "--out", "other2/a.safetensors", here=home)
    done = mbert(*words, "two.safetensors", here=home)
    assert done.code == 1
    assert "task 'sts': two adapters of it, adapters/sts.safetensors and other2/a.safetensors" in done.err
    assert "--keep" in done.err
    done = mbert(*words, "kept.safetensors", "--keep", "other2/a.safetensors", here=home)
    assert done.code == 0
    kept = json.loads(mbert("inspect", "kept.safetensors", "--json", here=home).out)
    other = json.loads(mbert("inspect", "other2/a.safetensors", "--json", here=home).out)
    assert kept["parts"]["sts"]["sha256"] == other["sha256"]


def test_a_task_of_ones_own(home: Path, base: Path) -> None:
    (home / "own.yml").write_text(
        "name: own\nkind: classify\ntext: [left, right]\nlabel: same\nlabels: [no-way, so-so, 'yes']\n"
        "metric: [matthews, f1]\nfiles: {train: own-train.csv, dev: own-dev.jsonl}\n"
    )
    train = [(f"good {word}", "bad plot", label) for word in ("cat", "dog", "man") for label in ("no-way", "yes")] * 6
    (home / "own-train.csv").write_text("left,right,same\n" + "".join(",".join(row) + "\n" for row in train))
    dev = [json.dumps({"left": "a", "right": "b", "same": label}) for label in ("no-way", "so-so", "yes")]
    (home / "own-dev.jsonl").write_text("\n".join(dev))
    assert json.loads(mbert("tasks", "own.yml", here=home).out)["labels"] == ["no-way", "so-so", "yes"]
    done = mbert("train-adapter", "--task", "own.yml", "--base", base, *QUICK, here=home)
    assert done.code == 0, done.err
    assert "dev matthews" in done.out
    done = mbert("eval", "adapters/own.safetensors", "--task", "own.yml", here=home)
    assert (done.code, "matthews" in done.out) == (0, True), done.err
    done = mbert("eval", "adapters/own.safetensors", here=home)
    assert (done.code, "no folder data/own" in done.err) == (1, True)
    done = mbert("predict", "adapters/own.safetensors", "good cat", "bad plot", here=home)
    assert table_of(done)[0]["prediction"] in ("no-way", "yes")
    (home / "adapters/own.safetensors").unlink()


def test_cut_rows_are_noted_on_standard_error(home: Path, base: Path) -> None:
    words = ("--task", "sts", "--base", base, *QUICK, "--max-length", "10", "--out", "cut/a.safetensors")
    done = mbert("train-adapter", *words, here=home)
    assert done.code == 0
    assert "note: sts: " in done.err
    assert "rows are longer than 10 tokens and are truncated" in done.err


def test_tensorboard_where_asked(home: Path, base: Path) -> None:
    words = ("--task", "sst", "--base", base, *QUICK, "--tensorboard", "--out", "board/a.safetensors")
    assert mbert("train-adapter", *words, here=home).code == 0
    assert list((home / "board/a.run/tensorboard").glob("events.out.*"))


def test_resume_of_what_is_done_changes_nothing(home: Path, base: Path) -> None:
    with unchanged(home / "adapters"):
        words = ("--task", "sst", "--base", base, *QUICK, "--rank", "3")
        done = mbert("train-adapter", *words, "--resume", here=home)
        assert done.code == 0, done.err
        done = mbert("train-adapter", *words, "--resume", "--lr", "0.5", here=home)
        assert done.code == 1
        assert "lr was 0.001, now 0.5" in done.err


def test_quickstart_does_it_all_and_reuses_what_is_done(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # three adapters of the usual rank need a wider base
        patch.setitem(tiny.CONFIGS, "bert", {**tiny.CONFIGS["bert"], "hidden_size": 48})
        base = tiny.write_tiny(tmp_path / "base", "bert")
    write_corpus(tmp_path / "corpus", ("sst", "para", "sts"), train=40, dev=12)
    words = ("quickstart", "--data", "corpus", "--base", base, "--out", "all")
    first = mbert(*words, here=tmp_path)
    assert first.code == 0, first.err
    assert first.out.count("\ntrained ") + first.out.startswith("trained ") == 9
    assert (tmp_path / "all/heatmap.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "all/table.md").read_text()
    assert {"sst", "para", "sts", "overall", "probe", "full"} <= set(table.replace("|", " ").split())
    with unchanged(tmp_path / "all/adapters"):
        second = mbert(*words, here=tmp_path)
    assert second.code == 0
    assert "trained " not in second.out
    assert (tmp_path / "all/table.md").read_text() == table


def test_the_sample_is_written_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_bert.data import sample

    rows = {"sst": (("A.",), "3"), "para": (("A?", "B?"), "1"), "sts": (("A.", "B."), "4.5")}
    monkeypatch.setattr(sample, "generate", lambda task, split: [rows[task]])
    done = mbert("sample", "corpus", here=tmp_path)
    assert done.code == 0
    assert done.out.split() == [f"corpus/{task}/{split}.tsv" for task in rows for split in ("train", "dev")]
    assert read_tsv(tmp_path / "corpus/sts/dev.tsv") == [{"sentence1": "A.", "sentence2": "B.", "label": "4.5"}]
    with unchanged(tmp_path):
        assert mbert("sample", "corpus", here=tmp_path).code == 1


def test_several_tasks_train_one_after_the_other_as_they_would_alone(home: Path, base: Path, tmp_path: Path) -> None:
    common = ("--base", base, "--data", home / "data", *QUICK, "--rank", "3")
    done = mbert("train-adapter", "--task", "sst", "--task", "sts", *common, here=tmp_path)
    assert done.code == 0, done.err
    for task in ("sst", "sts"):
        name = f"adapters/{task}.safetensors"
        assert (tmp_path / name).read_bytes() == (home / name).read_bytes()
    with unchanged(tmp_path):
        again = mbert("train-adapter", "--task", "para", "--task", "sst", *common, here=tmp_path)
    assert (again.code, "already" in again.err) == (1, True) or "no file" in again.err


def test_bench_tells_speeds_and_how_long_a_run_takes(home: Path, base: Path) -> None:
    with unchanged(home):
        done = mbert("bench", "--task", "sst", "--data", "data", "--base", base, "--threads", "1", here=home)
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if line.split()[:1] in (["fp32"], ["bf16"])]
    assert [len(numbers(row.replace(",", ""))) for row in rows] == [4, 4]
    assert "a run on 60 rows, 3 epochs of 32 rows a step in " in done.out


MIXED = [("sts", "good film", "good film"), ("sst", "good", ""), ("sts", "a cat", "bad plot"), ("sst", "poor plot", "")]


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "stdin"])
@pytest.mark.parametrize("method", ["ensemble", "fedavg"])
def test_rows_of_several_tasks_are_answered_together(home: Path, tmp_path: Path, suffix: str, method: str) -> None:
    path = tmp_path / f"mixed.{suffix}"
    if suffix == "jsonl":
        rows = [
            {"task": t, **({"sentence": a} if t == "sst" else {"sentence1": a, "sentence2": b})} for t, a, b in MIXED
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [f"{t}\t{a if t == 'sst' else ''}\t{'' if t == 'sst' else a}\t{b}" for t, a, b in MIXED]
        path.write_text("\n".join(["task\tsentence\tsentence1\tsentence2", *lines]) + "\n")
    words = [] if suffix == "stdin" else ["--input", str(path)]
    done = mbert("predict", f"{method}.safetensors", *words, stdin=path.read_bytes(), here=home)
    assert done.code == 0, done.err
    found = list(csv.DictReader(io.StringIO(done.out), delimiter="\t"))
    assert [row["task"] for row in found] == [task for task, *_ in MIXED]
    for row, (task, *texts) in zip(found, MIXED, strict=True):
        alone = mbert("predict", f"{method}.safetensors", "--task", task, *filter(None, texts), here=home).out
        expected = next(csv.DictReader(io.StringIO(alone), delimiter="\t"))
        assert float(row["prediction"]) == pytest.approx(float(expected["prediction"]), abs=2e-4)
        assert row["name"] == expected.get("name", "")
