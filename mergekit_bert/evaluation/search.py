"""Search for the weights, layer factors and options with which a merge scores best on held-out rows of train.

CMA-ES (Hansen 2016, arXiv 1604.00772) starts at the method's default weights and maximises the overall score.
Evaluations are stored and never computed twice, so a search that was interrupted, or is given more evaluations,
continues where it stopped. They are stored under a fingerprint of everything that determines them, as in
:mod:`~mergekit_bert.evaluation.merge_results`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import get_type_hints

import numpy as np
from cmaes import CMA

from mergekit_bert.composing.merge_input import MergeInput, check_together
from mergekit_bert.composing.merging import MergeContext, merge_weights, with_statistics
from mergekit_bert.composing.method import METHODS, Method, chosen_weights, make_options
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe, settled
from mergekit_bert.composing.source import made_by
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric, overall_score
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import fingerprint, write_json
from mergekit_bert.models.composition import Merged, Model
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.progress import progress_bar
from mergekit_bert.registry import unknown
from mergekit_bert.schema import Finite, Schema, SchemaError, Sha256, validate

_NOT_FINITE = -100.0
"""Below any score: an error metric is negative."""
SUFFIX = ".search.json"
OVER = ("weights", "layers", "options")
_FORMAT = 1
_GROUPS = 3
_SPREAD = 0.3
"""Initial standard deviation, in units of the axes."""

Tasks = Mapping[str, tuple[Task, Rows]]


@dataclass(frozen=True)
class Axis:
    """One searched number: its kind (one of :data:`OVER`), name, start value, unit and bounds.

    For the kind ``layers``, ``name`` is a pattern of site names, and the number is a factor for all weights there.
    """

    kind: str
    name: str
    start: float
    unit: float
    low: float = -math.inf
    high: float = math.inf


def find_axes(recipe: Recipe, merge_inputs: Sequence[MergeInput], over: Sequence[str]) -> list[Axis]:
    """The numbers that a search over ``over`` (of :data:`OVER`) changes; raises CompositionError if there are none."""
    for kind in over:
        if kind not in OVER:
            raise unknown("`over`", kind, list(OVER))
    method = METHODS.get(recipe.method)
    weights = chosen_weights(method, merge_inputs, recipe.weights)
    unit = fmean(map(abs, weights.values())) or 1.0
    axes = [Axis("weights", name, weight, unit) for name, weight in weights.items()] if "weights" in over else []
    if "layers" in over:
        if recipe.layers:
            raise CompositionError(
                "`over=layers`", "a recipe with weights by layer", "one without", "remove its layers"
            )
        axes += [Axis("layers", pattern, 1.0, 1.0) for pattern in layer_groups(merge_inputs)]
    if "options" in over:
        axes += _option_axes(method, recipe)
    if not axes:
        raise CompositionError(
            f"`over={','.join(over)}`",
            f"nothing that can be searched for {method.name}",
            f"some of {', '.join(OVER)}",
            "search over weights",
        )
    return axes


def layer_groups(merge_inputs: Sequence[MergeInput]) -> list[str]:
    """The encoder's layers in thirds, each as a pattern of its sites' names."""
    sites = {site for merge_input in merge_inputs for site in merge_input.deltas}
    numbers = {int(match[1]) for site in sites if (match := re.match(r"\D*(\d+)\.", site))}
    thirds = np.array_split(np.arange(max(numbers, default=-1) + 1), _GROUPS)
    groups = [numbers & set(third.tolist()) for third in thirds]
    return [rf"\D*({'|'.join(map(str, sorted(group)))})\..*" for group in groups if group]


def _option_axes(method: Method, recipe: Recipe) -> list[Axis]:
    """The method's numeric options that have a lower and an upper bound."""
    options, kinds = make_options(method, recipe.options), get_type_hints(method.options)
    axes = []
    for option in dataclasses.fields(method.options):
        low, high = option.metadata["low"], option.metadata["high"]
        if kinds[option.name] is float and low is not None and high is not None:
            axes.append(Axis("options", option.name, getattr(options, option.name), high - low, low, high))
    return axes


