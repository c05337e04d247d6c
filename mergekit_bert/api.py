"""The Python interface: everything the command line does, as short calls. ``import mergekit_bert as mb``.

Calls accept lists of rows, a dict of columns, tables of pandas and datasets, Rows and paths. They return objects, and
write files only if you name one. A wrong argument raises an :class:`~mergekit_bert.errors.MbertError` of one line.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import InstanceOf

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.base import encoder_of, on_base
from mergekit_bert.adapters.config import RECORDS, USUAL, Options
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.adapters.ledger import Ledger
from mergekit_bert.arguments import Location, checked
from mergekit_bert.composing.calibration import read_steps
from mergekit_bert.composing.merge_input import MergeInput, check_together, inputs_of
from mergekit_bert.composing.merging import change, reads_rows
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.recipe import Recipe, changed
from mergekit_bert.data.given import Tables, given_data, texts_of
from mergekit_bert.data.kind import Prediction
from mergekit_bert.data.source import is_synthetic, load_rows
from mergekit_bert.data.task import YAML, Task, get_task, with_source
from mergekit_bert.encoder.folder import FullModel
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.encoder.places import MINILM
from mergekit_bert.encoder.stored import open_encoder
from mergekit_bert.errors import ArgumentError, CompositionError, OutputError
from mergekit_bert.evaluation.compare import compare_recipes
from mergekit_bert.evaluation.doctor import Diagnosis, measure_pairs
from mergekit_bert.evaluation.evaluate import Evaluation, evaluate_model
from mergekit_bert.evaluation.held_out import DEV
from mergekit_bert.evaluation.invariants import check_invariants
from mergekit_bert.evaluation.merge_results import recipes_for
from mergekit_bert.evaluation.method_comparison import (
    MethodComparison,
)
from mergekit_bert.evaluation.sources import find_sources, given_rows, tasks_of
from mergekit_bert.files import SUFFIX, remove
from mergekit_bert.formats.dense import write_dense
from mergekit_bert.formats.file import write_model
from mergekit_bert.formats.format import FORMATS, open_model
from mergekit_bert.formats.inputs import read_inputs
from mergekit_bert.models.composition import Ensemble, Merged, Stored, as_composition, as_merged
from mergekit_bert.models.prediction import Predictor, the_task
from mergekit_bert.outputs import Output, claimed, written
from mergekit_bert.registry import unknown
from mergekit_bert.request import CALIBRATE_ROWS, SEARCH_ROWS, MergeRequest, calibrated, check_count
from mergekit_bert.training import manifest, run
from mergekit_bert.training.config import TrainConfig

ADAPTERS, MODELS = Path("adapters"), Path("models")
Base = Location | InstanceOf[Encoder]
AnyTask = Location | InstanceOf[Task]
"""A task: its name, its YAML file, or its record."""
AnyComposition = InstanceOf[Adapter] | InstanceOf[Merged] | InstanceOf[Ensemble]
AnyModel = Location | AnyComposition | InstanceOf[FullModel]
"""A model, or its file or folder."""
AnyInput = AnyModel | InstanceOf[MergeInput]
"""An input of a merge, or its file or folder."""
Answering = AnyModel | InstanceOf[Predictor]
"""A model, its file, or a predictor for it."""


def _encoder(base: Base) -> Encoder:
    return base if isinstance(base, Encoder) else load_encoder(base)


def _later(base: Base | None, models: Sequence[MergeInput]) -> Callable[[], Encoder]:
    """The encoder ``base``, or that of ``models``, loaded when it is first called."""
    return functools.cache(lambda: encoder_of("the first input", models[0].base, base))


def _named(base: Base | None) -> str | Encoder | None:
    return str(base) if isinstance(base, Path) else base


def _file(path: str | Path) -> Path:
    """``path`` as the name of a model file; raises OutputError for another suffix, which would hide its format."""
    if Path(path).suffix != SUFFIX:
        found = f"the suffix {Path(path).suffix!r}" if Path(path).suffix else "no suffix"
        raise OutputError(str(path), found, f"a file name that ends in {SUFFIX}", "correct `out`")
    return Path(path)


def _folder(path: str | Path) -> Path:
    if Path(path).suffix == SUFFIX:
        raise OutputError(str(path), "a file name", "a folder for the model", "correct `out`")
    return Path(path)


def default_out(task: Task, family: str) -> Path:
    """``adapters/<task>.safetensors``; the name of a head alone includes its type, and merges of a folder skip it."""
    name = f"{task.name}.{family}" if FAMILIES.get(family).head_alone else task.name
    return ADAPTERS / f"{name}{SUFFIX}"


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder of this process for runs without ``out``; they share its ledger of basis rows."""
    return tempfile.TemporaryDirectory(prefix="mbert-")


