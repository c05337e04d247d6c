"""``mbert merge``: several adapters as one model."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bert.cli import options
from mergekit_bert.errors import OutputError
from mergekit_bert.registry import names_in

if TYPE_CHECKING:
    from mergekit_bert.composing.merge_input import MergeInput
    from mergekit_bert.composing.recipe import Recipe
    from mergekit_bert.models.composition import Ensemble, Merged
    from mergekit_bert.outputs import Output

EXAMPLE = (
    "Example: mbert merge adapters/sst.safetensors adapters/sts.safetensors --method ties --space core "
    "--set density=0.3 --weights sst=1,sts=0.5"
)
METHODS = ", ".join([*names_in("mergekit_bert.composing.methods", "mbert.methods"), "ensemble"])

OUT = Path("merged.safetensors")
SEARCH_OVER, SEARCH_ROWS = "weights", 300
"""Default values; the parameters are None so that we know whether the user set them."""


def command(
    files: options.Inputs = None,
    method: Annotated[
        str, typer.Option(help=f"One of {METHODS}. See `mbert methods`.", show_default="the recommended method")
    ] = "",
    space: Annotated[
        str, typer.Option(help="The coordinates to merge in: full, core or knots.", show_default="full")
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the method, NAME=VALUE (see `mbert methods`).", show_default="none"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights by task, e.g. sst=1,para=-0.5. Inputs that are not listed get the method's default weight.",
            show_default="the method's own",
        ),
    ] = None,
    rank: options.Rank = None,
    size: Annotated[
        float | None,
        typer.Option(help="Maximum file size in MiB: compress to the largest rank that fits.", show_default="none"),
    ] = None,
    private: options.Private = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed for methods that use random numbers.", show_default="0")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe; options on the command line take precedence.", show_default="none")
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Write all settings as a YAML recipe.", show_default="off")
    ] = None,
    data: options.MergeData = None,
    texts: options.Texts = None,
    rows: options.Rows = None,
    search: Annotated[
        int | None,
        typer.Option(
            help="Search for the best merge with at most this many evaluations.",
            min=1,
            max=options.MOST,
            show_default="off",
        ),
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
            help="Labelled rows per task to search on, from train; rows that training held out are taken first.",
            min=1,
            max=options.MOST,
            show_default=str(SEARCH_ROWS),
        ),
    ] = None,
    calibrate: Annotated[
        str,
        typer.Option(
            help="After the merge: heads (refit each task's head), scales (rescale each site), or scales,heads.",
            show_default="off",
        ),
    ] = "",
    calibrate_rows: options.CalibrateRows = None,
    keep: options.Keep = None,
    keep_inputs: Annotated[
        bool, typer.Option("--keep-inputs", help="Also store the adapters in the file, for --add and --remove.")
    ] = False,
    add: Annotated[
        list[Path] | None, typer.Option(help="Add this input to the given merged file.", show_default="none")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Remove this task from the given merged file.", show_default="none")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default=f"{OUT}; no file for checkpoints with --dense"),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(help="Write one plain Hugging Face folder per task, DIR/<task>/.", show_default="off"),
    ] = None,
    base: options.ModelBase = None,
    force: options.Force = False,
) -> None:
    """Merge adapters into one Delta per site, or keep them all as an ensemble that routes by task.

    Every task keeps its own head. Inputs may differ in family, rank, targets and number of labels, but must share
    their base. Methods that need rows read the train split of --data, or --texts. Labels are not needed, except for
    --search and --calibrate heads. If there are no rows, --data synthetic generates texts. Without --method,
    the recommended method for the inputs is used. Checkpoints merged with --dense, and without --out, --data or
    --texts, are streamed through memory a few tensors at a time.
    """
    from mergekit_bert import api
    from mergekit_bert.cli.merge_report import print_choice, print_file, print_folder
    from mergekit_bert.composing.calibration import read_steps
    from mergekit_bert.composing.merging import parse_weights
    from mergekit_bert.composing.method import read_settings
    from mergekit_bert.composing.recipe import changed, read_recipe
    from mergekit_bert.files import beside
    from mergekit_bert.formats.dense import dense_outputs
    from mergekit_bert.outputs import Output, claimed
    from mergekit_bert.request import MergeRequest
    from mergekit_bert.terminal import say

    options.refuse_alone({"--search-over": search_over, "--search-rows": search_rows}, "--search", search)
    options.refuse_alone({"--calibrate-rows": calibrate_rows}, "--calibrate", calibrate)
    plain, steps = options.read_texts(texts or []), read_steps(calibrate)
    written = read_recipe(recipe) if recipe is not None else None
    named = files or [Path(path) for path in (written.inputs if written else ())]
    more = out or data or plain or add or remove or keep_inputs or search or steps
    streams = dense is not None and not more and _are_checkpoints(named)
    out = out or OUT
    outputs = [path for path in (None if streams else out, save_recipe) if path is not None]
    with contextlib.ExitStack() as holds:
        holds.enter_context(claimed(*(Output(path, force) for path in outputs)))
        if add or remove:
            inputs, written = api.changed_inputs(named, add or [], remove or [], base)
        else:
            inputs = _chosen_inputs(named, keep or [], out, base)
        request = MergeRequest(
            inputs=inputs,
            recipe=changed(
                written,
                method=method,
                space=space,
                options=read_settings(set_ or []),
                weights=parse_weights(weights or ""),
                rank=rank,
                private=private,
                seed=seed,
            ),
            data=data,
            texts=plain,
            rows=rows,
            base=base,
            size=size,
            keep_inputs=keep_inputs or bool(add or remove),
            search=search or 0,
            search_over=[word.strip() for word in (search_over or SEARCH_OVER).split(",")],
            search_rows=search_rows or SEARCH_ROWS,
            calibrate=steps,
            calibrate_rows=calibrate_rows,
        ).resolved()
        if dense is not None:  # what may fail is looked at before any long work
            tasks = [task for merge_input in inputs for task in merge_input.parts]
            holds.enter_context(claimed(*dense_outputs(dense, tasks, force)))
            encoder = inputs[0].encoder if streams else request.encoder
        model = request.run(out, folder=beside(out, ".run"), lazy=streams, show=True)
        if not streams:
            api.save(model, out, force=force)
            print_file(model, out)
        if request.reason:
            print_choice(request.recipe.method, request.reason, len(inputs))
        if save_recipe is not None:
            _save_recipe(Output(save_recipe, force), model, request.recipe, named)
        if not streams:
            say(f"what it costs: mbert eval {out}")
        if dense is not None:
            for path in api.export(model, dense, base=encoder, force=force):
                print_folder(model, path)


def _are_checkpoints(files: Sequence[Path]) -> bool:
    """Whether files are named, and all are whole models."""
    from mergekit_bert.formats.checkpoint import is_checkpoint

    return bool(files) and all(map(is_checkpoint, files))


def _chosen_inputs(files: Sequence[Path], keep: Sequence[Path], out: Path, base: str | None) -> "list[MergeInput]":
    """The inputs in ``files``, none of which may be the output."""
    from mergekit_bert import api
    from mergekit_bert.formats.inputs import choose_inputs

    inputs = choose_inputs(files, keep, api.ADAPTERS, base)
    if out.resolve() in {path.resolve() for path in files or api.ADAPTERS.glob("*.safetensors")}:
        raise OutputError(str(out), "it is one of the inputs", "another file", "choose another --out")
    return inputs


def _save_recipe(output: "Output", model: "Merged | Ensemble", asked: "Recipe", files: Sequence[Path]) -> None:
    """Write the settings, including weights found by a search."""
    from mergekit_bert.composing.recipe import Recipe, changed, write_recipe
    from mergekit_bert.outputs import written
    from mergekit_bert.terminal import say

    made = Recipe.from_json(model.recipe) if model.recipe else asked
    with written(output) as (part,):
        write_recipe(part, changed(made, inputs=[str(one) for one in files]))
    say(f"wrote {output.path}")
