"""Recipes: all settings of a merge, as a record, as a YAML file, and in the metadata of a merged file."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field

from mergekit_bert.arguments import check_types
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.method import ENSEMBLE as ENSEMBLE
from mergekit_bert.composing.method import METHODS, Method, chosen_weights, make_options
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.documents import DocumentError, read_yaml
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import write_atomic
from mergekit_bert.patterns import PatternError, check_patterns, matches
from mergekit_bert.registry import unknown
from mergekit_bert.schema import Rank, Scalar, SchemaError, Seed, Text, validate
from mergekit_bert.strict import STRICT, Before, from_pairs

_LARGEST_WEIGHT = 1e6
"""With larger weights, float32 sums overflow or lose all other terms."""
_LARGEST_RANK = 2**16
Weight = Annotated[float, Field(ge=-_LARGEST_WEIGHT, le=_LARGEST_WEIGHT)]


@dataclass(frozen=True)
class Recipe:
    """The settings of a merge.

    With an empty ``method``, the recommended one is used. ``weights`` are by input name. Inputs not listed get the
    method's default weight. ``layers`` maps patterns of full site names to weights that apply there instead; the last
    match counts. ``rank`` compresses every merged Delta to at most this rank. ``private`` is the rank of a residual
    that each task keeps at every site (None or 0: none). ``options`` are those of the method.
    """

    __pydantic_config__: ClassVar = STRICT

    method: Text = ""
    space: Text = "full"
    options: Mapping[Text, Scalar] = field(default_factory=dict)
    weights: Mapping[Text, Weight] = field(default_factory=dict)
    layers: Annotated[Mapping[Text, Mapping[Text, Weight]], Before(from_pairs)] = field(default_factory=dict)
    rank: Rank | None = None
    private: Rank | None = None
    seed: Seed = 0
    inputs: Sequence[Text] = ()

    def __post_init__(self) -> None:
        """Raise ArgumentError for a field of the wrong type."""
        check_types(self)

    def to_json(self) -> dict[str, Any]:
        """As JSON for a file's metadata, whose keys are sorted: ``layers`` are a list, because their order counts."""
        layers = [[pattern, dict(weights)] for pattern, weights in self.layers.items()]
        value = dataclasses.asdict(self) | {"inputs": list(self.inputs), "layers": layers}
        if not self.private:  # so that merges without residuals have the same bytes as before residuals existed
            del value["private"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Recipe":
        """The inverse of :meth:`to_json`; raises SchemaError for anything else."""
        return validate(cls, value)

    def check(self, merge_inputs: Sequence[MergeInput]) -> None:
        """Raise CompositionError or UnknownNameError if these inputs cannot be merged by this recipe."""
        if self.method != ENSEMBLE and self.method not in METHODS.names():
            raise unknown("merge method", self.method, [*METHODS.names(), ENSEMBLE])
        for name, value, low, high in (
            ("`rank`", self.rank, 1, _LARGEST_RANK),
            ("`private`", self.private, 0, _LARGEST_RANK),
            ("`seed`", self.seed, 0, 2**63 - 1),
        ):
            if value is not None and not low <= value <= high:
                raise CompositionError(name, f"{value}", f"a whole number from {low} to {high}", f"correct {name}")
        if self.method == ENSEMBLE:
            self._check_ensemble()
            return
        method = METHODS.get(self.method)
        if self.space not in SPACES:
            raise unknown("space", self.space, list(SPACES))
        if self.space not in method.spaces:
            raise CompositionError(
                f"`space={self.space}`",
                f"{method.name} is not defined there",
                f"one of {', '.join(method.spaces)}",
                "choose another space or method",
            )
        make_options(method, self.options)
        if self.layers and method.learn is not None:
            raise CompositionError(
                "layers", f"weights by layer for {method.name}, which learns them", "none", "drop them"
            )
        names = [merge_input.name for merge_input in merge_inputs]
        _check_weights("`weights`", self.weights, names)
        self._check_layers(names, {site for merge_input in merge_inputs for site in merge_input.deltas})
        method.check(merge_inputs)
        chosen_weights(method, merge_inputs, self.weights)

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
        for name, value in (("weights", self.weights), ("options", self.options), ("layers", self.layers)):
            if value:
                raise CompositionError(
                    f"`{name}`",
                    f"{name} for an ensemble",
                    "none: experts are kept as they are",
                    f"drop `{name}` or choose another `method`",
                )
        if self.rank is not None or self.space != "full":
            raise CompositionError(
                "`method=ensemble`", "a rank or space", "neither: experts are kept as they are", "drop them"
            )
        if self.private:
            raise CompositionError(
                "`private`", "residuals for an ensemble", "none: it keeps the experts whole", "drop `private`"
            )

    def at(self, site: str, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights at ``site``."""
        chosen = dict(weights)
        for pattern, replaced in self.layers.items():
            if matches(pattern, site):
                chosen |= replaced
        return chosen


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


def settled(recipe: Recipe, merge_inputs: Sequence[MergeInput]) -> Recipe:
    """``recipe`` with all defaults filled in; raises an MbertError if it does not fit these inputs."""
    recipe.check(merge_inputs)
    recipe = dataclasses.replace(recipe, inputs=())
    if recipe.method == ENSEMBLE:
        return recipe
    method = METHODS.get(recipe.method)
    options = dataclasses.asdict(make_options(method, recipe.options))
    return dataclasses.replace(recipe, options=options, weights=chosen_weights(method, merge_inputs, recipe.weights))


def rows_for(recipe: Recipe) -> int:
    """The default number of rows per task of the recipe's method."""
    return METHODS.get(recipe.method).rows if recipe.method in METHODS.names() else Method.rows


def changed(recipe: Recipe | None, **given: Any) -> Recipe:
    """``recipe`` (or the default one) with the ``given`` fields replaced, except those that are None or empty."""
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
        document = read_yaml(path)
    except OSError as error:
        raise CompositionError(
            str(path), (error.strerror or str(error)).lower(), "a YAML file", "check the path"
        ) from error
    except DocumentError as error:
        where = str(path) if error.line is None else f"{path}, line {error.line}"
        raise CompositionError(where, str(error), "a recipe in plain YAML", "see docs/merging.md") from error
    known = {record_field.name for record_field in dataclasses.fields(Recipe)}
    for key, line in document.lines.items():
        if key not in known:
            keys = f"one of {', '.join(sorted(known))}"
            raise CompositionError(f"{path}, line {line}", f"an unknown key {key!r}", keys, "correct it")
    try:
        recipe = validate(Recipe, document.value)
        check_patterns(recipe.layers)
    except SchemaError as error:
        line = document.lines.get(error.place.partition(".")[0], 1)
        where = f"{path}, line {line}, key '{error.place}'"
        raise CompositionError(where, error.found, error.expected, "correct it") from error
    except PatternError as error:
        where = f"{path}, line {document.lines['layers']}, key 'layers'"
        raise CompositionError(where, f"{error}", "patterns of whole site names", "correct them") from error
    return recipe
