"""With ``-v``, a table at the end: how many checks of each file of the battery every registered plug-in has passed."""

from collections import Counter

import pytest

from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.composing.method import METHODS
from mergekit_bert.data.kind import KINDS
from mergekit_bert.data.task import TASKS
from mergekit_bert.encoder.head import HEADS
from mergekit_bert.registry import Registry

REGISTRIES: dict[str, Registry[object]] = {
    "tasks": TASKS, "kinds": KINDS, "heads": HEADS, "families": FAMILIES, "methods": METHODS
}  # fmt: skip
COUNTED = ("passed", "failed", "error")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A check is of a plug-in if its name is among the parameters; a name of two plug-ins counts in its own file."""
    if terminalreporter.verbosity < 1:
        return
    names = Counter(name for registry in REGISTRIES.values() for name in registry.names())
    found: Counter[tuple[str, str, str, str]] = Counter()
    for outcome in COUNTED:
        for report in terminalreporter.stats.get(outcome, ()):
            place, _, parameters = report.nodeid.partition("[")
            file = place.partition("::")[0].rpartition("/test_")[2].removesuffix(".py")
            for registry, records in REGISTRIES.items():
                for name in records.names():
                    if f"-{name}-" in f"-{parameters[:-1]}-" and (names[name] == 1 or file == registry):
                        found[registry, name, file, outcome] += 1
    files = sorted({file for *_, file, _ in found})
    if not files:
        return
    terminalreporter.section("checks of each plug-in: passed, and failed if any did")
    line = "{:9} {:22}" + " {:>10}" * len(files)
    terminalreporter.write_line(line.format("", "", *files))
    for registry, records in REGISTRIES.items():
        for name in records.names():
            counts = [[found[registry, name, file, outcome] for outcome in COUNTED] for file in files]
            cells = [f"{passed}{f' ({sum(bad)})' if any(bad) else ''}" for passed, *bad in counts]
            terminalreporter.write_line(line.format(registry, name, *(cell if cell != "0" else "" for cell in cells)))
