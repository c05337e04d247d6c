"""Merging: adapters in, one Delta per site out, by any registered method; and the ensemble, which merges nothing."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_bert.adapters.adapter import TYPES, Adapter
from mergekit_bert.adapters.delta import Delta, LowRank
from mergekit_bert.adapters.file import provenance, read_adapter
from mergekit_bert.composing.composition import Ensemble, Merged, Own, check_together
from mergekit_bert.composing.method import METHODS, chosen_weights
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import CompositionError
from mergekit_bert.registry import unknown

ENSEMBLE = "ensemble"


def merge(
    adapters: Sequence[Adapter], method: str = "orthoada", weights: Mapping[str, float] | None = None
) -> Merged | Ensemble:
    """Compose ``adapters`` by ``method`` (or ``ensemble``).

    ``weights`` are by adapter name; an adapter without one gets the method's own. Ranks, targets and label counts may
    differ; a site that an adapter lacks counts as a zero Delta. All sums are in float32. Raises CompositionError or
    BasisError before any work.
    """
    check_together(adapters)
    given = dict(weights or {})
    names = [adapter.name for adapter in adapters]
    for name, weight in given.items():
        if name not in names:
            raise CompositionError("--weights", f"{name!r}", f"names among {', '.join(names)}", "correct --weights")
        if not math.isfinite(weight):
            raise CompositionError("--weights", f"'{name}={weight}'", "a finite number", "correct --weights")
    if method == ENSEMBLE:
        if given:
            raise CompositionError(
                "--weights",
                "weights for an ensemble",
                "none: experts are kept as they are",
                "drop --weights or choose another --method",
            )
        return Ensemble({adapter.name: adapter for adapter in adapters})
    if method not in METHODS.names():
        raise unknown("merge method", method, [*METHODS.names(), ENSEMBLE])
    record = METHODS.get(method)
    record.check(adapters)
    chosen = chosen_weights(record, adapters, given)
    per_adapter = {adapter.name: adapter.deltas() for adapter in adapters}
    sites = sorted({site for deltas in per_adapter.values() for site in deltas if not of_the_head(site)})
    merged: dict[str, Delta] = {}
    for site in sites:
        present = [(_float32(deltas[site]), chosen[name]) for name, deltas in per_adapter.items() if site in deltas]
        merged[site] = record.merge([delta for delta, _ in present], [weight for _, weight in present])
    return Merged(
        method=method,
        weights=chosen,
        base=adapters[0].base,
        deltas=merged,
        shifts=_merged_shifts(adapters, chosen),
        own={adapter.name: _own(adapter) for adapter in adapters},
        parts={adapter.name: provenance(adapter) for adapter in adapters},
    )


def _own(adapter: Adapter) -> Own:
    """What is not merged: nothing that one task's head alone reads can be shared, so it stays as it was trained."""
    return Own(
        adapter.head,
        {site: _float32(delta) for site, delta in adapter.deltas().items() if of_the_head(site)},
        {name: shift.float() for name, shift in adapter.shifts.items() if of_the_head(name)},
    )


def _float32(delta: Delta) -> Delta:
    if isinstance(delta, LowRank):
        return LowRank(delta.B.float(), delta.A.float())
    return type(delta)(delta.matrix.float())


def _merged_shifts(adapters: Sequence[Adapter], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Changes of biases and norms add up linearly, with the weights of their adapters."""
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, shift in adapter.shifts.items():
            if of_the_head(name):
                continue
            part = weights[adapter.name] * shift.to(torch.float32)
            total[name] = total[name] + part if name in total else part
    return total


def parse_weights(text: str) -> dict[str, float]:
    """``"sst=1,para=-0.5"`` as weights by name; raises CompositionError."""
    weights = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or name in weights:
            raise CompositionError(
                "--weights", f"{part!r}", "name=number, separated by commas, each name once", "correct it"
            )
        weights[name] = number
    return weights


def choose_files(files: Sequence[Path], keep: Sequence[Path], folder: Path) -> list[Adapter]:
    """The adapters in ``files`` (or, if none, all but probes in ``folder``); of two of one task that in ``keep``.

    Raises CompositionError naming the files where two adapters of one task meet and none is to be kept.
    """
    named = list({path.resolve(): path for path in files}.values()) or sorted(folder.glob("*.safetensors"))
    found = [(path, read_adapter(path)) for path in named]
    if not files:
        found = [(path, adapter) for path, adapter in found if TYPES.get(adapter.type).has_sites]
    if not found:
        raise CompositionError(str(folder), "no adapters", "adapter files", "name them, or train some")
    kept = {path.resolve() for path in keep}
    for path in keep:
        if path.resolve() not in {one.resolve() for one in named}:
            raise CompositionError("--keep", f"{path}", f"one of {', '.join(map(str, named))}", "name one of the files")
    by_task: dict[str, list[tuple[Path, Adapter]]] = {}
    for path, adapter in found:
        by_task.setdefault(adapter.name, []).append((path, adapter))
    chosen = []
    for task, all_of_it in by_task.items():
        rest = [one for one in all_of_it if one[0].resolve() in kept] or all_of_it
        if len(rest) > 1:
            first, second = rest[0][0], rest[1][0]
            raise CompositionError(
                f"task {task!r}",
                f"two adapters of it, {first} and {second}",
                "one adapter a task",
                f"say which with --keep {first} or --keep {second}",
            )
        chosen.append(rest[0][1])
    return chosen
