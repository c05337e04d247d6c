"""The exception tree. Every error a user can cause is one line: where, what was found, what was expected, what to do.

MbertError
├── UnknownNameError   a task, base, method, type or metric that nothing is registered under
├── DataError          rows that cannot be read: a file, a column, a label, a line
├── EncoderError       a base model that cannot be loaded or has no such sites
├── BasisError         rows of an orthogonal basis that collide or have run out
├── ModelFileError     an adapter, merged or ensemble file that is not what it claims to be
├── CompositionError   adapters that cannot be composed as asked
├── TrainingError      a run that cannot start or go on
├── OutputError        a result that cannot be written
└── MissingExtraError  an optional package that is not installed
"""


class MbertError(Exception):
    """An error the user can fix, told in one line."""

    def __init__(self, where: str, found: str, expected: str, remedy: str) -> None:
        """Keep the four parts; ``str(error)`` joins them."""
        self.where, self.found, self.expected, self.remedy = where, found, expected, remedy
        super().__init__(f"{where}: {found}; expected {expected}; {remedy}")


class UnknownNameError(MbertError):
    """A name that nothing is registered under."""


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
    """Something the user should know, said once; the work goes on."""
