"""The reference of the merge methods, from their records: rows of a table, and a page of Markdown for each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import get_type_hints

from mergekit_bert.composing.method import NEEDS, Method
from mergekit_bert.option import allowed_values

COLUMNS = ("method", "what it does", "needs", "spaces", "options")


def method_row(method: Method) -> list[str]:
    """The method as one row of a table with :data:`COLUMNS`."""
    options = ", ".join(f"{option.name}={option.default}" for option in dataclasses.fields(method.options))
    return [method.name, method.description, ", ".join(method.needs) or "nothing", _spaces(method), options or "none"]


def method_page(
    method: Method, files: Sequence[str] = ("sst", "para", "sts"), spelled: Callable[[str], str] = str
) -> str:
    """One screen of Markdown: formula, source, needs, weights, options, and an example command.

    ``spelled`` turns parameters in backticks into whatever the reader types, such as flags of the command line.
    """
    lines = [
        f"## `{method.name}`",
        "",
        f"{method.description[0].upper()}{method.description[1:]}.",
        "",
        f"- **Formula**: {method.formula}",
        f"- **Source**: {method.source}",
        f"- **Needs**: {spelled('; '.join(NEEDS[need] for need in method.needs)) or 'nothing'}",
        f"- **Default weights** λ: {method.default_weights}",
        f"- **Spaces**: {_spaces(method)}",
        f"- **Order of the inputs**: {'matters' if method.order_matters else 'does not matter'}",
        f"- **Random**: {spelled('yes, reproducible with `seed`') if method.random else 'no'}",
        f"- **A merge of one adapter** {_merge_of_one(method)}",
    ]
    fields = dataclasses.fields(method.options)
    if fields:
        types = get_type_hints(method.options)
        lines += ["", "| Option | Default | Allowed values | Meaning |", "|---|---|---|---|"]
        for option in fields:
            allowed = allowed_values(option.metadata, types[option.name])
            lines.append(f"| `{option.name}` | {option.default} | {allowed} | {option.metadata['help']} |")
    lines += ["", "```", example(method, files), "```", ""]
    return "\n".join(lines)


def example(method: Method, tasks: Sequence[str]) -> str:
    """A command that merges adapters of ``tasks`` by ``method``."""
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
    return "all, with the same result" if method.linear else ", ".join(method.spaces)


def _merge_of_one(method: Method) -> str:
    if method.one_stays is None:
        return "differs from that adapter"
    if not method.one_stays:
        return "is that adapter times its weight"
    options = ", ".join(f"{name}={value}" for name, value in method.one_stays.items())
    return f"is that adapter times its weight if {options}"
