"""The docs of the methods are what their records say."""

from pathlib import Path

from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.reference import method_page
from tests.cli.command import mbert

DOCS = Path(__file__).parents[2] / "docs/merging.md"


def test_the_docs_hold_the_page_of_every_method() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for method in METHODS:
        assert method_page(method) in text, f"run `mbert methods {method.name}` and put its page into {DOCS.name}"


def test_the_command_prints_them() -> None:
    whole = mbert("methods", "--markdown")
    assert whole.code == 0
    assert all(method_page(method) in whole.out for method in METHODS)
    assert mbert("methods", "ties").out.strip() == method_page(METHODS.get("ties")).strip()
    table = mbert("methods").out
    assert all(name[:8] in table for name in METHODS.names())
    assert mbert("methods", "tise").code == 1
