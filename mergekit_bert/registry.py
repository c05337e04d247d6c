"""Plug-ins by name: one file in a package is one plug-in, found with no second edit.

A plug-in module defines ``RECORD``, a frozen record whose ``name`` is the module's own name. Listing the names
imports nothing, so that ``--help`` stays fast.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, TypeVar

from mergekit_bert.errors import UnknownNameError

R = TypeVar("R")


def unknown(noun: str, name: str, names: list[str]) -> UnknownNameError:
    """The error for a ``noun`` called ``name`` where only ``names`` exist, with the nearest one suggested."""
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"choose one {noun} of that list"
    return UnknownNameError(noun, f"{name!r}", f"one of {', '.join(names)}", remedy)


def names_in(package: str) -> list[str]:
    """The names of a package's plug-ins, sorted, without importing one."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


class Registry(Generic[R]):
    """The plug-ins of one package, e.g. ``mergekit_bert.composing.methods``."""

    def __init__(self, package: str, noun: str, record: type[R]) -> None:
        """``noun`` is what messages call a member; ``record`` is the class of every ``RECORD``."""
        self.package, self.noun, self.record = package, noun, record

    def names(self) -> list[str]:
        """All names, sorted, without importing a plug-in."""
        return names_in(self.package)

    def get(self, name: str) -> R:
        """The record called ``name``; raises :class:`UnknownNameError`."""
        if name not in self.names():
            raise unknown(self.noun, name, self.names())
        record = importlib.import_module(f"{self.package}.{name}").RECORD
        if not isinstance(record, self.record) or getattr(record, "name", None) != name:
            raise TypeError(f"{self.package}.{name}.RECORD must be a {self.record.__name__} named {name!r}")
        return record

    def __iter__(self) -> Iterator[R]:
        """Every record, in the order of the names."""
        return (self.get(name) for name in self.names())
