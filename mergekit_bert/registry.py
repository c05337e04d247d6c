"""Plug-ins by name: mbert's own, one file each, and those of other packages and of this session.

A plug-in of mbert's is a module of the registry's package that defines ``RECORD``, a frozen record whose ``name`` is
the module's own name. Another package names its records in the entry points of the registry's group; they are
imported when they are asked for, and one that is broken costs a warning and nothing else. :func:`register` adds a
record for as long as the process lives. Listing the names imports nothing, so that ``--help`` stays fast.
"""

import difflib
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from mergekit_bert.errors import MbertWarning, PluginError, UnknownNameError
from mergekit_bert.text import one_line

R = TypeVar("R")


def unknown(noun: str, name: str, names: list[str]) -> UnknownNameError:
    """The error for a ``noun`` called ``name`` where only ``names`` exist, with the nearest one suggested."""
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"choose one {noun} of that list"
    return UnknownNameError(noun, f"{name!r}", f"one of {', '.join(names)}", remedy)


def names_in(package: str, group: str = "") -> list[str]:
    """The names of a package's plug-ins, and of those in the entry points of ``group``, without importing one."""
    path = importlib.import_module(package).__path__
    own = {module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")}
    return sorted(own.union(entry_points(group=group).names if group else ()))


class Registry(Generic[R]):
    """The plug-ins of one kind: those of a package, e.g. ``mergekit_bert.composing.methods``, and those added to it."""

    def __init__(self, package: str, noun: str, record: type[R], group: str, taken: Sequence[str] = ()) -> None:
        """Know where plug-ins come from.

        ``noun`` is what messages call a member; ``record`` is the class of every record; ``group`` is the entry points'
        group, e.g. ``mbert.methods``; ``taken`` are names that mean something else.
        """
        self.package, self.noun, self.record, self.group, self.taken = package, noun, record, group, taken
        self._added: dict[str, R] = {}
        self._points: dict[str, EntryPoint] | None = None
        _registries.append(self)

    def names(self) -> list[str]:
        """All names, sorted, without importing a plug-in."""
        return sorted({*names_in(self.package), *self._added, *self._foreign()})

    def get(self, name: str) -> R:
        """The record called ``name``; raises :class:`UnknownNameError`, after a warning where a plug-in is broken."""
        found = self._find(name)
        if found is None:
            raise unknown(self.noun, name, self.names())
        return found

    def add(self, record: R) -> R:
        """Register ``record`` for this process and return it; one added before makes way, as when a cell is run again.

        Raises :class:`PluginError` for the name of a plug-in of mbert's or of an installed package.
        """
        name = self._check(record)
        point = self._foreign().get(name)
        if point is not None and point.module in sys.modules:  # its own module has registered it while imported
            del self._foreign()[name]
        elif point is not None or self._is_own(name):
            raise self._exists(name, f"in {_origin(point)}" if point is not None else "in mbert")
        self._added[name] = record
        return record

    def added(self) -> list[R]:
        """The records of other packages that have been loaded, and those of this session."""
        return list(self._added.values())

    def __iter__(self) -> Iterator[R]:
        """Every record, in the order of the names."""
        found = (self._find(name) for name in self.names())
        return (record for record in found if record is not None)

    def _find(self, name: str) -> R | None:
        if name in self._added:
            return self._added[name]
        place = f"{self.package}.{name}"
        if ("." not in name and place in sys.modules) or name in names_in(self.package):
            record: R = importlib.import_module(place).RECORD
            if not isinstance(record, self.record) or getattr(record, "name", None) != name:
                raise TypeError(f"{place}.RECORD must be a {self.record.__name__} named {name!r}")
            return record
        return self._load(name) if name in self._foreign() else None

    def _is_own(self, name: str) -> bool:
        return name in self.taken or name in names_in(self.package)

    def _foreign(self) -> dict[str, EntryPoint]:
        """Entry points that are not loaded yet; those whose name exists already are left out, with a warning."""
        if self._points is None:
            self._points = {}
            for point in sorted(entry_points(group=self.group), key=lambda one: (one.name, _origin(one))):
                if self._is_own(point.name) or point.name in self._points:
                    _warn(point, str(self._exists(point.name, "already")))
                else:
                    self._points[point.name] = point
        return self._points

    def _load(self, name: str) -> R | None:
        """The record of an entry point; None, with a warning, where it is broken."""
        point = self._foreign().pop(name)
        try:
            record: R = point.load()
            if (found := self._check(record)) != name:
                raise PluginError(self.noun, f"the name {found!r}", f"{name!r}, as the entry point", "name them alike")
        except Exception as error:  # whatever somebody else's code raises
            _warn(point, str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}")
            self._added.pop(name, None)
            return None
        self._added[name] = record
        return record

    def _check(self, record: Any) -> str:
        """The record's name; raises PluginError unless it is a record of this registry with a plain name."""
        name = getattr(record, "name", None)
        if not isinstance(record, self.record):
            found = type(record).__name__
            raise PluginError(f"{self.noun}", f"a {found}", f"a {self.record.__name__}", "register such a record")
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise PluginError(f"{self.noun}", f"the name {name!r}", "letters, digits, '-' and '_'", "rename it")
        return name

    def _exists(self, name: str, where: str) -> PluginError:
        return PluginError(f"{self.noun} {name!r}", f"one of that name {where}", "a new name", "rename it")


_registries: list[Registry[Any]] = []


def register(record: R) -> R:
    """Add ``record`` (a task, kind, method …) to the registry of its class; returns it.

    Raises PluginError for a record of another class, or a name that exists already.
    """
    for registry in _registries:
        if isinstance(record, registry.record):
            registry.add(record)
            return record
    kinds = ", ".join(sorted(registry.record.__name__ for registry in _registries))
    raise PluginError("register", f"a {type(record).__name__}", f"one of {kinds}", "register a record")


def added_records() -> list[Any]:
    """All records that are not mbert's own and have been loaded."""
    return [record for registry in _registries for record in registry.added()]


def _origin(point: EntryPoint) -> str:
    """The package that an entry point is of."""
    return point.dist.name if point.dist is not None else point.module


def _warn(point: EntryPoint, reason: str) -> None:
    warnings.warn(
        one_line(f"plug-in {point.name!r} of {_origin(point)} is left out: {reason}", 500), MbertWarning, stacklevel=2
    )
