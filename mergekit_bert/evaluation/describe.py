"""Descriptions of model files, as JSON and as tables (``mbert inspect``)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from mergekit_bert.adapters.record import options_of
from mergekit_bert.arguments import Location, checked
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.evaluation.records import read_record, record_path
from mergekit_bert.evaluation.result import MISSING
from mergekit_bert.files import file_fingerprint
from mergekit_bert.formats.format import open_model
from mergekit_bert.training.manifest import parameters_of

_TRAINING = (
    "examples",
    "held_out",
    "epochs",
    "best_epoch",
    "batch_size",
    "lr",
    "head_lr",
    "seed",
    "precision",
    "max_length",
    "truncated",
    "data",
)


@checked
def describe(path: Location, *, base: Location | None = None) -> dict[str, Any]:
    """Everything about the model at ``path``, as JSON; raises ModelFileError.

    ``base`` is for a PEFT folder that does not record it.
    """
    path = Path(path)
    model = open_model(path, None if base is None else str(base))
    size = sum(file.stat().st_size for file in path.glob("**/*") if file.is_file()) if path.is_dir() else None
    description: dict[str, Any] = {
        "file": str(path),
        "kind": type(model).__name__.lower(),
        "role": model.role(),
        "bytes": size if size is not None else path.stat().st_size,
        "sha256": file_fingerprint(path),
    }
    description |= {"base": dataclasses.asdict(model.base), **model.described(), **parameters_of(path)}
    record = read_record(record_path(path))
    description["recorded"] = [vars(score) for score in record.scores] if record else []
    return description


def _all_sites(description: Mapping[str, Any]) -> dict[str, Any]:
    """The shared sites, and the task-specific ones with the task in their name."""
    specific = {
        f"{task}: {site}": facts
        for task, part in description.get("own", {}).items()
        for site, facts in part["sites"].items()
    }
    return {**description.get("sites", {}), **specific}


def description_tables(description: Mapping[str, Any]) -> list[Table]:
    """The description as tables: the file, its tasks, their training, its sites, its recorded scores."""
    tables = [_file_table(description), _task_table(description["parts"]), _training_table(description["parts"])]
    if sites := _all_sites(description):
        tables.append(_site_table(sites))
    if description["recorded"]:
        table = Table("task", "metric", "value", "95 % interval", "rows", title="recorded scores", box=SIMPLE_HEAD)
        for score in description["recorded"]:
            interval = f"{score['ci_low']:.3f} to {score['ci_high']:.3f}"
            table.add_row(score["task"], score["metric"], f"{score['value']:.3f}", interval, str(score["n"]))
        tables.append(table)
    return tables


def _file_table(description: Mapping[str, Any]) -> Table:
    table = Table(title=description["file"], box=SIMPLE_HEAD, show_header=False)
    kind, role = description["kind"], description["role"]
    table.add_row("kind", kind if kind == role else f"{kind} ({role})")
    table.add_row("size", f"{description['bytes'] / 2**20:.2f} MiB")
    table.add_row("sha256", description["sha256"])
    base = description["base"]
    table.add_row(
        "base", f"{base['name']}, weights {base['fingerprint'][:16]}, tokenizer {base['tokenizer_fingerprint'][:16]}"
    )
    if "weights" in description:
        table.add_row("weights", ", ".join(f"{name} {weight:.4g}" for name, weight in description["weights"].items()))
    if "router" in description:
        table.add_row("router", description["router"])
    if "trainable" in description:
        table.add_row("trained", _share(description))
    if description.get("space", "full") != "full":
        table.add_row("space", description["space"])
    shared = description.get("sites", {})
    for name, sites in (("sites", shared), ("task-specific sites", _all_sites({**description, "sites": {}}))):
        if sites:
            ranks = _range([site["rank"] for site in sites.values() if site["rank"] is not None], "d")
            table.add_row(name, f"{len(sites)}, {f'rank {ranks}' if ranks else 'dense'}")
    if description.get("private"):
        rank, size = description["private"]["rank"], description["private"]["bytes"]
        table.add_row("private", f"residuals of rank {rank} or less beside the shared sites, {size / 2**20:.2f} MiB")
    for kind, measured in description.get("statistics", {}).items():
        lost = max(facts["lost"] for facts in measured.values())
        table.add_row(kind, f"of {len(measured)} sites; the stored form loses at most {lost:.1%} of the energy")
    if description.get("shifts"):
        table.add_row("updates", f"{len(description['shifts'])} bias and norm parameters")
    extras = description.get("extras", {}) | {
        f"{task}: {name}": facts
        for task, part in description.get("own", {}).items()
        for name, facts in part.get("extras", {}).items()
    }
    for name, facts in extras.items():
        table.add_row(name, f"{' × '.join(map(str, facts['size']))}, norm {facts['norm']:.3f}")
    return table


def _share(description: Mapping[str, Any]) -> str:
    """How many parameters were trained, of how many where the manifest beside the file says so."""
    if "total" not in description:
        return f"{description['trainable']:,} parameters"
    share = f" ({100 - description['reduction_percent']:.2f} %)" if description["reduction_percent"] else ""
    return f"{description['trainable']:,} of {description['total']:,} parameters{share}"


def _task_table(parts: Mapping[str, Any]) -> Table:
    """The task and the adapter's options, one column per task."""
    table = Table("", *parts, title="tasks", box=SIMPLE_HEAD)
    columns = [_task_facts(part) for part in parts.values()]
    for key in dict.fromkeys(key for column in columns for key in column):
        table.add_row(key, *(column.get(key, MISSING) for column in columns))
    return table


