"""The base class of evaluations, comparisons and diagnoses: a table for pandas and notebooks, and a picture."""

from abc import ABC, abstractmethod
from html import escape
from typing import TYPE_CHECKING, Any

from mergekit_bert.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

MISSING = "–"


def figure(value: float | None, digits: int = 3) -> str:
    """A number as text, without a minus before zero; a dash if it is missing."""
    return MISSING if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


class Result(ABC):
    """A table of numbers, one record per row."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """The rows of the table, by column; None if not measured."""

    @abstractmethod
    def plot(self) -> "Figure":
        """The numbers as a matplotlib figure, which notebooks display and ``savefig`` writes."""

    def to_dataframe(self) -> "DataFrame":
        """The table as a pandas DataFrame; raises MissingExtraError if pandas is not installed."""
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise MissingExtraError(
                "to_dataframe", "the package pandas is not installed", "pandas", "install mbert[pandas]"
            ) from error
        return DataFrame(self.records())

    def _repr_html_(self) -> str:
        """The table as HTML, for notebooks."""
        records = self.records()
        names = dict.fromkeys(name for record in records for name in record)
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        lines = ("".join(f"<td>{escape(_cell(record.get(name)))}</td>" for name in names) for record in records)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    return figure(value) if value is None or isinstance(value, float) else str(value)
