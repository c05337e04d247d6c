"""What ``mbert merge`` prints about its result."""

from pathlib import Path

from mergekit_bert.cli.spelling import in_flags
from mergekit_bert.composing.composition import Ensemble, Merged
from mergekit_bert.terminal import say


def tell_file(model: Merged | Ensemble, out: Path) -> None:
    """Print what was written."""
    size = f"{out.stat().st_size / 2**20:.2f} MiB"
    say(f"wrote {out}: {model.account()}, {size}")
    if "lost" in model.trace:
        lost = model.trace["lost"]
        worst = max(lost["sites"], key=lost["sites"].get, default="none")
        say(
            f"rank {lost['rank']}: {lost['in_all']:.2%} of the total energy ‖Δ‖² is lost, most at {worst} "
            f"({lost['sites'].get(worst, 0.0):.2%})"
        )
    if model.private:
        rank, held = model.private["rank"], model.private["bytes"]
        say(f"private: each task keeps a residual of rank {rank} or less, {held / 2**20:.2f} MiB in total")
    if "search" in model.trace:
        told = model.trace["search"]
        scores = [one["score"] for one in told["evaluations"]]
        say(
            f"search: overall {scores[0]:.4f} at the start, {max(scores):.4f} at best, of {len(scores)} merges "
            "(on the rows used for the search, where the best score is too optimistic; run eval on other rows)"
        )
    for task, told in model.trace.get("calibrated", {}).get("heads", {}).get("rows", {}).items():
        kept = "" if told["strength"] else " (the old head is kept)"
        figures = f"{told['before']:.3f} to {told['after']:.3f}"
        say(f"head of {task}: {figures}, cross-validated on {told['count']} rows in {told['folds']} folds{kept}")


def tell_choice(method: str, reason: str, inputs: int) -> None:
    """Print which method was chosen where none was named, and why; the evidence is about several inputs."""
    why = (
        f"since {in_flags(reason)} (docs/evidence.md)"
        if inputs > 1
        else "but a single input has nothing to be merged with"
    )
    say(f"chosen: {method}, {why}")


def tell_folder(model: Merged | Ensemble, folder: Path) -> None:
    """Print what was written as a plain Hugging Face folder."""
    say(f"wrote {folder}" + (f": {brief}" if (brief := model.brief()) else ""))
