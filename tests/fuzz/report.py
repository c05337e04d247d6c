"""Counts of many outcomes, and what was bad in them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.fuzz.bench import BAD, VERDICTS, Outcome


def counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of one format: cases by verdict, the share refused in each stage, and by how many different reasons."""
    verdicts = Counter(one.verdict for one in outcomes)
    refused = [one for one in outcomes if one.verdict == "refused"]
    stages = Counter(one.stage for one in refused)
    return {
        "cases": len(outcomes),
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "refused_in": {stage: round(count / len(outcomes), 4) for stage, count in stages.most_common()},
        "first_stage": sum(one.first for one in refused),
        "reasons": len({reason(one.error) for one in refused}),
        "slowest_seconds": max(one.seconds for one in outcomes),
    }


def reason(error: str) -> str:
    """A message without what differs from case to case."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|\([^)]*\)", "…", error)[:80]


def by_format(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by the name of their format."""
    found: dict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        found[one.case.partition(":")[0]].append(one)
    return dict(sorted(found.items()))


def by_mutation(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Verdicts by the way in which files were changed."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for one in outcomes:
        found[one.mutation][one.verdict] += 1
    return {name: dict(sorted(verdicts.items())) for name, verdicts in sorted(found.items())}


def findings(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """What was bad, once for each kind and place: how often, and the first cases that show it."""
    found: dict[tuple[str, ...], list[Outcome]] = defaultdict(list)
    for one in outcomes:
        if one.verdict in BAD:
            place = (one.mutation, one.stage) if one.verdict == "tampered" else (reason(one.error)[:40], one.at)
            found[one.case.partition(":")[0], one.verdict, *place].append(one)
    ordered = sorted(found.values(), key=lambda cases: (cases[0].case.partition(":")[0], -len(cases)))
    return [_finding(sorted(cases, key=lambda one: int(one.case.partition(":")[2]))) for cases in ordered]


def _finding(cases: Sequence[Outcome]) -> dict[str, Any]:
    first = cases[0]
    return {
        "verdict": first.verdict,
        "count": len(cases),
        "cases": [one.case for one in cases[:3]],
        "error": first.error,
        "at": first.at,
        "stage": first.stage,
        "file": f"{first.file} ({first.specimen})",
        "change": f"{first.mutation}: {first.told}",
    }


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that is recorded of a run."""
    formats = by_format(outcomes)
    total = Counter(one.verdict for one in outcomes)
    return {
        "cases": len(outcomes),
        "verdicts": {verdict: total[verdict] for verdict in VERDICTS},
        "formats": {name: counts(own) for name, own in formats.items()},
        "mutations": by_mutation(outcomes),
        "findings": findings(outcomes),
    }


def table(told: Mapping[str, Any]) -> str:
    """The counts as text, a line for each format."""
    heads = ("cases", *VERDICTS, "reasons")
    lines = [f"{'format':12}" + "".join(f"{head:>10}" for head in heads)]
    for name, one in told["formats"].items():
        lines.append(f"{name:12}" + "".join(f"{one[head]:>10}" for head in heads))
    return "\n".join(lines)
