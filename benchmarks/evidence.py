"""The evidence: which merge works, over seeds, bases and tasks; what its cost buys; how well the doctor predicts.

Usage: python -m benchmarks.evidence merges|curves|tasks|doctor|options --sets FOLDER --data DIR --out FOLDER

FOLDER of --sets is what benchmarks.adapters wrote. Scores are of the first rows of dev, per cents are of the ensemble
of the same adapters: of a task's figure as it is, overall with correlations as (r + 1) / 2. Finished cells are kept in
--out and not computed again.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import typer

import mergekit_bert as mb
from benchmarks.adapters import TASKS
from benchmarks.cells import Result, Set, draws, held_out, interval, markdown, open_sets, redrawn
from benchmarks.machine import provenance, write_result
from benchmarks.predicting import correlations, doctor_numbers, table_of
from mergekit_bert.composing.method import METHODS, make_options
from mergekit_bert.evaluation.doctor import word_for
from mergekit_bert.evaluation.pictures import write_picture
from mergekit_bert.progress import progress_bar

HALF = {"method": "task_arithmetic", "weight": 0.5}
MERGES: Mapping[str, Mapping[str, Any]] = {
    "ensemble": {"method": "ensemble"},
    "distill": {"method": "distill"},
    "distill, rank 12": {"method": "distill", "rank": 12},
    "distill, layer by layer": {"method": "distill", "options": {"local": True}},
    "distill, synthetic texts": {"method": "distill", "synthetic": True},
    "regmean": {"method": "regmean"},
    "pico": {"method": "pico"},
    "iso_c": {"method": "iso_c"},
    "tsv": {"method": "tsv"},
    "task_arithmetic": {"method": "task_arithmetic"},
    "task_arithmetic, 0.5 each": HALF,
    "ties": {"method": "ties"},
    "fedavg": {"method": "fedavg"},
    "orthoada": {"method": "orthoada"},
    "task_arithmetic, 0.5 each, private 2": {**HALF, "private": 2},
    "task_arithmetic, 0.5 each, private 4": {**HALF, "private": 4},
    "pico, private 2": {"method": "pico", "private": 2},
    "pico, private 4": {"method": "pico", "private": 4},
    "regmean, rank 12": {"method": "regmean", "rank": 12},
    "pico, rank 12": {"method": "pico", "rank": 12},
    "iso_c, rank 12": {"method": "iso_c", "rank": 12},
    "tsv, rank 12": {"method": "tsv", "rank": 12},
    "regmean + heads": {"method": "regmean", "calibrate": ("heads",)},
    "pico + heads": {"method": "pico", "calibrate": ("heads",)},
    "pico + scales": {"method": "pico", "calibrate": ("scales",)},
    "task_arithmetic, 0.5 each + heads": {**HALF, "calibrate": ("heads",)},
}
"""Arguments of each recipe, where its rows are from, and what is calibrated after it; orthoada is left out where the
adapters share no basis."""

ROWS = (50, 200, 1000, 4096)
STEPS = (0, 40, 80, 160, 320)
RANKS = {4: 4, 12: 12, 36: None}
"""Three adapters of rank 12 have 36 together: no bound."""
PRIVATE = (0, 1, 2, 4, 8)
PRIVATE_OF = ("task_arithmetic, 0.5 each", "pico")

_TRIED = (
    (100, 32, 2e-3),
    (90, 32, 2e-3),
    (90, 32, 3e-3),
    (90, 32, 1.3e-3),
    (120, 24, 2e-3),
    (180, 16, 2e-3),
    (160, 16, 2e-3),
)
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    f"{steps} steps of {rows} rows, lr {lr}": {"steps": steps, "batch_size": rows, "lr": lr}
    for steps, rows, lr in _TRIED
}
"""Distill's options that were tried last, at about the same cost."""

DOCTORED = ("task_arithmetic, 0.5 each", "pico", "regmean", "ties")
THREE, ALL = ",".join(TASKS[:3]), ",".join(TASKS)
BOTH = f"{THREE};{ALL}"
Sets = Annotated[Path, typer.Option(help="Folder with the sets.")]
Data = Annotated[Path, typer.Option(help="Folder with <task>/{train,dev}.tsv.")]
Out = Annotated[Path, typer.Option(help="Where finished cells are kept.")]
Limit = Annotated[int, typer.Option(help="The most dev rows of a task.")]
Begin = Annotated[str, typer.Option("--set", help="Beginnings of the sets' names, separated by commas.")]
Tasks = Annotated[str, typer.Option(help="Tasks, separated by commas.")]
app = typer.Typer(help=__doc__, add_completion=False)


# --- which merge works ------------------------------------------------------------------------------------------------


