"""The options of training. Imports nothing heavy, because the command line makes its flags from them."""

from dataclasses import dataclass

from mergekit_bert.errors import TrainingError
from mergekit_bert.option import option
from mergekit_bert.registry import names_in

ADAPTER_RATES = (1e-3, 1e-3)
"""Peak learning rates of an adapter and its head, unless its family has its own."""
FULL_RATES = (5e-5, 5e-4)
"""Peak learning rates of full fine-tuning: the encoder, and the head."""
_MOST, _LARGEST = 10**9, 1e9
_WHOLE = {"max_length": (8, 2**20), "seed": (0, 2**63 - 1), "threads": (1, 1024)}
"""Bounds of whole numbers; the others are from 1 to ``_MOST``."""


def _shown(place: int) -> str:
    adapters, full = ADAPTER_RATES[place], FULL_RATES[place]
    return f"{adapters:g} for adapters unless the family has its own, {full:g} for full fine-tuning"


@dataclass(frozen=True)
class TrainConfig:
    """The options of training, for adapters, probes and full fine-tuning alike.

    ``lr`` and ``head_lr`` are peak learning rates (``None``: the default for what is trained), reached after the share
    ``warmup`` of all steps and then decreasing linearly to zero. The share ``hold_out`` of the training rows (at most
    ``hold_out_limit``) is never trained on: the epoch with the best score on these rows is kept, and training stops
    early after ``patience`` epochs without improvement. At most ``checkpoint_seconds`` of work are lost if a run is
    killed.
    """

    epochs: int = option(3, "Maximum number of epochs; the best one is kept.")
    batch_size: int = option(32, "Rows per step.")
    lr: float | None = option(None, "Peak learning rate.", _shown(0))
    head_lr: float | None = option(None, "Peak learning rate of the head.", _shown(1))
    warmup: float = option(0.1, "Share of the steps during which the learning rate rises.")
    weight_decay: float = option(0.01, "AdamW's weight decay; biases and norms are not decayed.")
    clip: float = option(1.0, "Maximum norm of the gradient.")
    balance: bool = option(False, "Weight the loss so that rare labels count as much as frequent ones.")
    head: str = option("native", f"Task head: {', '.join(names_in('mergekit_bert.encoder.heads', 'mbert.heads'))}.")
    head_dropout: float = option(0.1, "Dropout before the head.")
    max_length: int = option(256, "Maximum tokens per sequence; longer ones are truncated and counted.")
    hold_out: float = option(0.1, "Share of the training rows held out to choose the best epoch.")
    hold_out_limit: int = option(1000, "Maximum number of rows to hold out.")
    patience: int = option(2, "Stop after this many epochs without improvement.")
    seed: int = option(0, "Random seed.")
    precision: str = option("auto", "auto (bf16 if a quick measurement shows that it is faster), fp32 or bf16.")
    threads: int | None = option(None, "CPU threads.", "torch's choice")
    checkpoint_seconds: float = option(30.0, "Seconds between checkpoints: the most work that a kill can lose.")

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range, ArgumentError for one of another type."""
        from mergekit_bert.arguments import check_types

        check_types(self)

        def check(good: bool, name: str, found: object, expected: str) -> None:
            if not good:
                raise TrainingError(f"`{name}`", f"{found}", expected, "correct it")

        for name in ("epochs", "batch_size", "patience", "hold_out_limit", "max_length", "seed", "threads"):
            value, (low, high) = getattr(self, name), _WHOLE.get(name, (1, _MOST))
            check(value is None or low <= value <= high, name, value, f"a whole number from {low} to {high}")
        for name in ("lr", "head_lr", "clip"):
            value = getattr(self, name)
            check(value is None or 0 < value <= _LARGEST, name, value, f"a positive number up to {_LARGEST:g}")
        for name in ("weight_decay", "checkpoint_seconds"):
            value = getattr(self, name)
            check(0 <= value <= _LARGEST, name, value, f"a number from 0 to {_LARGEST:g}")
        for name in ("warmup", "head_dropout"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number from 0 to below 1")
        check(0 < self.hold_out < 1, "hold_out", self.hold_out, "a share between 0 and 1")