def _summary(task: Mapping[str, Any]) -> str:
    known = Task.from_json(task)
    return kind_of(known).summary(known)


def _task_facts(part: Mapping[str, Any]) -> dict[str, str]:
    task, config, basis = part["task"], part.get("config"), part.get("basis")
    names = task["label_names"] or task["labels"]
    pairs = zip(task["labels"], names, strict=True)
    labels = ", ".join(label if name == label else f"{label} {name}" for label, name in pairs)
    facts = {
        "kind": task["kind"],
        "text": ", ".join(task["text"]),
        "labels": labels or _summary(task),
        "metrics": ", ".join(task["metrics"]),
        "type": part.get("type", part.get("kind", MISSING)),
    }
    if config is not None:
        facts |= options_of(part.get("type"), config).facts()
    if others := [avoided.split()[0] for avoided in part.get("training", {}).get("avoid", [])]:
        facts["basis"] = f"avoid {', '.join(others)}"
    if basis:
        facts["basis"] = f"rows {basis['start']} to {basis['start'] + basis['count'] - 1} of seed {basis['seed']}"
    return facts


def _training_table(parts: Mapping[str, Any]) -> Table:
    table = Table("", *parts, title="training", box=SIMPLE_HEAD)
    for key in _TRAINING:
        values = [part.get("training", {}).get(key) for part in parts.values()]
        if any(value is not None for value in values):
            table.add_row(key, *(str(value)[:16] if value is not None else MISSING for value in values))
    scores = [
        ", ".join(f"{name} {value:.3f}" for name, value in part.get("scores", {}).items()) or MISSING
        for part in parts.values()
    ]
    table.add_row("scores", *scores)
    versions = [part.get("training", {}).get("versions", {}) for part in parts.values()]
    table.add_row(
        "versions",
        *(", ".join(f"{name} {of[name]}" for name in ("mbert", "torch") if name in of) for of in versions),
    )
    return table


def _site_table(sites: Mapping[str, Any]) -> Table:
    """One row for the sites with the same name in all layers; ``--json`` lists each of them."""
    table = Table(Column("site", overflow="fold"), "count", "out × in", "rank", "‖Δ‖", title="sites", box=SIMPLE_HEAD)
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, site in sites.items():
        size = f"{site['size'][0]} × {site['size'][1]}"
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), size), []).append(site)
    for (name, size), members in groups.items():
        ranks = _range([site["rank"] for site in members if site["rank"] is not None], "d") or "dense"
        norms = _range([site["norm"] for site in members if site["norm"] is not None], ".3f") or MISSING
        table.add_row(name, str(len(members)), size, ranks, norms)
    return table


def _range(values: Sequence[int] | Sequence[float], form: str) -> str:
    if not values:
        return ""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"
