"""What ``mbert merge`` prints about its result."""

from pathlib import Path

from mergekit_bert.cli.spelling import in_flags
from mergekit_bert.models.composition import Ensemble, Merged
from mergekit_bert.terminal import say


def print_file(model: Merged | Ensemble, out: Path) -> None:
    """Print the path and the contents of the file."""
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
        rank, size_of_residuals = model.private["rank"], model.private["bytes"]
        say(f"private: each task keeps a residual of rank {rank} or less, {size_of_residuals / 2**20:.2f} MiB in total")
    if "search" in model.trace:
        scores = [evaluation["score"] for evaluation in model.trace["search"]["evaluations"]]
        say(
            f"search: overall {scores[0]:.4f} at the start, {max(scores):.4f} for the best of {len(scores)} merges "
            "(on the rows used for the search, where the best score is too optimistic; run eval on other rows)"
        )
    for task, head in model.trace.get("calibrated", {}).get("heads", {}).get("rows", {}).items():
        kept = "" if head["strength"] else " (the old head is kept)"
        change = f"{head['before']:.3f} to {head['after']:.3f}"
        say(f"head of {task}: {change}, cross-validated on {head['count']} rows in {head['folds']} folds{kept}")


def print_choice(method: str, reason: str, inputs: int) -> None:
    """Print which method was chosen because none was given, and why; the evidence applies to several inputs only."""
    why = (
        f"since {in_flags(reason)} (docs/evidence.md)"
        if inputs > 1
        else "but a single input is not merged with anything"
    )
    say(f"chosen: {method}, {why}")


def print_folder(model: Merged | Ensemble, folder: Path) -> None:
    """Print the path and the contents of a plain Hugging Face folder."""
    say(f"wrote {folder}" + (f": {brief}" if (brief := model.brief()) else ""))
