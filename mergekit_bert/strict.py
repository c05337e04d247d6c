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
