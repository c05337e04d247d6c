"""Search: the weights, factors of layers and options under which a merge scores best on rows held out from train.

CMA-ES (Hansen 2016, arXiv 1604.00772) starts at the method's own weights; merging stays as quick as it is, and the
score is the overall one of an evaluation. A finished evaluation is kept and never computed twice, so that a search that
was killed, or is asked for more evaluations, goes on where it stood. It is known by all that a finished cell is.
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

from mergekit_bert.composing.composition import Merged, Model
from mergekit_bert.composing.merge_input import MergeInput, check_together
from mergekit_bert.composing.merging import MergeContext, merge_weights, with_statistics
from mergekit_bert.composing.method import METHODS, Method, chosen_weights, make_options
from mergekit_bert.composing.prediction import Predictor
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
from mergekit_bert.progress import progress_bar
from mergekit_bert.registry import unknown
from mergekit_bert.schema import Finite, Schema, SchemaError, Sha256, validate

SUFFIX = ".search.json"
OVER = ("weights", "layers", "options")
_FORMAT = 1
_GROUPS = 3
_SPREAD = 0.3
"""The first steps, in units of the axes."""

Tasks = Mapping[str, tuple[Task, Rows]]


@dataclass(frozen=True)
class Axis:
    """A number that is searched: of what kind, which one, where it starts, its unit and its bounds.

    Of the kind ``layers``, ``name`` is the pattern of a group's sites and the number a factor of all weights there.
    """

    kind: str
    name: str
    start: float
    unit: float
    low: float = -math.inf
    high: float = math.inf


def find_axes(recipe: Recipe, merge_inputs: Sequence[MergeInput], over: Sequence[str]) -> list[Axis]:
    """What ``over`` (of :data:`OVER`) lets a search change; raises CompositionError where that is nothing."""
    for kind in over:
        if kind not in OVER:
            raise unknown("`over`", kind, list(OVER))
    method = METHODS.get(recipe.method)
    weights = chosen_weights(method, merge_inputs, recipe.weights)
    unit = fmean(map(abs, weights.values())) or 1.0
    found = [Axis("weights", name, weight, unit) for name, weight in weights.items()] if "weights" in over else []
    if "layers" in over:
        if recipe.layers:
            raise CompositionError("`over=layers`", "a recipe with weights by layer", "one without", "drop its layers")
        found += [Axis("layers", pattern, 1.0, 1.0) for pattern in layer_groups(merge_inputs)]
    if "options" in over:
        found += _option_axes(method, recipe)
    if not found:
        raise CompositionError(
            f"`over={','.join(over)}`",
            f"nothing that {method.name} could change",
            f"some of {', '.join(OVER)}",
            "search over weights",
        )
    return found


def layer_groups(merge_inputs: Sequence[MergeInput]) -> list[str]:
    """The encoder's layers in thirds, each as a pattern of its sites."""
    sites = {site for one in merge_inputs for site in one.deltas}
    numbers = {int(match[1]) for site in sites if (match := re.match(r"\D*(\d+)\.", site))}
    thirds = np.array_split(np.arange(max(numbers, default=-1) + 1), _GROUPS)
    groups = [numbers & set(third.tolist()) for third in thirds]
    return [rf"\D*({'|'.join(map(str, sorted(group)))})\..*" for group in groups if group]


def _option_axes(method: Method, recipe: Recipe) -> list[Axis]:
    """The method's options that are numbers between two bounds."""
    options, kinds = make_options(method, recipe.options), get_type_hints(method.options)
    found = []
    for one in dataclasses.fields(method.options):
        low, high = one.metadata["low"], one.metadata["high"]
        if kinds[one.name] is float and low is not None and high is not None:
            found.append(Axis("options", one.name, getattr(options, one.name), high - low, low, high))
    return found


def moved(recipe: Recipe, merge_inputs: Sequence[MergeInput], axes: Sequence[Axis], point: Sequence[float]) -> Recipe:
    """``recipe`` with the axes at ``point``."""
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
    """The overall score of the tasks' main figures; 0 where an output is not finite."""
    predictor = Predictor(model, encoder)
    found = []
    for name, (task, rows) in tasks.items():
        outputs = predictor.outputs(name, rows)
        if not np.isfinite(outputs).all():
            return 0.0
        value = metric(task.metric).value(rows.label_column(task), kind_of(task).predicted(task, outputs))
        found.append((task.metric, value))
    return overall_score(found)


