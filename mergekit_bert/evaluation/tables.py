"""Results as tables, rendered as text for a terminal or as Markdown."""

import io
from collections.abc import Mapping, Sequence

from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.table import Table

from mergekit_bert.evaluation.comparison import REFERENCES, Comparison, Grid, in_per_cent, retention
from mergekit_bert.evaluation.doctor import ALL_INPUTS, MATRICES, Report, label, verdicts
from mergekit_bert.evaluation.held_out import HELD_OUT
from mergekit_bert.evaluation.invariants import Invariants
from mergekit_bert.evaluation.method_comparison import ComparisonRow, MethodComparison
from mergekit_bert.evaluation.result import MISSING, figure
from mergekit_bert.terminal import PlainConsole

_WIDTH = 200


def comparison_table(comparison: Comparison) -> Table:
    """One row per task and metric, then the overall score."""
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
    overall = grid.overall(comparison.model)
    references = [grid.overall(name) for name in REFERENCES]
    table.add_section()
    table.add_row(
        "overall",
        "",
        figure(overall),
        "",
        "",
        *(figure(reference) for reference in references),
        *(figure(in_per_cent(retention(overall, reference)), 1) for reference in references),
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


def method_table(merges: Sequence[ComparisonRow], full: Mapping[str, float] | None = None) -> Table:
    """One row per merge, best first; ``full`` has the scores of full fine-tuning by task and ``overall``.

    The worst task is the one with the smallest share of its ensemble score. The last column is the rise of the
    process's peak memory, which is smaller if earlier merges already used that memory.
    """
    table = Table(box=SIMPLE_HEAD)
    table.add_column("merge")
    tasks = list(merges[0].values)
    headers = (*tasks, "overall", "% of ensemble", "worst task", *(["% of full"] if full else []), "behind best (95 %)")
    for header in (*headers, "needs", "seconds", "MiB", "memory rise, MiB"):
        table.add_column(header, justify="left" if header == "needs" else "right")
    for row in merges:
        result = row.result
        table.add_row(
            result.name,
            *(figure(row.values[task]) for task in tasks),
            figure(row.overall),
            figure(in_per_cent(row.retention["overall"]), 1),
            MISSING if row.worst is None else f"{100 * row.worst[0]:.1f} {row.worst[1]}",
            *([figure(in_per_cent(retention(row.overall, full["overall"])), 1)] if full else []),
            f"{figure(row.behind[0])} to {figure(row.behind[1])}",
            ", ".join(result.needs) or "nothing",
            f"{result.seconds:.1f}",
            f"{result.size / 2**20:.2f}",
            MISSING if result.memory is None else f"{result.memory / 2**20:.0f}",
        )
    return table


def scored_rows(comparison: MethodComparison) -> str:
    """One line: the rows that the merges were scored on."""
    where = "rows of train that training held out" if comparison.on == HELD_OUT else "dev rows"
    return f"scored on {where}: {', '.join(f'{count} of {name}' for name, count in comparison.rows.items())}"


def missing_references(comparison: MethodComparison) -> str:
    """One line: why there are no percentages of full fine-tuning; empty if there are."""
    if comparison.full is not None:
        return ""
    if comparison.missing:
        return f"missing: scores of full fine-tuning on these rows; record them with: {'; '.join(comparison.missing)}"
    return "no % of full: full fine-tuning is recorded on all dev rows only, not on those scored here (`limit`, `on`)"


def invariant_table(invariants: Invariants) -> Table:
    """One row per invariant with its worst case, followed by one row for every other violation."""
    table = Table("invariant", "checks", "worst error", "at", "tolerance", "", box=SIMPLE_HEAD)
    for invariant in dict.fromkeys(check.invariant for check in invariants.checks):
        checks = [check for check in invariants.checks if check.invariant == invariant]
        worst = max(checks, key=lambda check: check.error)
        others = [check for check in checks if not check.holds and check is not worst]
        for count, check in [(str(len(checks)), worst), *(("", check) for check in others)]:
            place = f"{check.what}, {check.where}" if check.error > 0 else MISSING
            verdict = "holds" if check.holds else "VIOLATED"
            numbers = (f"{check.error:.1e}", place, f"{check.tolerance:.0e}")
            table.add_row(invariant if count else "", count, *numbers, verdict)
    return table


def pair_table(report: Report) -> Table:
    """One row per ordered pair, one column for each number."""
    table = Table("task", "merged with", box=SIMPLE_HEAD)
    for name in report.matrices:
        table.add_column(label(name), justify="right")
    for i, name in enumerate(report.names):
        for j, other in enumerate(report.names):
            if i != j:
                values = [float(matrix[i, j]) for matrix in report.matrices.values()]
                table.add_row(name, other, *(figure(value if value == value else None) for value in values))
    return table


def matrix_legend(report: Report) -> list[str]:
    """One line of explanation for each column of :func:`pair_table`."""
    return [f"{label(name)}: {MATRICES[name]}" for name in report.matrices]


def verdict_table(report: Report) -> Table:
    """One row per input and one for all: predicted loss, verdict, and the input that causes most of the loss."""
    table = Table("input", "predicted loss", "verdict", "most by", box=SIMPLE_HEAD)
    for verdict in verdicts(report):
        if verdict.name == ALL_INPUTS:
            table.add_section()
        table.add_row(verdict.name, figure(verdict.value), verdict.word, verdict.by or MISSING)
    return table
