"""``mbert embed``: vectors of texts."""

import io
from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = "Example: mbert embed sts.safetensors --task sts --input texts.txt --out vectors.npy"


def command(
    file: Annotated[Path, typer.Argument(help="An adapter, merged or ensemble file, a PEFT folder or a model folder.")],
    text: Annotated[list[str] | None, typer.Argument(help="Texts, a vector for each.", show_default="none")] = None,
    task: Annotated[str | None, typer.Option(help="Which of the file's tasks.", show_default="the only one")] = None,
    rows: Annotated[
        Path | None, typer.Option("--input", help="Plain text file, one text per line.", show_default="none")
    ] = None,
    out: Annotated[Path, typer.Option(help="NumPy file to write: float32, texts × width.")] = Path("vectors.npy"),
    base: options.ModelBase = None,
    force: options.Force = False,
) -> None:
    """Embed texts: the mean of the last states, as a task's head reads them, for search and clustering.

    For tasks with a head that reads each text by itself: matching, cosine, or mean on one text. Texts that such a task
    calls similar have a large cosine.
    """
    import numpy as np

    from mergekit_bert import api
    from mergekit_bert.data.readers import read_lines
    from mergekit_bert.errors import DataError
    from mergekit_bert.files import write_atomic
    from mergekit_bert.outputs import Output, claimed, written
    from mergekit_bert.terminal import say

    if bool(text) == (rows is not None):
        found = "texts and --input" if text else "no texts"
        raise DataError("mbert embed", found, "texts, or --input FILE", "give one of them")
    texts = text or [line.rstrip("\r\n") for _, line in read_lines(rows or Path()) if line.strip()]
    with claimed(Output(out, force)):
        vectors = api.embed(api.load(file, base=base), texts, task, base=base)
        stream = io.BytesIO()
        np.save(stream, vectors, allow_pickle=False)
        with written(Output(out, force)) as (part,):
            write_atomic(part, stream.getvalue())
    say(f"wrote {out}: {len(vectors)} vectors of {vectors.shape[1]}")
