"""Merge requests: everything that one merge is asked for, in one record; resolved once, then run.

The command line, the Python interface and whatever else asks for a merge build a :class:`MergeRequest`. What
contradicts itself, or would do nothing, is refused by :meth:`MergeRequest.resolved`, before any long work.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_bert.adapters.base import encoder_of
from mergekit_bert.composing.calibration import calibrate_heads, calibrate_scales
from mergekit_bert.composing.merge_input import MergeInput, check_together
from mergekit_bert.composing.merging import MergeContext, kept_inputs, merge_inputs_of, reads_rows
from mergekit_bert.composing.merging import merge as compose
from mergekit_bert.composing.recipe import Recipe, rows_for
from mergekit_bert.composing.recommendation import with_method
from mergekit_bert.data.given import given_data
from mergekit_bert.data.source import is_synthetic
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import ArgumentError, CompositionError, MbertWarning
from mergekit_bert.evaluation.held_out import apart_from_training, warn_of_training_rows
from mergekit_bert.evaluation.search import SUFFIX as SEARCHED
from mergekit_bert.evaluation.search import search
from mergekit_bert.evaluation.sources import calibration_rows, given_rows, tasks_of
from mergekit_bert.files import beside
from mergekit_bert.formats.budget import refuse_beside_size, within_size
from mergekit_bert.models.composition import Ensemble, Merged, as_merged
from mergekit_bert.outputs import held

SEARCH_ROWS, CALIBRATE_ROWS = 300, 256
_MOST_SEARCHED = 0.5
"""The largest share of a task's train rows that a search may score on."""


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, how, on which rows, and what to do after the merge.

    ``recipe`` without a method stands for the recommended one, and ``reason`` says why that was chosen ("" where a
    method was named). ``data`` and ``texts`` are where rows come from (see :func:`mergekit_bert.merge`), ``rows`` how
    many of each task a method may read (None: the method's own number). ``size`` limits the file, in MiB. ``search`` is
    the number of evaluations of a search (0: none) over ``search_over``, scored on ``search_rows`` of each task.
    ``calibrate`` names the steps after the merge, on ``calibrate_rows`` of each task. ``base`` is the encoder, where
    the inputs do not say it.
    """

    inputs: Sequence[MergeInput]
    recipe: Recipe = field(default_factory=Recipe)
    data: Any = None
    texts: Mapping[str, Any] | None = None
    rows: int | None = None
    base: str | Path | Encoder | None = None
    size: float | None = None
    keep_inputs: bool = False
    search: int = 0
    search_over: Sequence[str] = ("weights",)
    search_rows: int = SEARCH_ROWS
    calibrate: Sequence[str] = ()
    calibrate_rows: int | None = None
    reason: str = ""

    def resolved(self) -> "MergeRequest":
        """The same with its method, its rank and its rows settled.

        Raises an :class:`~mergekit_bert.errors.MbertError` for what contradicts itself, does not fit the inputs or
        would do nothing. Warns of ``data`` that nothing reads: a script may give the same to every method.
        """
        for name in ("rows", "search_rows", "calibrate_rows"):
            check_count(name, getattr(self, name))
        check_together(self.inputs)
        data = given_data("data", self.data, list(tasks_of(self.inputs).values()), "train")
        recipe, reason = self.recipe, ""
        if self.size is not None:
            refuse_beside_size("`keep_inputs`", self.keep_inputs)
            merged = bool(self.search or self.calibrate)
            recipe, reason = within_size(recipe, self.inputs, self.size, merged)
        recipe, why = with_method(
            recipe,
            self.inputs,
            bool(data or self.texts),
            synthetic=is_synthetic(data) and not self.texts,
            searched=bool(self.search),
        )
        return dataclasses.replace(self, data=data, recipe=recipe, reason=reason or why, size=None)._with_rows()

    def _with_rows(self) -> "MergeRequest":
        """The same with ``rows`` being those that the method reads."""
        if reads_rows(self.recipe, self.inputs):
            if self.calibrate and self.rows is not None and self.calibrate_rows is None:
                raise CompositionError(
                    "`rows`",
                    f"with `calibrate` it could mean those that {self.recipe.method} reads, or those to calibrate on",
                    "`rows` together with `calibrate_rows`",
                    "add `calibrate_rows=N`",
                )
            return self
        if self.calibrate and self.calibrate_rows is None:  # no others can be meant
            return dataclasses.replace(self, rows=None, calibrate_rows=self.rows)._with_rows_unread()
        return self._with_rows_unread()

    def _with_rows_unread(self) -> "MergeRequest":
        """The same, whose method reads no rows; CompositionError for some that nothing else reads either."""
        method = self.recipe.method
        unread = "`rows`" if self.rows else "`texts`" if self.texts and "scales" not in self.calibrate else ""
        if unread:
            remedy = (
                "give `search_rows` for the rows to search on, or drop it" if self.search and self.rows else "drop it"
            )
            raise CompositionError(unread, f"{method} reads no rows here", "a method that does", remedy)
        if self.data is not None and not self.search and not self.calibrate:
            others = "`calibrate=scales`" if is_synthetic(self.data) else "`search` or `calibrate`"
            warnings.warn(
                f"`data={self.data}`: {method} reads no rows here, so they are ignored; rows are used by methods that "
                f"need them (see `mbert methods`) and by {others}",
                MbertWarning,
                stacklevel=4,
            )
        return self

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The base of the inputs: the encoder given as ``base``, or the one they name."""
        return encoder_of("the first input", self.inputs[0].base, self.base)

    def _encoder(self) -> Encoder:
        return self.encoder

    def run(
        self, out: Path | None = None, *, folder: Path | None = None, lazy: bool = False, show: bool = False
    ) -> Merged | Ensemble:
        """The model that a resolved request asks for.

        Unfinished work is kept in ``folder`` by methods that learn, and beside ``out`` (the file to come) by a search,
        and the same request goes on from there. ``lazy`` is as in :func:`mergekit_bert.merge`.
        """
        calibrate_rows = self.calibrate_rows or CALIBRATE_ROWS
        if self.calibrate:  # missing rows or labels are reported before any long work
            calibration_rows(self.inputs, self.data, self.texts, self.calibrate, calibrate_rows, self._encoder)
        context = self._context(folder, show)
        model = self._search(context, out, show) if self.search else compose(self.inputs, self.recipe, context, lazy)
        model = model.keeping(kept_inputs(self.inputs)) if self.keep_inputs else model
        if not self.calibrate:
            return model
        merged = as_merged(
            model, "`steps`", "ensemble, which is not merged", "a merge method", "choose another `method`"
        )
        return calibrated(
            merged, self.calibrate, self.data, self.texts, calibrate_rows, self._encoder, self.inputs, show=show
        )

    def _context(self, folder: Path | None, show: bool) -> MergeContext | None:
        """What methods that need rows get, where there are any."""
        if not self.data and not self.texts:
            return None
        count = self.rows or rows_for(self.recipe)
        context = given_rows(self.inputs, self.data, self.texts, count, self._encoder, show)
        return dataclasses.replace(context, folder=folder)

    def _search(self, context: MergeContext | None, out: Path | None, show: bool) -> Merged:
        """The merge that scores best on rows which training held out, where it can be."""
        chosen = {
            name: apart_from_training(task, self.inputs, self.data, self.search_rows, _MOST_SEARCHED)
            for name, task in tasks_of(self.inputs).items()
        }
        warn_of_training_rows("`evaluations`", chosen)
        tasks = {name: (task, chosen[name].rows) for name, task in tasks_of(self.inputs).items()}
        known = {name: rows.held_out for name, rows in chosen.items()}
        path = beside(out, SEARCHED) if out is not None else None
        with held(out) if out is not None else contextlib.nullcontext():
            return search(
                self.inputs,
                self.recipe,
                tasks,
                self.encoder,
                self.search,
                self.search_over,
                context,
                path,
                show,
                known,
            )


def calibrated(
    model: Merged,
    steps: Sequence[str],
    data: Any,
    texts: Mapping[str, Any] | None,
    count: int,
    encoder: Callable[[], Encoder],
    experts: Sequence[MergeInput] = (),
    *,
    show: bool = False,
) -> Merged:
    """``model`` after calibration ``steps`` on ``count`` rows of each task, which may be ``texts`` for ``scales``.

    ``experts`` are the inputs of the merge; without any, those that the model keeps.
    """
    chosen = calibration_rows([model], data, texts, steps, count, encoder)
    if "scales" in steps:
        experts = experts or merge_inputs_of(list(model.on(encoder()).kept.values()))
        scaled_on = {name: one.rows for name, one in chosen["scales"].items()}
        model = calibrate_scales(model, experts, encoder(), scaled_on)
    if "heads" in steps:
        warn_of_training_rows("`steps=heads`", chosen["heads"])
        labelled = {name: one.rows for name, one in chosen["heads"].items()}
        held_out = {name: one.held_out for name, one in chosen["heads"].items()}
        model = calibrate_heads(model, encoder(), labelled, show=show, held=held_out)
    return model


def check_count(name: str, count: int | None) -> None:
    """Raise ArgumentError for a number of things that is none."""
    if count is not None and count < 1:
        raise ArgumentError(f"`{name}`", f"{count}", "a whole number of at least 1", f"correct `{name}`")
