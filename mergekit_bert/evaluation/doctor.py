"""How well adapters will get along in a merge, told before there is one: from their Deltas, and from rows if given.

:func:`numbers` measures, :func:`verdicts` puts one of the numbers into words. Without rows the numbers say how the
Deltas lie to each other; how far one adapter disturbs another's task, only rows can tell: the features of a task lie
also where the Deltas of the others look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.delta import Delta, factors, svd
from mergekit_bert.adapters.ledger import Ledger
from mergekit_bert.composing.learning import Answers, expert_answers
from mergekit_bert.composing.merge_input import MergeInput, check_together
from mergekit_bert.composing.merging import MergeContext, finite_delta, merge_weights
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import check_base
from mergekit_bert.errors import DataError
from mergekit_bert.evaluation.invariants import Invariants, one_of_each_kind
from mergekit_bert.evaluation.pictures import pairs_picture
from mergekit_bert.evaluation.result import Result
from mergekit_bert.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPECTED = "expected"
TRIAL = 0.5
"""The weight of every input in the sum whose loss is foretold."""
MATRICES = {
    "basis": "share of the basis rows of the smaller that both hold",
    "inputs": "overlap of the input spaces, weighted by energy: ‖Δi Δjᵀ‖ / √(‖Δi Δiᵀ‖ ‖Δj Δjᵀ‖)",
    "outputs": "overlap of the output spaces, weighted by energy: ‖Δiᵀ Δj‖ / √(‖Δiᵀ Δi‖ ‖Δjᵀ Δj‖)",
    "input_space": "mean cos² of the principal angles of the input spaces: ‖Qi Qjᵀ‖² / min rank, Q its unit rows",
    "output_space": "mean cos² of the principal angles of the output spaces",
    "cosine": "cosine of the Deltas, 〈Δi, Δj〉 / (‖Δi‖ ‖Δj‖)",
    "norms": "‖Δi‖ / ‖Δj‖",
    "signs": "share of the energy, each adapter's as 1, in entries where the signs differ (0.5 by chance)",
    "interference": "how far j moves the features of i's rows: ‖f(x; Δi + Δj) − f(x; Δi)‖² / var f(x; Δi)",
    "answers": "the same of the outputs of i's head",
    EXPECTED: f"share of i's score to be lost in the sum with j at {TRIAL} each, as i itself sees it",
}
"""What each matrix tells: i by row, j by column; not a number where there is nothing to tell."""

_WORDS = ((0.05, "gets along"), (0.2, "is disturbed"), (np.inf, "is moved far"))
"""Up to which expected loss a word holds."""
UNBALANCED = 2.0
"""A ratio of norms from which the larger adapter is worth a smaller weight."""

Matrix = Float[np.ndarray, "inputs inputs"]


@dataclass(frozen=True)
class Report:
    """``matrices`` by the names of :data:`MATRICES`; the last three only where there were rows.

    ``expected`` is the loss to be expected of each input in the sum of all at 0.5 each, by name.
    ``capacity`` is how many more adapters of the largest rank have room in the basis that these share (None: they
    share none). ``invented`` says that the rows were made up.
    """

    names: Sequence[str]
    matrices: Mapping[str, Matrix]
    capacity: int | None = None
    expected: Mapping[str, float] = field(default_factory=dict)
    invented: bool = False


@dataclass(frozen=True)
class Verdict:
    """One input (or all: the worst) in words, its expected loss, and ``by`` whom it would lose most."""

    name: str
    value: float
    word: str
    by: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """What ``mbert doctor`` tells."""

    invariants: Invariants
    report: Report

    def __repr__(self) -> str:
        """One line: the inputs, and how many invariants were tried and broken."""
        tried, broken = len(self.invariants.checks), sum(not one.kept for one in self.invariants.checks)
        return f"Diagnosis({' + '.join(self.report.names)}, {tried} checks, {broken} broken)"

    def records(self) -> list[dict[str, Any]]:
        """One line for each ordered pair of inputs, by the names of :data:`MATRICES`."""
        names, matrices = self.report.names, self.report.matrices
        return [
            {"of": one, "beside": two} | {name: _finite(float(matrix[i, j])) for name, matrix in matrices.items()}
            for i, one in enumerate(names)
            for j, two in enumerate(names)
            if i != j
        ]

    def plot(self) -> "Figure":
        """Each matrix as a heatmap."""
        return pairs_picture(self.report.names, self.report.matrices)


def numbers(
    merge_inputs: Sequence[MergeInput],
    given: MergeContext | None = None,
    ledger: Ledger | None = None,
    invented: bool = False,
) -> Report:
    """Measure every pair of inputs; raises MbertError for inputs that cannot meet.

    ``given`` adds what rows tell, ``invented`` ones or real; ``ledger`` knows of rows of the basis that other adapters
    hold.
    """
    check_together(merge_inputs)
    overlaps, angles, signs = _geometry(merge_inputs), _angles(merge_inputs), _signs(merge_inputs)
    found = {"basis": _basis(merge_inputs), **overlaps, **angles, "signs": signs}
    matrices = {name: found[name] for name in MATRICES if name in found}
    expected: dict[str, float] = {}
    if given is not None:
        moved, expected = _moved(merge_inputs, given)
        matrices |= moved
    return Report([one.name for one in merge_inputs], matrices, _capacity(merge_inputs, ledger), expected, invented)


def _basis(merge_inputs: Sequence[MergeInput]) -> Matrix:
    def shared(one: BasisRows | None, two: BasisRows | None) -> float:
        if one is None or two is None or one.seed != two.seed:
            return np.nan
        both = min(one.start + one.count, two.start + two.count) - max(one.start, two.start)
        return max(0, both) / min(one.count, two.count)

    return np.array([[shared(one.basis, two.basis) for two in merge_inputs] for one in merge_inputs])


def _capacity(merge_inputs: Sequence[MergeInput], ledger: Ledger | None) -> int | None:
    """Free runs of rows at the narrowest site, in adapters of the largest rank."""
    taken = [one.basis for one in merge_inputs if one.basis is not None]
    if len(taken) < len(merge_inputs) or len({one.seed for one in taken}) > 1:
        return None
    width = min(delta.shape[1] for one in merge_inputs for delta in _all_deltas(one))
    free = [True] * width
    for one in taken:
        free[one.start : one.start + one.count] = [False] * one.count
    rank = max(one.count for one in taken)
    left = sum(len(list(run)) // rank for is_free, run in groupby(free) if is_free)
    return left if ledger is None else min(left, ledger.capacity_left(merge_inputs[0].base.fingerprint, rank, width))


def _all_deltas(one: MergeInput) -> list[Delta]:
    return [*one.deltas.values(), *(delta for own in one.own.values() for delta in own.deltas.values())]


def _geometry(merge_inputs: Sequence[MergeInput]) -> dict[str, Matrix]:
    """Overlaps, cosines and norms over all sites, from products of factors as wide as the ranks.

    The overlaps are root mean squares of the cosines of the principal angles where all directions weigh the same;
    weighted, they are cosines of ``ΔiᵀΔi`` and ``ΔjᵀΔj`` (of ``ΔiΔiᵀ`` and ``ΔjΔjᵀ``), square roots taken.
    """
    count = len(merge_inputs)
    inner, inputs, outputs = (np.zeros((count, count)) for _ in range(3))
    for site in _sites(merge_inputs):
        parts = {
            place: factors(finite_delta(one, site).to(torch.float64))
            for place, one in enumerate(merge_inputs)
            if site in one.deltas
        }
        left = {(i, j): parts[i].B.T @ parts[j].B for i in parts for j in parts}
        right = {(i, j): parts[i].A @ parts[j].A.T for i in parts for j in parts}
        for i, j in left:
            inner[i, j] += float((left[i, j] * right[i, j]).sum())
            inputs[i, j] += float(((left[i, i] @ right[i, j]) * (right[i, j] @ left[j, j])).sum())
            outputs[i, j] += float(((right[i, i] @ left[i, j]) * (left[i, j] @ right[j, j])).sum())
    sizes = np.sqrt(np.diag(inner).clip(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        norms = np.where(sizes > 0, sizes[:, None] / sizes, np.nan)
    return {
        "inputs": np.sqrt(_normal(inputs).clip(0)),
        "outputs": np.sqrt(_normal(outputs).clip(0)),
        "cosine": _normal(inner),
        "norms": norms,
    }


def _angles(merge_inputs: Sequence[MergeInput]) -> dict[str, Matrix]:
    """Mean squared cosines of the principal angles over all sites, every direction of a Delta weighing the same.

    As of the block-diagonal matrices of all sites: ``Σ ‖Qi Qjᵀ‖² / min(Σ ri, Σ rj)``; beside a zero, zero.
    """
    count = len(merge_inputs)
    inputs, outputs, ranks = np.zeros((count, count)), np.zeros((count, count)), np.zeros(count)
    for site in _sites(merge_inputs):
        parts = {place: svd(finite_delta(one, site)) for place, one in enumerate(merge_inputs) if site in one.deltas}
        for i, (left, values, right) in parts.items():
            ranks[i] += len(values)
            for j, (other_left, _, other_right) in parts.items():
                inputs[i, j] += float((right @ other_right.T).square().sum())
                outputs[i, j] += float((left.T @ other_left).square().sum())
    least = np.minimum.outer(ranks, ranks)
    return {
        name: np.divide(found, least, out=np.zeros_like(found), where=least > 0)
        for name, found in {"input_space": inputs, "output_space": outputs}.items()
    }


def _normal(products: Matrix) -> Matrix:
    """Inner products as cosines; beside a zero, zero."""
    size = np.sqrt(np.diag(products).clip(0))
    scale = np.outer(size, size)
    cosines: Matrix = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return cosines


def _sites(merge_inputs: Sequence[MergeInput]) -> list[str]:
    return list(dict.fromkeys(site for one in merge_inputs for site in one.deltas))


def _signs(merge_inputs: Sequence[MergeInput]) -> Matrix:
    """From dense Deltas, so at one site of each kind only."""
    count = len(merge_inputs)
    energy, against = np.zeros(count), np.zeros((count, count))
    for site in one_of_each_kind(merge_inputs):
        parts = {
            place: finite_delta(one, site).to(torch.float64).dense()
            for place, one in enumerate(merge_inputs)
            if site in one.deltas
        }
        for i, one in parts.items():
            energy[i] += float(one.square().sum())
            for j, two in parts.items():
                against[i, j] += float(one.square()[one.sign() * two.sign() < 0].sum())
    shares = np.divide(against, energy[:, None], out=np.zeros_like(against), where=energy[:, None] > 0)
    return (shares + shares.T) / 2


def _moved(merge_inputs: Sequence[MergeInput], given: MergeContext) -> tuple[dict[str, Matrix], dict[str, float]]:
    """Interference, answers and expected loss of every ordered pair, and the loss expected of each among all."""
    encoder, count = given.encoder(), len(merge_inputs)
    check_base("doctor", merge_inputs[0].base, encoder)
    matrices = {name: np.zeros((count, count)) for name in ("interference", "answers", EXPECTED)}
    among_all = dict.fromkeys((one.name for one in merge_inputs), 0.0)

    def answers(task: str, parts: Sequence[MergeInput], weight: float = 1.0) -> Answers:
        model = merge_weights(parts, Recipe("task_arithmetic", weights={one.name: weight for one in parts}))
        part, rows = model.part(task), given.rows(task)
        if len(rows) < 2:
            raise DataError(rows.where, f"{len(rows)} rows", "at least two", "give more `rows`")
        return expert_answers(encoder, part, part.tokens(encoder, rows))

    with progress_bar("interference", count, given.show) as bar:
        for i, one in enumerate(merge_inputs):
            bar(i, one.name)
            for task in one.parts:
                known, alone = Task.from_json(one.parts[task]["task"]), answers(task, [one])
                kind = kind_of(known)
                for j, two in enumerate(merge_inputs):
                    if two is not one:
                        beside, sum_of_two = answers(task, [one, two]), answers(task, [one, two], TRIAL)
                        found = (
                            _distance(alone.features, beside.features),
                            _distance(alone.outputs, beside.outputs),
                            kind.expected_loss(known, alone.outputs, sum_of_two.outputs),
                        )
                        for matrix, value in zip(matrices.values(), found, strict=True):
                            matrix[i, j] += value / len(one.parts)
                if count > 1:
                    sum_of_all = answers(task, merge_inputs, TRIAL)
                    among_all[one.name] += kind.expected_loss(known, alone.outputs, sum_of_all.outputs) / len(one.parts)
    return matrices, among_all


def _distance(alone: Float[Tensor, "rows width"], beside: Float[Tensor, "rows width"]) -> float:
    """``Σ ‖beside − alone‖² / Σ ‖alone − mean‖²`` over the rows; 0 where nothing moved."""
    apart = float((beside - alone).double().square().sum())
    spread = float((alone - alone.mean(0)).double().square().sum())
    return apart / max(spread, torch.finfo(torch.float32).tiny) if apart else 0.0


def verdicts(report: Report) -> list[Verdict]:
    """One for each input, and the worst for all; none without real rows.

    They rest on the expected loss, which of all numbers goes best with the loss that follows (docs/evidence.md). What
    the Deltas alone tell does not foretell it, and made-up rows are moved by other amounts.
    """
    if not report.expected or report.invented:
        return []
    found = []
    for place, name in enumerate(report.names):
        row = np.delete(report.matrices[EXPECTED][place], place)
        by = np.delete(np.array(report.names), place)[row.argmax()] if len(row) and row.max() > 0 else ""
        found.append(Verdict(name, report.expected[name], word_for(report.expected[name]), str(by)))
    worst = max(found, key=lambda one: one.value)
    return [*found, Verdict("in all", worst.value, worst.word, worst.name)]


def word_for(value: float) -> str:
    """An expected loss in words."""
    return next(word for bar, word in _WORDS if not value > bar)


def hints(report: Report) -> list[str]:
    """What can be done about it, most to the point first."""
    off = ~np.eye(len(report.names), dtype=bool)
    if not off.any():
        return []
    found = []
    found_out = verdicts(report)
    if not found_out:
        found.append("for a verdict give real rows, `data=DIR`: only they tell how far one disturbs another's task")
    elif found_out[-1].word != _WORDS[0][1]:
        found += [
            "fit the merged factors to every expert on rows without labels: mbert merge --method distill --data DIR",
            "lose nothing and keep all adapters: mbert merge --method ensemble",
        ]
    if not (report.matrices["basis"][off] == 0).all():
        found.append("train all of them in one folder on rows of one basis (the default of mbert train-adapter): "
                     "then no input direction is shared")  # fmt: skip
    norms = np.nan_to_num(report.matrices["norms"])
    if (largest := norms.max()) >= UNBALANCED:
        i, j = np.argwhere(norms == largest)[0]
        found.append(f"{report.names[i]} is {largest:.1f} times as large as {report.names[j]}: "
                     f"try a smaller weight, `weights={report.names[i]}={1 / largest:.2g}`")  # fmt: skip
    return found


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """All of it; what is not finite is null."""
    report, invariants = diagnosis.report, diagnosis.invariants
    return {
        "invariants": [
            {
                "invariant": one.invariant,
                "what": one.what,
                "error": _finite(one.error),
                "tolerance": one.tolerance,
                "where": one.where,
                "kept": one.kept,
            }
            for one in invariants.checks
        ],
        "left_out": dict(invariants.left_out),
        "names": list(report.names),
        "matrices": {
            name: [[_finite(value) for value in row] for row in matrix.tolist()]
            for name, matrix in report.matrices.items()
        },
        "expected": dict(report.expected),
        "capacity": report.capacity,
        "verdicts": [vars(one) for one in verdicts(report)],
        "hints": hints(report),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
