"""What people read: lines, tables and progress with nothing in them that could steer a terminal.

Names, labels and texts come from files of strangers. All that is printed goes through here; files keep data as it is.
"""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergekit_bert.text import printable

_LINE_ENDS = str.maketrans({"\n": "\\n", "\r": "\\r"})


def say(line: str, error: bool = False) -> None:
    """Print one line, on standard error if asked, whatever is in it."""
    print(printable(line).translate(_LINE_ENDS), file=sys.stderr if error else sys.stdout, flush=True)


def say_lines(text: str) -> None:
    """Print text of several lines, each with its end."""
    sys.stdout.write(printable(text))


def say_tsv(text: str) -> None:
    """Print a TSV, in which line ends of the data are quoted and so can be read back."""
    sys.stdout.write("\r".join(printable(part) for part in text.split("\r")))


def say_json(value: Any, sort_keys: bool = False) -> None:
    """Print ``value`` as indented JSON, escaped as JSON does it."""
    print(json.dumps(value, indent=2, sort_keys=sort_keys).replace("\x7f", "\\u007f"))


class PlainConsole(Console):
    """A console that takes the texts in tables as they are: no markup, no emoji codes, no control characters."""

    def __init__(self, **options: Any) -> None:
        """As rich's, but plain."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a cell or title, escaped."""
        return super().render_str(printable(text), **options)


def show(*tables: Table) -> None:
    """Print tables as wide as the terminal."""
    for table in tables:
        PlainConsole().print(table)
