"""Comparison, tables and pictures: the arithmetic of retention and of the overall score, shown and drawn."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mergekit_bert.data.task import get_task
from mergekit_bert.evaluation.comparison import REFERENCES, Comparison, Grid, Line, grid_of
from mergekit_bert.evaluation.pictures import heatmap, write_picture
from mergekit_bert.evaluation.result import figure
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.evaluation.tables import as_markdown, as_text, comparison_table, grid_table

MAIN = (("sst", "accuracy"), ("para", "accuracy"), ("sts", "pearson"))


def score(task: str, metric: str, value: float) -> Score:
    return Score(task, metric, value, value - 0.05, value + 0.04, 123, "rows")


def comparison_of(values: Mapping[str, float], references: Mapping[str, Mapping[str, float | None]]) -> Comparison:
    lines = tuple(Line(score(task, metric, values[task]), references[task]) for task, metric in MAIN if task in values)
    return Comparison(
        "fedavg", lines, tuple(pair for pair in MAIN if pair[0] in values), ("mbert finetune --task sst",)
    )


FULL: dict[str, dict[str, float | None]] = {
    "sst": {"adapter": 0.5, "probe": 0.25, "full": 0.6},
    "para": {"adapter": 0.8, "probe": 0.5, "full": 0.9},
    "sts": {"adapter": 0.8, "probe": -0.1, "full": None},
}
COMPARISON = comparison_of({"sst": 0.45, "para": 0.72, "sts": 0.6}, FULL)

UNIT = st.floats(0, 1)


@settings(deadline=None)
@given(UNIT, UNIT, st.floats(-1, 1))
def test_the_overall_score_is_the_fields(sst: float, para: float, sts: float) -> None:
    grid = Grid(MAIN, ("m",), {("sst", "m"): sst, ("para", "m"): para, ("sts", "m"): sts})
    assert grid.overall("m") == pytest.approx((sst + para + (sts + 1) / 2) / 3)


def test_overall_needs_every_task() -> None:
    assert Grid(MAIN, ("m",), {("sst", "m"): 0.5, ("para", "m"): None, ("sts", "m"): 0.1}).overall("m") is None
    assert Grid(MAIN, ("m",), {("sst", "m"): 0.5}).overall("m") is None


@pytest.mark.parametrize(
    ("value", "reference", "retention"),
    [(0.45, 0.5, 90.0), (0.6, 0.5, 120.0), (0.0, 0.5, 0.0), (-0.1, 0.5, -20.0), (0.3, 0.0, None), (0.3, -0.2, None)],
)
def test_retention_is_per_cent_of_a_positive_reference(value: float, reference: float, retention: float | None) -> None:
    found = Line(score("sst", "accuracy", value), {"full": reference}).retention("full")
    assert found == (None if retention is None else pytest.approx(retention))
    assert Line(score("sst", "accuracy", value), {"full": None}).retention("full") is None


def test_json_has_an_entry_per_task_and_metric_and_the_overall_scores() -> None:
    told = COMPARISON.to_json()
    assert set(told) == {"model", "scores", "overall", "overall_references", "missing"}
    assert told["model"] == "fedavg"
    assert told["scores"][0] == {
        "task": "sst",
        "metric": "accuracy",
        "value": 0.45,
        "ci_low": pytest.approx(0.40),
        "ci_high": pytest.approx(0.49),
        "n": 123,
        "adapter": 0.5,
        "retention_adapter": pytest.approx(90),
        "probe": 0.25,
        "retention_probe": pytest.approx(180),
        "full": 0.6,
        "retention_full": pytest.approx(75),
    }
    assert told["scores"][2]["retention_probe"] is None
    assert told["scores"][2]["full"] is told["scores"][2]["retention_full"] is None
    assert told["overall"] == pytest.approx((0.45 + 0.72 + 0.8) / 3)
    assert told["overall_references"] == {
        "adapter": pytest.approx((0.5 + 0.8 + 0.9) / 3),
        "probe": pytest.approx((0.25 + 0.5 + 0.45) / 3),
        "full": None,
    }
    assert told["missing"] == ["mbert finetune --task sst"]


def cells(markdown: str) -> list[list[str]]:
    """The cells of the one table of a Markdown text, as a Markdown parser finds them."""
    rows: list[list[str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
    for before, token in itertools.pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("th_open", "td_open"):
            rows[-1].append(token.content.strip())
    return rows


def test_the_table_shows_every_figure_and_a_dash_for_a_missing_one() -> None:
    header, *rows = cells(as_markdown(comparison_table(COMPARISON)))
    assert header == [
        *("task", "metric", "fedavg", "95 % interval", "rows"),
        *REFERENCES,
        *(f"% of {name}" for name in REFERENCES),
    ]
    assert rows == [
        ["sst", "accuracy", "0.450", "0.400 to 0.490", "123", "0.500", "0.250", "0.600", "90.0", "180.0", "75.0"],
        ["para", "accuracy", "0.720", "0.670 to 0.760", "123", "0.800", "0.500", "0.900", "90.0", "144.0", "80.0"],
        ["sts", "pearson", "0.600", "0.550 to 0.640", "123", "0.800", "-0.100", "–", "75.0", "–", "–"],
        ["overall", "", "0.657", "", "", "0.733", "0.400", "–", "89.5", "164.2", "–"],
    ]


def test_text_and_markdown_tell_the_same() -> None:
    table = as_text(comparison_table(COMPARISON))
    assert [line.split() for line in table.splitlines() if line.split()[0] in ("sst", "para", "sts", "overall")] == [
        " ".join(row).split() for row in cells(as_markdown(comparison_table(COMPARISON)))[1:]
    ]


GRID = grid_of(
    [get_task(name) for name in ("sst", "para", "sts")],
    {
        "probe": [score("sst", "accuracy", 0.3), score("para", "accuracy", 0.6), score("sts", "pearson", 0.2)],
        "full": [score("sst", "accuracy", 0.5), score("sst", "f1", 0.4), score("para", "accuracy", 0.8)],
    },
)


def test_a_grid_has_main_metrics_by_model() -> None:
    assert GRID.models == ("probe", "full")
    header, *rows = cells(as_markdown(grid_table(GRID)))
    assert header == ["task", "metric", "probe", "full"]
    assert rows == [
        ["sst", "accuracy", "0.300", "0.500"],
        ["para", "accuracy", "0.600", "0.800"],
        ["sts", "pearson", "0.200", "–"],
        ["overall", "", "0.500", "–"],
    ]


@pytest.mark.parametrize(("value", "digits", "shown"), [(None, 3, "–"), (0.12345, 3, "0.123"), (99.96, 1, "100.0")])
def test_a_figure_as_it_is_shown(value: float | None, digits: int, shown: str) -> None:
    assert figure(value, digits) == shown


def picture(grid: Grid, folder: Path, reference: str = "full") -> np.ndarray:
    write_picture(heatmap(grid, reference, "a title"), folder / "sub/heat.png")
    assert (folder / "sub/heat.png").read_bytes().startswith(b"\x89PNG")
    return np.asarray(matplotlib.image.imread(folder / "sub/heat.png"))[..., :3]


def test_the_picture_is_drawn_and_shows_the_figures(tmp_path: Path) -> None:
    drawn = picture(GRID, tmp_path / "one")
    assert drawn.shape[0] > 200
    assert drawn.shape[1] > 300
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100
    assert (drawn == picture(GRID, tmp_path / "two")).all()
    other = grid_of(
        [get_task("sst")],
        {"probe": [score("sst", "accuracy", 0.1)], "full": [score("sst", "accuracy", 0.5)]},
    )
    same_shape = grid_of(
        [get_task("sst")],
        {"probe": [score("sst", "accuracy", 0.5)], "full": [score("sst", "accuracy", 0.5)]},
    )
    low, even = picture(other, tmp_path / "three"), picture(same_shape, tmp_path / "four")
    assert low.shape == even.shape
    assert (low != even).any(-1).mean() > 0.05, "a lower figure has another colour"


@pytest.mark.parametrize("top", [0.0, None])
def test_a_reference_of_nothing_is_no_reason_to_fail(tmp_path: Path, top: float | None) -> None:
    values: dict[tuple[str, str], float | None] = {("sst", "probe"): 0.3, ("sst", "full"): top}
    assert picture(Grid((("sst", "accuracy"),), ("probe", "full"), values), tmp_path).std() > 0


def test_a_correlation_of_minus_one_as_reference_is_drawn(tmp_path: Path) -> None:
    values: dict[tuple[str, str], float | None] = {("sts", "probe"): 0.3, ("sts", "full"): -1.0}
    assert picture(Grid((("sts", "pearson"),), ("probe", "full"), values), tmp_path).std() > 0
