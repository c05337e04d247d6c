"""How well the doctor predicts losses: its numbers for the tasks of a merge, and their correlation with the losses."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from benchmarks.cells import RESAMPLES, Set, markdown
from mergekit_bert.evaluation.doctor import measure_pairs
from mergekit_bert.files import fingerprint, write_json

ROWS = 64
"""Of each task's train, for what only rows tell."""
POOLED, WITHIN = "mean of the merges", "the same within a task"


def doctor_numbers(one: Set, names: tuple[str, ...]) -> dict[str, dict[str, float | None]]:
    """The doctor's numbers for each task: the mean over the others where there are several; kept with the cells.

    ``others`` is how many there are, which needs no doctor.
    """
    inputs, given = [one.inputs[name] for name in names], one.given(ROWS)
    key = fingerprint([[two.identify() for two in inputs], [given.rows(name).fingerprint() for name in names]])
    path = one.kept / f"{key[:32]}.numbers.json"
    if not path.exists():
        report = measure_pairs(inputs, given)
        matrices = {**report.matrices, "inputs × outputs": report.matrices["inputs"] * report.matrices["outputs"]}
        others = ~np.eye(len(names), dtype=bool)
        means = {key: matrix.mean(1, where=others) for key, matrix in matrices.items()}
        write_json(
            path,
            {
                name: {
                    **{key: float(mean[row]) if np.isfinite(mean[row]) else None for key, mean in means.items()},
                    "expected among all": report.predicted_loss[name],
                    "others": len(names) - 1,
                }
                for row, name in enumerate(names)
            },
        )
    found: dict[str, dict[str, float | None]] = json.loads(path.read_text())
    return found


def correlations(points: Sequence[Mapping[str, Any]], ranks: bool) -> dict[str, dict[str, list[float] | None]]:
    """Of every number with every merge's loss: the value and its 95 % interval over the sets; None: undefined.

    Then with the mean of the merges' losses, as it is and with each task's mean taken from number and loss.
    """
    given = np.array([list(one["numbers"].values()) for one in points], dtype=np.float64).round(6)
    lost = np.array([list(one["losses"].values()) for one in points])
    lost = np.column_stack([lost, lost.mean(1)])
    both = np.column_stack([given, lost])
    within, tasks, sets = both.copy(), *(np.array([one[key] for one in points]) for key in ("task", "set"))
    for task in set(tasks.tolist()):
        within[tasks == task] -= within[tasks == task].mean(0)
    width = given.shape[1]

    def against(index: np.ndarray) -> Float[np.ndarray, "numbers merges"]:
        blocks = []
        for values in (both[index], within[index]):
            columns = stats.rankdata(values, axis=0) if ranks else values
            with np.errstate(invalid="ignore", divide="ignore"):
                blocks.append(np.corrcoef(columns, rowvar=False)[:width, width:])
        return np.column_stack([blocks[0], blocks[1][:, -1]])

    members = [np.flatnonzero(sets == name) for name in dict.fromkeys(sets.tolist())]
    source = np.random.default_rng(0)
    drawn = [
        against(np.concatenate([members[place] for place in source.integers(0, len(members), len(members))]))
        for _ in range(RESAMPLES)
    ]
    found = np.stack([against(np.arange(len(points))), *np.percentile(drawn, [2.5, 97.5], axis=0)])
    columns = [*points[0]["losses"], POOLED, WITHIN]
    return {
        name: {
            column: found[:, row, place].tolist() if np.isfinite(found[:, row, place]).all() else None
            for place, column in enumerate(columns)
        }
        for row, name in enumerate(points[0]["numbers"])
    }


def table_of(table: Mapping[str, Mapping[str, list[float] | None]]) -> str:
    """Numbers × merges."""
    header = ["number", *next(iter(table.values()))]
    shown = {name: ["–" if one is None else "{:.2f} ({:.2f} to {:.2f})".format(*one) for one in line.values()]
             for name, line in table.items()}  # fmt: skip
    return markdown(header, [[name, *line] for name, line in shown.items()])
