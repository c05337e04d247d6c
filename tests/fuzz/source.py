"""Where all chance comes from: a generator of one case, which also writes down what was done with it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class Source(random.Random):
    """Draws of one case; ``told`` says in words what they changed."""

    def __init__(self, name: str) -> None:
        """The same name gives the same draws, on every machine."""
        super().__init__(name)
        self.told: list[str] = []

    def tell(self, what: str) -> None:
        """Note a change, shortly."""
        self.told.append(what if len(what) <= 120 else f"{what[:119]}…")


Change = Callable[[Source, bytes, bytes], bytes]
"""(source, a file's bytes, those of another file of its kind) -> the bytes changed."""


@dataclass(frozen=True)
class Mutation:
    """One way of changing a file; ``sealed``: its digest is taken anew, as a hostile author would."""

    name: str
    change: Change
    weight: int = 1
    sealed: bool = False


Kind = tuple[Mutation, ...]
"""All the ways of changing a kind of file."""


def changed(source: Source, kind: Kind, data: bytes, other: bytes) -> tuple[bytes, Mutation]:
    """``data`` changed in one way, drawn by weight, so that it differs if it can; now and then twice."""
    mutation = source.choices(kind, [one.weight for one in kind])[0]
    times = 2 if source.random() < 0.1 else 1
    found = data
    for _ in range(20):
        source.told.clear()
        for _ in range(times):
            found = mutation.change(source, found, other)
        if found != data:
            break
    return found, mutation


def pick(source: Source, weighted: Sequence[tuple[Change, int]]) -> Change:
    """One of several changes, by weight."""
    return source.choices([one for one, _ in weighted], [weight for _, weight in weighted])[0]
