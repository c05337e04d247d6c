"""``mbert merge``: several adapters as one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_bert.cli import options
from mergekit_bert.registry import names_in

if TYPE_CHECKING:
    from mergekit_bert.composing.composition import Ensemble, Merged

EXAMPLE = (
    "Example: mbert merge adapters/sst.safetensors adapters/sts.safetensors --method ties --space core "
    "--set density=0.3 --weights sst=1,sts=0.5"
)
METHODS = ", ".join([*names_in("mergekit_bert.composing.methods"), "ensemble"])


SEARCH_OVER, SEARCH_ROWS = "weights", 300
"""What holds where nothing is given; None as the default tells whether something was."""


def command(
    files: options.Inputs = None,
    method: Annotated[
        str, typer.Option(help=f"One of {METHODS}. See `mbert methods`.", show_default="the recommended one")
    ] = "",
    space: Annotated[str, typer.Option(help="Where to merge: full, core or knots.", show_default="full")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the method, NAME=VALUE (see `mbert methods`).", show_default="none"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights by task, e.g. sst=1,para=-0.5.", show_default="the method's own")
    ] = None,
    rank: options.Rank = None,
    private: options.Private = None,
    seed: Annotated[int | None, typer.Option(help="Seed of methods that draw.", show_default="0")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe; the options given besides come first.", show_default="none")
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Write what was asked as a YAML recipe.", show_default="not")
    ] = None,
    data: options.MergeData = None,
    texts: options.Texts = None,
    rows: options.Rows = None,
    search: Annotated[
        int | None,
        typer.Option(help="Search for the best merge, by so many evaluations at most.", min=1, show_default="not"),
    ] = None,
    search_over: Annotated[
        str | None,
        typer.Option(
            help="What to search: weights, layers, options, or several, e.g. weights,options.", show_default=SEARCH_OVER
        ),
    ] = None,
    search_rows: Annotated[
        int | None,
        typer.Option(
            help="Labelled rows of each task to search on; of train, what training held out first.",
            min=1,
            show_default=str(SEARCH_ROWS),
        ),
    ] = None,
    calibrate: Annotated[
        str,
        typer.Option(
            help="After the merge: heads (refit every task's head), scales (scale each site), or both: scales,heads.",
            show_default="not",
        ),
    ] = "",
    calibrate_rows: options.CalibrateRows = None,
    keep: options.Keep = None,
    keep_inputs: Annotated[
        bool, typer.Option("--keep-inputs", help="Keep the adapters in the file, for --add and --remove.")
    ] = False,
    add: Annotated[
        list[Path] | None, typer.Option(help="Add this input to the merged file FILES.", show_default="none")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Remove this task from the merged file FILES.", show_default="none")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write.", show_default="merged.safetensors; of whole checkpoints with --dense, no file"
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(help="Write a plain Hugging Face folder per task, DIR/<task>/.", show_default="not"),
    ] = None,
    base: options.ModelBase = None,
    force: options.Force = False,
) -> None:
    """Merge adapters into one Delta per site, or keep them all as an ensemble that routes by task.

    Every task keeps its own head. Inputs may differ in kind, rank, targets and label count; they must share their
    base. Methods that need rows take them from the train split of --data, or from --texts; labels are never read and
    need not be there, but for --search and --calibrate heads. --data invented makes up texts where there are none.
    Whole checkpoints merged with --dense and without --out, --data or --texts pass through memory a few tensors at a
    time.
    """
    from mergekit_bert import api
    from mergekit_bert.composing.calibration import read_steps
    from mergekit_bert.composing.checkpoint import is_checkpoint
    from mergekit_bert.composing.composition import Merged
    from mergekit_bert.composing.inputs import choose_inputs
    from mergekit_bert.composing.merging import parse_weights, reads_rows
    from mergekit_bert.composing.method import read_settings
    from mergekit_bert.composing.recipe import Recipe, changed, read_recipe, with_method, write_recipe
    from mergekit_bert.encoder.load import load_encoder
    from mergekit_bert.errors import CompositionError, OutputError
    from mergekit_bert.files import beside, refuse_existing

    options.refuse_alone({"--search-over": search_over, "--search-rows": search_rows}, "--search", search)
    options.refuse_alone({"--calibrate-rows": calibrate_rows}, "--calibrate", calibrate)
    plain = options.read_texts(texts or [])
    if save_recipe is not None:
        refuse_existing(save_recipe, force)
    given = read_recipe(recipe) if recipe is not None else None
    named = files or [Path(one) for one in (given.inputs if given else ())]
    whole = bool(named) and all(is_checkpoint(path) for path in named)
    steps = read_steps(calibrate)
    more = out or data or plain or add or remove or keep_inputs or search or steps
    streams = whole and dense is not None and not more
    out = out or Path("merged.safetensors")
    if not streams:
        refuse_existing(out, force)
    if add or remove:
        inputs, given = api.changed_inputs(named, add or [], remove or [], base)
        keep_inputs = True
    else:
        inputs = choose_inputs(named, keep or [], api.ADAPTERS, base)
        if out.resolve() in {path.resolve() for path in named or api.ADAPTERS.glob("*.safetensors")}:
            raise OutputError(str(out), "it is one of the inputs", "another file", "choose another --out")
    asked = changed(
        given,
        method=method,
        space=space,
        options=read_settings(set_ or []),
        weights=parse_weights(weights or ""),
        rank=rank,
        private=private,
        seed=seed,
    )
    asked, reason = with_method(asked, inputs, bool(data or plain), bool(search))
    reads = reads_rows(asked, inputs)
    if steps and calibrate_rows is None and not reads:  # then these alone can be meant
        rows, calibrate_rows = None, rows
    idle = "--rows" if rows else "--texts" if plain and "scales" not in steps else ""
    if idle and not reads:
        remedy = "give --search-rows for the rows to search on, or drop it" if search and rows else "drop it"
        raise CompositionError(idle, f"{asked.method} takes nothing from rows here", "a method that does", remedy)
    tasks = [task for one in inputs for task in one.parts]
    if dense is not None:  # before any long work
        for task in tasks:
            refuse_existing(dense / task, force)
    if streams:
        encoder = inputs[0].model.encoder
        model = api.merge(inputs, asked, lazy=True)
    else:
        calibration: dict[str, Any] = {"steps": steps, "rows": calibrate_rows or options.CALIBRATE_ROWS}
        needed = dense is not None or data is not None or plain or search or steps
        encoder = load_encoder(base or inputs[0].base.name) if needed else None
        if steps:  # rows that are missing, or lack labels, are told before any long work
            api.rows_to_calibrate(inputs, data, plain, base=encoder, **calibration)
        common: dict[str, Any] = {"texts": plain, "base": encoder or base, "progress": True}
        if search:
            over = [word.strip() for word in (search_over or SEARCH_OVER).split(",")]
            kept = {"out": out, "keep_inputs": keep_inputs, "held_out": search_rows or SEARCH_ROWS, **common}
            model = api.search(inputs, asked, search, data, over=over, rows=rows, **kept)
        else:
            unfinished = beside(out, ".run")
            model = api.merge(inputs, asked, data=data, rows=rows, keep_inputs=keep_inputs, folder=unfinished, **common)
        if steps:
            model = api.calibrate(model, data, inputs=inputs, **calibration, **common)
        api.save(model, out, force=force)
        _tell(model, out)
    if reason:
        print(f"chosen: {asked.method}, since {reason} (docs/evidence.md)")
    if save_recipe is not None:
        made = Recipe.from_json(model.recipe) if isinstance(model, Merged) else asked  # with what a search found
        write_recipe(save_recipe, changed(made, inputs=[str(path) for path in named]))
        print(f"wrote {save_recipe}")
    if not streams:
        print(f"what it costs: mbert eval {out}")
    if dense is not None:
        for path in api.export(model, dense, base=encoder, force=force):
            print(f"wrote {path}" + (f": {model.method} of {_counted(model)}" if isinstance(model, Merged) else ""))


def _tell(model: "Merged | Ensemble", out: Path) -> None:
    """Say what was written."""
    from mergekit_bert.composing.composition import Ensemble

    size = f"{out.stat().st_size / 2**20:.2f} MiB"
    if isinstance(model, Ensemble):
        print(f"wrote {out}: ensemble of {', '.join(model.experts)}, routed by task, {size}")
        return
    ranks = sorted({delta.rank for delta in model.deltas.values() if hasattr(delta, "rank")})
    low = f"rank {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ", ".join(f"rank {rank}" for rank in ranks)
    dense = sum(not hasattr(delta, "rank") for delta in model.deltas.values())
    shown = ", ".join(filter(None, [low, f"{dense} dense" if dense else ""])) or "nothing to merge"
    space = model.recipe.get("space", "full")
    where = f" in {space} space" if space != "full" else ""
    print(f"wrote {out}: {model.title}{where} of {_counted(model)}; {len(model.deltas)} sites, {shown}, {size}")
    if "lost" in model.trace:
        lost = model.trace["lost"]
        worst = max(lost["sites"], key=lost["sites"].get, default="none")
        print(
            f"rank {lost['rank']}: {lost['in_all']:.2%} of the energy ‖Δ‖² is lost in all, most at {worst} "
            f"({lost['sites'].get(worst, 0.0):.2%})"
        )
    if model.private:
        rank, held = model.private["rank"], model.private["bytes"]
        print(f"private: each task keeps a remainder of rank {rank} at most, {held / 2**20:.2f} MiB in all")
    if "search" in model.trace:
        told = model.trace["search"]
        scores = [one["score"] for one in told["evaluations"]]
        print(f"search: overall {scores[0]:.4f} at the start, {max(scores):.4f} at best, of {len(scores)} merges")
    for task, told in model.trace.get("calibrated", {}).get("heads", {}).get("rows", {}).items():
        kept = "" if told["strength"] else " (the old head is kept)"
        figures = f"{told['before']:.3f} to {told['after']:.3f}"
        print(f"head of {task}: {figures}, cross-validated on {told['count']} rows in {told['folds']} folds{kept}")


def _counted(model: "Merged") -> str:
    """What every input counted."""
    return ", ".join(f"{name} × {weight:.3g}" for name, weight in model.weights.items())
