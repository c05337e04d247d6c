"""One case: a valid file spoiled in one way, what a user would do with it, and the verdict."""

import contextlib
import os
import random
import shutil
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bert.errors import MbertError
from mergekit_bert.hardware import set_threads
from mergekit_bert.text import has_control_characters
from tests.fuzz.format import BASE, Format, UnsoundError, Workshop, digest
from tests.fuzz.source import Mutation, Source, changed
from tests.tiny import write_tiny

VERDICTS = ("refused", "same", "changed", "tampered", "crash", "hang", "memory")
"""Refused in one line; taken with the same answers; with others, where nothing seals the file, or a hostile author
sealed it anew; with others though its digest should have told; any other exception; no end; more than a GiB."""
BAD = ("tampered", "crash", "hang", "memory")
MEMORY = 2**30
_LONGEST = 2500
_NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory", "malloc of size", "realloc of size", "Cannot allocate")
CASE = Path("case")

Marks = Sequence[tuple[str, str]]
"""The stages that were done, and a digest of what each gave."""


@dataclass(frozen=True)
class Specimen:
    """Valid files, those of them that are spoiled, and what their use gives."""

    files: Mapping[str, bytes]
    targets: Sequence[str]
    marks: Marks


@dataclass(frozen=True)
class Spoiled:
    """A specimen one of whose files was changed; ``told`` says how."""

    specimen: str
    file: str
    data: bytes
    mutation: Mutation
    told: str


@dataclass(frozen=True)
class Outcome:
    """A case's verdict, the stage that it ended in (``first``: no other was done), and what an error says."""

    case: str
    specimen: str
    file: str
    mutation: str
    told: str
    verdict: str
    stage: str
    seconds: float
    first: bool = False
    error: str = ""
    at: str = ""
    trace: str = ""


