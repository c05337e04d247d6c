"""What a dataclass says of itself to :mod:`mergekit_bert.schema`; light, unlike the validator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STRICT: dict[str, Any] = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
"""The ``__pydantic_config__`` of a dataclass: types are not converted, unknown keys refused, numbers finite."""


@dataclass(frozen=True)
class Before:
    """A field's annotation: ``change`` sees the plain JSON first; it raises ValueError for what it does not take."""

    change: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """For pydantic, which asks every annotation."""
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.change, handler(source))


def from_pairs(value: Any) -> Any:
    """A mapping from the pairs that a file keeps of it; raises ValueError for a key that comes twice."""
    if not isinstance(value, list) or not all(isinstance(one, list) and len(one) == 2 for one in value):
        return value
    if not all(isinstance(key, str) for key, _ in value):
        raise ValueError("a pattern that is no text")
    found = dict(value)
    if len(found) < len(value):
        raise ValueError("a pattern twice")
    return found
