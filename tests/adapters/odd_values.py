"""Put odd values in every place of an adapter file's metadata: each is refused in one line, or does no harm.

``python odd_values.py FILE…`` ends with 1 if anything went wrong. It runs by itself, since the type
checker that the tests install would refuse many of them before the package does.
"""

import copy
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from mergekit_bert.errors import MbertError
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.tensorfile import read_tensors
from tests.adapters.helpers import one_line, write_signed

ODD: tuple[Any, ...] = (None, -1, 2, 10**30, 1.5, float("inf"), "", "x", [], ["x"], {})
GONE = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside ``value``."""
    if path:
        yield path
    if path[-1:] in (("labels",), ("label_names",)):
        value = value[:1]
    if path[-1:] in (("parts",), ("experts",)):
        value = dict(list(value.items())[:1])
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def put(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A copy of ``value`` with ``odd`` at ``path``, or with nothing there."""
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if odd is GONE:
        place.pop(path[-1])
    else:
        place[path[-1]] = odd
    return changed


def refused(path: Path) -> bool:
    """Whether the file is refused; if it is not, its model must work and survive a round trip."""
    try:
        model = read_model(path)
    except MbertError as error:
        return one_line(error)
    for task in model.tasks:
        for delta in model.part(task.name).deltas.values():
            delta.dense()
    write_model(path, model)
    read_model(path)
    return False


def main(path: Path) -> int:
    """How often something went wrong; each time is told on standard error."""
    os.fsync = lambda descriptor: None
    tensors, metadata = read_tensors(path)
    failed = stopped = 0
    changed = path.with_name("odd.safetensors")
    for place in places(metadata):
        for odd in (*ODD, GONE):
            changed.unlink(missing_ok=True)
            write_signed(changed, tensors, put(metadata, place, odd))
            try:
                stopped += refused(changed)
            except Exception:
                failed += 1
                last = traceback.format_exc().strip().splitlines()
                shown = "removed" if odd is GONE else repr(odd)
                print(f"{'.'.join(map(str, place))} = {shown}: {last[-1]}  [{last[-3].strip()}]", file=sys.stderr)
    assert stopped > 200, "hardly anything was refused"
    return failed


if __name__ == "__main__":
    sys.exit(min(1, sum(main(Path(name)) for name in sys.argv[1:])))