@app.command()
def merges(
    sets: Sets,
    data: Data,
    out: Out,
    limit: Limit = 1000,
    tasks: Annotated[str, typer.Option(help="Lists of tasks, separated by semicolons.")] = BOTH,
    only: Annotated[str, typer.Option(help="Merges, separated by semicolons.")] = ";".join(MERGES),
    chosen: Begin = "",
    record: Annotated[str, typer.Option(help="Name of the result, in benchmarks/results.")] = "evidence_merges",
) -> None:
    """Every merge of every set: a table for each kind of basis and each list of tasks."""
    encoder, labels = mb.load_encoder("minilm"), only.split(";")
    every = [one for names in tasks.split(";") for one in open_sets(sets, names.split(","), data, out, limit, encoder)]
    found = _begin(every, chosen)
    groups: dict[tuple[str, tuple[str, ...]], list[Set]] = {}
    for one in found:
        groups.setdefault((one.basis, tuple(one.dev)), []).append(one)
    jobs = [(one, label) for one in found for label in labels]
    results = _run([(one, tuple(one.dev), label, MERGES[label], None) for one, label in jobs])
    done = {(id(one), label): result for (one, label), result in zip(jobs, results, strict=True)}
    tables = []
    for (basis, names), group in groups.items():
        lines = _lines(group, {label: [done[id(one), label] for one in group] for label in labels})
        tables.append({"basis": basis, "tasks": names, "sets": [one.name for one in group], "merges": lines})
        print(f"\n{' + '.join(names)}, {basis} basis ({len(group)} sets):\n\n{_merge_table(lines)}", end="")
    refused = {one.label: one.cell.refused for one in results if one.cell.refused}
    for label, reason in refused.items():
        print(f"left out {label}: {reason}")
    cells = [one.to_json() for one in results if not one.cell.refused]
    write_result(record, {**provenance(), "limit": limit, "tables": tables, "cells": cells})


def _begin(found: Sequence[Set], beginnings: str) -> list[Set]:
    chosen = [one for one in found if one.name.startswith(tuple(beginnings.split(",")))]
    if not chosen:
        raise typer.BadParameter("no such set has all the tasks", param_hint="--sets")
    return chosen


def _run(jobs: Sequence[tuple[Set, tuple[str, ...], str, Mapping[str, Any], int | None]]) -> list[Result]:
    """The result of every job: set, tasks, label, arguments of the recipe, rows for methods that read some."""
    print(f"{len(jobs)} cells, and the ensemble of each set")
    found = []
    with progress_bar("cells", len(jobs), True) as bar:
        for number, (one, names, label, told, rows) in enumerate(jobs):
            bar(number, f"{one.name} {' + '.join(names)}: {label}")
            found.append(one.result(names, label, told, rows))
            bar(number + 1)
    return found


