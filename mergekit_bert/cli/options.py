"""Options that several commands share, and flags made from config records. Imports nothing heavy."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mergekit_bert.cli.spelling import in_flags
from mergekit_bert.errors import ArgumentError, CompositionError, DataError
from mergekit_bert.option import read_pairs
from mergekit_bert.registry import names_in

MOST = 10**9
"""The largest number accepted for anything that is counted."""
CALIBRATE_ROWS = 256
"""Default value; the parameter is None so that we know whether the user set it."""

Task = Annotated[
    str, typer.Option(help="A built-in task (see `mbert tasks`) or a task's YAML file.", show_default=False)
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder with <task>/{train,dev}.tsv (.csv, .jsonl, .parquet), or 'sample' for the generated corpus.",
        show_default="the folder data/, then the Hub",
    ),
]
MergeData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Folder with <task>/train.tsv, for methods that need rows, --search and --calibrate; or 'sample'; or "
        "'synthetic': generated texts, for steps that read no labels.",
        show_default="none",
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        help="TASK=FILE: a task's rows as plain text, for methods that need rows: one row per line, a tab between two "
        "texts, no header, no labels. Takes precedence over --data.",
        show_default="none",
    ),
]
Inputs = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Adapter files, merged files, PEFT folders and fine-tuned checkpoints of one base, in any combination.",
        show_default="all adapters in adapters/",
    ),
]
Keep = Annotated[
    list[Path] | None,
    typer.Option(help="If several adapters have the same task, the file to use.", show_default="none"),
]
Methods = Annotated[str, typer.Option(help="Comma-separated methods, or 'all'.")]
Rank = Annotated[
    int | None,
    typer.Option(help="Compress the result to this rank at every site.", show_default="exact, no compression"),
]
Private = Annotated[
    int | None, typer.Option(help="Rank of a residual that each task keeps in addition.", show_default="none")
]
Rows = Annotated[
    int | None,
    typer.Option(
        help="Rows per task, for methods that need rows.", show_default="the method's default", min=1, max=MOST
    ),
]
CalibrateRows = Annotated[
    int | None,
    typer.Option(
        help="Rows per task to calibrate on (heads reads their labels).",
        min=1,
        max=MOST,
        show_default=str(CALIBRATE_ROWS),
    ),
]
_FAMILIES = ", ".join(names_in("mergekit_bert.adapters.families", "mbert.families"))
Family = Annotated[
    str, typer.Option("--type", help=f"Adapter family: {_FAMILIES}; or a sum of families, such as lora+bitfit.")
]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="An option of the family, NAME=VALUE: the way to those of other packages' families, which have no flags. "
        "May be repeated.",
        show_default="none",
    ),
]
Base = Annotated[str, typer.Option(help="The encoder: 'minilm' (built in), a local folder, or a name on the Hub.")]
ModelBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The encoder. Needed if the file names one other than minilm, a local folder with the recorded "
        "fingerprint, or a name listed in the environment variable MBERT_ALLOWED_BASES (a,b,c).",
        show_default="the one in the file",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard files into the run folder.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.", show_default="off")]


def read_texts(given: list[str]) -> dict[str, Path]:
    """Parse ``["sst=reviews.txt"]`` into files by task; raises DataError."""
    found: dict[str, Path] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path or name in found:
            raise DataError("--texts", f"{text!r}", "TASK=FILE, each task once", "correct it")
        found[name] = Path(path)
    return found


def read_names(text: str) -> list[str] | None:
    """``"ties, tsv"`` as names; None for ``"all"``."""
    return None if text == "all" else [name.strip() for name in text.split(",")]


def refuse_alone(these: Mapping[str, object], needed: str, given: object) -> None:
    """Raise CompositionError if one of ``these`` options is given without ``needed``, the option it depends on."""
    for option, value in these.items():
        if value is not None and not given:
            raise CompositionError(option, f"no {needed}, and only that uses it", needed, "add it, or drop this")


Choice = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, str]], Any]
"""Makes a record from a command's other arguments, the flags that are on the command line, and the texts of --set."""


def of_family(given: Mapping[str, Any], typed: Mapping[str, Any], texts: Mapping[str, str]) -> Any:
    """The options of the family that ``--type`` names."""
    from mergekit_bert.adapters.family import FAMILIES

    family = FAMILIES.get(given["kind"])
    return family.configured({**typed, **family.read(texts)})


def flags(
    chosen: Mapping[str, Choice] | None = None,
    **configs: type[Any] | Sequence[type[Any]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per option of each config record; the command receives the records by keyword.

    Where a keyword has several records, which are alternatives, ``chosen`` makes the one that is meant. Such a command
    has a flag ``--set`` besides, for options of records that are not among them.
    """
    chosen = chosen or {}
    groups = {name: [one] if isinstance(one, type) else list(one) for name, one in configs.items()}

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(context: Any, **given: Any) -> None:
            texts = read_pairs(given.pop("settings", None) or ())
            asked = {name for name in given if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
            values = {name: {one: given.pop(one) for one in _option_fields(group)} for name, group in groups.items()}
            for name, options in values.items():
                typed = {option: value for option, value in options.items() if option in asked}
                if twice := sorted(typed.keys() & texts.keys()):
                    raise ArgumentError(f"`{twice[0]}`", "given here and in `options`", "one of the two", "drop one")
                given[name] = chosen[name](given, typed, texts) if name in chosen else groups[name][0](**typed)
            command(**given)

        hints = get_type_hints(command, include_extras=True)
        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name not in configs]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context]
        parameters += [one.replace(annotation=hints[one.name], kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        for group in groups.values():
            parameters += _parameters(group)
        if chosen:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter("settings", keyword, default=None, annotation=_Settings))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return wrap


def _option_fields(group: Sequence[type[Any]]) -> dict[str, tuple[Any, type[Any]]]:
    """The fields that are options, those with a help text, by name, each with the record that defines it."""
    found: dict[str, tuple[Any, type[Any]]] = {}
    for config in group:
        for one in dataclasses.fields(config):
            if "help" in one.metadata:
                owner = next(
                    kind for kind in reversed(config.__mro__) if one.name in vars(kind).get("__annotations__", ())
                )
                found.setdefault(one.name, (one, owner))
    return found


def _parameters(group: Sequence[type[Any]]) -> list[inspect.Parameter]:
    made = []
    for one, owner in _option_fields(group).values():
        of = getattr(owner, "of", "")
        flag = typer.Option(
            f"--{one.name.replace('_', '-')}",
            help=in_flags(one.metadata["help"]) + (f" ({of})" if of else ""),
            show_default=one.metadata["shown"] or True,
        )
        annotation = operator.getitem(Annotated, (get_type_hints(owner)[one.name], flag))
        keyword = inspect.Parameter.KEYWORD_ONLY
        made.append(inspect.Parameter(one.name, keyword, default=one.default, annotation=annotation))
    return made
