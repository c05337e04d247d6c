"""Pictures: the grid as a heatmap, coloured by what each model keeps of full fine-tuning."""

import io
from pathlib import Path

import numpy as np

from mergekit_bert.data.metrics import on_unit_scale
from mergekit_bert.evaluation.comparison import Grid
from mergekit_bert.evaluation.tables import figure
from mergekit_bert.files import write_atomic


def heatmap(grid: Grid, reference: str, path: Path, title: str) -> None:
    """Write a PNG: tasks (and overall) × models, the figure in each cell, its colour the share of ``reference``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [*(task for task, _ in grid.tasks), "overall"]
    cells = [[grid.values.get((task, model)) for model in grid.models] for task, _ in grid.tasks]
    cells.append([grid.overall(model) for model in grid.models])
    metrics = [*(metric for _, metric in grid.tasks), "accuracy"]
    place = grid.models.index(reference)
    shares = np.full((len(names), len(grid.models)), np.nan)
    for row, values in enumerate(cells):
        top = values[place]
        for column, value in enumerate(values):
            if value is not None and top is not None and on_unit_scale(metrics[row], top) > 0:
                unit = on_unit_scale(metrics[row], value) / on_unit_scale(metrics[row], top)
                shares[row, column] = 100 * unit
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
    picture.colorbar(image, ax=axes, label=f"per cent of {reference} (correlations as (r + 1) / 2)")
    data = io.BytesIO()
    FigureCanvasAgg(picture).print_png(data)
    write_atomic(path, data.getvalue())
