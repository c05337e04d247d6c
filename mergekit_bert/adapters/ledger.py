"""The basis ledger: which adapter holds which rows of the orthogonal basis (``basis.json`` beside the adapters).

A ledger serves one folder of adapters. Rows are counted per base model, since only adapters of one base meet.
"""

import json
from pathlib import Path
from typing import Any

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.errors import BasisError
from mergekit_bert.files import write_json
from mergekit_bert.outputs import held

LEDGER = "basis.json"
_VERSION = 1


class Ledger:
    """The ledger of one folder."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        """``seed`` names the basis of a ledger that does not exist yet; an existing one keeps its own."""
        self.path = folder / LEDGER
        self.seed = seed

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"version": _VERSION, "seed": self.seed, "bases": {}}
        try:
            value = json.loads(self.path.read_text(encoding="utf-8"))
            if value["version"] != _VERSION or not isinstance(value["seed"], int):
                raise ValueError(f"version {value['version']!r}")
            for holders in value["bases"].values():
                for rows in holders.values():
                    BasisRows(value["seed"], rows["start"], rows["count"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BasisError) as error:
            raise BasisError(
                str(self.path),
                f"not readable as a ledger ({' '.join(str(error).split())})",
                f"version {_VERSION} JSON",
                "restore it; without it rows could collide",
            ) from error
        return dict(value)

    def take(self, base: str, holder: str, count: int, width: int) -> BasisRows:
        """Rows for adapter ``holder``: those it holds already, or the first free ones, written down at once.

        ``base`` is the base's fingerprint, ``width`` the in_features of the narrowest site. Raises BasisError when
        the basis is used up, OutputError where the ledger cannot be written.
        """
        with held(self.path, wait=True):
            return self._take(base, holder, count, width)

    def _take(self, base: str, holder: str, count: int, width: int) -> BasisRows:
        value = self._read()
        holders = value["bases"].setdefault(base, {})
        kept = holders.pop(holder, None)
        if kept is not None and kept["count"] == count and kept["start"] + count <= width:
            return BasisRows(value["seed"], kept["start"], count)
        start = _first_gap([(rows["start"], rows["count"]) for rows in holders.values()], count)
        if start + count > width:
            raise BasisError(
                str(self.path),
                f"{len(holders)} adapters hold {sum(r['count'] for r in holders.values())} of {width} rows",
                f"{count} free rows in a run",
                "use a smaller --rank, another folder, or --basis random",
            )
        holders[holder] = {"start": start, "count": count}
        write_json(self.path, value)
        return BasisRows(value["seed"], start, count)

    def capacity_left(self, base: str, count: int, width: int) -> int:
        """How many more adapters of rank ``count`` fit."""
        taken = [(rows["start"], rows["count"]) for rows in self._read()["bases"].get(base, {}).values()]
        left = 0
        while (start := _first_gap(taken, count)) + count <= width:
            taken.append((start, count))
            left += 1
        return left


def _first_gap(taken: list[tuple[int, int]], count: int) -> int:
    """The lowest start at which ``count`` rows are free."""
    start = 0
    for other, size in sorted(taken):
        if start + count <= other:
            break
        start = max(start, other + size)
    return start
