"""The run folder: what lies beside an output while it is made, and what tells afterwards how it was made.

Beside the output ``X`` lies ``X.run`` with the log, ``run.json`` and a checkpoint while the run is unfinished, and the
manifest when it has ended.
"""

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.errors import OutputError, TrainingError
from mergekit_bert.files import beside, file_fingerprint, remove, write_json
from mergekit_bert.hardware import GpuMeter, default_device, peak_memory_bytes
from mergekit_bert.outputs import Output, held, written
from mergekit_bert.schema import Count, Finite, Name, Schema, SchemaError, validate
from mergekit_bert.training.checkpoint import CHECKPOINT
from mergekit_bert.training.log import BOARD, LOG
from mergekit_bert.training.loop import Outcome
from mergekit_bert.training.supervised import Setting, check_same
from mergekit_bert.training.trainable import Trainable

MANIFEST = "manifest.json"
_RUN = "run.json"
_PACKAGES = ("mbert", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


class _Part(Schema):
    """A part of the manifest, of which more may be there."""

    model_config = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class Control:
    """How a run meets what lies at its output already, and how it is watched."""

    resume: bool = False
    force: bool = False
    tensorboard: bool = False
    show: bool = True


def run_folder(out: Path) -> Path:
    """Where the log, the manifest and the checkpoint of the run that makes ``out`` lie."""
    return beside(out, ".run")


@dataclass(frozen=True)
class Claim:
    """A run's hold on its output: whether it is finished already, goes on, and was ever told to overwrite."""

    output: Output
    finished: bool
    resume: bool
    force: bool


@contextlib.contextmanager
def claim(out: Path, control: Control, inside: tuple[str, ...] = ()) -> Iterator[Claim]:
    """Hold ``out`` (a folder of files named as ``inside``, if given) and its run folder while the block runs.

    Raises OutputError or TrainingError when something lies in the way, or another run holds it.
    """
    folder = run_folder(out)
    with held(out):
        begun = _begun(folder, passing=not control.resume)[1]
        _refuse_other(folder, out, begun)
        finished, force, own = control.resume and is_finished(out), control.force, False
        if control.resume and not finished:
            force = force or begun.get("force") is True
            own = out.exists() and begun.get("sha256") == file_fingerprint(out)  # killed just after writing it
        output = Output(out, force or own, inside)
        if not finished:
            output.refuse()
        if not control.resume and not force and (folder / CHECKPOINT).exists():
            raise TrainingError(
                str(folder),
                "an unfinished run",
                "a new place, or a decision about it",
                "give `resume` to go on or `force` to start over",
            )
        yield Claim(output, finished, control.resume, force)


def _refuse_other(folder: Path, out: Path, begun: Mapping[str, Any]) -> None:
    """Raise TrainingError for the run folder of another output: ``x`` and ``x.safetensors`` would share it."""
    owner = Path(str(begun.get("output", out.name))).name
    if owner != out.name and ((folder / _RUN).exists() or os.path.lexists(out.parent / owner)):
        raise TrainingError(str(folder), f"it belongs to {owner}", f"the run of {out.name}", "choose another `out`")


def is_finished(out: Path) -> bool:
    """Whether the run that makes ``out`` has ended."""
    return out.exists() and not any((run_folder(out) / name).exists() for name in (_RUN, CHECKPOINT))


def _begun(folder: Path, passing: bool = False) -> tuple[Path, dict[str, Any]]:
    """What is written about the run of ``folder``, and the file that says so; nothing where there is none.

    Raises TrainingError for a file that says something else; ``passing`` counts it as none.
    """
    for path in (folder / _RUN, folder / MANIFEST):
        try:
            value = read_mapping(path)
            if not isinstance(value.get("run"), dict):
                raise DocumentError("no record of a run")
            return path, value
        except FileNotFoundError:
            continue
        except (OSError, DocumentError) as error:
            if not passing:
                raise _broken(path, error) from error
    return folder / _RUN, {}


def _broken(path: Path, error: Exception) -> TrainingError:
    reason = getattr(error, "strerror", None) or error
    return TrainingError(str(path), f"broken ({reason})", "a record as mbert writes it", "start over with `force`")


class _Parameters(_Part):
    trainable: Count
    total: Annotated[Count, Field(ge=1)]
    reduction_percent: Finite


class _Training(_Part):
    examples: Count
    epochs: Count
    best_epoch: Annotated[Count, Field(ge=1)]
    precision: Name


class Manifest(_Part):
    """What a finished run's manifest tells people; it holds more."""

    training: _Training
    history: list[dict[Name, Finite]]
    parameters: _Parameters
    wall_seconds: Annotated[Finite, Field(ge=0)]
    peak_memory_bytes: Count


class _Made(_Part):
    """Which file a run has made, and from how many parameters."""

    sha256: Name
    parameters: _Parameters


def read_manifest(out: Path, metric: str) -> tuple[Manifest, float]:
    """The manifest of the run that made ``out``, and the best epoch's held-out figure; raises TrainingError."""
    path = run_folder(out) / MANIFEST
    try:
        manifest = validate(Manifest, read_mapping(path))
        return manifest, manifest.history[manifest.training.best_epoch - 1][f"held_out_{metric}"]
    except (OSError, DocumentError, SchemaError, LookupError) as error:
        raise _broken(path, error) from error


def parameters_of(out: Path) -> dict[str, Any]:
    """What the manifest of the run that made ``out`` says of its parameters; nothing without one of this very file."""
    try:
        found = validate(_Made, read_mapping(run_folder(out) / MANIFEST))
    except (OSError, DocumentError, SchemaError):
        return {}
    return found.parameters.model_dump() if found.sha256 == file_fingerprint(out) else {}


def recorded(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """How the run of ``folder`` was begun, and the file that says so; None where none does."""
    path, begun = _begun(folder)
    return (path, begun["run"]) if begun else None


def check_recorded(folder: Path, run: Mapping[str, Any], finished: bool) -> None:
    """Raise TrainingError unless the run of ``folder``, finished or not, was begun as this one."""
    earlier = recorded(folder)
    if earlier is not None:
        # A finished file may be reused whatever the number of threads is now; an unfinished run must keep it.
        check_same(*earlier, {key: value for key, value in run.items() if not (finished and key == "threads")})
    elif finished:
        raise TrainingError(
            str(folder / MANIFEST),
            "the output exists, but no manifest says how it was made",
            "a run to resume",
            "choose another `out` or give `force`",
        )


def begin(setting: Setting, claim: Claim) -> None:
    """Write down how the run is begun; one that does not go on first clears away what an earlier one left."""
    if not claim.resume:
        for name in (LOG, BOARD, MANIFEST, _RUN, CHECKPOINT):  # whatever else lies there is not ours
            remove(setting.folder / name)
    _write_begun(setting, claim)


def _write_begun(setting: Setting, claim: Claim, **more: str) -> None:
    told = {"output": claim.output.path.name, "run": setting.run, "force": claim.force}
    write_json(setting.folder / _RUN, told | more)


@contextlib.contextmanager
def delivered(setting: Setting, claim: Claim, outcome: Outcome) -> Iterator[Path]:
    """Yield the place at which to write and check the model that becomes the output.

    Where it cannot become that, the run is kept: with ``--resume`` it only has to write again.
    """
    try:
        with written(claim.output, remedy="move that away and give `resume`: the run is kept") as (part,):
            yield part
            _write_begun(setting, claim, sha256=file_fingerprint(part))
    except OutputError:
        with contextlib.suppress(OutputError):
            outcome.keep()
        raise


def provenance(setting: Setting, outcome: Outcome) -> dict[str, Any]:
    """What the model file says about its training: nothing that differs between equal runs."""
    return {
        "examples": len(setting.train),
        "held_out": len(setting.held_out),
        "truncated": setting.train.truncated + setting.held_out.truncated,
        "epochs_done": len(outcome.progress.epochs),
        "best_epoch": outcome.progress.best_epoch + 1,
        "steps": outcome.progress.step,
        "optimizer": "AdamW",
        **setting.run["train"],
        **{key: setting.run[key] for key in ("lr", "head_lr", "precision", "threads", "data")},
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def finish(out: Path, setting: Setting, outcome: Outcome, work: Trainable, meter: GpuMeter) -> None:
    """Write the manifest and drop the checkpoint."""
    trainable = sum(p.numel() for p in work.parameters.values())
    total = sum(p.numel() for p in work.model.parameters())
    write_json(
        setting.folder / MANIFEST,
        {
            "output": out.name,
            "sha256": file_fingerprint(out),
            "run": setting.run,
            "training": provenance(setting, outcome),
            "history": outcome.history,
            "parameters": {
                "trainable": trainable,
                "total": total,
                "reduction_percent": round(100 * (1 - trainable / total), 3),
            },
            "wall_seconds": round(outcome.progress.seconds, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "gpu_memory_bytes": {"average": meter.average_bytes, "maximum": meter.maximum_bytes},
            "device": str(default_device()),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
    )
    for name in (_RUN, CHECKPOINT):  # the checkpoint last: while it is there, the run is unfinished
        (setting.folder / name).unlink(missing_ok=True)
