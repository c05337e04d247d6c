"""mbert: train one small adapter per task on a frozen BERT-like encoder, compose them, and know what it costs.

Names are imported when they are first used, so that ``import mergekit_bert`` is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_bert.adapters.adapter import Adapter
    from mergekit_bert.adapters.config import AdapterConfig
    from mergekit_bert.api import (
        calibrate,
        changed_inputs,
        compare,
        convert,
        doctor,
        embed,
        evaluate,
        export,
        finetune,
        load,
        merge,
        predict,
        predictor,
        save,
        search,
        train_adapter,
    )
    from mergekit_bert.composing.defining import method
    from mergekit_bert.composing.recipe import Recipe
    from mergekit_bert.data.kind import Prediction
    from mergekit_bert.data.rows import Rows
    from mergekit_bert.data.source import load_rows, write_sample
    from mergekit_bert.data.task import Task, get_task
    from mergekit_bert.encoder.folder import FullModel
    from mergekit_bert.encoder.load import Encoder, load_encoder
    from mergekit_bert.errors import MbertError, MbertWarning
    from mergekit_bert.evaluation.describe import describe
    from mergekit_bert.evaluation.doctor import Diagnosis
    from mergekit_bert.evaluation.evaluate import Evaluation
    from mergekit_bert.evaluation.method_comparison import MethodComparison
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.models.composition import Ensemble, Merged
    from mergekit_bert.models.prediction import Predictor
    from mergekit_bert.registry import register
    from mergekit_bert.training.config import TrainConfig

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Diagnosis",
    "Encoder",
    "Ensemble",
    "Evaluation",
    "FullModel",
    "MbertError",
    "MbertWarning",
    "Merged",
    "MethodComparison",
    "Prediction",
    "Predictor",
    "Recipe",
    "Rows",
    "Task",
    "TrainConfig",
    "calibrate",
    "changed_inputs",
    "compare",
    "convert",
    "describe",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "get_task",
    "load",
    "load_encoder",
    "load_rows",
    "merge",
    "method",
    "predict",
    "predictor",
    "register",
    "save",
    "search",
    "set_threads",
    "train_adapter",
    "write_sample",
]

_HOMES = {
    "adapters.adapter": ("Adapter",),
    "adapters.config": ("AdapterConfig",),
    "models.composition": ("Ensemble", "Merged"),
    "composing.defining": ("method",),
    "models.prediction": ("Predictor",),
    "data.kind": ("Prediction",),
    "composing.recipe": ("Recipe",),
    "data.rows": ("Rows",),
    "data.source": ("load_rows", "write_sample"),
    "data.task": ("Task", "get_task"),
    "encoder.folder": ("FullModel",),
    "encoder.load": ("Encoder", "load_encoder"),
    "errors": ("MbertError", "MbertWarning"),
    "evaluation.method_comparison": ("MethodComparison",),
    "evaluation.doctor": ("Diagnosis",),
    "evaluation.describe": ("describe",),
    "evaluation.evaluate": ("Evaluation",),
    "hardware": ("set_threads",),
    "registry": ("register",),
    "training.config": ("TrainConfig",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Import a public name from its home on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'mergekit_bert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mergekit_bert.{_HOME.get(name, 'api')}"), name)