class Bench:
    """Valid files of some formats, made in ``root``, and cases that follow from ``seed`` and a number."""

    def __init__(self, root: Path, seed: int, formats: Iterable[Format]) -> None:
        """Make the files; raises MbertError or UnsoundError where a valid one is refused, or harms."""
        self.root, self.seed = root.resolve(), seed
        self.formats = {one.name: one for one in formats}
        os.fsync = lambda descriptor: None
        set_threads(1)
        warnings.simplefilter("ignore")
        _quiet()
        (self.root / BASE).mkdir(parents=True)
        write_tiny(self.root / BASE, "bert")
        self.enter("made")
        self.shop = Workshop()
        self.specimens = {
            name: {one: self._specimen(format, one) for one in format.specimens}
            for name, format in self.formats.items()
        }

    def enter(self, room: str) -> None:
        """Work in a folder of its own, where the base lies too: then paths in files are the same everywhere."""
        folder = self.root / room
        if not folder.exists():
            shutil.copytree(self.root / BASE, folder / BASE)
        os.chdir(folder)

    def _specimen(self, format: Format, name: str) -> Specimen:
        shutil.rmtree(CASE, ignore_errors=True)
        CASE.mkdir()
        format.specimens[name](self.shop, CASE)
        files = {str(one.relative_to(CASE)): one.read_bytes() for one in sorted(CASE.rglob("*")) if one.is_file()}
        targets = [file for file in files if format.kind_of(file)]
        marks = list[tuple[str, str]]()
        self._use(format, files, marks)
        if not targets:
            raise UnsoundError(f"{format.name}, {name}: none of {', '.join(files)} is spoiled")
        return Specimen(files, targets, marks)

    def _use(self, format: Format, files: Mapping[str, bytes], found: list[tuple[str, str]]) -> None:
        """Put the files down and use them; ``found`` gets the stages that are done."""
        shutil.rmtree(CASE, ignore_errors=True)
        for name, data in files.items():
            path = CASE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for stage, value in format.use(self.shop, CASE):
            found.append((stage, digest(value)))

    def spoil(self, case: str) -> Spoiled:
        """The files of a case, ``format:number``."""
        name = case.partition(":")[0]
        format, specimens = self.formats[name], self.specimens[name]
        source = Source(f"{self.seed} {case}")
        chosen = source.choice(list(specimens))
        file = source.choice(specimens[chosen].targets)
        kind = format.kind_of(file)
        assert kind is not None
        alike = [
            data
            for specimen, one in specimens.items()
            for target, data in one.files.items()
            if format.kind_of(target) == kind and (specimen, target) != (chosen, file)
        ]
        other = source.choice(alike or [specimens[chosen].files[file]])
        data, mutation = changed(source, kind, specimens[chosen].files[file], other)
        return Spoiled(chosen, file, data, mutation, "; ".join(source.told))

    def judge(self, case: str) -> Outcome:
        """The verdict on a case."""
        start, spoiled, format = time.monotonic(), self.spoil(case), self.formats[case.partition(":")[0]]
        specimen, found = self.specimens[format.name][spoiled.specimen], list[tuple[str, str]]()
        before, caught = _peak_memory(), None
        try:
            self._use(format, {**specimen.files, spoiled.file: spoiled.data}, found)
            self._check_strays()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # Rust's panics are no Exceptions
            caught = error
        differs = list(found) != list(specimen.marks[: len(found)]) or (
            caught is None and len(found) < len(specimen.marks)
        )
        verdict, error = _verdict(caught, differs, format.digest and not spoiled.mutation.sealed)
        if _peak_memory() - before > MEMORY:
            verdict = "memory"
        stages = [*(stage for stage, _ in specimen.marks), "after"]
        return Outcome(
            case,
            spoiled.specimen,
            spoiled.file,
            spoiled.mutation.name,
            spoiled.told,
            verdict,
            stages[min(len(found), len(stages) - 1)] if caught is not None else "done",
            round(time.monotonic() - start, 4),
            not found,
            "" if error is None else _last_line(error),
            "" if error is None else _place(error),
            "" if error is None or verdict == "refused" else "".join(traceback.format_exception(error))[-8000:],
        )

    def _check_strays(self) -> None:
        """Raise UnsoundError for a file that was written elsewhere."""
        strays = {one.name for one in Path().iterdir()} - {str(BASE), str(CASE)}
        if strays:
            for name in strays:
                shutil.rmtree(name, ignore_errors=True)
                with contextlib.suppress(OSError):
                    os.unlink(name)
            raise UnsoundError(f"files outside the folder of the case: {sorted(strays)}")

    def cases(self, count: int) -> list[str]:
        """``count`` cases, a share for each format, mixed so that any beginning of them is a sample of all."""
        whole = sum(one.share for one in self.formats.values())
        numbers = {name: max(1, round(count * one.share / whole)) for name, one in self.formats.items()}
        found = [f"{name}:{number}" for name, most in numbers.items() for number in range(most)]
        random.Random(self.seed).shuffle(found)
        return found


def _verdict(caught: BaseException | None, differs: bool, sealed: bool) -> tuple[str, BaseException | None]:
    """The verdict, and the error behind it."""
    if caught is not None and _lacks_memory(caught):
        return "memory", caught
    if isinstance(caught, MbertError):
        text = str(caught)
        if has_control_characters(text) or len(text) > _LONGEST:
            wrong = UnsoundError(f"a message that is not one line of printable text: {text[:200]!r}")
            return "crash", wrong.with_traceback(caught.__traceback__)
        return ("tampered" if differs and sealed else "refused"), caught
    if caught is not None:
        return "crash", caught
    return ("same" if not differs else "tampered" if sealed else "changed"), None


def _lacks_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is of too little memory."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or any(word in str(seen) for word in _NO_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _last_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())[:300]


def _place(error: BaseException) -> str:
    """The last line of the package that an error passed through."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "/mergekit_bert/" in one.filename]
    if not frames:
        frames = traceback.extract_tb(error.__traceback__)[-1:]
    return next((f"{one.filename.rpartition('/mergekit_bert/')[2]}:{one.lineno} {one.name}" for one in frames[-1:]), "")


def _peak_memory() -> int:
    """Most bytes that the process has had in memory so far; 0 where nothing tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
