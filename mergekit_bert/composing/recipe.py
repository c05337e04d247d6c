"""Recipes: everything that a merge is told, as a record, as YAML, and in the merged file."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergekit_bert.composing.ingredient import Ingredient
from mergekit_bert.composing.method import METHODS, Method, chosen_weights, make_options
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import write_atomic
from mergekit_bert.patterns import PatternError, check_patterns, matches
from mergekit_bert.registry import unknown

ENSEMBLE = "ensemble"
_LARGEST_WEIGHT = 1e6
"""Beyond it the sums of float32 values overflow or drown all others."""


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    An empty ``method`` is the recommended one, see
    :func:`~mergekit_bert.composing.recommendation.with_method`. ``weights`` are by input name; an input
    without one gets the method's own. ``layers`` maps a pattern of whole site names to weights that hold there
    instead, the last match counts. ``rank`` compresses every merged Delta to at most so many directions. ``private``
    is the rank of the remainder that every task keeps for itself at every site (None or 0: none). ``options`` are the
    method's.
    """

    method: str = ""
    space: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rank: int | None = None
    private: int | None = None
    seed: int = 0
    inputs: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """For a file whose keys are sorted: the order of the layers counts, so they are a list."""
        layers = [[pattern, dict(weights)] for pattern, weights in self.layers.items()]
        found = dataclasses.asdict(self) | {"inputs": list(self.inputs), "layers": layers}
        if not self.private:  # a merge without remainders is what it was before there were any
            del found["private"]
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Recipe":
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "layers": dict(value["layers"])})

    def check(self, ingredients: Sequence[Ingredient]) -> None:
        """Raise CompositionError or UnknownNameError for what these inputs cannot be merged by."""
        if self.method != ENSEMBLE and self.method not in METHODS.names():
            raise unknown("merge method", self.method, [*METHODS.names(), ENSEMBLE])
        if self.method == ENSEMBLE:
            self._check_ensemble()
            return
        method = METHODS.get(self.method)
        if self.space not in SPACES:
            raise unknown("space", self.space, list(SPACES))
        if self.space not in method.spaces:
            raise CompositionError(
                f"--space {self.space}",
                f"{method.name} is not defined there",
                f"one of {', '.join(method.spaces)}",
                "choose another space or method",
            )
        if self.rank is not None and self.rank < 1:
            raise CompositionError("--rank", f"{self.rank}", "a whole number of at least 1", "correct --rank")
        if self.private is not None and self.private < 0:
            raise CompositionError("--private", f"{self.private}", "a whole number of at least 0", "correct --private")
        make_options(method, self.options)
        if self.layers and method.learn is not None:
            raise CompositionError(
                "layers", f"weights by layer for {method.name}, which learns its own", "none", "drop them"
            )
        names = [one.name for one in ingredients]
        _check_weights("--weights", self.weights, names)
        self._check_layers(names, {site for one in ingredients for site in one.deltas})
        method.check(ingredients)
        chosen_weights(method, ingredients, self.weights)

    def _check_layers(self, names: Sequence[str], sites: AbstractSet[str]) -> None:
        try:
            check_patterns(self.layers)
        except PatternError as error:
            raise CompositionError("layers", f"{error}", "patterns of whole site names", "correct them") from error
        for pattern, weights in self.layers.items():
            _check_weights(f"layers, {pattern!r}", weights, names)
            if not any(matches(pattern, site) for site in sites):
                raise CompositionError(
                    f"layers, {pattern!r}",
                    "no site matches it",
                    f"a pattern of whole names such as {min(sites, default='none')}",
                    "correct the pattern",
                )

    def _check_ensemble(self) -> None:
        for name, given in (("weights", self.weights), ("options", self.options), ("layers", self.layers)):
            if given:
                raise CompositionError(
                    f"--{name}",
                    f"{name} for an ensemble",
                    "none: experts are kept as they are",
                    f"drop --{name} or choose another --method",
                )
        if self.rank is not None or self.space != "full":
            raise CompositionError(
                "--method ensemble", "a rank or space", "neither: experts are kept as they are", "drop them"
            )
        if self.private:
            raise CompositionError(
                "--private", "remainders for an ensemble", "none: it keeps the experts whole", "drop --private"
            )

    def at(self, site: str, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights that hold at ``site``."""
        found = dict(weights)
        for pattern, own in self.layers.items():
            if matches(pattern, site):
                found |= own
        return found


def _check_weights(where: str, weights: Mapping[str, float], names: Sequence[str]) -> None:
    for name, weight in weights.items():
        if name not in names:
            raise CompositionError(where, f"{name!r}", f"names among {', '.join(names)}", f"correct {where}")
        if not math.isfinite(weight):
            raise CompositionError(where, f"'{name}={weight}'", "a finite number", f"correct {where}")
        if abs(weight) > _LARGEST_WEIGHT:
            raise CompositionError(
                where, f"'{name}={weight}'", f"a number within ±{_LARGEST_WEIGHT:g}", f"correct {where}"
            )


def settled(recipe: Recipe, ingredients: Sequence[Ingredient]) -> Recipe:
    """``recipe`` with all that it leaves to defaults; raises an MbertError for one that these inputs do not allow."""
    recipe.check(ingredients)
    recipe = dataclasses.replace(recipe, inputs=())
    if recipe.method == ENSEMBLE:
        return recipe
    method = METHODS.get(recipe.method)
    options = dataclasses.asdict(make_options(method, recipe.options))
    return dataclasses.replace(recipe, options=options, weights=chosen_weights(method, ingredients, recipe.weights))


def rows_for(recipe: Recipe) -> int:
    """How many rows of each task do the recipe's method good."""
    return METHODS.get(recipe.method).rows if recipe.method in METHODS.names() else Method.rows


def changed(recipe: Recipe | None, **given: Any) -> Recipe:
    """``recipe`` (or the default one) with what is given (not None, not empty) instead of its own."""
    return dataclasses.replace(
        recipe or Recipe(), **{name: value for name, value in given.items() if value or value == 0}
    )


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write ``recipe`` as YAML."""
    value = dataclasses.asdict(recipe) | {"inputs": list(recipe.inputs)}
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    write_atomic(path, text.encode())


def read_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; raises CompositionError naming line and key."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise CompositionError(str(path), found.lower(), "a YAML file", "check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise CompositionError(where, "not YAML", "key: value lines", "correct the line") from error
    if not isinstance(value, dict) or not isinstance(node, yaml.MappingNode):
        raise CompositionError(str(path), "not a mapping", "key: value lines", "see docs/merging.md")
    keys = [str(key.value) for key, _ in node.value]
    for place, (key, _) in enumerate(node.value):
        if str(key.value) in keys[:place]:
            where = f"{path}, line {key.start_mark.line + 1}"
            raise CompositionError(where, f"the key {key.value!r} again", "each key once", "drop one of them")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    known = {one.name for one in dataclasses.fields(Recipe)}
    kept = {}
    for key, found in value.items():
        where = f"{path}, line {lines.get(str(key), 1)}"
        if key not in known:
            raise CompositionError(where, f"an unknown key {key!r}", f"one of {', '.join(sorted(known))}", "correct it")
        kept[key] = _checked(f"{where}, key {key!r}", key, found)
    return Recipe(**kept)


def _checked(where: str, key: str, value: Any) -> Any:
    """A recipe's value in its type."""
    whole = isinstance(value, int) and not isinstance(value, bool)

    def numbers(found: Any) -> bool:
        return isinstance(found, dict) and all(
            isinstance(name, str) and isinstance(one, int | float) and not isinstance(one, bool)
            for name, one in found.items()
        )

    expected, good = {
        "method": ("a name", isinstance(value, str)),
        "space": ("a name", isinstance(value, str)),
        "options": ("names and values", isinstance(value, dict) and all(isinstance(one, str) for one in value)),
        "weights": ("a number for each input", numbers(value)),
        "layers": (
            "patterns, each with a number for each input",
            isinstance(value, dict) and all(isinstance(p, str) and numbers(one) for p, one in value.items()),
        ),
        "rank": ("a whole number or nothing", value is None or whole),
        "private": ("a whole number or nothing", value is None or whole),
        "seed": ("a whole number", whole),
        "inputs": ("a list of files", isinstance(value, list) and all(isinstance(one, str) for one in value)),
    }[key]
    if not good:
        raise CompositionError(where, f"{value!r}", expected, "correct it")
    if key == "layers":
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CompositionError(where, f"{pattern!r} ({error})", "a regular expression", "correct it") from error
    return value
