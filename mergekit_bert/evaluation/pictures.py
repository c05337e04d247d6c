"""Pictures: scores as a heatmap, merges against their cost, and the numbers of every pair."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mergekit_bert.evaluation.comparison import Grid, in_per_cent, retention
from mergekit_bert.evaluation.result import figure
from mergekit_bert.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_picture(picture: "Figure", path: Path) -> None:
    """Write ``picture`` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    FigureCanvasAgg(picture).print_png(data)
    write_atomic(path, data.getvalue())


def heatmap(grid: Grid, reference: str, title: str) -> "Figure":
    """Tasks (and overall) × models, with the score in each cell, coloured by its share of ``reference``."""
    from matplotlib.figure import Figure

    names = [*(task for task, _ in grid.tasks), "overall"]
    cells = [[grid.values.get((task, model)) for model in grid.models] for task, _ in grid.tasks]
    cells.append([grid.overall(model) for model in grid.models])
    place = grid.models.index(reference)
    shares = np.full((len(names), len(grid.models)), np.nan)
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            share = retention(value, values[place])
            shares[row, column] = np.nan if share is None else 100 * share
    picture = Figure(figsize=(2.2 + 1.25 * len(grid.models), 1.6 + 0.6 * len(names)), layout="constrained")
    axes = picture.subplots()
    image = axes.imshow(shares, cmap="RdYlGn", vmin=50, vmax=105, aspect="auto")
    labels = [f"{task}\n{metric}" for task, metric in grid.tasks] + ["overall"]
    axes.set_xticks(range(len(grid.models)), grid.models)
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(length=0)
    axes.set_title(title)
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            axes.text(column, row, figure(value), ha="center", va="center")
    picture.colorbar(image, ax=axes, label=f"per cent of {reference}")
    return picture


@dataclass(frozen=True)
class Mark:
    """A merge in a picture: its share of the ensemble's scores by task, its overall score, and its cost."""

    name: str
    retention: Mapping[str, float | None]
    overall: float
    size: int
    seconds: float


def merges_picture(marks: Sequence[Mark]) -> "Figure":
    """Retention of every merge by task, and its overall score against file size and seconds."""
    from matplotlib.figure import Figure

    names, columns = [mark.name for mark in marks], list(marks[0].retention)
    percents = [[in_per_cent(mark.retention[column]) for column in columns] for mark in marks]
    shares = np.array(percents, dtype=np.float64)  # None becomes NaN
    picture = Figure(figsize=(14, 2 + 0.3 * len(names)), layout="constrained")
    left, middle, right = picture.subplots(1, 3, width_ratios=(2, 2, 2))
    image = left.imshow(shares, cmap="RdYlGn", vmin=60, vmax=102, aspect="auto")
    left.set_xticks(range(len(columns)), columns)
    left.set_yticks(range(len(names)), names)
    for row, line in enumerate(percents):
        for column, share in enumerate(line):
            left.text(column, row, figure(share, 0), ha="center", va="center", fontsize=8)
    picture.colorbar(image, ax=left, label="per cent of the ensemble", location="bottom")
    for axes, label, costs in (
        (middle, "MiB of the file", [mark.size / 2**20 for mark in marks]),
        (right, "seconds to merge", [max(mark.seconds, 0.01) for mark in marks]),
    ):
        axes.scatter(costs, [mark.overall for mark in marks], s=14)
        for cost, mark in zip(costs, marks, strict=True):
            axes.annotate(mark.name, (cost, mark.overall), fontsize=6, xytext=(3, 2), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("overall score")
    return picture


_SCALES = {"norms": (0.0, 2.0), "cosine": (-1.0, 1.0), "interference": (0.0, 2.0), "output change": (0.0, 2.0)}
"""Range of the colour scale of a matrix, if it is not 0 to 1."""


def pairs_picture(names: Sequence[str], matrices: Mapping[str, Float[np.ndarray, "inputs inputs"]]) -> "Figure":
    """Each matrix as a heatmap, i by row and j by column."""
    from matplotlib.figure import Figure

    columns, count = 4, len(names)
    lines = -(-len(matrices) // columns)
    side = 2.0 + 0.6 * count
    picture = Figure(figsize=(columns * side, lines * side), layout="constrained")
    grid = picture.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, matrix) in zip(grid, matrices.items(), strict=False):
        low, high = _SCALES.get(name, (0.0, 1.0))
        axes.imshow(matrix, cmap="RdBu_r" if low < 0 else "Reds", vmin=low, vmax=high)
        axes.set_xticks(range(count), names, rotation=45)
        axes.set_yticks(range(count), names)
        axes.set_title(name)
        for row, line in enumerate(matrix):
            for column, value in enumerate(line):
                shown = figure(float(value) if value == value else None, 2)
                colour = "white" if abs(value) > 0.7 * high else "black"
                axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    for axes in grid[len(matrices) :]:
        axes.set_axis_off()
    return picture