def recipe_at(
    recipe: Recipe, merge_inputs: Sequence[MergeInput], axes: Sequence[Axis], point: Sequence[float]
) -> Recipe:
    """``recipe`` with the numbers of ``axes`` set to ``point``."""
    values: dict[str, dict[str, float]] = {kind: {} for kind in OVER}
    for axis, value in zip(axes, point, strict=True):
        values[axis.kind][axis.name] = value
    weights = chosen_weights(METHODS.get(recipe.method), merge_inputs, recipe.weights) | values["weights"]
    layers = {
        pattern: {name: factor * weight for name, weight in weights.items()}
        for pattern, factor in values["layers"].items()
    }
    return dataclasses.replace(
        recipe, weights=weights, layers={**recipe.layers, **layers}, options={**recipe.options, **values["options"]}
    )


def overall(model: Model, encoder: Encoder, tasks: Tasks) -> float:
    """The overall score of the tasks' main metrics; below any score if an output is not finite."""
    predictor = Predictor(model, encoder)
    scores = []
    for name, (task, rows) in tasks.items():
        outputs = predictor.outputs(name, rows)
        if not np.isfinite(outputs).all():
            return _NOT_FINITE
        score = metric(task.metric).value(rows.label_column(task), kind_of(task).predicted(task, outputs))
        scores.append((task.metric, score))
    return overall_score(scores)


def search(
    inputs: Sequence[MergeInput],
    recipe: Recipe,
    tasks: Tasks,
    encoder: Encoder,
    evaluations: int,
    over: Sequence[str] = ("weights",),
    context: MergeContext | None = None,
    path: Path | None = None,
    show: bool = False,
    held: Mapping[str, int | None] | None = None,
) -> Merged:
    """The best merge of ``inputs`` in at most ``evaluations`` evaluations, the first of which is ``recipe`` itself.

    ``tasks`` has the labelled rows to score on, ``held`` how many of each task's rows were held out when its adapter
    was trained. Evaluations are stored in the file ``path``. The seed is that of the recipe. The ``trace`` of the
    result has all evaluations. Raises CompositionError for what cannot be searched.
    """
    _check(inputs, recipe, evaluations)
    axes = find_axes(recipe, inputs, over)
    complete = with_statistics(METHODS.get(recipe.method), inputs, context)

    def merged_at(point: Sequence[float]) -> Merged:
        return merge_weights(complete, recipe_at(recipe, inputs, axes, point), context)

    key = fingerprint(
        {
            "format": _FORMAT,
            "made_by": made_by(),
            "recipe": settled(recipe, inputs).to_json(),
            "axes": [[axis.kind, axis.name, axis.start] for axis in axes],
            "inputs": [merge_input.identify() for merge_input in inputs],
            "base": encoder.fingerprint,
            "rows": {name: rows.fingerprint() for name, (_, rows) in tasks.items()},
            "unlabelled": _unlabelled(recipe, tasks, context),
            "cmaes": version("cmaes"),
        }
    )
    evaluate = _Evaluations(lambda point: overall(merged_at(point), encoder, tasks), path, key)
    with progress_bar("search", evaluations, show) as bar:
        _optimise(axes, evaluate, evaluations, recipe.seed, bar)
    points = list(evaluate.scores)
    best = max(range(len(points)), key=lambda place: (evaluate.scores[points[place]], -place))
    model = merged_at(points[best])
    named = partial(_named, axes)
    trace = {
        "over": list(over),
        "optimizer": f"CMA-ES, cmaes {version('cmaes')}",
        "rows": {
            name: {**rows.record(), "held_out_in_training": (held or {}).get(name)} for name, (_, rows) in tasks.items()
        },
        "evaluations": [{**named(point), "score": score} for point, score in evaluate.scores.items()],
        "best": best,
    }
    return dataclasses.replace(model, trace={**model.trace, "search": trace})