def search(
    inputs: Sequence[MergeInput],
    recipe: Recipe,
    tasks: Tasks,
    encoder: Encoder,
    evaluations: int,
    over: Sequence[str] = ("weights",),
    given: MergeContext | None = None,
    path: Path | None = None,
    show: bool = False,
    held: Mapping[str, int | None] | None = None,
) -> Merged:
    """The best merge of ``inputs`` that at most ``evaluations`` find; the first is ``recipe`` itself.

    ``tasks`` has the labelled rows to score on, ``held`` how many of each task's its adapter's training held out.
    Finished evaluations are kept at ``path``. The seed is the recipe's; all that was tried is in the result's
    ``trace``. Raises CompositionError for what cannot be searched.
    """
    _check(inputs, recipe, evaluations)
    axes = find_axes(recipe, inputs, over)
    ready = with_statistics(METHODS.get(recipe.method), inputs, given)

    def made(point: Sequence[float]) -> Merged:
        return merge_weights(ready, moved(recipe, inputs, axes, point), given)

    key = fingerprint(
        {
            "format": _FORMAT,
            "made_by": made_by(),
            "recipe": settled(recipe, inputs).to_json(),
            "axes": [[axis.kind, axis.name, axis.start] for axis in axes],
            "inputs": [one.identify() for one in inputs],
            "base": encoder.fingerprint,
            "rows": {name: rows.fingerprint() for name, (_, rows) in tasks.items()},
            "unlabelled": _unlabelled(recipe, tasks, given),
            "cmaes": version("cmaes"),
        }
    )
    tried = _Tried(lambda point: overall(made(point), encoder, tasks), path, key)
    with progress_bar("search", evaluations, show) as bar:
        _optimise(axes, tried, evaluations, recipe.seed, bar)
    points = list(tried.scores)
    best = max(range(len(points)), key=lambda place: (tried.scores[points[place]], -place))
    model = made(points[best])
    told = partial(_told, axes)
    trace = {
        "over": list(over),
        "optimizer": f"CMA-ES, cmaes {version('cmaes')}",
        "rows": {
            name: {**rows.record(), "held_out_in_training": (held or {}).get(name)} for name, (_, rows) in tasks.items()
        },
        "evaluations": [{**told(point), "score": score} for point, score in tried.scores.items()],
        "best": best,
    }
    return dataclasses.replace(model, trace={**model.trace, "search": trace})


def _check(inputs: Sequence[MergeInput], recipe: Recipe, evaluations: int) -> None:
    check_together(inputs)
    recipe.check(inputs)
    if evaluations < 1:
        raise CompositionError("`evaluations`", f"{evaluations} evaluations", "at least 1", "correct `evaluations`")
    if recipe.method == ENSEMBLE or METHODS.get(recipe.method).learn is not None:
        found = "keeps all weights" if recipe.method == ENSEMBLE else "finds its weights itself"
        raise CompositionError("`evaluations`", f"{recipe.method}, which {found}", "a method that is given its weights",
                               "choose another `method` or drop `evaluations`")  # fmt: skip


def _unlabelled(recipe: Recipe, tasks: Tasks, given: MergeContext | None) -> dict[str, str]:
    """The fingerprints of the rows that the method itself reads."""
    if given is None or not METHODS.get(recipe.method).needs:
        return {}
    return {name: given.rows(name).fingerprint() for name in tasks}


class _Tried:
    """The score of a point: known from before, or found and kept."""

    def __init__(self, score: Callable[[Sequence[float]], float], path: Path | None, key: str) -> None:
        self.score, self.path, self.key = score, path, key
        self.before = _read(path, key)
        self.scores: dict[tuple[float, ...], float] = {}

    def __call__(self, point: tuple[float, ...]) -> float:
        if point not in self.scores:
            known = point in self.before
            self.scores[point] = self.before[point] if known else self.score(point)
            if self.path is not None and not known:
                kept = {**self.before, **self.scores}
                told = [{"point": list(point), "score": score} for point, score in kept.items()]
                write_json(self.path, {"key": self.key, "evaluations": told})
        return self.scores[point]


class _Evaluation(Schema):
    point: tuple[Finite, ...]
    score: Finite


class _File(Schema):
    """The layout of the file that keeps a search."""

    key: Sha256
    evaluations: list[_Evaluation]


def _read(path: Path | None, key: str) -> dict[tuple[float, ...], float]:
    """The finished evaluations of the same search; none where the file is of another.

    Raises CompositionError for a file that is broken.
    """
    try:
        found = validate(_File, read_mapping(path)) if path is not None else None
    except FileNotFoundError:
        return {}
    except (OSError, DocumentError, SchemaError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompositionError(
            str(path), f"broken ({reason})", "a search as mbert keeps it", "remove it: the search then begins anew"
        ) from error
    return {one.point: one.score for one in found.evaluations} if found is not None and found.key == key else {}


def _optimise(
    axes: Sequence[Axis], tried: _Tried, evaluations: int, seed: int, bar: Callable[[int, str], None]
) -> None:
    """Try the start, then what CMA-ES asks for, in units of the axes."""
    start, unit = np.array([axis.start for axis in axes]), np.array([axis.unit for axis in axes])
    bounds = np.array([[axis.low, axis.high] for axis in axes])
    tried(tuple(start.tolist()))
    optimizer = CMA(start / unit, _SPREAD, bounds / unit[:, None], seed=seed % 2**32)
    asked = 1
    while not optimizer.should_stop():
        answers = []
        for _ in range(optimizer.population_size):
            if asked == evaluations:
                return
            place = optimizer.ask()
            point = np.clip(place * unit, bounds[:, 0], bounds[:, 1])
            score = tried(tuple(point.tolist()))
            asked += 1
            answers.append((place, -score))
            bar(asked, f"best {max(tried.scores.values()):.4f}")
        optimizer.tell(answers)


def _told(axes: Sequence[Axis], point: Sequence[float]) -> dict[str, dict[str, float]]:
    """A point as a reader of the file wants it: by kind and name."""
    found: dict[str, dict[str, float]] = {}
    for axis, value in zip(axes, point, strict=True):
        found.setdefault(axis.kind, {})[axis.name] = value
    return found
