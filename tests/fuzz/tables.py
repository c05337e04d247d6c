"""What a user writes: tasks, recipes, and rows as TSV, CSV, JSON lines, Parquet and plain text."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.composing.recipe import read_recipe, write_recipe
from mergekit_bert.data.rows import parse_requests, read_records, read_rows, read_texts
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.models.prediction import Predictor, mixed_table, predict_table
from tests.adapters.helpers import random_adapter
from tests.fuzz.format import TEXTS, Format, UnsoundError, Workshop, answered, saved, shown, sound
from tests.fuzz.models import Stages
from tests.fuzz.trees import BINARY, JSON_LINES, LINES, YAML

_LABELLED = """\
name: weather
kind: classify
text: [remark, more]
label: kind
labels: [question, statement, 3]
label_names: [asks, says, other]
metric: [accuracy, f1]
description: what is said of the weather
"""
_NUMBERED = """\
name: warmth
kind: regress
text: remark
range: [-1.5, 4]
metric: pearson
files: {train: rows.tsv}
"""


def use_task(shop: Workshop, folder: Path) -> Stages:
    """Read a task and its rows, and have an adapter for it that is written, read and asked."""
    task = get_task(folder / "task.yml")
    yield "read", task
    yield "record", Task.from_json(json.loads(json.dumps(task.to_json())))
    rows = mb.load_rows(task, "train", folder / "rows")
    yield "rows", rows
    model = saved(random_adapter(shop.encoder, task, targets="qv"), folder)
    yield "adapter", model
    yield "predict", answered(shop, model, folder)
    predictor = Predictor(model, shop.encoder)
    yield "table", shown(predict_table(predictor, model.tasks[0], rows).replace("\r", ""))


def _task(text: str, rows: str) -> Callable[[Workshop, Path], None]:
    def make(shop: Workshop, folder: Path) -> None:
        (folder / "task.yml").write_text(text)
        (folder / "rows/weather").mkdir(parents=True)
        (folder / ("rows/weather/train.tsv" if "files" not in text else "rows.tsv")).write_text(rows)

    return make


TASKS = Format(
    "task",
    {
        "labelled": _task(_LABELLED, "remark\tmore\tkind\na good film\tx\tstatement\nnot fine\ty\tquestion\n"),
        "numbered": _task(_NUMBERED, "remark\tlabel\na good film\t0.5\nnot fine\t-1\n"),
    },
    {"task.yml": YAML},
    use_task,
    share=2,
)


def use_recipe(shop: Workshop, folder: Path) -> Stages:
    """Read a recipe, merge by it, let the merge answer, and write the recipe down again."""
    recipe = read_recipe(folder / "recipe.yml")
    yield "read", recipe
    model = api.merge(shop.trio[:2], recipe)
    yield "merge", model
    model = saved(model, folder)
    yield "predict", answered(shop, model, folder)
    if isinstance(model, mb.Merged):
        again = mb.Recipe.from_json(model.recipe)
        write_recipe(folder / "again.yml", again)
        if read_recipe(folder / "again.yml") != dataclasses.replace(again, inputs=[]):
            raise UnsoundError("a recipe that does not read back as it was written")


_RECIPES = {
    "layers": mb.Recipe(
        method="ties",
        options={"density": 0.4},
        weights={"sst": 0.5, "sts": 1.5},
        layers={r"encoder\.layer\.0\..*": {"sst": 0.25}, r".*\.(query|value)": {"sts": 2.0, "sst": -1.0}},
        rank=4,
        private=2,
        seed=3,
        inputs=["adapters/sst.safetensors", "adapters/sts.safetensors"],
    ),
    "space": mb.Recipe(method="dare", space="core", seed=11, weights={"sst": 1.0}),
}
RECIPES = Format(
    "recipe",
    {
        name: lambda shop, folder, recipe=recipe: write_recipe(folder / "recipe.yml", recipe)  # type: ignore[misc]
        for name, recipe in _RECIPES.items()
    },
    {"recipe.yml": YAML},
    use_recipe,
    share=2,
)


def _rows(shop: Workshop, columns: bool = True) -> list[dict[str, Any]]:
    """Records of sts, with what is hard to keep apart in a table."""
    rows = shop.rows("sts", 6)
    assert rows.labels is not None
    texts = [*rows.texts[:3], ('a "quoted" one', "a, comma"), ("två ord", "emoji \U0001f600"), rows.texts[5]]
    return [
        dict(zip((*get_task("sts").text, "label"), (*pair, label), strict=True))
        for pair, label in zip(texts, rows.labels, strict=True)
    ]


def _use_rows(name: str) -> Callable[[Workshop, Path], Stages]:
    def use(shop: Workshop, folder: Path) -> Stages:
        """Read rows with labels and without, and let an adapter answer them."""
        task, path = get_task("sts"), folder / name
        rows = read_texts(path, task) if path.suffix == ".txt" else read_rows(path, task)
        yield "read", [rows.texts, rows.labels, rows.fingerprint(), rows.hashes()]
        yield "predict", predict_table(Predictor(shop.trio[1], shop.encoder), task, rows.take(range(min(3, len(rows)))))

    return use


def _delimited(name: str, delimiter: str) -> Callable[[Workshop, Path], None]:
    def make(shop: Workshop, folder: Path) -> None:
        import csv

        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*get_task("sts").text, "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(_rows(shop))

    return make


def _jsonl(shop: Workshop, folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(shop)))


def _parquet(shop: Workshop, folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rows(shop)), folder / "rows.parquet")


def _plain(shop: Workshop, folder: Path) -> None:
    (folder / "rows.txt").write_text("".join("\t".join(texts) + "\n" for texts in shop.rows("sts", 6).texts))


TSV = Format("tsv", {"six": _delimited("rows.tsv", "\t")}, {"*.tsv": LINES}, _use_rows("rows.tsv"))
CSV = Format("csv", {"six": _delimited("rows.csv", ",")}, {"*.csv": LINES}, _use_rows("rows.csv"))
JSONL = Format("jsonl", {"six": _jsonl}, {"*.jsonl": JSON_LINES}, _use_rows("rows.jsonl"))
PARQUET = Format("parquet", {"six": _parquet}, {"*.parquet": BINARY}, _use_rows("rows.parquet"))
PLAIN = Format("texts", {"six": _plain}, {"*.txt": LINES}, _use_rows("rows.txt"))


def use_requests(shop: Workshop, folder: Path) -> Stages:
    """Answer rows of several tasks from one file."""
    model = api.merge(shop.trio, "ensemble")
    tasks = {task.name: task for task in model.tasks}
    path = folder / "requests.jsonl"
    requests = parse_requests(str(path), read_records(path, ("task",)), tasks)
    yield "read", requests
    predictor = Predictor(model, shop.encoder)
    yield "predict", sound(predictor.mixed(requests[:6]))
    yield "table", mixed_table(predictor, requests[:6])


def _requests(shop: Workshop, folder: Path) -> None:
    rows = [{"task": task.name, **dict.fromkeys(task.text, TEXTS[0])} for task in map(get_task, ("sst", "sts", "para"))]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


REQUESTS = Format("requests", {"three": _requests}, {"*.jsonl": JSON_LINES}, use_requests)