@contextlib.contextmanager
def _place(out: str | Path | None, task: Task, control: manifest.Control) -> Iterator[tuple[Path, manifest.Control]]:
    """The file that a run writes: ``out``, or a temporary file that is removed when the run has ended."""
    if out is not None:
        yield _file(out), control
        return
    for name in ("resume", "tensorboard"):
        if getattr(control, name):
            raise ArgumentError(
                f"`{name}`", "no `out`", f"`out`, which `{name}` needs", f"give `out`, or drop `{name}`"
            )
    path = Path(_scratch().name) / f"{task.name}{SUFFIX}"
    try:
        yield path, dataclasses.replace(control, force=True)
    finally:
        for leftover in (path, manifest.run_folder(path)):
            remove(leftover)


def _check_options(options: Mapping[str, Any], *records: type[Options] | type[TrainConfig]) -> None:
    """Raise UnknownNameError for an option that is a field of none of ``kinds``."""
    names = list(dict.fromkeys(field.name for record in records for field in dataclasses.fields(record)))
    for name in options:
        if name not in names:
            raise unknown("training option", name, names)


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of :class:`TrainConfig`, and the rest."""
    loop = {field.name: options[field.name] for field in dataclasses.fields(TrainConfig) if field.name in options}
    return loop, {name: value for name, value in options.items() if name not in loop}


@checked
def train_adapter(
    task: AnyTask,
    data: Any = None,
    out: Location | None = None,
    *,
    base: Base = MINILM,
    type: str = USUAL,
    adapter: InstanceOf[Options] | None = None,
    train: InstanceOf[TrainConfig] | None = None,
    resume: bool = False,
    force: bool = False,
    tensorboard: bool = False,
    progress: bool = False,
    with_stats: Sequence[str] = (),
    avoid: Sequence[Location | InstanceOf[Adapter]] = (),
    **options: Any,
) -> Adapter:
    """Train an adapter for ``task``, and write it to ``out`` if that is given.

    ``data`` are the labelled rows: a table, a folder that holds ``<task>/train.tsv``, or ``"sample"``. ``type`` is the
    adapter's family, or a sum of families (``"lora+bitfit"``). ``options`` are those of the family (for LoRA the fields
    of ``AdapterConfig``) and of ``TrainConfig``, by name (``rank=8, epochs=2``); complete records of them may be passed
    as ``adapter`` and ``train``. ``with_stats`` names statistics (``gram``, ``fisher``) to store in the adapter, so
    that merges need no rows. ``avoid`` are other tasks' adapters or their files, for ``basis="avoid"``. Adapters
    trained without ``out`` share one orthogonal basis per process, those with ``out`` one per folder.
    Raises an :class:`~mergekit_bert.errors.MbertError` for invalid arguments or data.
    """
    found = get_task(task)
    control = manifest.Control(resume, force, tensorboard, progress)
    family = FAMILIES.get(type)
    _check_options(options, *RECORDS, family.options, TrainConfig)
    loop, own = _split_options(options)
    configs = family.configured(own, adapter), dataclasses.replace(train or TrainConfig(), **loop)
    with _place(out, found, control) as (path, control):
        rows = load_rows(found, "train", given_data("data", data, [found], "train"))
        others = [read_adapter(Path(one)) if isinstance(one, str | Path) else one for one in avoid]
        return run.train_adapter(_encoder(base), found, rows, path, type, *configs, control, with_stats, others)


@checked
def finetune(
    task: AnyTask,
    data: Any = None,
    out: Location | None = None,
    *,
    base: Base = MINILM,
    train: InstanceOf[TrainConfig] | None = None,
    resume: bool = False,
    force: bool = False,
    tensorboard: bool = False,
    progress: bool = False,
    **options: Any,
) -> FullModel:
    """Fine-tune the whole encoder for ``task`` and write a plain Hugging Face folder to ``out``, which is required.

    ``data`` is as in :func:`train_adapter`; ``options`` are those of ``TrainConfig``.
    """
    found = get_task(task)
    control = manifest.Control(resume, force, tensorboard, progress)
    _check_options(options, TrainConfig)
    if out is None:
        raise ArgumentError("`out` of finetune", "nothing", "a folder for the whole model", "name one")
    path, config = _folder(out), dataclasses.replace(train or TrainConfig(), **options)
    rows = load_rows(found, "train", given_data("data", data, [found], "train"))
    return run.finetune(_encoder(base), found, rows, path, config, control)


@checked
def load(path: Location, *, base: Base | None = None, task: AnyTask | None = None) -> Stored:
    """Read a model of any format: an adapter, merged or ensemble file, a PEFT folder, or the folder of a whole model.

    ``base`` and ``task`` are for a PEFT folder that does not record them.
    """
    return open_model(Path(path), _named(base), get_task(task) if task is not None else None)


@checked
def save(model: AnyComposition, path: Location, *, force: bool = False) -> None:
    """Write ``model`` to one safetensors file; raises OutputError where one exists, unless ``force``."""
    with written(Output(_file(path), force)) as (part,):
        write_model(part, model)


@checked
def export(
    model: AnyComposition,
    folder: Location,
    *,
    base: Base | None = None,
    tasks: Sequence[str] = (),
    stream: bool = False,
    force: bool = False,
) -> list[Path]:
    """Write one plain Hugging Face folder per task (or of ``tasks`` alone), ``folder/<task>/``; returns the folders.

    ``stream`` reads the base from its folder one tensor at a time instead of loading it; the outputs of the exported
    model are then not compared with those of ``model``.
    """
    encoder = encoder_of("model", model.base, base, open_encoder if stream else load_encoder)
    return write_dense(Path(folder), model, encoder, force, tasks)


@checked
def convert(
    path: Location,
    to: str,
    out: Location,
    *,
    base: Base | None = None,
    task: AnyTask | None = None,
    force: bool = False,
) -> list[Path]:
    """Write the model at ``path``, an mbert file or a PEFT adapter folder, in another format; returns the paths.

    ``to`` is ``"peft"`` (``out`` is the folder of an adapter; of other models, ``out/<task>/``), ``"mbert"`` (``out``
    is a file) or ``"hf"`` (plain Hugging Face folders ``out/<task>/``). ``base`` and ``task`` are needed for a PEFT
    folder that does not record them.
    """
    if to not in FORMATS:
        raise unknown("format", to, list(FORMATS))
    form = FORMATS[to]
    target = _file(out) if form.is_file else _folder(out)
    known = get_task(task) if task is not None else None
    load = functools.cache(load_encoder)
    with claimed(*([Output(target, force)] if form.is_file else [])):
        model = as_composition(open_model(Path(path), _named(base), known, load), str(path))
        return form.write(target, model, lambda: encoder_of(str(path), model.base, base, load), force)


@checked
def merge(
    inputs: Sequence[AnyInput],
    method: str | InstanceOf[Recipe] = "",
    weights: Mapping[str, float] | None = None,
    *,
    space: str | None = None,
    options: Mapping[str, Any] | None = None,
    layers: Mapping[str, Mapping[str, float]] | None = None,
    rank: int | None = None,
    private: int | None = None,
    seed: int | None = None,
    data: Any = None,
    texts: Mapping[str, Any] | None = None,
    rows: int | None = None,
    base: Base | None = None,
    size: float | None = None,
    keep_inputs: bool = False,
    calibrate: Sequence[str] = (),
    calibrate_rows: int | None = None,
    lazy: bool = False,
    folder: Location | None = None,
    progress: bool = False,
    **more: Any,
) -> Merged | Ensemble:
    """Compose adapters, merged models or their files by ``method``: a merge method, or ``"ensemble"``.

    With ``method=""`` the recommended method is used. Options of the method are given by name,
    ``merge(inputs, "ties", density=0.5)``, or in the mapping ``options``, needed for options whose name is also a
    parameter of ``merge`` (``rank`` of ctm, ``layers`` of distill). ``weights`` are by task name; see
    :class:`~mergekit_bert.composing.recipe.Recipe` for the rest. A ``Recipe`` may be passed as ``method``; other
    arguments override the recipe. ``data`` is for methods that need unlabelled rows: ``rows`` of ``train`` for each
    task (None: the method's default), from a folder or from tables by task, ``{"sst": ["a text", …]}``, or
    ``"synthetic"`` for generated texts. ``texts`` replace the rows of some tasks: lists of texts, or plain text files,
    one row per line, two texts separated by a tab. ``size`` is the maximum size of the file in MiB: the largest rank
    that fits is used. ``keep_inputs`` stores the adapters in the model too, so that inputs can be added and removed
    later. ``calibrate`` names steps after the merge, as in :func:`calibrate`, on ``calibrate_rows`` rows of each task.
    ``folder`` is where a method that learns keeps its checkpoints: repeating the call resumes from there.
    ``lazy`` merges each site on demand without keeping it in memory, for :func:`export` of whole checkpoints.
    """
    named = Recipe(method) if isinstance(method, str) else method
    of_method = {**(options or {}), **more}
    changes = {"space": space, "rank": rank, "private": private, "seed": seed}
    request = MergeRequest(
        inputs=_read_all(inputs, base),
        recipe=changed(named, options=of_method, weights=weights, layers=layers, **changes),
        data=data,
        texts=texts,
        rows=rows,
        base=base,
        size=size,
        keep_inputs=keep_inputs,
        calibrate=read_steps(",".join(calibrate)),
        calibrate_rows=calibrate_rows,
    )
    unfinished = Path(folder) if folder is not None else None
    return request.resolved().run(folder=unfinished, lazy=lazy, show=progress)


def _read_all(inputs: Sequence[AnyInput], base: Base | None) -> list[MergeInput]:
    """Models and paths as merge inputs, on their base where they need it."""
    merge_inputs: list[MergeInput] = []
    load = functools.cache(load_encoder)
    for model in inputs:
        if isinstance(model, str | Path):
            merge_inputs += read_inputs(Path(model), _named(base), load)
        else:
            merge_inputs += inputs_of(model, "the inputs", _named(base), load)
    return merge_inputs


@checked
def changed_inputs(
    files: Sequence[Location], add: Sequence[AnyInput], remove: Sequence[str], base: Base | None = None
) -> tuple[list[MergeInput], Recipe]:
    """The inputs stored in one merged file, with others added and some removed, and the file's recipe."""
    if len(files) != 1:
        raise CompositionError("`add` or `remove`", f"{len(files)} files", "one merged file", "name the file to change")
    where = str(files[0])
    model = as_merged(load(where), where, "not merged", "a file merged with `keep_inputs`", "merge first")
    kept = {name: on_base(where, one, base) for name, one in model.kept.items()}
    left = change(dataclasses.replace(model, kept=kept), _read_all(add, base), remove)
    names, recipe = {one.name for one in left}, Recipe.from_json(model.recipe)

    def known(weights: Mapping[str, float]) -> dict[str, float]:
        return {name: weight for name, weight in weights.items() if name in names}

    layers = {pattern: known(weights) for pattern, weights in recipe.layers.items()}
    return left, dataclasses.replace(recipe, weights=known(recipe.weights), layers=layers)


@checked
def search(
    inputs: Sequence[AnyInput],
    method: str | InstanceOf[Recipe] = "",
    evaluations: int = 64,
    data: Any = None,
    *,
    over: Sequence[str] = ("weights",),
    held_out: int = SEARCH_ROWS,
    texts: Mapping[str, Any] | None = None,
    rows: int | None = None,
    out: Location | None = None,
    base: Base | None = None,
    keep_inputs: bool = False,
    progress: bool = False,
) -> Merged:
    """Search for the merge of ``inputs`` with the best overall score, among at most ``evaluations`` merges.

    Merges are scored on labelled rows held out from ``train``, at most ``held_out`` per task. ``method`` is as in
    :func:`merge`, but the recommended method is then one that does not learn. ``over`` names what is searched:
    ``weights``, ``layers`` (a factor for each third of the layers) and ``options`` of the method. ``texts`` and
    ``rows`` are as in :func:`merge`, for methods that need unlabelled rows. ``out``: output path; finished evaluations
    are cached beside it.
    """
    for name, count in (("evaluations", evaluations), ("held_out", held_out)):
        check_count(name, count)
    request = MergeRequest(
        inputs=_read_all(inputs, base),
        recipe=method if isinstance(method, Recipe) else Recipe(method),
        data=data,
        texts=texts,
        rows=rows,
        base=base,
        keep_inputs=keep_inputs,
        search=evaluations,
        search_over=over,
        search_rows=held_out,
    )
    model = request.resolved().run(_file(out) if out is not None else None, show=progress)
    return as_merged(model, "`method`", "ensemble, which merges nothing", "a merge method", "choose another `method`")


@checked
def calibrate(
    model: AnyModel,
    data: Any = None,
    *,
    steps: Sequence[str] = ("heads",),
    texts: Mapping[str, Any] | None = None,
    rows: int = CALIBRATE_ROWS,
    inputs: Sequence[AnyInput] = (),
    base: Base | None = None,
    progress: bool = False,
) -> Merged:
    """Calibrate a merged model on ``rows`` training rows of each task.

    The step ``heads`` refits every task's head to the merged features on labelled rows: if there are enough, rows that
    the adapters' training held out and no search has read. The step ``scales`` scales the merged Delta of each site so
    that it changes outputs as much as the Deltas of ``inputs`` (default: the inputs stored in the model) do on their
    own rows, which may be ``texts`` or synthetic as in :func:`merge`.
    """
    taken, read = read_steps(",".join(steps)), load(model, base=base) if isinstance(model, str | Path) else model
    found = as_merged(read, "`model`", f"{read.role()}, not merged", "a merged model", "choose a merge method")
    check_count("rows", rows)
    source = given_data("data", data, found.tasks, "train")
    encoder = functools.cache(lambda: encoder_of("model", found.base, base))
    return calibrated(found, taken, source, texts, rows, encoder, _read_all(inputs, base), show=progress)


@checked
def predictor(model: Answering, *, base: Base | None = None) -> Predictor:
    """A predictor for ``model`` or its file, ``predictor(…).predict("sts", [("a", "b")])``. Threads may share it."""
    if isinstance(model, Predictor):
        return model
    found = load(model, base=base) if isinstance(model, str | Path) else model
    where = str(model) if isinstance(model, str | Path) else "model"
    return Predictor(found, None if found.stands_alone else encoder_of(where, found.base, base), where)


@checked
def predict(
    model: Answering, texts: Any, task: str | None = None, *, base: Base | None = None
) -> Prediction | list[Prediction]:
    """Predictions of ``model`` for ``texts``; ``task`` may be omitted if the model has one task.

    One text (for a task of two texts, a tuple of two) gives one prediction; a list of them, a dict of columns, a table
    of pandas or datasets, Rows or the ``Path`` of a file gives a list. A string is always a text, also if a file has
    that name. Raises DataError naming the row for anything else.
    """
    answering = predictor(model, base=base)
    found = the_task(answering.model, task)
    rows, single = texts_of("`texts`", texts, found)
    answers = answering.predict(found.name, rows.texts)
    return answers[0] if single else answers


@checked
def embed(
    model: Answering, texts: Any, task: str | None = None, *, base: Base | None = None
) -> Float[np.ndarray, "texts width"]:
    """A vector for each text: the mean of the last hidden states, which the head of ``task`` takes as input.

    Available for tasks whose head encodes each text separately (``matching``, ``cosine``; ``mean`` on one text): texts
    that such a task rates as similar have a high cosine. ``task`` may be omitted if the model has one task.
    """
    answering = predictor(model, base=base)
    return answering.embed(the_task(answering.model, task).name, texts)


@checked
def evaluate(
    model: Answering,
    data: Any = None,
    *,
    base: Base | None = None,
    tasks: Sequence[AnyTask] = (),
    predictions: Location | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score ``model`` on labelled rows of each of its tasks, or of ``tasks``.

    ``data`` are tables by task, ``{"sst": table}`` (for a model of one task, the table itself), or a folder that holds
    ``<task>/dev.tsv``. If ``model`` is a path, the scores are recorded beside it, and those of its adapters, the linear
    probe and full fine-tuning are looked up among the recorded scores there. ``predictions`` is a folder to write the
    predictions to. ``tasks`` are names, or Tasks and YAML files that define where the rows are, which a model file does
    not record.
    """
    given = {str(one): get_task(one) for one in tasks if isinstance(one, Task) or Path(one).suffix in YAML}
    named = {task.name: task for task in given.values()}
    answering = predictor(model, base=base)
    source = given_data("data", data, answering.model.tasks, "dev")
    chosen = [given[str(one)].name if str(one) in given else str(one) for one in tasks]
    return evaluate_model(
        answering,
        lambda task: load_rows(with_source(task, named.get(task.name)), "dev", source),
        Path(model) if isinstance(model, str | Path) else None,
        chosen or (list(source.tables) if isinstance(source, Tables) else []),
        Path(predictions) if predictions else None,
        progress,
        source,
        {task.name: spelling for spelling, task in given.items() if Path(spelling).suffix in YAML},
    )


@checked
def compare(
    inputs: Sequence[AnyInput],
    methods: Sequence[str] | None = None,
    spaces: Sequence[str] | None = None,
    data: Any = None,
    *,
    texts: Mapping[str, Any] | None = None,
    rows: int | None = None,
    limit: int | None = None,
    on: str = DEV,
    rank: int | None = None,
    private: int | None = None,
    calibrate: Sequence[str] = (),
    calibrate_rows: int = CALIBRATE_ROWS,
    seed: int = 0,
    out: Location | None = None,
    base: Base | None = None,
    references: Sequence[Location] = (),
    force: bool = False,
    progress: bool = False,
) -> MethodComparison:
    """Merge ``inputs`` by every method (or those named) in every space, and score each merge on rows of all tasks.

    ``on``: rows to score on, ``"dev"``, or ``"held-out"`` for the part of ``train`` that the adapters' training held
    out, so that a method can be chosen without using dev. ``limit``: maximum rows per task. ``data`` is a folder, or
    tables by task: of the rows to score on, or of both splits, ``{"sst": {"train": …, "dev": …}}``. ``texts`` and
    ``rows`` are as in :func:`merge`, for methods that need unlabelled rows; rows that are scored on are never used for
    that. ``calibrate`` names steps as in :func:`calibrate`, done on ``calibrate_rows`` of each task: every merge then
    has a second row with its calibrated result. ``out`` is a folder in which finished results are cached, and
    ``table.md``, ``table.json`` and ``picture.png`` are written, with the rows of earlier calls; a table for other
    inputs or rows is overwritten only with ``force``. ``references`` are further files beside which scores of full
    fine-tuning may be recorded. Raises an :class:`~mergekit_bert.errors.MbertError` before any long work.
    """
    for name, count in (("rows", rows), ("limit", limit), ("calibrate_rows", calibrate_rows)):
        check_count(name, count)
    merge_inputs, steps = _read_all(inputs, base), read_steps(",".join(calibrate))
    check_together(merge_inputs)
    recipes = recipes_for(methods or METHODS.names(), spaces, seed, rank, private)
    data = given_data("data", data, list(tasks_of(merge_inputs).values()), "dev" if on == DEV else "train")
    sources = find_sources(merge_inputs, data, texts, on, limit, calibrate_rows if "heads" in steps else 0)
    if "scales" in steps or any(reads_rows(one, merge_inputs) for one in recipes):
        for name in sources.tasks:
            sources.unlabelled(name)
    elif texts:
        raise CompositionError("`texts`", "no merge here takes anything from rows", "a method that does", "drop it")
    return compare_recipes(
        recipes,
        merge_inputs,
        sources,
        encoder=_later(base, merge_inputs)(),
        calibration=sources.calibration(steps, calibrate_rows),
        rows=rows,
        out=Path(out) if out is not None else None,
        beside=[Path(one) for one in (*inputs, *references) if isinstance(one, str | Path)],
        data=data,
        force=force,
        show=progress,
    )


@checked
def doctor(
    inputs: Sequence[AnyInput],
    data: Any = None,
    *,
    methods: Sequence[str] | None = None,
    rows: int = 64,
    every_site: bool = False,
    texts: Mapping[str, Any] | None = None,
    base: Base | None = None,
    folder: Location | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Check the invariants of the merge methods on ``inputs`` and predict how much each task would lose.

    ``methods`` limits the check to some methods. The loss is predicted on ``rows`` unlabelled rows of each task's
    ``train`` in ``data`` (``"synthetic"`` measures interference, but gives no verdict), or on ``texts`` as in
    :func:`merge`; without rows, only the Deltas are compared. ``every_site`` checks the invariants at every site
    instead of one site of each shape. ``folder`` contains the ledger of the inputs' basis (default: the folder of the
    first file).
    """
    names = [
        METHODS.get(name).name for name in methods or METHODS.names()
    ]  # unknown names are reported before any work
    merge_inputs = _read_all(inputs, base)
    check_count("rows", rows)
    data = given_data("data", data, list(tasks_of(merge_inputs).values()), "train")
    encoder = _later(base, merge_inputs)
    given = given_rows(merge_inputs, data, texts, rows, encoder, progress) if data or texts else None
    folders = [folder, *(Path(one).parent for one in inputs if isinstance(one, str | Path))]
    ledger = next((Ledger(Path(one)) for one in folders if one is not None), None)
    report = measure_pairs(merge_inputs, given, ledger, is_synthetic(data))
    return Diagnosis(check_invariants(merge_inputs, names, every_site, progress, given), report)
