"""Storage formats of models: how each is recognised, read, used as a merge input and written.

This is the only module that decides from a path which format it has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_bert.adapters.base import Loader
from mergekit_bert.composing.merge_input import MergeInput, inputs_of
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.folder import FullModel
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.formats.checkpoint import is_checkpoint, read_checkpoint
from mergekit_bert.formats.dense import write_dense
from mergekit_bert.formats.file import read_file, read_model, write_model
from mergekit_bert.formats.peft import is_peft
from mergekit_bert.formats.peft_format import read_peft, read_peft_input, write_peft
from mergekit_bert.models.composition import Composition, Stored
from mergekit_bert.outputs import Output, written

Base = str | Encoder | None
Opened = Callable[[], Encoder]


@dataclass(frozen=True)
class Format:
    """A storage format: mbert's file, a PEFT folder, or a Hugging Face folder.

    ``holds`` checks whether a path has the format. ``read`` returns the model, ``inputs`` its merge inputs; a base and
    a task are passed for folders that do not record them. ``write`` writes a composition, opening its encoder if
    needed, and returns the paths. ``is_file``: the format is a single file rather than a folder.
    """

    name: str
    holds: Callable[[Path], bool]
    read: Callable[[Path, Base, Task | None, Loader], Stored]
    inputs: Callable[[Path, Base, Loader], list[MergeInput]]
    write: Callable[[Path, Composition, Opened, bool], list[Path]]
    is_file: bool = False


def format_of(path: Path) -> Format:
    """The format of the model at ``path``; mbert's file format if there is nothing."""
    return next(storage for storage in FORMATS.values() if storage.holds(path))


def _read(path: Path, base: Base, task: Task | None, load: Loader) -> Stored:
    if task is not None:
        raise CompositionError("`task`", f"a task for {path}", "none: the file records its task", "drop `task`")
    return read_model(path)


def _file_inputs(path: Path, base: Base, load: Loader) -> list[MergeInput]:
    return inputs_of(read_file(path), str(path), base, load)


def _write_file(path: Path, model: Composition, encoder: Opened, force: bool) -> list[Path]:
    with written(Output(path, force)) as (part,):
        write_model(part, model)
    return [path]


def _peft_inputs(path: Path, base: Base, load: Loader) -> list[MergeInput]:
    return [read_peft_input(path, base, load)]


def _write_peft(path: Path, model: Composition, encoder: Opened, force: bool) -> list[Path]:
    return write_peft(path, model, encoder(), force)


def _folder_inputs(path: Path, base: Base, load: Loader) -> list[MergeInput]:
    if is_checkpoint(path):
        return [read_checkpoint(path, base)]
    raise CompositionError(
        str(path),
        "it is a folder with neither adapter_config.json nor config.json",
        "an adapter file, a PEFT folder or a fine-tuned model",
        "name the files in it",
    )


def _write_folder(path: Path, model: Composition, encoder: Opened, force: bool) -> list[Path]:
    return write_dense(path, model, encoder(), force)


FORMATS = {
    one.name: one
    for one in (
        Format("peft", is_peft, read_peft, _peft_inputs, _write_peft),
        Format("mbert", lambda path: not path.is_dir(), _read, _file_inputs, _write_file, is_file=True),
        Format("hf", Path.is_dir, _read, _folder_inputs, _write_folder),
    )
}
"""All formats by name, in the order in which a path is checked."""


@inputs_of.register
def _(model: FullModel, where: str = "the inputs", base: Base = None, load: Loader = load_encoder) -> list[MergeInput]:
    return format_of(model.path).inputs(model.path, base, load)


def open_model(path: Path, base: Base = None, task: Task | None = None, load: Loader = load_encoder) -> Stored:
    """Read the model at ``path`` in any format: a file, a PEFT folder, or the folder of a whole model.

    ``base`` and ``task`` are for a PEFT folder that does not record them. Raises ModelFileError or CompositionError.
    """
    return format_of(path).read(path, base, task, load)
