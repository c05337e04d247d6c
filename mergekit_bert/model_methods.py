"""The public functions of the package as methods of the models, with the model as first argument.

The functions are in an upper layer, which models must not import, so they are looked up when a method is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mergekit_bert as mb

if TYPE_CHECKING:
    import numpy as np

    from mergekit_bert import Adapter, Encoder, Evaluation, Prediction, Predictor

_PREDICTORS = "_predictors"


class ModelMethods:
    """Methods of all models."""

    def predictor(self, *, base: "str | Path | Encoder | None" = None) -> "Predictor":
        """A predictor for the model, created once; ``base`` is its encoder, if the recorded one cannot be used."""
        made: dict[Any, Predictor] = vars(self).setdefault(_PREDICTORS, {})
        key = base if isinstance(base, str | Path | None) else id(base)
        if key not in made:
            made.clear()
            made[key] = mb.predictor(cast(Any, self), base=base)
        return made[key]

    def predict(
        self, texts: Any, task: str | None = None, *, base: "str | Path | Encoder | None" = None
    ) -> "Prediction | list[Prediction]":
        """See :func:`mergekit_bert.predict`."""
        return mb.predict(self.predictor(base=base), texts, task)

    def embed(
        self, texts: Any, task: str | None = None, *, base: "str | Path | Encoder | None" = None
    ) -> "np.ndarray[Any, Any]":
        """See :func:`mergekit_bert.embed`."""
        return mb.embed(self.predictor(base=base), texts, task)

    def evaluate(self, data: Any = None, *, base: "str | Path | Encoder | None" = None, **options: Any) -> "Evaluation":
        """See :func:`mergekit_bert.evaluate`; no scores are recorded."""
        return mb.evaluate(self.predictor(base=base), data, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the predictor out, so that copies create their own."""
        return {name: value for name, value in vars(self).items() if name != _PREDICTORS}


class CompositionMethods(ModelMethods):
    """Methods of models that are stored in mbert's files."""

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """See :func:`mergekit_bert.save`."""
        mb.save(cast(Any, self), path, force=force)

    def export(self, folder: str | Path, **options: Any) -> list[Path]:
        """See :func:`mergekit_bert.export`."""
        return mb.export(cast(Any, self), folder, **options)


class AdapterMethods(CompositionMethods):
    """Methods of adapters."""

    @staticmethod
    def train(data: Any, task: Any, out: str | Path | None = None, **options: Any) -> "Adapter":
        """See :func:`mergekit_bert.train_adapter`."""
        return mb.train_adapter(task, data, out, **options)


def summary(kind: str, tasks: tuple[Any, ...], *facts: str) -> str:
    """A model in one line, for ``repr``: its tasks, then other ``facts``."""
    names = [task.name for task in tasks]
    shown = names if len(names) <= _SHOWN else [*names[:_SHOWN], f"{len(names) - _SHOWN} more"]
    return f"{kind}({', '.join([' + '.join(shown), *filter(None, facts)])})"


_SHOWN = 8


def mebibytes(count: int) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:.2f} MiB"