def _lines(group: Sequence[Set], results: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """One line per merge that no set refused: means over the sets, the interval over sets and rows."""
    index = draws(group[0].dev)
    whole = np.array([redrawn(one.dev, one.whole, index) for one in group])
    lines = []
    for label, found in results.items():
        if any(one.cell.refused for one in found):
            continue
        own = np.array([redrawn(one.dev, two.cell, index) for one, two in zip(group, found, strict=True)])
        lines.append(
            {
                "merge": label,
                "overall": fmean(one.overall for one in found),
                "percent": fmean(one.percent for one in found),
                "percent_95": interval(100 * own / whole),
                "worst": fmean(one.worst[0] for one in found),
                "lowest": min(one.worst for one in found),
                "seconds": median(one.cell.seconds for one in found),
                "bytes": median(one.cell.size for one in found),
            }
        )
    return sorted(lines, key=lambda line: -line["overall"])


def _merge_table(lines: Sequence[Mapping[str, Any]]) -> str:
    header = ("merge", "overall", "% of ensemble (95 %)", "worst task, %", "its lowest", "seconds", "MiB")
    return markdown(
        header,
        [
            (
                one["merge"],
                f"{one['overall']:.3f}",
                "{:.1f} ({:.1f} to {:.1f})".format(one["percent"], *one["percent_95"]),
                f"{one['worst']:.1f}",
                "{:.1f} {}".format(*one["lowest"]),
                f"{one['seconds']:.1f}",
                f"{one['bytes'] / 2**20:.1f}",
            )
            for one in lines
        ],
    )


# --- what its cost buys -----------------------------------------------------------------------------------------------


@app.command()
def curves(
    sets: Sets,
    data: Data,
    out: Out,
    limit: Limit = 1000,
    tasks: Tasks = THREE,
    chosen: Annotated[str, typer.Option("--set", help="The set.")] = "orthogonal_1",
) -> None:
    """Distillation by rows, steps and rank, and private residuals by rank, on one set."""
    one = _chosen(sets, tasks, data, out, limit, chosen)
    points = list(_points(tuple(one.dev)))
    results = _run([(one, names, f"{curve} {at}", told, rows) for curve, at, names, told, rows in points])
    told = [{"curve": curve, "at": at, **result.to_json()}
            for (curve, at, *_), result in zip(points, results, strict=True)]  # fmt: skip
    print()
    print(_curve_table(told), end="")
    _draw(told, Path(__file__).parent / "results/evidence_curves.png", one.name)
    write_result("evidence_curves", {**provenance(), "limit": limit, "set": one.name, "points": told})


@app.command("tasks")
def by_tasks(
    sets: Sets,
    data: Data,
    out: Out,
    limit: Limit = 1000,
    tasks: Tasks = f"{ALL},asks,polar",
    chosen: Annotated[str, typer.Option("--set", help="The set.")] = "orthogonal_1",
) -> None:
    """What a merge of two, four and more tasks keeps, as they are named one after the other."""
    one = _chosen(sets, tasks, data, out, limit, chosen)
    counts = range(2, len(one.dev) + 1, 2)
    labels = ("distill", "pico")
    jobs = [(one, tuple(one.dev)[:count], label, MERGES[label], None) for label in labels for count in counts]
    results = _run(jobs)
    shown = {
        (label, len(names)): f"{result.percent:.1f} ({result.worst[0]:.1f} {result.worst[1]})"
        for (_, names, label, *_), result in zip(jobs, results, strict=True)
    }
    header = ("merge", *(f"{count}" for count in counts))
    print("\n% of the ensemble (the worst task's), by number of tasks:\n")
    print(markdown(header, [(label, *(shown[label, count] for count in counts)) for label in labels]), end="")
    cells = [one.to_json() for one in results]
    write_result("evidence_tasks", {**provenance(), "limit": limit, "set": one.name, "cells": cells})


def _chosen(sets: Path, tasks: str, data: Path, out: Path, limit: int, name: str) -> Set:
    found = open_sets(sets, tasks.split(","), data, out, limit, mb.load_encoder("minilm"))
    one = next((one for one in found if one.name == name), None)
    if one is None:
        raise typer.BadParameter(f"{name} lacks some of {tasks}", param_hint="--set")
    return one


def _points(names: tuple[str, ...]) -> Iterator[tuple[str, int, tuple[str, ...], Mapping[str, Any], int | None]]:
    """Curve, place on its axis, tasks, arguments of the recipe, rows; what is the default is not named."""
    usual, distill = make_options(METHODS.get("distill"), {}).steps, MERGES["distill"]
    for rows in ROWS:
        yield "rows", rows, names, distill, rows if rows < METHODS.get("distill").rows else None
    for steps in STEPS:
        yield "steps", steps, names, distill if steps == usual else {**distill, "options": {"steps": steps}}, None
    for at, rank in RANKS.items():
        yield "rank", at, names, {**distill, "rank": rank}, None
    for label in PRIVATE_OF:
        for rank in PRIVATE:
            yield f"private, {label}", rank, names, {**MERGES[label], "private": rank or None}, None


def _curve_table(points: Sequence[Mapping[str, Any]]) -> str:
    header = ("curve", "at", "% of ensemble", "worst task, %", "seconds", "MiB")
    return markdown(
        header,
        [
            (
                one["curve"],
                str(one["at"]),
                f"{one['percent']['overall']:.1f}",
                f"{one['percent']['worst task']:.1f} {min(one['tasks'], key=one['percent'].__getitem__)}",
                f"{one['seconds']:.1f}",
                f"{one['bytes'] / 2**20:.2f}",
            )
            for one in points
        ],
    )


def _draw(points: Sequence[Mapping[str, Any]], path: Path, name: str) -> None:
    """A picture for each of what was varied: overall whole, the worst task dashed."""
    from matplotlib.figure import Figure

    labels = {"rows": "rows of each task", "steps": "steps", "rank": "rank of the merged Delta",
              "private": "rank of the private residuals"}  # fmt: skip
    picture = Figure(figsize=(16, 4), layout="constrained")
    for axes, (panel, label) in zip(picture.subplots(1, len(labels), sharey=True), labels.items(), strict=True):
        lines = [line for line in dict.fromkeys(one["curve"] for one in points) if line.split(",")[0] == panel]
        for number, line in enumerate(lines):
            here = [one for one in points if one["curve"] == line]
            places = [one["at"] for one in here]
            for style, key in (("-", "overall"), ("--", "worst task")):
                title = f"{line.partition(', ')[2] or 'distill'}, {key}"
                axes.plot(
                    places,
                    [one["percent"][key] for one in here],
                    style,
                    marker="o",
                    markersize=4,
                    color=f"C{number}",
                    label=title,
                )
        if panel in ("rows", "rank"):
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, list(map(str, places)), fontsize=8)
        axes.set_xlabel(label)
        axes.legend(fontsize=7, loc="lower right", handlelength=3)
        axes.grid(alpha=0.3)
    picture.axes[0].set_ylabel(f"per cent of the ensemble ({name})")
    write_picture(picture, path)


