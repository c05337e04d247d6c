"""How to train. Imports nothing heavy: the command line reads its defaults from here."""

import math
from dataclasses import dataclass

from mergekit_bert.errors import TrainingError

ADAPTER_RATES = (1e-3, 1e-3)
"""Peak learning rates of an adapter and its head, unless its type needs others."""
FULL_RATES = (5e-5, 5e-4)
"""Peak learning rates of full fine-tuning: the encoder, and the head."""


@dataclass(frozen=True)
class TrainConfig:
    """The options of the loop, for adapters, probes and full fine-tuning alike.

    ``lr`` and ``head_lr`` are peak learning rates (``None``: the usual ones above), reached after the
    share ``warmup`` of all steps and then falling linearly to zero. ``hold_out`` of the training rows (at most
    ``hold_out_limit``) are never trained on: they choose the best epoch, and training stops early after ``patience``
    epochs without a better one. ``checkpoint_seconds`` is how much work a kill may cost.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float | None = None
    head_lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    head_dropout: float = 0.1
    max_length: int = 256
    hold_out: float = 0.05
    hold_out_limit: int = 1000
    patience: int = 2
    seed: int = 0
    precision: str = "auto"
    threads: int | None = None
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range."""

        def check(good: bool, option: str, found: object, expected: str) -> None:
            if not good:
                raise TrainingError(f"--{option.replace('_', '-')}", f"{found}", expected, "correct it")

        for option in ("epochs", "batch_size", "patience"):
            check(getattr(self, option) >= 1, option, getattr(self, option), "a whole number of at least 1")
        for option in ("lr", "head_lr", "clip"):
            value = getattr(self, option)
            check(value is None or (math.isfinite(value) and value > 0), option, value, "a positive number")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        for option in ("warmup", "head_dropout"):
            check(0 <= getattr(self, option) < 1, option, getattr(self, option), "a number from 0 to below 1")
        check(0 < self.hold_out < 1, "hold_out", self.hold_out, "a share between 0 and 1")
        check(self.max_length >= 8, "max_length", self.max_length, "at least 8 tokens")
        check(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")
        check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
