"""The Python interface: everything the command line does, as short calls. ``import mergekit_bert as mb``."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bert.adapters.adapter import FAMILIES, Adapter
from mergekit_bert.adapters.base import encoder_of, on_base
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.adapters.ledger import Ledger
from mergekit_bert.adapters.peft import is_peft
from mergekit_bert.composing.calibration import calibrate_heads, calibrate_scales, read_steps
from mergekit_bert.composing.composition import Composition, Ensemble, Merged, Model
from mergekit_bert.composing.dense import write_dense
from mergekit_bert.composing.file import read_model, write_model
from mergekit_bert.composing.ingredient import Ingredient, check_together
from mergekit_bert.composing.inputs import read_inputs
from mergekit_bert.composing.merging import Given, Input, change, ingredient, reads_rows, with_inputs
from mergekit_bert.composing.merging import merge as merge_inputs
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.peft import read_peft, write_peft
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.composing.recipe import Recipe, rows_for
from mergekit_bert.composing.recommendation import refuse_beside_size, with_method
from mergekit_bert.composing.source import made_by
from mergekit_bert.data.source import INVENTED, load_rows
from mergekit_bert.data.task import YAML, Task, get_task, with_source
from mergekit_bert.encoder.folder import FullModel
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.encoder.places import MINILM
from mergekit_bert.encoder.stored import open_encoder
from mergekit_bert.errors import CompositionError, OutputError
from mergekit_bert.evaluation.cells import recipes_for, run_cells
from mergekit_bert.evaluation.comparison import command_for
from mergekit_bert.evaluation.contest import (
    RESULTS,
    Contest,
    comparison_of,
    full_figures,
    refuse_other,
    standings,
    to_json,
    with_earlier,
)
from mergekit_bert.evaluation.doctor import Diagnosis, numbers
from mergekit_bert.evaluation.evaluate import Evaluation, evaluate_model, reference_folders
from mergekit_bert.evaluation.held_out import DEV, Chosen, apart_from_training, tell_learned
from mergekit_bert.evaluation.pictures import contest_picture
from mergekit_bert.evaluation.promises import try_promises
from mergekit_bert.evaluation.records import find_records
from mergekit_bert.evaluation.search import SUFFIX as SEARCHED
from mergekit_bert.evaluation.search import search as search_merge
from mergekit_bert.evaluation.sources import calibration_rows, find_sources, given_rows, tasks_of
from mergekit_bert.evaluation.tables import as_markdown, contest_rows, contest_table
from mergekit_bert.files import SUFFIX, beside, write_atomic, write_json
from mergekit_bert.outputs import Output, claimed, held, written
from mergekit_bert.progress import progress_bar
from mergekit_bert.registry import unknown
from mergekit_bert.training import manifest, run
from mergekit_bert.training.config import TrainConfig

ADAPTERS, MODELS = Path("adapters"), Path("models")
FORMATS = ("peft", "mbert", "hf")
Base = str | Path | Encoder


def _encoder(base: Base) -> Encoder:
    return base if isinstance(base, Encoder) else load_encoder(base)


def _later(base: Base | None, models: Sequence[Merged | Ingredient]) -> Callable[[], Encoder]:
    """The encoder ``base``, or that of ``models``, loaded when it is first asked for."""
    return functools.cache(lambda: encoder_of("the first input", models[0].base, base))


def _named(base: Base | None) -> str | Encoder | None:
    return str(base) if isinstance(base, Path) else base


def _file(path: str | Path) -> Path:
    """``path`` as the name of a model file; raises OutputError for another suffix, which would hide its kind."""
    if Path(path).suffix != SUFFIX:
        raise OutputError(str(path), "no name of a model file", f"a name that ends in {SUFFIX}", "correct --out")
    return Path(path)


def _folder(path: str | Path) -> Path:
    if Path(path).suffix == SUFFIX:
        raise OutputError(str(path), "the name of a file", "a folder for the model", "correct --out")
    return Path(path)


def default_out(task: Task, kind: str) -> Path:
    """``adapters/<task>.safetensors``, with the type in the name where it has no sites: no merge takes it."""
    name = task.name if FAMILIES.get(kind).has_sites else f"{task.name}.{kind}"
    return ADAPTERS / f"{name}{SUFFIX}"


def train_adapter(
    task: str | Path | Task,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    base: Base = MINILM,
    kind: str = "lora",
    adapter: AdapterConfig | None = None,
    train: TrainConfig | None = None,
    resume: bool = False,
    force: bool = False,
    tensorboard: bool = False,
    progress: bool = False,
    with_stats: Sequence[str] = (),
    avoid: Sequence[Adapter | str | Path] = (),
) -> Adapter:
    """Train an adapter for ``task`` and write it to ``out`` (``adapters/<task>.safetensors``).

    ``kind`` names the family (``lora``, ``dora``, ``probe``), ``adapter`` its options. ``data`` is a folder that holds
    ``<task>/train.tsv``, or ``"sample"``; see ``AdapterConfig`` and ``TrainConfig`` for the options. ``with_stats``
    names statistics (``gram``, ``fisher``) to put into the file, for merges that then need no rows. ``avoid`` are other
    tasks' adapters or their files, for ``AdapterConfig(basis="avoid")``. Raises a
    :class:`~mergekit_bert.errors.MbertError` for whatever the caller can fix.
    """
    found = get_task(task)
    control = manifest.Control(resume, force, tensorboard, progress)
    path = _file(out or default_out(found, kind))
    rows = load_rows(found, "train", data)
    others = [one if isinstance(one, Adapter) else read_adapter(Path(one)) for one in avoid]
    return run.train_adapter(_encoder(base), found, rows, path, kind, adapter, train, control, with_stats, others)


def finetune(
    task: str | Path | Task,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    base: Base = MINILM,
    train: TrainConfig | None = None,
    resume: bool = False,
    force: bool = False,
    tensorboard: bool = False,
    progress: bool = False,
) -> FullModel:
    """Fine-tune the whole encoder for ``task`` and write a plain Hugging Face folder to ``out`` (``models/<task>``)."""
    found = get_task(task)
    control = manifest.Control(resume, force, tensorboard, progress)
    path = _folder(out or MODELS / found.name)
    rows = load_rows(found, "train", data)
    return run.finetune(_encoder(base), found, rows, path, train, control)


def load(path: str | Path) -> Model:
    """Read an adapter, merged or ensemble file, or a model folder."""
    return read_model(Path(path))


def save(model: Composition, path: str | Path, *, force: bool = False) -> None:
    """Write ``model`` to one safetensors file; raises OutputError where one exists, unless ``force``."""
    with written(Output(_file(path), force)) as (part,):
        write_model(part, model)


def export(
    model: Composition,
    folder: str | Path,
    *,
    base: Base | None = None,
    tasks: Sequence[str] = (),
    stream: bool = False,
    force: bool = False,
) -> list[Path]:
    """Write one plain Hugging Face folder per task (or of ``tasks`` alone), ``folder/<task>/``; returns the folders.

    ``stream`` reads the base from its folder a tensor at a time instead of loading it; the outputs are then not
    compared.
    """
    encoder = encoder_of("model", model.base, base, open_encoder if stream else load_encoder)
    return write_dense(Path(folder), model, encoder, force, tasks)


def convert(
    path: str | Path,
    to: str,
    out: str | Path,
    *,
    base: Base | None = None,
    task: str | Path | Task | None = None,
    force: bool = False,
) -> list[Path]:
    """Write the model at ``path``, a file of mbert's or a PEFT adapter folder, in another format; returns the paths.

    ``to`` is ``"peft"`` (``out`` is the folder of an adapter; of other models, ``out/<task>/``), ``"mbert"`` (``out``
    is a file) or ``"hf"`` (plain Hugging Face folders ``out/<task>/``). ``base`` and ``task`` are for a PEFT folder
    that does not say them.
    """
    if to not in FORMATS:
        raise unknown("format", to, list(FORMATS))
    target = _file(out) if to == "mbert" else _folder(out)
    known = get_task(task) if task is not None else None
    load = functools.cache(load_encoder)
    with claimed(*([Output(target, force)] if to == "mbert" else [])):
        model = read_peft(Path(path), _named(base), known, load) if is_peft(Path(path)) else _composition(path, known)
        if to == "mbert":
            save(model, target, force=force)
            return [target]
    encoder = encoder_of(str(path), model.base, base, load)
    return (write_peft if to == "peft" else write_dense)(target, model, encoder, force)


def _composition(path: str | Path, task: Task | None) -> Composition:
    """A model file that can be converted."""
    if task is not None:
        raise CompositionError("--task", f"a task for {path}", "none: the file says its own", "drop it")
    model = load(path)
    if isinstance(model, FullModel):
        raise CompositionError(str(path), "a whole model", "an adapter, merged or ensemble file", "give one of these")
    return model


def merge(
    inputs: Sequence[Input | str | Path],
    method: str | Recipe = "",
    weights: Mapping[str, float] | None = None,
    *,
    space: str = "full",
    options: Mapping[str, Any] | None = None,
    layers: Mapping[str, Mapping[str, float]] | None = None,
    rank: int | None = None,
    private: int | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    texts: Mapping[str, str | Path] | None = None,
    rows: int | None = None,
    base: Base | None = None,
    size: float | None = None,
    keep_inputs: bool = False,
    lazy: bool = False,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Merged | Ensemble:
    """Compose adapters, merged models or their files by a merge method, or by ``"ensemble"``; ``""``: as recommended.

    ``weights`` are by task name; see :class:`~mergekit_bert.composing.recipe.Recipe` for the rest, which may also be
    given whole in place of the method. ``data`` is for methods that need rows: ``rows`` of ``train`` for each task
    (None: the method's own number), without labels; ``"invented"``: texts made up here, for where there are none.
    ``texts`` names by task plain text files that are read instead, one row a line, two texts a line with a tab between
    them. ``size`` is the most MiB that the file may take: the rank is then the largest that fits. ``keep_inputs`` keeps
    the adapters in the model, so that its file can be changed.
    ``folder`` is where a method that learns keeps unfinished work, from which the same call goes on after a kill.
    ``lazy`` merges a site when it is asked for and keeps none: for :func:`export` of whole checkpoints.
    """
    found = _read_all(inputs, base)
    recipe = (
        method
        if isinstance(method, Recipe)
        else Recipe(method, space, options or {}, weights or {}, layers or {}, rank, private, seed)
    )
    ingredients = [ingredient(one) for one in found]
    refuse_beside_size("--keep-inputs", size is not None and keep_inputs)
    made_up = str(data) == INVENTED and not texts
    recipe, _ = with_method(recipe, ingredients, bool(data or texts), invented=made_up, size=size)
    given = _given(ingredients, data, texts, rows or rows_for(recipe), base, progress)
    if given is not None and folder is not None:
        given = dataclasses.replace(given, folder=Path(folder))
    model = merge_inputs(found, recipe, given, lazy)
    return with_inputs(model, found) if keep_inputs and isinstance(model, Merged) else model


def _read_all(inputs: Sequence[Input | str | Path], base: Base | None) -> list[Input]:
    """Inputs, those that are paths read from there, adapters that need their base on it."""
    found: list[Input] = []
    load = functools.cache(load_encoder)
    for one in inputs:
        if isinstance(one, str | Path):
            found += read_inputs(Path(one), _named(base), load)
        else:
            found.append(one if isinstance(one, Ingredient) else on_base("the inputs", one, base))
    return found


def changed_inputs(
    files: Sequence[str | Path], add: Sequence[str | Path], remove: Sequence[str], base: str | None = None
) -> tuple[list[Ingredient], Recipe]:
    """The inputs of one merged file that kept them, with others added and some removed, and its recipe."""
    if len(files) != 1:
        raise CompositionError("--add or --remove", f"{len(files)} files", "one merged file", "name the file to change")
    model = load(files[0])
    if not isinstance(model, Merged):
        raise CompositionError(str(files[0]), "no merged model", "a file merged with --keep-inputs", "merge first")
    kept = {name: on_base(str(files[0]), one, base) for name, one in model.kept.items()}
    left = change(dataclasses.replace(model, kept=kept), _read_all(add, base), remove)
    names, recipe = {one.name for one in left}, Recipe.from_json(model.recipe)

    def known(weights: Mapping[str, float]) -> dict[str, float]:
        return {name: weight for name, weight in weights.items() if name in names}

    layers = {pattern: known(weights) for pattern, weights in recipe.layers.items()}
    return left, dataclasses.replace(recipe, weights=known(recipe.weights), layers=layers)


def _given(
    ingredients: Sequence[Ingredient],
    data: str | Path | None,
    texts: Mapping[str, str | Path] | None,
    rows: int,
    base: Base | None,
    show: bool,
) -> Given | None:
    """What methods that need rows get, where the caller says from where."""
    return given_rows(ingredients, data, texts, rows, _later(base, ingredients), show) if data or texts else None


def search(
    inputs: Sequence[Input | str | Path],
    method: str | Recipe = "",
    evaluations: int = 64,
    data: str | Path | None = None,
    *,
    over: Sequence[str] = ("weights",),
    held_out: int = 300,
    texts: Mapping[str, str | Path] | None = None,
    rows: int | None = None,
    out: str | Path | None = None,
    base: Base | None = None,
    keep_inputs: bool = False,
    progress: bool = False,
) -> Merged:
    """The merge of ``inputs`` that scores best overall, of at most ``evaluations``, on rows held out from ``train``.

    ``method`` is as in :func:`merge`, but the recommended one does not learn by itself. ``over`` names what is
    searched: ``weights``, ``layers`` (a factor for each third of them) and ``options`` of the method. ``held_out`` is
    the most rows of a task to score on, whose labels are read. ``texts`` and ``rows`` are as in :func:`merge`, for
    methods that need unlabelled rows. With ``out``, the name of the file to come, finished evaluations are kept beside
    it.
    """
    found = _read_all(inputs, base)
    ingredients = [ingredient(one) for one in found]
    check_together(ingredients)
    known = tasks_of(ingredients)
    chosen = {name: apart_from_training(task, ingredients, data, held_out, 0.5) for name, task in known.items()}
    tell_learned("--search", chosen)
    tasks = {name: (known[name], one.rows) for name, one in chosen.items()}
    encoder = _later(base, ingredients)()
    recipe = method if isinstance(method, Recipe) else Recipe(method)
    recipe, _ = with_method(recipe, ingredients, bool(data or texts), searched=True)
    given = _given(ingredients, data, texts, rows or rows_for(recipe), encoder, progress)
    path = beside(_file(out), SEARCHED) if out is not None else None
    told = {name: one.held_out for name, one in chosen.items()}
    with held(Path(out)) if out is not None else contextlib.nullcontext():
        model = search_merge(ingredients, recipe, tasks, encoder, evaluations, over, given, path, progress, told)
    return with_inputs(model, found) if keep_inputs else model


def calibrate(
    model: Merged | Ensemble | str | Path,
    data: str | Path | None = None,
    *,
    steps: Sequence[str] = ("heads",),
    texts: Mapping[str, str | Path] | None = None,
    rows: int = 256,
    inputs: Sequence[Input | str | Path] = (),
    base: Base | None = None,
    progress: bool = False,
) -> Merged:
    """A merged model put right on ``rows`` of each task's ``train``.

    ``heads`` refits every task's head to the merged features and reads labels, of rows that the adapters' training
    held out where there are enough, and no search has read; ``scales`` scales the merged Delta of
    each site to the size that the Deltas of ``inputs`` (those that it keeps, if none are given) have on their rows,
    which may be ``texts`` or invented as in :func:`merge`.
    """
    taken, found = read_steps(",".join(steps)), load(model) if isinstance(model, str | Path) else model
    if not isinstance(found, Merged):
        raise CompositionError("--calibrate", "a model that is not merged", "a merged one", "choose a merge method")
    encoder = encoder_of("model", found.base, base)
    chosen = rows_to_calibrate([found], data, texts, steps=taken, rows=rows, base=encoder)
    if "scales" in taken:
        experts = [ingredient(one) for one in _read_all(inputs, base) or found.on(encoder).kept.values()]
        found = calibrate_scales(found, experts, encoder, {name: one.rows for name, one in chosen["scales"].items()})
    if "heads" in taken:
        tell_learned("--calibrate heads", chosen["heads"])
        labelled = {name: one.rows for name, one in chosen["heads"].items()}
        told = {name: one.held_out for name, one in chosen["heads"].items()}
        found = calibrate_heads(found, encoder, labelled, show=progress, held=told)
    return found


def rows_to_calibrate(
    models: Sequence[Merged | Ingredient],
    data: str | Path | None = None,
    texts: Mapping[str, str | Path] | None = None,
    *,
    steps: Sequence[str],
    rows: int,
    base: Base | None = None,
) -> dict[str, dict[str, Chosen]]:
    """At most ``rows`` of each task to calibrate on, by step: only ``heads`` needs labels, and takes no ``texts``."""
    return calibration_rows(models, data, texts, steps, rows, _later(base, models))


def predictor(model: Model | str | Path, *, base: Base | None = None) -> Predictor:
    """A predictor for ``model`` or its file: ``predictor(…).predict("sts", [("a", "b")])``. Threads may share it."""
    found = load(model) if isinstance(model, str | Path) else model
    where = str(model) if isinstance(model, str | Path) else "model"
    if isinstance(found, FullModel):
        return Predictor(found, where=where)
    return Predictor(found, encoder_of(where, found.base, base), where)


def evaluate(
    model: Model | str | Path,
    data: str | Path | None = None,
    *,
    base: Base | None = None,
    tasks: Sequence[str | Path | Task] = (),
    predictions: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score ``model`` on the dev rows of every task it answers.

    Given a file, the figures are recorded beside it, and its adapters, the linear probe and full fine-tuning are
    looked up among the results recorded around it. ``predictions`` is a folder for the predictions. ``tasks`` are
    names, or YAML files and Tasks where these say where the rows are; a model file does not.
    """
    given = {str(one): get_task(one) for one in tasks if isinstance(one, Task) or Path(one).suffix in YAML}
    named = {task.name: task for task in given.values()}
    return evaluate_model(
        predictor(model, base=base),
        lambda task: load_rows(with_source(task, named.get(task.name)), "dev", data),
        Path(model) if isinstance(model, str | Path) else None,
        [given[str(one)].name if str(one) in given else str(one) for one in tasks],
        Path(predictions) if predictions else None,
        progress,
        data,
        {task.name: spelling for spelling, task in given.items() if Path(spelling).suffix in YAML},
    )


def compare(
    inputs: Sequence[Input | str | Path],
    methods: Sequence[str] | None = None,
    spaces: Sequence[str] | None = None,
    data: str | Path | None = None,
    *,
    texts: Mapping[str, str | Path] | None = None,
    rows: int | None = None,
    limit: int | None = None,
    on: str = DEV,
    rank: int | None = None,
    private: int | None = None,
    calibrate: Sequence[str] = (),
    calibrate_rows: int = 256,
    seed: int = 0,
    out: str | Path = "comparison",
    base: Base | None = None,
    references: Sequence[str | Path] = (),
    force: bool = False,
    progress: bool = False,
) -> Contest:
    """Merge ``inputs`` by every method (or those named) in every space, and score each merge on rows of all tasks.

    ``on`` says on which: ``"dev"``, or ``"held-out"``, what the adapters' training held out of ``train``, so that a
    choice by this table leaves dev untouched; ``limit`` is the most of a task. ``texts`` and ``rows`` are as in
    :func:`merge`, for methods that need unlabelled rows: none that are scored on. ``calibrate`` names steps as in
    :func:`calibrate`; every merge then has a second line, after them, on ``calibrate_rows`` of each task. Finished
    cells are kept in the folder ``out`` and never computed twice; ``table.md``, ``table.json`` and ``picture.png`` are
    written there, with the lines of earlier calls, and over those of other inputs or rows only with ``force``.
    ``references`` are more files around which the figures of full fine-tuning may lie. Raises a
    :class:`~mergekit_bert.errors.MbertError` before any long work.
    """
    folder, found, steps = Path(out), _read_all(inputs, base), read_steps(",".join(calibrate))
    ingredients = [ingredient(one) for one in found]
    check_together(ingredients)
    recipes = recipes_for(methods or METHODS.names(), spaces, seed, rank, private)
    sources = find_sources(ingredients, data, texts, on, limit, calibrate_rows if "heads" in steps else 0)
    if "scales" in steps or any(reads_rows(one, ingredients) for one in recipes):
        for name in sources.tasks:
            sources.unlabelled(name)
    elif texts:
        raise CompositionError("--texts", "no merge here takes anything from rows", "a method that does", "drop it")
    encoder = _later(base, ingredients)()
    comparison = comparison_of(ingredients, encoder, sources.tasks)
    calibration = sources.calibration(steps, calibrate_rows)
    cells = []
    with held(folder):
        refuse_other(folder, comparison, force)
        with progress_bar("compare", len(recipes), progress) as bar:
            for number, recipe in enumerate(recipes):
                bar(number, recipe.method)
                given = sources.given(rows or rows_for(recipe), encoder, progress)
                cells += run_cells(recipe, ingredients, encoder, sources.tasks, given, folder, calibration)
        placed = standings(with_earlier(cells, folder, comparison, sources.tasks), sources.tasks)
        records = find_records([*reference_folders(folder / RESULTS[0]), *_beside([*inputs, *references])])
        figures = full_figures(records, encoder.fingerprint, sources.tasks)
        full = figures if "overall" in figures else None
        absent = [name for name in sources.tasks if name not in figures and sources.whole]
        missing = [command_for("full", name, ingredients[0].base.name, data) for name in absent]
        refused = {cell.name: cell.refused for cell in cells if cell.refused}
        counts = {name: len(scored) for name, (_, scored) in sources.tasks.items()}
        contest = Contest(placed, full, refused, on, counts, missing)
        _write_contest(folder, contest, comparison, force)
    return contest


def _write_contest(folder: Path, contest: Contest, comparison: str, force: bool) -> None:
    """Write the results; those of an earlier call may go, not what has been put there since this one began."""
    refuse_other(folder, comparison, force)
    with written(*(Output(folder / name, (folder / name).exists()) for name in RESULTS)) as (table, markdown, picture):
        write_json(table, {**to_json(contest), "comparison": comparison, "made_by": made_by()})
        text = as_markdown(contest_table(contest.placed, contest.full))
        write_atomic(markdown, f"{contest_rows(contest)}\n\n{text}".encode())
        contest_picture(contest.placed, picture)


def _beside(inputs: Sequence[Input | str | Path]) -> list[Path]:
    """Where the records of the references may lie: around the inputs' files, as of eval, and around their folders."""
    files = [Path(one) for one in inputs if isinstance(one, str | Path)]
    around = [place for path in files for place in (path, path.parent)]
    return list(dict.fromkeys(folder for place in around for folder in reference_folders(place)))


def doctor(
    inputs: Sequence[Input | str | Path],
    data: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    rows: int = 64,
    every_site: bool = False,
    texts: Mapping[str, str | Path] | None = None,
    base: Base | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Whether every merge method (or ``methods``) keeps its promises on ``inputs``, and how well these get along.

    ``data`` adds how far each disturbs the others' tasks, on ``rows`` of each task's ``train`` (labels are never
    read; ``"invented"`` ones do), ``texts`` the same on plain text files, as in :func:`merge`. ``every_site`` tries
    the merges at every site instead of one of each kind. ``folder`` is where the ledger of their basis lies: beside
    the first file, unless given.
    """
    names = [METHODS.get(name).name for name in methods or METHODS.names()]  # unknown ones are told before any work
    found = _read_all(inputs, base)
    ingredients = [ingredient(one) for one in found]
    given = _given(ingredients, data, texts, rows, base, progress)
    folders = [folder, *(Path(one).parent for one in inputs if isinstance(one, str | Path))]
    ledger = next((Ledger(Path(one)) for one in folders if one is not None), None)
    report = numbers(ingredients, given, ledger, str(data) == INVENTED)
    return Diagnosis(try_promises(ingredients, names, every_site, progress, given), report)
