"""What a method's record says, for people: rows of a table, and a page of Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import get_type_hints

from mergekit_bert.composing.method import NEEDS, Method
from mergekit_bert.option import told_range

COLUMNS = ("method", "what it does", "needs", "spaces", "options")


def method_row(method: Method) -> list[str]:
    """The method in one line of a table, see :data:`COLUMNS`."""
    options = ", ".join(f"{one.name}={one.default}" for one in dataclasses.fields(method.options))
    return [method.name, method.description, ", ".join(method.needs) or "nothing", _spaces(method), options or "none"]


def method_page(method: Method, files: Sequence[str] = ("sst", "para", "sts")) -> str:
    """One screen of Markdown: formula, source, needs, weights, options, and a worked call."""
    lines = [
        f"## `{method.name}`",
        "",
        f"{method.description[0].upper()}{method.description[1:]}.",
        "",
        f"- **Formula**: {method.formula}",
        f"- **Source**: {method.source}",
        f"- **Needs**: {'; '.join(NEEDS[need] for need in method.needs) or 'nothing'}",
        f"- **Weights** λ, where none are given: {method.default_weights}",
        f"- **Spaces**: {_spaces(method)}",
        f"- **Order of the inputs**: {'matters' if method.order_matters else 'does not matter'}",
        f"- **Random**: {'yes, repeats with `seed`' if method.random else 'no'}",
        f"- **A merge of one adapter** is {_one(method)}",
    ]
    fields = dataclasses.fields(method.options)
    if fields:
        kinds = get_type_hints(method.options)
        lines += ["", "| option | default | may be | |", "|---|---|---|---|"]
        lines += [
            f"| `{one.name}` | {one.default} | {told_range(one.metadata, kinds[one.name])} | {one.metadata['help']} |"
            for one in fields
        ]
    lines += ["", "```", example(method, files), "```", ""]
    return "\n".join(lines)


def example(method: Method, tasks: Sequence[str]) -> str:
    """A command that merges by ``method``."""
    words = ["mbert merge", *(f"adapters/{task}.safetensors" for task in tasks), f"--method {method.name}"]
    fields = dataclasses.fields(method.options)
    if not method.linear and "core" in method.spaces and not method.needs:
        words.append("--space core")
    if fields:
        words.append(f"--set {fields[0].name}={fields[0].default}")
    if set(method.needs) - {"basis"}:
        words.append("--data DIR")
    return " ".join(words)


def _spaces(method: Method) -> str:
    return "all, with one result" if method.linear else ", ".join(method.spaces)


def _one(method: Method) -> str:
    if method.one_stays is None:
        return "changed"
    if not method.one_stays:
        return "that adapter times its weight"
    told = ", ".join(f"{name}={value}" for name, value in method.one_stays.items())
    return f"that adapter times its weight if {told}"
