"""Which merge works: every method on the shipped adapters, scored on rows of train that their training held out.

Usage: python -m benchmarks.compare --data DIR [--out FOLDER]

Nothing is measured on dev, so that what is chosen by this table can be reported on dev. Finished results are kept in
FOLDER and not computed again.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import provenance, write_result

TASKS = ("sst", "para", "sts")
HELD = 400


def main(
    data: Annotated[Path, typer.Option(help="Folder with <task>/train.tsv.")],
    out: Annotated[Path, typer.Option(help="Where finished results are kept.")] = Path("comparison"),
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "all",
) -> None:
    import mergekit_bert as mb
    from mergekit_bert.evaluation.held_out import HELD_OUT
    from mergekit_bert.evaluation.method_comparison import to_json
    from mergekit_bert.evaluation.tables import as_text, method_table

    files = [f"adapters/{task}.safetensors" for task in TASKS]
    chosen = None if methods == "all" else methods.split(",")
    comparison = mb.compare(files, chosen, None, data, on=HELD_OUT, limit=HELD, out=out, force=True, progress=True)
    print(as_text(method_table(comparison.merges)), end="")
    for name, reason in comparison.refused.items():
        print(f"left out {name}: {reason}")
    write_result("compare", {**provenance(), **to_json(comparison)})
    picture = Path(__file__).parent / "results/compare.png"
    picture.write_bytes((out / "picture.png").read_bytes())


if __name__ == "__main__":
    typer.run(main)
