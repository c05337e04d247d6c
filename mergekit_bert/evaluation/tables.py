"""Tables: the comparison and the grid as text on a terminal or as Markdown."""

import io
from collections.abc import Mapping, Sequence

from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.recipe import ENSEMBLE
from mergekit_bert.evaluation.comparison import REFERENCES, Comparison, Grid
from mergekit_bert.evaluation.contest import Standing

MISSING = "–"
_WIDTH = 200


def figure(value: float | None, digits: int = 3) -> str:
    """A figure as shown; a dash for a missing one."""
    return MISSING if value is None else f"{value:.{digits}f}"


def comparison_table(comparison: Comparison) -> Table:
    """One line per task and metric, then the overall score."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("metric")
    headers = (comparison.model, "95 % interval", "rows", *REFERENCES, *(f"% of {name}" for name in REFERENCES))
    for header in headers:
        table.add_column(header, justify="right")
    for line in comparison.lines:
        score = line.score
        table.add_row(
            score.task,
            score.metric,
            figure(score.value),
            f"{score.ci_low:.3f} to {score.ci_high:.3f}",
            str(score.n),
            *(figure(line.references[name]) for name in REFERENCES),
            *(figure(line.retention(name), 1) for name in REFERENCES),
        )
    grid = comparison.grid()
    own = grid.overall(comparison.model)
    others = [grid.overall(name) for name in REFERENCES]
    table.add_section()
    table.add_row(
        "overall",
        "",
        figure(own),
        "",
        "",
        *(figure(other) for other in others),
        *(figure(100 * own / other if own is not None and other else None, 1) for other in others),
    )
    return table


def grid_table(grid: Grid) -> Table:
    """Tasks × models, then the overall score."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("metric")
    for model in grid.models:
        table.add_column(model, justify="right")
    for task, metric in grid.tasks:
        table.add_row(task, metric, *(figure(grid.values.get((task, model))) for model in grid.models))
    table.add_section()
    table.add_row("overall", "", *(figure(grid.overall(model)) for model in grid.models))
    return table


def as_text(table: Table) -> str:
    """The table as plain text."""
    return _render(table)


def as_markdown(table: Table) -> str:
    """The table as Markdown."""
    table.box = MARKDOWN
    for row in table.rows:
        row.end_section = False
    return _render(table)


def _render(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=_WIDTH, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip()) + "\n"


def contest_table(placed: Sequence[Standing], full: Mapping[str, float] | None = None) -> Table:
    """One line per merge, the best first; ``full`` are full fine-tuning's figures by task and ``overall``."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("merge")
    tasks = list(placed[0].values)
    headers = (*tasks, "overall", "% of ensemble", "worst task", *(["% of full"] if full else []), "behind best (95 %)")
    for header in (*headers, "needs", "seconds", "MiB", "memory MiB"):
        table.add_column(header, justify="left" if header == "needs" else "right")
    for one in placed:
        record = METHODS.get(one.cell.recipe.method) if one.cell.recipe.method != ENSEMBLE else None
        worst = min((kept, task) for task, kept in one.retention.items() if task != "overall")
        table.add_row(
            one.cell.name,
            *(figure(one.values[task]) for task in tasks),
            figure(one.overall),
            figure(100 * one.retention["overall"], 1),
            f"{100 * worst[0]:.1f} {worst[1]}",
            *([figure(100 * one.overall / full["overall"], 1)] if full else []),
            f"{one.behind[0]:.3f} to {one.behind[1]:.3f}",
            ", ".join(record.needs) if record is not None and record.needs else "nothing",
            f"{one.cell.seconds:.1f}",
            f"{one.cell.size / 2**20:.2f}",
            MISSING if one.cell.memory is None else f"{one.cell.memory / 2**20:.0f}",
        )
    return table
