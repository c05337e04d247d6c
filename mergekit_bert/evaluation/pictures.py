"""Pictures: the grid as a heatmap, coloured by what each model keeps of full fine-tuning."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergekit_bert.evaluation.comparison import Grid, in_per_cent, retention
from mergekit_bert.evaluation.contest import Standing
from mergekit_bert.evaluation.doctor import Report
from mergekit_bert.evaluation.tables import figure
from mergekit_bert.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_picture(picture: "Figure", path: Path) -> None:
    """Write ``picture`` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    FigureCanvasAgg(picture).print_png(data)
    write_atomic(path, data.getvalue())


def heatmap(grid: Grid, reference: str, path: Path, title: str) -> None:
    """Write a PNG: tasks (and overall) × models, the figure in each cell, its colour the share of ``reference``."""
    from matplotlib.figure import Figure

    names = [*(task for task, _ in grid.tasks), "overall"]
    cells = [[grid.values.get((task, model)) for model in grid.models] for task, _ in grid.tasks]
    cells.append([grid.overall(model) for model in grid.models])
    place = grid.models.index(reference)
    shares = np.full((len(names), len(grid.models)), np.nan)
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            kept = retention(value, values[place])
            shares[row, column] = np.nan if kept is None else 100 * kept
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
    write_picture(picture, path)


def contest_picture(placed: Sequence[Standing], path: Path) -> None:
    """Write a PNG: what every merge keeps of the ensemble by task, and its score against bytes and seconds."""
    from matplotlib.figure import Figure

    names = [one.cell.name for one in placed]
    columns = [*placed[0].values, "overall"]
    kept = [[in_per_cent(one.retention[column]) for column in columns] for one in placed]
    shares = np.array(kept, dtype=np.float64)  # None is no number there
    picture = Figure(figsize=(14, 2 + 0.3 * len(names)), layout="constrained")
    left, middle, right = picture.subplots(1, 3, width_ratios=(2, 2, 2))
    image = left.imshow(shares, cmap="RdYlGn", vmin=60, vmax=102, aspect="auto")
    left.set_xticks(range(len(columns)), columns)
    left.set_yticks(range(len(names)), names)
    for row, line in enumerate(kept):
        for column, share in enumerate(line):
            left.text(column, row, figure(share, 0), ha="center", va="center", fontsize=8)
    picture.colorbar(image, ax=left, label="per cent of the ensemble", location="bottom")
    for axes, label, found in (
        (middle, "MiB of the file", [one.cell.size / 2**20 for one in placed]),
        (right, "seconds to merge", [max(one.cell.seconds, 0.01) for one in placed]),
    ):
        axes.scatter(found, [one.overall for one in placed], s=14)
        for x, one in zip(found, placed, strict=True):
            axes.annotate(one.cell.name, (x, one.overall), fontsize=6, xytext=(3, 2), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("overall score")
    write_picture(picture, path)


_SCALES = {"norms": (0.0, 2.0), "cosine": (-1.0, 1.0), "interference": (0.0, 2.0), "answers": (0.0, 2.0)}
"""Lowest and highest colour of a matrix, where these are not 0 and 1."""


def doctor_picture(report: Report, path: Path) -> None:
    """Write a PNG: each matrix of ``report`` as a heatmap, i by row and j by column."""
    from matplotlib.figure import Figure

    columns, count = 4, len(report.names)
    lines = -(-len(report.matrices) // columns)
    side = 2.0 + 0.6 * count
    picture = Figure(figsize=(columns * side, lines * side), layout="constrained")
    grid = picture.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, matrix) in zip(grid, report.matrices.items(), strict=False):
        low, high = _SCALES.get(name, (0.0, 1.0))
        axes.imshow(matrix, cmap="RdBu_r" if low < 0 else "Reds", vmin=low, vmax=high)
        axes.set_xticks(range(count), report.names, rotation=45)
        axes.set_yticks(range(count), report.names)
        axes.set_title(name)
        for row, line in enumerate(matrix):
            for column, value in enumerate(line):
                shown = figure(float(value) if value == value else None, 2)
                colour = "white" if abs(value) > 0.7 * high else "black"
                axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    for axes in grid[len(report.matrices) :]:
        axes.set_axis_off()
    write_picture(picture, path)
