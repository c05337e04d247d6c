"""The run folder ``X.run`` beside an output ``X``: the state of an unfinished run, and the manifest of a finished one.

During a run it contains the log, ``run.json`` (the run's description) and a checkpoint; afterwards the log and
``manifest.json``, which records how the output was trained.
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
from mergekit_bert.training.supervised import TrainingRun, check_same
from mergekit_bert.training.trainable import Trainable

MANIFEST = "manifest.json"
_RUN = "run.json"
_PACKAGES = ("mbert", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


class _Part(Schema):
    """A part of the manifest; further keys are ignored."""

    model_config = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class Control:
    """How a run treats an existing output, and how it reports progress."""

    resume: bool = False
    force: bool = False
    tensorboard: bool = False
    show: bool = True


def run_folder(out: Path) -> Path:
    """The folder with the log, the manifest and the checkpoint of the run that writes ``out``."""
    return beside(out, ".run")


@dataclass(frozen=True)
class Claim:
    """A run's lock on its output: whether the run is finished, resumes, and was ever allowed to overwrite."""

    output: Output
    finished: bool
    resume: bool
    force: bool


@contextlib.contextmanager
def claim(out: Path, control: Control, inside: tuple[str, ...] = ()) -> Iterator[Claim]:
    """Lock ``out`` (a folder of files named as ``inside``, if given) and its run folder while the block runs.

    Raises OutputError or TrainingError if something exists there already, or another run holds the lock.
    """
    folder = run_folder(out)
    with held(out):
        begun = _begun(folder, passing=not control.resume)[1]
        _refuse_other(folder, out, begun)
        finished, force, ours = control.resume and is_finished(out), control.force, False
        if control.resume and not finished:
            force = force or begun.get("force") is True
            ours = out.exists() and begun.get("sha256") == file_fingerprint(out)  # killed just after writing it
        output = Output(out, force or ours, inside)
        if not finished:
            output.refuse()
        if not control.resume and not force and (folder / CHECKPOINT).exists():
            raise TrainingError(
                str(folder),
                "an unfinished run",
                "another `out`, `resume` or `force`",
                "give `resume` to continue it or `force` to start over",
            )
        yield Claim(output, finished, control.resume, force)


def _refuse_other(folder: Path, out: Path, begun: Mapping[str, Any]) -> None:
    """Raise TrainingError for the run folder of another output, since ``x`` and ``x.safetensors`` would share it."""
    owner = Path(str(begun.get("output", out.name))).name
    if owner != out.name and ((folder / _RUN).exists() or os.path.lexists(out.parent / owner)):
        raise TrainingError(str(folder), f"it belongs to {owner}", f"the run of {out.name}", "choose another `out`")


def is_finished(out: Path) -> bool:
    """Whether the run that writes ``out`` has finished."""
    return out.exists() and not any((run_folder(out) / name).exists() for name in (_RUN, CHECKPOINT))


def _begun(folder: Path, passing: bool = False) -> tuple[Path, dict[str, Any]]:
    """The file that records the run of ``folder``, and its content; empty if there is none.

    Raises TrainingError for a broken file, unless ``passing``, which counts it as none.
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
    """The part of a finished run's manifest that is shown."""

    training: _Training
    history: list[dict[Name, Finite]]
    parameters: _Parameters
    wall_seconds: Annotated[Finite, Field(ge=0)]
    peak_memory_bytes: Count


class _Made(_Part):
    """The SHA-256 of a run's output, and its numbers of parameters."""

    sha256: Name
    parameters: _Parameters


def read_manifest(out: Path, metric: str) -> tuple[Manifest, float]:
    """The manifest of the run that wrote ``out``, and the best epoch's held-out score; raises TrainingError."""
    path = run_folder(out) / MANIFEST
    try:
        manifest = validate(Manifest, read_mapping(path))
        return manifest, manifest.history[manifest.training.best_epoch - 1][f"held_out_{metric}"]
    except (OSError, DocumentError, SchemaError, LookupError) as error:
        raise _broken(path, error) from error


def parameters_of(out: Path) -> dict[str, Any]:
    """The numbers of parameters in the manifest of ``out``; empty without a manifest of exactly this file."""
    try:
        manifest = validate(_Made, read_mapping(run_folder(out) / MANIFEST))
    except (OSError, DocumentError, SchemaError):
        return {}
    return manifest.parameters.model_dump() if manifest.sha256 == file_fingerprint(out) else {}


def recorded(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file that records the run of ``folder``, and the run's description; None if there is none."""
    path, begun = _begun(folder)
    return (path, begun["run"]) if begun else None


def check_recorded(folder: Path, run: Mapping[str, Any], finished: bool) -> None:
    """Raise TrainingError unless the recorded run of ``folder``, finished or not, has the same description."""
    earlier = recorded(folder)
    if earlier is not None:
        # A finished file may be reused whatever the number of threads is now; an unfinished run must keep it.
        check_same(*earlier, {key: value for key, value in run.items() if not (finished and key == "threads")})
    elif finished:
        raise TrainingError(
            str(folder / MANIFEST),
            "the output exists, but no manifest records how it was trained",
            "a run to resume",
            "choose another `out` or give `force`",
        )


def begin(spec: TrainingRun, claim: Claim) -> None:
    """Record the run's description; unless it resumes, first remove the files of an earlier run."""
    if not claim.resume:
        for name in (LOG, BOARD, MANIFEST, _RUN, CHECKPOINT):  # other files there are not mbert's
            remove(spec.folder / name)
    _write_begun(spec, claim)


def _write_begun(spec: TrainingRun, claim: Claim, **more: str) -> None:
    record = {"output": claim.output.path.name, "run": spec.run, "force": claim.force}
    write_json(spec.folder / _RUN, record | more)


@contextlib.contextmanager
def delivered(spec: TrainingRun, claim: Claim, outcome: Outcome) -> Iterator[Path]:
    """Yield a temporary path at which to write and check the model; it becomes the output at the end.

    If that fails, the run is kept, and with ``resume`` it only has to write the model again.
    """
    try:
        with written(claim.output, remedy="move that away and give `resume`: the run is kept") as (part,):
            yield part
            _write_begun(spec, claim, sha256=file_fingerprint(part))
    except OutputError:
        with contextlib.suppress(OutputError):
            outcome.keep()
        raise


def provenance(spec: TrainingRun, outcome: Outcome) -> dict[str, Any]:
    """The training record of the model file; it contains nothing that differs between equal runs."""
    return {
        "examples": len(spec.train),
        "held_out": len(spec.held_out),
        "truncated": spec.train.truncated + spec.held_out.truncated,
        "epochs_done": len(outcome.progress.epochs),
        "best_epoch": outcome.progress.best_epoch + 1,
        "steps": outcome.progress.step,
        "optimizer": "AdamW",
        **spec.run["train"],
        **{key: spec.run[key] for key in ("lr", "head_lr", "precision", "threads", "data")},
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def finish(out: Path, spec: TrainingRun, outcome: Outcome, work: Trainable, meter: GpuMeter) -> None:
    """Write the manifest and remove the checkpoint."""
    trainable = sum(p.numel() for p in work.parameters.values())
    total = sum(p.numel() for p in work.model.parameters())
    write_json(
        spec.folder / MANIFEST,
        {
            "output": out.name,
            "sha256": file_fingerprint(out),
            "run": spec.run,
            "training": provenance(spec, outcome),
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
    for name in (_RUN, CHECKPOINT):  # the checkpoint last: while it exists, the run counts as unfinished
        (spec.folder / name).unlink(missing_ok=True)
