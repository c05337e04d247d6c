"""Comparing: every recipe merged and scored on the same rows, kept in a folder, and reported in one table."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.recipe import Recipe, rows_for
from mergekit_bert.composing.source import made_by
from mergekit_bert.data.given import Data
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.evaluation.comparison import command_for
from mergekit_bert.evaluation.evaluate import reference_folders
from mergekit_bert.evaluation.merge_results import run_recipe
from mergekit_bert.evaluation.method_comparison import (
    RESULTS,
    MethodComparison,
    comparison_fingerprint,
    comparison_rows,
    full_finetuning_scores,
    refuse_other_results,
    to_json,
    with_earlier_results,
)
from mergekit_bert.evaluation.pictures import write_picture
from mergekit_bert.evaluation.records import find_records
from mergekit_bert.evaluation.sources import Sources
from mergekit_bert.evaluation.tables import as_markdown, method_table, scored_rows
from mergekit_bert.files import write_atomic, write_json
from mergekit_bert.outputs import Output, held, written
from mergekit_bert.progress import progress_bar


def compare_recipes(
    recipes: Sequence[Recipe],
    merge_inputs: Sequence[MergeInput],
    sources: Sources,
    *,
    encoder: Encoder,
    calibration: Mapping[str, Mapping[str, Rows]],
    rows: int | None = None,
    out: Path | None = None,
    beside: Sequence[Path] = (),
    data: Data = None,
    force: bool = False,
    show: bool = False,
) -> MethodComparison:
    """Merge ``merge_inputs`` by each of ``recipes`` and score them on the rows of ``sources``.

    Methods that need unlabelled rows get ``rows`` of each task (None: the method's own number); ``calibration`` has
    those of each calibration step. With ``out``, finished results and the tables are kept there, and an earlier table
    for other inputs or rows is overwritten only with ``force``. The scores of full fine-tuning are looked up in ``out``
    and around the files ``beside``; ``data`` is for the commands that would make those that are missing.
    """
    tasks = sources.tasks
    comparison = comparison_fingerprint(merge_inputs, encoder, tasks)
    results = []
    with _folder(out) as folder:
        refuse_other_results(folder, comparison, force)
        with progress_bar("compare", len(recipes), show) as bar:
            for number, recipe in enumerate(recipes):
                bar(number, recipe.method)
                context = sources.context(rows or rows_for(recipe), encoder, show)
                results += run_recipe(recipe, merge_inputs, encoder, tasks, context, folder, calibration)
        merges = comparison_rows(with_earlier_results(results, folder, comparison, tasks), tasks)
        records = find_records([*reference_folders(folder / RESULTS[0]), *_around(beside)])
        full = full_finetuning_scores(records, encoder.fingerprint, tasks)
        absent = [name for name in tasks if name not in full and sources.whole]
        compared = MethodComparison(
            merges,
            full if "overall" in full else None,
            {result.name: result.refused for result in results if result.refused},
            sources.on,
            {name: len(scored) for name, (_, scored) in tasks.items()},
            [command_for("full", name, merge_inputs[0].base.name, data) for name in absent],
        )
        if out is not None:
            _write(folder, compared, comparison, force)
    return compared


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """``out``, locked; or a temporary folder."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="mbert-") as folder:
            yield Path(folder)
    else:
        with held(out):
            yield out


def _write(folder: Path, compared: MethodComparison, comparison: str, force: bool) -> None:
    """Write the results; those of an earlier call may go, not what has been put there since this one began."""
    refuse_other_results(folder, comparison, force)
    with written(*(Output(folder / name, (folder / name).exists()) for name in RESULTS)) as (table, markdown, picture):
        write_json(table, {**to_json(compared), "comparison": comparison, "made_by": made_by()})
        text = as_markdown(method_table(compared.merges, compared.full))
        write_atomic(markdown, f"{scored_rows(compared)}\n\n{text}".encode())
        write_picture(compared.plot(), picture)


def _around(files: Sequence[Path]) -> list[Path]:
    """Where the records of the references may lie: around ``files``, as of eval, and around their folders."""
    places = [place for path in files for place in (path, path.parent)]
    return list(dict.fromkeys(folder for place in places for folder in reference_folders(place)))
