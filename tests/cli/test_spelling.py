"""Parameters that messages name are flags on the command line, and every such flag is one that a command has."""

import inspect
import re

import pytest

from mergekit_bert import api
from mergekit_bert.cli.spelling import _FLAGS, in_flags
from tests.cli.command import mbert


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("correct `rank`", "correct --rank"),
        ("`keep_inputs`: no", "--keep-inputs: no"),
        ("use `method=task_arithmetic` or `basis=random`", "use --method task_arithmetic or --basis random"),
        ("`over=weights,options`", "--search-over weights,options"),
        ("`weights=sst=0.5`", "--weights sst=0.5"),
        ("see `mbert methods`, 'a' and ``", "see `mbert methods`, 'a' and ``"),
    ],
)
def test_parameters_become_flags(told: str, shown: str) -> None:
    assert in_flags(told) == shown


def test_flags_of_another_name_are_there() -> None:
    text = mbert("merge", "--help").out
    calls = {name for call in (api.merge, api.search, api.calibrate) for name in inspect.signature(call).parameters}
    assert calls >= set(_FLAGS)
    for flag in _FLAGS.values():
        assert re.search(rf"{flag}\b", text)
