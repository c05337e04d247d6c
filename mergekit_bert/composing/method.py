"""What a merge method is: a frozen record around one pure function on the Deltas of one site."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.registry import Registry

Check = Callable[[Sequence[Adapter]], None]


def _no_needs(adapters: Sequence[Adapter]) -> None:
    """Any adapters will do."""


@dataclass(frozen=True)
class Method:
    """A merge method.

    ``merge`` combines the weighted Deltas of one site: ``merge(deltas, weights) -> Delta``; a site that an adapter
    does not have is simply not in the list. ``weights`` gives the weights where the user names none. ``check`` raises
    for adapters that do not meet the method's needs, which ``needs`` tells in words.
    """

    name: str
    description: str
    formula: str
    source: str
    merge: Callable[[Sequence[Delta], Sequence[float]], Delta]
    weights: Callable[[Sequence[Adapter]], list[float]]
    default_weights: str
    needs: str = "nothing"
    check: Check = _no_needs
    order_matters: bool = False


METHODS = Registry("mergekit_bert.composing.methods", "merge method", Method)


def chosen_weights(method: Method, adapters: Sequence[Adapter], given: Mapping[str, float]) -> dict[str, float]:
    """The weight of every adapter by name: given ones first, the method's own for the rest."""
    if all(adapter.name in given for adapter in adapters):
        return {adapter.name: given[adapter.name] for adapter in adapters}
    own = method.weights(adapters)
    return {adapter.name: given.get(adapter.name, weight) for adapter, weight in zip(adapters, own, strict=True)}
