"""Help: every command has a worked example and tells every default."""

import dataclasses
import re

import pytest
import typer

from mergekit_bert.cli import app
from mergekit_bert.registry import names_in
from tests.cli.command import mbert

COMMANDS = {command.name: command for command in typer.main.get_command(app).commands.values()}  # type: ignore[attr-defined]


def test_all_commands_are_listed_with_what_they_do() -> None:
    done = mbert("--help")
    assert done.code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"\b{name}\b", done.out)
        assert command.get_short_help_str(20).split()[0] in done.out


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_and_its_defaults(name: str, flag: str) -> None:
    done = mbert(name, flag)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.out).split())
    assert (done.code, done.err) == (0, "")
    assert f"Example: mbert {name}" in text
    for parameter in COMMANDS[name].params:
        if parameter.name == "help" or parameter.param_type_name == "argument":
            continue
        assert f"--{parameter.opts[-1].lstrip('-')}" in text
        if parameter.required:
            assert "[required]" in text
        elif not parameter.is_flag:
            shown = parameter.show_default if isinstance(parameter.show_default, str) else str(parameter.default)
            assert f"[default: {shown}]" in text or f"[default: ({shown})]" in text, parameter.name


def test_the_defaults_shown_are_those_of_the_records() -> None:
    from mergekit_bert.adapters.config import AdapterConfig
    from mergekit_bert.training.config import TrainConfig

    given = {parameter.name: parameter.default for parameter in COMMANDS["train-adapter"].params}
    for config in (AdapterConfig(), TrainConfig()):
        for one in dataclasses.fields(config):
            if one.metadata:  # patterns of ranks and alphas are for Python and for files
                assert given[one.name] == getattr(config, one.name), one.name


def test_the_families_that_help_names_for_an_option_are_those_that_have_it() -> None:
    from mergekit_bert.adapters.family import FAMILIES

    own = [FAMILIES.get(name) for name in names_in(FAMILIES.package)]
    for parameter in COMMANDS["train-adapter"].params:
        having = [
            one.name for one in own if parameter.name in {field.name for field in dataclasses.fields(one.options)}
        ]
        assert not having or parameter.help.endswith(f"({', '.join(having)})"), parameter.name


def test_nothing_but_the_name_shows_the_help() -> None:
    done = mbert()
    assert done.code == 2
    assert "Usage: mbert" in done.out + done.err


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["tasks", "--nonsense"],
        ["train-adapter"],
        ["train-adapter", "--task"],
        ["train-adapter", "--task", "sst", "--epochs", "many"],
        ["train-adapter", "--task", "sst", "--rank", "1.5"],
        ["finetune", "--lr", "fast", "--task", "sst"],
        ["eval"],
        ["inspect"],
        ["predict"],
        ["inspect", "a", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_two(words: list[str]) -> None:
    done = mbert(*words)
    assert done.code == 2
    assert "Error" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
