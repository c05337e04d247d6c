"""Predict how well adapters will merge, from their Deltas and, if given, from unlabelled rows.

:func:`measure_pairs` computes numbers for every pair of inputs, :func:`verdicts` turns one of them, the predicted loss,
into words. Without rows, the numbers compare the Deltas alone. How much one adapter disturbs another's task can only be
measured on rows, because the features of a task also have components along the input directions of other Deltas.
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

PREDICTED_LOSS = "expected"
"""Name of the matrix of predicted losses."""
TRIAL_WEIGHT = 0.5
"""Weight of every input in the sum whose loss is predicted."""
ALL_INPUTS = "in all"
"""Name of the verdict on all inputs together."""
MATRICES = {
    "basis": "share of the basis rows that both use, relative to the smaller number of rows",
    "inputs": "overlap of the input spaces, weighted by energy: ‖Δi Δjᵀ‖ / √(‖Δi Δiᵀ‖ ‖Δj Δjᵀ‖)",
    "outputs": "overlap of the output spaces, weighted by energy: ‖Δiᵀ Δj‖ / √(‖Δiᵀ Δi‖ ‖Δjᵀ Δj‖)",
    "input_space": "mean cos² of the principal angles of the input spaces: ‖Qi Qjᵀ‖² / min rank, Q with unit rows",
    "output_space": "mean cos² of the principal angles of the output spaces",
    "cosine": "cosine of the Deltas, 〈Δi, Δj〉 / (‖Δi‖ ‖Δj‖)",
    "norms": "‖Δi‖ / ‖Δj‖",
    "signs": "share of the energy in entries where the signs differ, averaged over both adapters (0.5 by chance)",
    "interference": "how far j moves the features of i's rows: ‖f(x; Δi + Δj) − f(x; Δi)‖² / var f(x; Δi)",
    "answers": "the same for the outputs of i's head",
    PREDICTED_LOSS: f"share of i's score lost in the sum with j at {TRIAL_WEIGHT} each, as estimated by i's adapter",
}
"""What each matrix contains: i is the row, j the column; NaN where the number is undefined."""

LABELS = {"answers": "output change", PREDICTED_LOSS: "predicted loss"}
"""Names of matrices in tables and pictures, where these differ from the names in JSON."""

_WORDS = ((0.05, "gets along"), (0.2, "is disturbed"), (np.inf, "strongly affected"))
"""Verdicts by the largest predicted loss to which they apply."""
UNBALANCED = 2.0
"""Ratio of norms from which a smaller weight for the larger adapter is suggested."""

Matrix = Float[np.ndarray, "inputs inputs"]


@dataclass(frozen=True)
class Report:
    """The numbers of every pair: ``matrices`` by the names of :data:`MATRICES`, the last three only if there were rows.

    ``capacity`` is how many more adapters of the largest rank fit into the inputs' common basis (None if they have no
    common basis). ``predicted_loss`` is the predicted loss of each input in the sum of all at 0.5 each, by name.
    ``synthetic`` is whether the rows were generated.
    """

    names: Sequence[str]
    matrices: Mapping[str, Matrix]
    capacity: int | None = None
    predicted_loss: Mapping[str, float] = field(default_factory=dict)
    synthetic: bool = False


@dataclass(frozen=True)
class Verdict:
    """The verdict on one input (or the worst, for all): its predicted loss, and ``by`` which input it loses most."""

    name: str
    value: float
    word: str
    by: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """The report of ``mbert doctor``: invariants of the merge methods on the inputs, and numbers for every pair."""

    invariants: Invariants
    report: Report

    def __repr__(self) -> str:
        """One line: the inputs, and the numbers of checks and violations."""
        checks, violated = len(self.invariants.checks), len(self.invariants.violated)
        return f"Diagnosis({' + '.join(self.report.names)}, {checks} checks, {violated} violated)"

    def records(self) -> list[dict[str, Any]]:
        """One record for each ordered pair of inputs, with all numbers of the pair."""
        names, matrices = self.report.names, self.report.matrices
        return [
            {"of": of, "beside": beside} | {name: _finite(float(matrix[i, j])) for name, matrix in matrices.items()}
            for i, of in enumerate(names)
            for j, beside in enumerate(names)
            if i != j
        ]

    def plot(self) -> "Figure":
        """Each matrix as a heatmap."""
        return pairs_picture(self.report.names, {label(name): one for name, one in self.report.matrices.items()})


def label(name: str) -> str:
    """What tables and pictures call the matrix ``name``."""
    return LABELS.get(name, name)


def measure_pairs(
    merge_inputs: Sequence[MergeInput],
    context: MergeContext | None = None,
    ledger: Ledger | None = None,
    synthetic: bool = False,
) -> Report:
    """Compute all numbers for every pair of inputs; raises MbertError for inputs that cannot be merged.

    ``context`` provides rows, for the numbers that need some; ``synthetic`` is whether these were generated. ``ledger``
    records the basis rows that other adapters use.
    """
    check_together(merge_inputs)
    overlaps, angles, signs = _geometry(merge_inputs), _angles(merge_inputs), _signs(merge_inputs)
    computed = {"basis": _shared_basis(merge_inputs), **overlaps, **angles, "signs": signs}
    matrices = {name: computed[name] for name in MATRICES if name in computed}
    predicted_loss: dict[str, float] = {}
    if context is not None:
        measured, predicted_loss = _measure_on_rows(merge_inputs, context)
        matrices |= measured
    names, capacity = [merge_input.name for merge_input in merge_inputs], _capacity(merge_inputs, ledger)
    return Report(names, matrices, capacity, predicted_loss, synthetic)


def _shared_basis(merge_inputs: Sequence[MergeInput]) -> Matrix:
    def share(first: BasisRows | None, second: BasisRows | None) -> float:
        if first is None or second is None or first.seed != second.seed:
            return np.nan
        common = min(first.start + first.count, second.start + second.count) - max(first.start, second.start)
        return max(0, common) / min(first.count, second.count)

    return np.array([[share(first.basis, second.basis) for second in merge_inputs] for first in merge_inputs])


def _capacity(merge_inputs: Sequence[MergeInput], ledger: Ledger | None) -> int | None:
    """How many more adapters of the largest rank fit into the free runs of basis rows at the narrowest site."""
    taken = [merge_input.basis for merge_input in merge_inputs if merge_input.basis is not None]
    if len(taken) < len(merge_inputs) or len({rows.seed for rows in taken}) > 1:
        return None
    width = min(delta.shape[1] for merge_input in merge_inputs for delta in _all_deltas(merge_input))
    free = [True] * width
    for rows in taken:
        free[rows.start : rows.start + rows.count] = [False] * rows.count
    rank = max(rows.count for rows in taken)
    left = sum(len(list(run)) // rank for is_free, run in groupby(free) if is_free)
    return left if ledger is None else min(left, ledger.capacity_left(merge_inputs[0].base.fingerprint, rank, width))


def _all_deltas(merge_input: MergeInput) -> list[Delta]:
    task_specific = [delta for part in merge_input.own.values() for delta in part.deltas.values()]
    return [*merge_input.deltas.values(), *task_specific]


def _geometry(merge_inputs: Sequence[MergeInput]) -> dict[str, Matrix]:
    """Overlaps, cosines and norms over all sites, from products of factors.

    The overlap of the input spaces is the square root of the cosine of ``ΔiᵀΔi`` and ``ΔjᵀΔj``; that of the output
    spaces, of ``ΔiΔiᵀ`` and ``ΔjΔjᵀ``. If all directions had the same weight, it would be the root mean square of the
    cosines of the principal angles.
    """
    count = len(merge_inputs)
    inner, inputs, outputs = (np.zeros((count, count)) for _ in range(3))
    for site in _sites(merge_inputs):
        parts = {
            place: factors(finite_delta(merge_input, site).to(torch.float64))
            for place, merge_input in enumerate(merge_inputs)
            if site in merge_input.deltas
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
        "inputs": np.sqrt(_normalized(inputs).clip(0)),
        "outputs": np.sqrt(_normalized(outputs).clip(0)),
        "cosine": _normalized(inner),
        "norms": norms,
    }


def _angles(merge_inputs: Sequence[MergeInput]) -> dict[str, Matrix]:
    """Mean squared cosines of the principal angles over all sites, every direction of a Delta with the same weight.

    That is, of the block-diagonal matrices over all sites: ``Σ ‖Qi Qjᵀ‖² / min(Σ ri, Σ rj)``; zero if a Delta is zero.
    """
    count = len(merge_inputs)
    inputs, outputs, ranks = np.zeros((count, count)), np.zeros((count, count)), np.zeros(count)
    for site in _sites(merge_inputs):
        parts = {
            place: svd(finite_delta(merge_input, site))
            for place, merge_input in enumerate(merge_inputs)
            if site in merge_input.deltas
        }
        for i, (left, values, right) in parts.items():
            ranks[i] += len(values)
            for j, (other_left, _, other_right) in parts.items():
                inputs[i, j] += float((right @ other_right.T).square().sum())
                outputs[i, j] += float((left.T @ other_left).square().sum())
    least = np.minimum.outer(ranks, ranks)
    return {
        name: np.divide(total, least, out=np.zeros_like(total), where=least > 0)
        for name, total in {"input_space": inputs, "output_space": outputs}.items()
    }


def _normalized(products: Matrix) -> Matrix:
    """Inner products as cosines; zero if a vector is zero."""
    size = np.sqrt(np.diag(products).clip(0))
    scale = np.outer(size, size)
    cosines: Matrix = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return cosines


def _sites(merge_inputs: Sequence[MergeInput]) -> list[str]:
    return list(dict.fromkeys(site for merge_input in merge_inputs for site in merge_input.deltas))


def _signs(merge_inputs: Sequence[MergeInput]) -> Matrix:
    """Shares of energy with differing signs; computed from dense Deltas, so only at one site of each kind."""
    count = len(merge_inputs)
    energy, opposed = np.zeros(count), np.zeros((count, count))
    for site in one_of_each_kind(merge_inputs):
        parts = {
            place: finite_delta(merge_input, site).to(torch.float64).dense()
            for place, merge_input in enumerate(merge_inputs)
            if site in merge_input.deltas
        }
        for i, delta in parts.items():
            energy[i] += float(delta.square().sum())
            for j, other in parts.items():
                opposed[i, j] += float(delta.square()[delta.sign() * other.sign() < 0].sum())
    shares = np.divide(opposed, energy[:, None], out=np.zeros_like(opposed), where=energy[:, None] > 0)
    return (shares + shares.T) / 2


def _measure_on_rows(
    merge_inputs: Sequence[MergeInput], context: MergeContext
) -> tuple[dict[str, Matrix], dict[str, float]]:
    """Interference, output change and predicted loss of every ordered pair; predicted loss in the sum of all."""
    encoder, count = context.encoder(), len(merge_inputs)
    check_base("doctor", merge_inputs[0].base, encoder)
    matrices = {name: np.zeros((count, count)) for name in ("interference", "answers", PREDICTED_LOSS)}
    among_all = dict.fromkeys((merge_input.name for merge_input in merge_inputs), 0.0)

    def answers(task: str, parts: Sequence[MergeInput], weight: float = 1.0) -> Answers:
        weights = dict.fromkeys((merge_input.name for merge_input in parts), weight)
        model = merge_weights(parts, Recipe("task_arithmetic", weights=weights))
        part, rows = model.part(task), context.rows(task)
        if len(rows) < 2:
            raise DataError(rows.where, f"{len(rows)} rows", "at least two", "give more `rows`")
        return expert_answers(encoder, part, part.tokens(encoder, rows))

    with progress_bar("interference", count, context.show) as bar:
        for i, measured in enumerate(merge_inputs):
            bar(i, measured.name)
            for task in measured.parts:
                known, alone = Task.from_json(measured.parts[task]["task"]), answers(task, [measured])
                kind = kind_of(known)
                for j, other in enumerate(merge_inputs):
                    if other is not measured:
                        pair = [measured, other]
                        beside, sum_of_two = answers(task, pair), answers(task, pair, TRIAL_WEIGHT)
                        values = (
                            _distance(alone.features, beside.features),
                            _distance(alone.outputs, beside.outputs),
                            kind.expected_loss(known, alone.outputs, sum_of_two.outputs),
                        )
                        for matrix, value in zip(matrices.values(), values, strict=True):
                            matrix[i, j] += value / len(measured.parts)
                if count > 1:
                    sum_of_all = answers(task, merge_inputs, TRIAL_WEIGHT)
                    loss = kind.expected_loss(known, alone.outputs, sum_of_all.outputs)
                    among_all[measured.name] += loss / len(measured.parts)
    return matrices, among_all


def _distance(alone: Float[Tensor, "rows width"], beside: Float[Tensor, "rows width"]) -> float:
    """``Σ ‖beside − alone‖² / Σ ‖alone − mean‖²`` over the rows; 0 if nothing moved."""
    moved = float((beside - alone).double().square().sum())
    spread = float((alone - alone.mean(0)).double().square().sum())
    return moved / max(spread, torch.finfo(torch.float32).tiny) if moved else 0.0


def verdicts(report: Report) -> list[Verdict]:
    """One verdict for each input, and the worst for all together; none without real rows.

    They are based on the predicted loss, the number that correlates best with the measured loss (docs/evidence.md).
    Numbers from the Deltas alone do not predict it, and neither do synthetic rows, which are moved by other amounts.
    """
    if not report.predicted_loss or report.synthetic:
        return []
    verdicts_by_input = []
    for place, name in enumerate(report.names):
        losses, loss = np.delete(report.matrices[PREDICTED_LOSS][place], place), report.predicted_loss[name]
        by = np.delete(np.array(report.names), place)[losses.argmax()] if len(losses) and losses.max() > 0 else ""
        verdicts_by_input.append(Verdict(name, loss, word_for(loss), str(by)))
    worst = max(verdicts_by_input, key=lambda verdict: verdict.value)
    return [*verdicts_by_input, Verdict(ALL_INPUTS, worst.value, worst.word, worst.name)]


def word_for(loss: float) -> str:
    """A predicted loss in words."""
    return next(word for limit, word in _WORDS if not loss > limit)


def hints(report: Report) -> list[str]:
    """What the user can do to lose less, most useful first."""
    off = ~np.eye(len(report.names), dtype=bool)
    if not off.any():
        return []
    advice = []
    judged = verdicts(report)
    if not judged:
        advice.append("give real rows, `data=DIR`, for a verdict: without them the loss cannot be predicted")
    elif judged[-1].word != _WORDS[0][1]:
        advice += [
            "fit the merge to the answers of every adapter on unlabelled rows: mbert merge --method distill --data DIR",
            "keep all adapters in one file, which loses nothing: mbert merge --method ensemble",
        ]
    if not (report.matrices["basis"][off] == 0).all():
        advice.append(
            "train all adapters in one folder with rows of one basis (the default of mbert train-adapter): "
            "then they share no input directions"
        )
    norms = np.nan_to_num(report.matrices["norms"])
    if (largest := norms.max()) >= UNBALANCED:
        i, j = np.argwhere(norms == largest)[0]
        advice.append(
            f"the Delta of {report.names[i]} is {largest:.1f} times as large as that of {report.names[j]}: "
            f"try a smaller weight, `weights={report.names[i]}={1 / largest:.2g}`"
        )
    return advice


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything as JSON; numbers that are not finite are null. The predicted losses are under ``expected``."""
    report, invariants = diagnosis.report, diagnosis.invariants
    return {
        "invariants": [
            {
                "invariant": check.invariant,
                "what": check.what,
                "error": _finite(check.error),
                "tolerance": check.tolerance,
                "where": check.where,
                "kept": check.holds,
            }
            for check in invariants.checks
        ],
        "left_out": dict(invariants.left_out),
        "names": list(report.names),
        "matrices": {
            name: [[_finite(value) for value in row] for row in matrix.tolist()]
            for name, matrix in report.matrices.items()
        },
        "expected": dict(report.predicted_loss),
        "capacity": report.capacity,
        "verdicts": [vars(verdict) for verdict in verdicts(report)],
        "hints": hints(report),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
