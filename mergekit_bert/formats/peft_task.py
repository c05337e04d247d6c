"""The task of a PEFT folder that does not name one: its name from the folder, its labels from what is known of them."""

import os
from pathlib import Path

from mergekit_bert.data.kind import HubFields, numbered
from mergekit_bert.data.task import TASKS, Task, task_from_hub
from mergekit_bert.encoder.classifier import head_shapes
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.formats.peft import PREFIX, PeftFolder


def task_of(folder: PeftFolder, encoder: Encoder) -> Task | None:
    """The task whose head the folder holds; None where it holds no head.

    A folder named like a built-in task is of that task. The labels of any other are those of a ``config.json`` in the
    folder or of the base, where their number is that of the head's outputs, else ``LABEL_0`` …; one output is a
    regression. Raises ModelFileError for a broken ``config.json``, DataError for labels that no task can have.
    """
    outputs = _outputs(folder, encoder)
    if outputs is None:
        return None
    name = folder_name(folder.path)
    if name in TASKS.names():
        return TASKS.get(name)
    config = encoder.config
    base = HubFields(config.id2label, config.problem_type or "", config.to_dict())
    told = [one for one in (folder.label_fields, base) if one is not None and len(one.id2label) == outputs]
    return task_from_hub(name, told[0] if told else HubFields(dict(enumerate(numbered(outputs)))))


def folder_name(path: Path) -> str:
    """The last part of the path as the user gave it: a link's own name, not that of what it points to."""
    return Path(os.path.abspath(path)).name


def stand_in(name: str) -> Task:
    """A task for reading a folder without a head, which has none."""
    return task_from_hub(name, HubFields({0: ""}))


def _outputs(folder: PeftFolder, encoder: Encoder) -> int | None:
    """How many outputs the head has: the size of the tensor that grows with them; None where it is not there."""
    two, three = (head_shapes(encoder.config, _labelled(count)) for count in (2, 3))
    grows = next(name for name, shape in two.items() if shape != three[name])
    shape = folder.tensors.shapes.get(f"{PREFIX}{grows}", ())
    return shape[0] if shape else None


def _labelled(count: int) -> Task:
    return task_from_hub("probe", HubFields(dict(enumerate(numbered(count)))))
