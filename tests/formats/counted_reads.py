"""Stream a merge of the given folders and print how it read them. Run by a test, without the tests' type checker,
which looks into every mapping that it meets.

Usage: python counted_reads.py OUT FOLDER…
"""

import json
import sys
import weakref
from pathlib import Path
from typing import Any

from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.encoder.stored import StoredEncoder
from mergekit_bert.formats.checkpoint import read_checkpoint
from mergekit_bert.formats.dense import write_dense
from mergekit_bert.tensorfile import StoredTensors

living: list[weakref.ref[Any]] = []
told = {"reads": 0, "most": 0}
read = StoredTensors.__getitem__


def counted(stored: StoredTensors, name: str) -> Any:
    """Read, and count the tensors read that still live."""
    tensor = read(stored, name)
    living[:] = [one for one in living if one() is not None] + [weakref.ref(tensor)]
    told.update(reads=told["reads"] + 1, most=max(told["most"], len(living)))
    return tensor


StoredTensors.__getitem__ = counted  # type: ignore[method-assign]
out, *folders = map(Path, sys.argv[1:])
inputs = [read_checkpoint(folder) for folder in folders]
encoder = inputs[0].encoder
assert isinstance(encoder, StoredEncoder)
model = merge(inputs, Recipe("fedavg"), lazy=True)
told["before"], told["most"], living[:] = told["reads"], 0, []
write_dense(out, model, encoder, only=[inputs[0].name])  # type: ignore[arg-type]
print(json.dumps(told | {"weights": len(encoder.weights)}))
