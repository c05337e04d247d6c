"""Collections whose values are computed on every access and not cached, so that a merge has one site in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

V = TypeVar("V")


class LazyMap(Mapping[str, V]):
    """``make(key)`` for every key, computed on every access."""

    def __init__(self, keys: Iterable[str], make: Callable[[str], V]) -> None:
        """The keys are known, the values are not."""
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> V:
        """Compute the value."""
        self._keys[key]
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        """Without computing a value."""
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Their number."""
        return len(self._keys)


class LazyList(Sequence[V]):
    """``make(item)`` for every item, computed on every access."""

    def __init__(self, items: Iterable[Any], make: Callable[[Any], V]) -> None:
        """The items are known, the values are not."""
        self._items, self._make = list(items), make

    @overload
    def __getitem__(self, place: int) -> V: ...
    @overload
    def __getitem__(self, place: slice) -> "LazyList[V]": ...
    def __getitem__(self, place: int | slice) -> "V | LazyList[V]":
        """Compute the value; a slice is lazy too."""
        if isinstance(place, slice):
            return LazyList(self._items[place], self._make)
        return self._make(self._items[place])

    def __len__(self) -> int:
        """The number of items."""
        return len(self._items)
