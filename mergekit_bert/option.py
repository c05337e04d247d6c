"""Options of a config record, each explained once: where it stands. The command line makes its flags from them."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str, shown: str | None = None) -> Any:
    """A dataclass field with the help text of its flag; ``shown`` stands for a default that is worked out later."""
    return field(default=default, metadata={"help": text, "shown": shown})