# --- how well the doctor predicts losses ------------------------------------------------------------------------------


@app.command()
def doctor(
    sets: Sets,
    data: Data,
    out: Out,
    limit: Limit = 300,
    tasks: Tasks = THREE,
    chosen: Begin = "",
    most: Annotated[int, typer.Option(help="The most cells; pairs and triples are drawn, evenly from the sets.")] = 160,
) -> None:
    """Correlation of each of the doctor's numbers with the loss of a task in a merge of two or three."""
    found = _begin(open_sets(sets, tasks.split(","), data, out, limit, mb.load_encoder("minilm")), chosen)
    subsets = _subsets(found, most // len(DOCTORED))
    results = _run([(one, names, label, MERGES[label], None) for one, names in subsets for label in DOCTORED])
    points = []
    with progress_bar("numbers", len(subsets), True) as bar:
        for place, (one, names) in enumerate(subsets):
            bar(place, f"{one.name} {' + '.join(names)}")
            numbers, merged = doctor_numbers(one, names), results[place * len(DOCTORED) : (place + 1) * len(DOCTORED)]
            points += [
                {
                    "subset": place,
                    "set": one.name,
                    "tasks": names,
                    "task": task,
                    "numbers": numbers[task],
                    "losses": {result.label: 1 - result.percents[task] / 100 for result in merged},
                }
                for task in names
            ]
    told: dict[str, Any] = {kind: correlations(points, kind == "spearman") for kind in ("spearman", "pearson")}
    for kind, table in told.items():
        print(f"\n{kind.title()}, {len(points)} losses in {len(subsets)} subsets:\n\n{table_of(table)}", end="")
    told["words"] = _by_word(points)
    for word, (count, loss) in told["words"].items():
        print(f"\n{word}: {count} losses, {loss:.1%} on average", end="")
    print()
    cells = [one.to_json() for one in results]
    write_result("evidence_doctor", {**provenance(), "limit": limit, "points": points, **told, "cells": cells})


def _by_word(points: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    """How many losses lie under each word of the doctor's verdict, and their mean; the merges of one task give one."""
    found: dict[str, list[float]] = {}
    for one in points:
        word = word_for(one["numbers"]["expected among all"])
        found.setdefault(word, []).append(fmean(one["losses"].values()))
    return {word: (len(losses), fmean(losses)) for word, losses in found.items()}


# --- what distill's options are chosen by -----------------------------------------------------------------------------


@app.command()
def options(
    sets: Sets,
    data: Data,
    out: Out,
    limit: Limit = 1000,
    tasks: Tasks = THREE,
    chosen: Annotated[str, typer.Option("--set", help="Sets, separated by commas.")] = "orthogonal_0,random_0",
    only: Annotated[str, typer.Option(help="Trials, separated by semicolons.")] = ";".join(OPTIONS),
) -> None:
    """Distill by other options, on rows of train that training held out: dev is left for the report."""
    found = open_sets(sets, tasks.split(","), data, out, limit, mb.load_encoder("minilm"))
    places = [held_out(one, limit) for one in found if one.name in chosen.split(",")]
    told = {label: {"method": "distill", "options": OPTIONS[label]} for label in only.split(";")}
    results = _run([(one, tuple(one.dev), label, recipe, None) for one in places for label, recipe in told.items()])
    header = ("set", "distill", "last loss", "% of ensemble", "worst task, %", "seconds")
    lines = [
        (
            one.place,
            one.label,
            f"{one.cell.learned['last_loss']:.4f}",
            f"{one.percent:.1f}",
            "{:.1f} {}".format(*one.worst),
            f"{one.cell.seconds:.1f}",
        )
        for one in results
    ]
    print("\n" + markdown(header, lines), end="")
    write_result("evidence_options", {**provenance(), "limit": limit, "cells": [one.to_json() for one in results]})


def _subsets(found: Sequence[Set], most: int) -> list[tuple[Set, tuple[str, ...]]]:
    """Pairs and triples within the sets, at most so many, each set in turn in an order of its own."""
    every = []
    for place, one in enumerate(found):
        some = [names for size in (2, 3) for names in combinations(one.dev, size)]
        order = np.random.default_rng(place).permutation(len(some))
        every.append([(one, some[number]) for number in order])
    return [one for turn in zip(*every, strict=True) for one in turn][:most]


if __name__ == "__main__":
    app()
