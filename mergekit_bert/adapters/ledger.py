"""The basis ledger: which adapter holds which rows of the orthogonal basis (``basis.json`` beside the adapters).

A ledger serves one folder of adapters. Rows are counted per base model, since only adapters of one base meet. Rows that
the adapter files themselves tell of are never handed out again, and files that contradict the ledger are refused.
"""

import contextlib
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.errors import BasisError, ModelFileError
from mergekit_bert.files import SUFFIX, write_json
from mergekit_bert.outputs import held
from mergekit_bert.schema import Count, Name, Schema, SchemaError, Seed, Width, validate
from mergekit_bert.tensorfile import read_metadata

LEDGER = "basis.json"


class _Rows(Schema):
    start: Count
    count: Width

    def overlaps(self, other: "_Rows") -> bool:
        return self.start < other.start + other.count and other.start < self.start + self.count

    def __str__(self) -> str:
        return f"rows {self.start} to {self.start + self.count - 1}"


class _Record(Schema):
    """``basis.json``: the rows of every adapter, by the fingerprint of its base and the name of its file."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    seed: Seed
    bases: dict[Name, dict[Name, _Rows]]


class Ledger:
    """The ledger of one folder."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        """``seed`` names the basis of a ledger that does not exist yet; an existing one keeps its own."""
        self.path = folder / LEDGER
        self.seed = seed

    def _read(self) -> _Record:
        try:
            record = validate(_Record, read_mapping(self.path))
        except FileNotFoundError:
            return _Record(seed=self.seed, bases={})
        except (OSError, DocumentError, SchemaError) as error:
            raise self._broken(str(getattr(error, "strerror", None) or error)) from error
        for holders in record.bases.values():
            last, end = "", 0
            for name, rows in sorted(holders.items(), key=lambda pair: pair[1].start):
                if rows.start < end:
                    raise self._broken(f"{last} and {name} hold the same rows")
                last, end = name, rows.start + rows.count
        return record

    def _broken(self, reason: str) -> BasisError:
        return BasisError(
            str(self.path),
            f"not readable as a ledger ({reason})",
            "version 1 JSON",
            "restore it; without it rows could collide",
        )

    def take(self, base: str, holder: str, count: int, width: int) -> BasisRows:
        """Rows for adapter ``holder``: those it holds already, or the first free ones, written down at once.

        ``base`` is the base's fingerprint, ``width`` the in_features of the narrowest site. Raises BasisError when
        the basis is used up or a file of the folder contradicts the ledger, OutputError where that cannot be written.
        """
        with held(self.path, wait=True):
            return self._take(base, holder, count, width)

    def _take(self, base: str, holder: str, count: int, width: int) -> BasisRows:
        record = self._read()
        files = self._rows_of_files(record, base, holder)
        holders = dict(record.bases.get(base, {}))
        kept = holders.pop(holder, None)
        if kept is not None and kept.count == count and kept.start + count <= width:
            return BasisRows(record.seed, kept.start, count)
        start = _first_gap([*holders.values(), *files], count)
        if start + count > width:
            raise BasisError(
                str(self.path),
                f"{len(holders)} adapters hold {sum(rows.count for rows in holders.values())} of {width} rows",
                f"{count} free rows in a run",
                "use a smaller `rank`, another folder, or `basis=random`",
            )
        holders[holder] = _Rows(start=start, count=count)
        value = record.model_copy(update={"bases": record.bases | {base: holders}}).model_dump()
        try:
            validate(_Record, value)
        except SchemaError as error:  # else nobody could read it again
            raise BasisError(str(self.path), f"the name {holder!r}", "a plain file name", "choose another") from error
        write_json(self.path, value)
        return BasisRows(record.seed, start, count)

    def _rows_of_files(self, record: _Record, base: str, holder: str) -> list[_Rows]:
        """What the folder's other adapters of ``base`` hold; raises BasisError for one that contradicts the ledger.

        A file may differ from its own entry: a run that is to overwrite it has new rows already.
        """
        known, found = record.bases.get(base, {}), []
        for path in sorted(self.path.parent.glob(f"*{SUFFIX}")):
            rows = None if path.stem == holder else _rows_in(path, base, record.seed)
            if rows is None:
                continue
            for name, others in known.items():
                if name != path.stem and rows.overlaps(others):
                    raise BasisError(
                        str(path),
                        f"it holds basis {rows}, which {LEDGER} gives to {name}",
                        "rows that no two adapters of a folder share",
                        f"move it to another folder, or restore the {LEDGER} that knows it",
                    )
            if path.stem not in known:
                entry = f'"{path.stem}": {{"start": {rows.start}, "count": {rows.count}}}'
                raise BasisError(
                    str(path),
                    f"it holds basis {rows}, of which {LEDGER} does not know",
                    "adapters whose rows are written down",
                    f"restore {LEDGER}, move the file to another folder, or add {entry} to {base!r} there",
                )
            found.append(rows)
        return found

    def capacity_left(self, base: str, count: int, width: int) -> int:
        """How many more adapters of rank ``count`` fit."""
        left = start = 0
        for rows in sorted(self._read().bases.get(base, {}).values(), key=lambda rows: rows.start):
            left += max(0, min(rows.start, width) - start) // count
            start = rows.start + rows.count
        return left + max(0, width - start) // count


def _rows_in(path: Path, base: str, seed: int) -> _Rows | None:
    """The rows that an adapter file of ``base`` holds of the basis of this seed; None for any other file."""
    with contextlib.suppress(ModelFileError, LookupError, TypeError, SchemaError, BasisError):
        record = read_metadata(path)["adapter"]
        rows = validate(BasisRows, record["basis"])
        if record["base"]["fingerprint"] == base and rows.seed == seed:
            return _Rows(start=rows.start, count=rows.count)
    return None


def _first_gap(taken: list[_Rows], count: int) -> int:
    """The lowest start at which ``count`` rows are free."""
    start = 0
    for rows in sorted(taken, key=lambda rows: rows.start):
        if start + count <= rows.start:
            break
        start = max(start, rows.start + rows.count)
    return start
