"""The documentation of the merge methods is generated from their records."""

from pathlib import Path

from mergekit_bert.cli.spelling import in_flags
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.reference import method_page
from tests.cli.command import mbert

DOCS = Path(__file__).parents[2] / "docs/merging.md"
PAGES = {method.name: method_page(method, spelled=in_flags) for method in METHODS}


def test_the_docs_hold_the_page_of_every_method() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, page in PAGES.items():
        assert page in text, f"run `mbert methods {name}` and put its page into {DOCS.name}"


def test_the_command_prints_them() -> None:
    whole = mbert("methods", "--markdown")
    assert whole.code == 0
    assert all(page in whole.out for page in PAGES.values())
    assert mbert("methods", "ties").out.strip() == PAGES["ties"].strip()
    table = mbert("methods").out
    assert all(name[:8] in table for name in METHODS.names())
    assert mbert("methods", "tise").code == 1


def test_parameters_are_spelled_as_flags_on_the_command_line() -> None:
    assert "`with_stats=fisher`, or `data` or `texts`" in method_page(METHODS.get("fisher"))
    assert "--with-stats fisher, or --data or --texts" in PAGES["fisher"]
    assert "reproducible with --seed" in PAGES["dare"]