def _check(inputs: Sequence[MergeInput], recipe: Recipe, evaluations: int) -> None:
    check_together(inputs)
    recipe.check(inputs)
    if evaluations < 1:
        raise CompositionError("`evaluations`", f"{evaluations} evaluations", "at least 1", "correct `evaluations`")
    if recipe.method == ENSEMBLE or METHODS.get(recipe.method).learn is not None:
        reason = "keeps all adapters as they are" if recipe.method == ENSEMBLE else "learns from rows by itself"
        raise CompositionError(
            "`evaluations`",
            f"{recipe.method}, which {reason}",
            "a method whose weights can be searched",
            "choose another `method` or drop `evaluations`",
        )


def _unlabelled(recipe: Recipe, tasks: Tasks, context: MergeContext | None) -> dict[str, str]:
    """The fingerprints of the rows that the method itself reads."""
    if context is None or not METHODS.get(recipe.method).needs:
        return {}
    return {name: context.rows(name).fingerprint() for name in tasks}


class _Evaluations:
    """The score of a point: read from the file of an earlier search, or computed and stored there."""

    def __init__(self, score: Callable[[Sequence[float]], float], path: Path | None, key: str) -> None:
        self.score, self.path, self.key = score, path, key
        self.stored = _read(path, key)
        self.scores: dict[tuple[float, ...], float] = {}

    def __call__(self, point: tuple[float, ...]) -> float:
        if point not in self.scores:
            known = point in self.stored
            self.scores[point] = self.stored[point] if known else self.score(point)
            if self.path is not None and not known:
                scores = {**self.stored, **self.scores}
                evaluations = [{"point": list(point), "score": score} for point, score in scores.items()]
                write_json(self.path, {"key": self.key, "evaluations": evaluations})
        return self.scores[point]


class _Evaluation(Schema):
    point: tuple[Finite, ...]
    score: Finite


class _File(Schema):
    """The layout of the file with the evaluations of a search."""

    key: Sha256
    evaluations: list[_Evaluation]


def _read(path: Path | None, key: str) -> dict[tuple[float, ...], float]:
    """The stored evaluations of the same search; none if the file belongs to another search.

    Raises CompositionError if the file is broken.
    """
    try:
        stored = validate(_File, read_mapping(path)) if path is not None else None
    except FileNotFoundError:
        return {}
    except (OSError, DocumentError, SchemaError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompositionError(
            str(path), f"broken ({reason})", "a search file as mbert writes it", "remove it to start the search again"
        ) from error
    if stored is None or stored.key != key:
        return {}
    return {evaluation.point: evaluation.score for evaluation in stored.evaluations}


def _optimise(
    axes: Sequence[Axis], evaluate: _Evaluations, evaluations: int, seed: int, bar: Callable[[int, str], None]
) -> None:
    """Evaluate the start, then the points that CMA-ES asks for, in units of the axes."""
    start, unit = np.array([axis.start for axis in axes]), np.array([axis.unit for axis in axes])
    bounds = np.array([[axis.low, axis.high] for axis in axes])
    evaluate(tuple(start.tolist()))
    optimizer = CMA(start / unit, _SPREAD, bounds / unit[:, None], seed=seed % 2**32)
    asked = 1
    while not optimizer.should_stop():
        answers = []
        for _ in range(optimizer.population_size):
            if asked == evaluations:
                return
            place = optimizer.ask()
            point = np.clip(place * unit, bounds[:, 0], bounds[:, 1])
            score = evaluate(tuple(point.tolist()))
            asked += 1
            answers.append((place, -score))
            bar(asked, f"best {max(evaluate.scores.values()):.4f}")
        optimizer.tell(answers)


def _named(axes: Sequence[Axis], point: Sequence[float]) -> dict[str, dict[str, float]]:
    """The numbers of a point by kind and name."""
    by_kind: dict[str, dict[str, float]] = {}
    for axis, value in zip(axes, point, strict=True):
        by_kind.setdefault(axis.kind, {})[axis.name] = value
    return by_kind
