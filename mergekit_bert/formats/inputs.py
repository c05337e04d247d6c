"""Merge inputs read from files and folders of any format."""

import functools
from collections.abc import Sequence
from pathlib import Path

from mergekit_bert.adapters.base import Loader
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.formats.format import format_of
from mergekit_bert.formats.peft import is_peft


def read_inputs(path: Path, base: str | Encoder | None = None, load: Loader = load_encoder) -> list[MergeInput]:
    """Read merge inputs: an adapter (a file, or a PEFT folder, possibly without a head), a merged model, all adapters
    of an ensemble, or the folder of a fine-tuned model.

    ``base`` is the encoder for a folder whose recorded base may not be opened; ``load`` may cache encoders that several
    folders share.
    """
    return format_of(path).inputs(path, base, load)


def choose_inputs(
    files: Sequence[Path], keep: Sequence[Path], folder: Path, base: str | None = None
) -> list[MergeInput]:
    """The inputs in ``files`` (default: all adapters but probes in ``folder``); of two for one task, that in ``keep``.

    A merged file is one input, so it is dropped only if other files are kept for all its tasks. Raises
    CompositionError, naming the files and possible remedies, if two inputs have the same task.
    """
    load = functools.cache(load_encoder)
    named = list({path.resolve(): path for path in files}.values()) or sorted(folder.glob("*.safetensors"))
    inputs = [(path, merge_input) for path in named for merge_input in read_inputs(path, base, load)]
    if not files:
        inputs = [(path, merge_input) for path, merge_input in inputs if not _is_probe(merge_input)]
    if not inputs:
        raise CompositionError(str(folder), "no adapters", "adapter files", "name them, or train some")
    kept = {path.resolve() for path in keep}
    for path in keep:
        if path.resolve() not in {file.resolve() for file in named}:
            raise CompositionError("`keep`", f"{path}", f"one of {', '.join(map(str, named))}", "name one of the files")
    by_task: dict[str, list[tuple[Path, MergeInput]]] = {}
    for path, merge_input in inputs:
        for task in merge_input.parts:
            by_task.setdefault(task, []).append((path, merge_input))
    chosen: dict[int, MergeInput] = {}
    for all_of_it in by_task.values():
        rest = [merge_input for path, merge_input in all_of_it if path.resolve() in kept] or [
            merge_input for _, merge_input in all_of_it
        ]
        chosen |= {id(merge_input): merge_input for merge_input in rest}
    chosen |= {id(merge_input): merge_input for _, merge_input in inputs if not merge_input.parts}
    for task, all_of_it in by_task.items():
        left = [(path, merge_input) for path, merge_input in all_of_it if id(merge_input) in chosen]
        if len(left) > 1:
            raise _two_of(task, *left[:2])
    return list(chosen.values())


def _two_of(task: str, first: tuple[Path, MergeInput], second: tuple[Path, MergeInput]) -> CompositionError:
    """The error for two inputs of one task, with remedies: one can be kept if the other has no other task."""
    keep = [f"`keep={path}`" for (path, _), (_, other) in ((first, second), (second, first)) if len(other.parts) == 1]
    ways = [f"say which with {' or '.join(keep)}"] if keep else []
    for path, merge_input in (first, second):
        if len(merge_input.parts) > 1:
            change = f", or `mbert merge {path} --remove {task} --out FILE` first" if merge_input.kept else ""
            ways.append(f"{path} goes in whole: to leave its {task} out, give its adapters' files instead{change}")
    ways += ["if these are two tasks, rename a folder"] if any(is_peft(path) for path, _ in (first, second)) else []
    return CompositionError(
        f"task {task!r}", f"two adapters of it, {first[0]} and {second[0]}", "one adapter per task", "; ".join(ways)
    )


def _is_probe(merge_input: MergeInput) -> bool:
    return merge_input.adapter is not None and merge_input.adapter.family.head_alone
