"""Tables: the comparison and the grid as text on a terminal or as Markdown."""

import io
from collections.abc import Mapping, Sequence

from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.table import Table

from mergekit_bert.evaluation.comparison import REFERENCES, Comparison, Grid, in_per_cent, retention
from mergekit_bert.evaluation.contest import Contest, Standing
from mergekit_bert.evaluation.doctor import EXPECTED, MATRICES, Report, verdicts
from mergekit_bert.evaluation.held_out import HELD_OUT
from mergekit_bert.evaluation.invariants import Invariants
from mergekit_bert.evaluation.result import MISSING, figure
from mergekit_bert.terminal import PlainConsole

_WIDTH = 200


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
        *(figure(in_per_cent(retention(own, other)), 1) for other in others),
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
    PlainConsole(file=text, width=_WIDTH, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip()) + "\n"


def contest_table(placed: Sequence[Standing], full: Mapping[str, float] | None = None) -> Table:
    """One line per merge, the best first; ``full`` are full fine-tuning's figures by task and ``overall``.

    The worst task is the one that keeps least of the ensemble's figure. The last column is how far the merge raised the
    memory of a process that other merges may have warmed.
    """
    table = Table(box=SIMPLE_HEAD)
    table.add_column("merge")
    tasks = list(placed[0].values)
    headers = (*tasks, "overall", "% of ensemble", "worst task", *(["% of full"] if full else []), "behind best (95 %)")
    for header in (*headers, "needs", "seconds", "MiB", "memory rise, MiB"):
        table.add_column(header, justify="left" if header == "needs" else "right")
    for one in placed:
        table.add_row(
            one.cell.name,
            *(figure(one.values[task]) for task in tasks),
            figure(one.overall),
            figure(in_per_cent(one.retention["overall"]), 1),
            MISSING if one.worst is None else f"{100 * one.worst[0]:.1f} {one.worst[1]}",
            *([figure(in_per_cent(retention(one.overall, full["overall"])), 1)] if full else []),
            f"{figure(one.behind[0])} to {figure(one.behind[1])}",
            ", ".join(one.cell.needs) or "nothing",
            f"{one.cell.seconds:.1f}",
            f"{one.cell.size / 2**20:.2f}",
            MISSING if one.cell.memory is None else f"{one.cell.memory / 2**20:.0f}",
        )
    return table


def contest_rows(contest: Contest) -> str:
    """One line that says on which rows the figures are."""
    where = "rows that training held out of train" if contest.on == HELD_OUT else "dev rows"
    return f"scored on {where}: {', '.join(f'{count} of {name}' for name, count in contest.rows.items())}"


def contest_missing(contest: Contest) -> str:
    """One line that says why no share of full fine-tuning is shown; empty where it is."""
    if contest.full is not None:
        return ""
    if contest.missing:
        return f"missing: full fine-tuning's figures on these rows, recorded by: {'; '.join(contest.missing)}"
    return "no % of full: full fine-tuning is recorded on all dev rows, and others are scored here (`limit`, `on`)"


def invariant_table(invariants: Invariants) -> Table:
    """One line per invariant, its worst case; then one for every case in which it was broken."""
    table = Table("invariant", "tried", "worst error", "at", "tolerance", "", box=SIMPLE_HEAD)
    for invariant in dict.fromkeys(one.invariant for one in invariants.checks):
        tried = [one for one in invariants.checks if one.invariant == invariant]
        broken = [one for one in tried if not one.kept]
        worst = max(tried, key=lambda one: one.error)
        for count, one in [(str(len(tried)), worst), *(("", one) for one in broken if one is not worst)]:
            place = f"{one.what}, {one.where}" if one.error > 0 else MISSING
            verdict = "kept" if one.kept else "BROKEN"
            table.add_row(invariant if count else "", count, f"{one.error:.1e}", place, f"{one.tolerance:.0e}", verdict)
    return table


def pair_table(report: Report) -> Table:
    """One line per ordered pair, a column for each number."""
    table = Table("of", "beside", box=SIMPLE_HEAD)
    for name in report.matrices:
        table.add_column(name, justify="right")
    for i, one in enumerate(report.names):
        for j, two in enumerate(report.names):
            if i != j:
                values = [float(matrix[i, j]) for matrix in report.matrices.values()]
                table.add_row(one, two, *(figure(value if value == value else None) for value in values))
    return table


def matrix_legend(report: Report) -> list[str]:
    """What the columns of :func:`pair_table` are."""
    return [f"{name}: {MATRICES[name]}" for name in report.matrices]


def verdict_table(report: Report) -> Table:
    """One line per input and one for all: the number that the verdict rests on, and the words."""
    table = Table("input", EXPECTED, "verdict", "most by", box=SIMPLE_HEAD)
    for one in verdicts(report):
        if one.name == "in all":
            table.add_section()
        table.add_row(one.name, figure(one.value), one.word, one.by or MISSING)
    return table
