"""``mbert merge``: several adapters as one model."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options
from mergekit_bert.registry import names_in

EXAMPLE = (
    "Example: mbert merge adapters/sst.safetensors adapters/sts.safetensors --method fedavg --weights sst=1,sts=0.5"
)
METHODS = ", ".join([*names_in("mergekit_bert.composing.methods"), "ensemble"])


def command(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Adapter files.", show_default="all adapters in adapters/")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {METHODS}.")] = "orthoada",
    weights: Annotated[
        str | None, typer.Option(help="Weights by task, e.g. sst=1,para=-0.5.", show_default="the method's own")
    ] = None,
    keep: Annotated[
        list[Path] | None, typer.Option(help="Of several adapters of one task, the file to keep.", show_default="none")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("merged.safetensors"),
    dense: Annotated[
        Path | None,
        typer.Option(help="Also write a plain Hugging Face folder per task, DIR/<task>/.", show_default="not"),
    ] = None,
    base: options.ModelBase = None,
    force: options.Force = False,
) -> None:
    """Merge adapters into one Delta per site, or keep them all as an ensemble that routes by task.

    Every task keeps its own head. Adapters may differ in rank, targets and label count; they must share their base.
    """
    from mergekit_bert import api
    from mergekit_bert.composing.composition import Merged
    from mergekit_bert.composing.merging import choose_files, parse_weights
    from mergekit_bert.encoder.load import load_encoder
    from mergekit_bert.files import refuse_existing

    refuse_existing(out, force)
    adapters = choose_files(files or [], keep or [], api.ADAPTERS)
    model = api.merge(adapters, method, parse_weights(weights or ""))
    if dense is not None:  # before any long work
        for task in model.tasks:
            refuse_existing(dense / task.name, force)
    encoder = load_encoder(base or model.base.name) if dense is not None else None
    api.save(model, out, force=force)
    if isinstance(model, Merged):
        told = ", ".join(f"{name} × {weight:.3g}" for name, weight in model.weights.items())
        ranks = sorted({delta.rank for delta in model.deltas.values() if hasattr(delta, "rank")})
        shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ", ".join(map(str, ranks)) or "none"
        print(
            f"wrote {out}: {method} of {told}; {len(model.deltas)} sites, rank {shown}, "
            f"{out.stat().st_size / 2**20:.2f} MiB"
        )
    else:
        print(
            f"wrote {out}: ensemble of {', '.join(model.experts)}, routed by task, {out.stat().st_size / 2**20:.2f} MiB"
        )
    print(f"what it costs: mbert eval {out}")
    if dense is not None:
        for path in api.export(model, dense, base=encoder, force=force):
            print(f"wrote {path}")
