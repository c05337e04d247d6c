"""The exception tree. Every error a user can cause is one line: where, what was found, what was expected, what to do.

MbertError
├── ArgumentError      an argument of a public function that is not of its type
├── UnknownNameError   a task, base, method, type or metric that nothing is registered under
├── PluginError        a plug-in that cannot be registered
├── DataError          rows that cannot be read: a file, a column, a label, a line
├── EncoderError       a base model that cannot be loaded or has no such sites
├── BasisError         rows of an orthogonal basis that collide or have run out
├── ModelFileError     an adapter, merged or ensemble file that is not what it claims to be
├── CompositionError   adapters that cannot be composed as asked
├── TrainingError      a run that cannot start or go on
├── OutputError        a result that cannot be written
└── MissingExtraError  an optional package that is not installed

Messages name parameters as Python does, in backticks: `rank`, `method=ensemble`. The command line shows flags instead.
"""

from mergekit_bert.text import one_line

_LIMITS = (500, 300, 800, 800)
"""Characters of each part: a message never prints a whole value of a file."""


class MbertError(Exception):
    """An error the user can fix, in one line that is safe to print."""

    def __init__(self, where: str, found: str, expected: str, remedy: str) -> None:
        """Keep the four parts, escaped and cut; ``str(error)`` joins them."""
        parts = (where, found, expected, remedy)
        self.where, self.found, self.expected, self.remedy = map(one_line, parts, _LIMITS)
        super().__init__(f"{self.where}: {self.found}; expected {self.expected}; {self.remedy}")


class ArgumentError(MbertError):
    """An argument of a public function, or a field of a public record, that is not of its type."""


class UnknownNameError(MbertError):
    """A name that nothing is registered under."""


class PluginError(MbertError):
    """A plug-in that cannot be registered."""


class DataError(MbertError):
    """Rows that cannot be read."""


class EncoderError(MbertError):
    """A base model that cannot be loaded, or has no such sites."""


class BasisError(MbertError):
    """Rows of an orthogonal basis that collide or have run out."""


class ModelFileError(MbertError):
    """A model file that is cut short, foreign, or not what it claims to be."""


class CompositionError(MbertError):
    """Adapters that cannot be composed as asked."""


class TrainingError(MbertError):
    """A training run that cannot start or go on."""


class OutputError(MbertError):
    """A result that cannot be written."""


class MissingExtraError(MbertError):
    """An optional package that is not installed."""


class MbertWarning(UserWarning):
    """A warning for the user; the work continues."""
