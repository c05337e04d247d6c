"""What a model file says about itself: one description for people and programs."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.arguments import Location, checked
from mergekit_bert.composing.file import read_model
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.evaluation.records import read_record, record_path
from mergekit_bert.evaluation.result import MISSING
from mergekit_bert.files import file_fingerprint

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
def describe(path: Location) -> dict[str, Any]:
    """Everything about the model at ``path``, as JSON; raises ModelFileError."""
    path = Path(path)
    model = read_model(path)
    size = sum(file.stat().st_size for file in path.glob("**/*") if file.is_file()) if path.is_dir() else None
    told: dict[str, Any] = {
        "file": str(path),
        "kind": type(model).__name__.lower(),
        "role": model.role(),
        "bytes": size if size is not None else path.stat().st_size,
        "sha256": file_fingerprint(path),
    }
    told |= {"base": dataclasses.asdict(model.base), **model.described()}
    record = read_record(record_path(path))
    told["recorded"] = [vars(score) for score in record.scores] if record else []
    return told


def _all_sites(told: Mapping[str, Any]) -> dict[str, Any]:
    """The shared sites and, with the task in the name, those that a task has of its own."""
    own = {f"{task}: {site}": one for task, part in told.get("own", {}).items() for site, one in part["sites"].items()}
    return {**told.get("sites", {}), **own}


def description_tables(told: Mapping[str, Any]) -> list[Table]:
    """The description as tables: the file, its tasks, their training, its sites, its recorded scores."""
    tables = [_file_table(told), _task_table(told["parts"]), _training_table(told["parts"])]
    if sites := _all_sites(told):
        tables.append(_site_table(sites))
    if told["recorded"]:
        table = Table("task", "metric", "value", "95 % interval", "rows", title="recorded scores", box=SIMPLE_HEAD)
        for score in told["recorded"]:
            interval = f"{score['ci_low']:.3f} to {score['ci_high']:.3f}"
            table.add_row(score["task"], score["metric"], f"{score['value']:.3f}", interval, str(score["n"]))
        tables.append(table)
    return tables


def _file_table(told: Mapping[str, Any]) -> Table:
    table = Table(title=told["file"], box=SIMPLE_HEAD, show_header=False)
    table.add_row("kind", told["kind"] if told["kind"] == told["role"] else f"{told['kind']} ({told['role']})")
    table.add_row("size", f"{told['bytes'] / 2**20:.2f} MiB")
    table.add_row("sha256", told["sha256"])
    base = told["base"]
    table.add_row(
        "base", f"{base['name']}, weights {base['fingerprint'][:16]}, tokenizer {base['tokenizer_fingerprint'][:16]}"
    )
    if "weights" in told:
        table.add_row("weights", ", ".join(f"{name} {weight:.4g}" for name, weight in told["weights"].items()))
    if "router" in told:
        table.add_row("router", told["router"])
    if told.get("space", "full") != "full":
        table.add_row("space", told["space"])
    for name, sites in (("sites", told.get("sites", {})), ("own sites", _all_sites({**told, "sites": {}}))):
        if sites:
            ranks = _range([site["rank"] for site in sites.values() if site["rank"] is not None], "d")
            table.add_row(name, f"{len(sites)}, {f'rank {ranks}' if ranks else 'dense'}")
    if told.get("private"):
        rank, size = told["private"]["rank"], told["private"]["bytes"]
        table.add_row("private", f"remainders of rank {rank} at most beside the shared sites, {size / 2**20:.2f} MiB")
    for kind, measured in told.get("statistics", {}).items():
        lost = max(one["lost"] for one in measured.values())
        table.add_row(kind, f"of {len(measured)} sites, at most {lost:.1%} of its energy lost to its compact form")
    if told.get("shifts"):
        table.add_row("shifts", f"{len(told['shifts'])} bias and norm parameters")
    return table


def _task_table(parts: Mapping[str, Any]) -> Table:
    """Task and adapter facts, one column per task."""
    table = Table("", *parts, title="tasks", box=SIMPLE_HEAD)
    columns = [_task_facts(part) for part in parts.values()]
    for key in columns[0]:
        table.add_row(key, *(column[key] for column in columns))
    return table


def _summary(task: Mapping[str, Any]) -> str:
    known = Task.from_json(task)
    return kind_of(known).summary(known)


def _task_facts(part: Mapping[str, Any]) -> dict[str, str]:
    task, config, basis = part["task"], part.get("config"), part.get("basis")
    names = task["label_names"] or task["labels"]
    pairs = zip(task["labels"], names, strict=True)
    labels = ", ".join(label if said == label else f"{label} {said}" for label, said in pairs)
    facts = {
        "kind": task["kind"],
        "text": ", ".join(task["text"]),
        "labels": labels or _summary(task),
        "metrics": ", ".join(task["metrics"]),
        "type": part.get("type", part.get("kind", MISSING)),
        "rank, alpha": MISSING,
        "targets": MISSING,
        "basis": MISSING,
    }
    family = FAMILIES.get(part["type"]) if part.get("type") in FAMILIES.names() else None
    if config is not None and family is not None and family.has_sites:
        options = family.options.from_json(config)
        stabilized = ", rank-stabilised" if options.rank_stabilized else ""
        facts |= {"rank, alpha": f"{options.rank}, {options.alpha:g}{stabilized}", "targets": options.targets}
        others = [one.split()[0] for one in part["training"].get("avoid", [])]
        facts["basis"] = options.basis + (f" {', '.join(others)}" if others else "")
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
        *(", ".join(f"{name} {one[name]}" for name in ("mbert", "torch") if name in one) for one in versions),
    )
    return table


def _site_table(sites: Mapping[str, Any]) -> Table:
    """Sites of one name in all layers as one line; ``--json`` tells each."""
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
