"""A task's classifier with everything needed to predict rows of texts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergekit_bert.data.batches import Tokens
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.head import Classifier


@dataclass(frozen=True)
class Ready:
    """A classifier; ``tokens`` tokenises rows, truncated to ``max_length``, ``units`` scales outputs to task units."""

    model: Classifier
    tokens: Callable[[Rows], Tokens]
    max_length: int
    units: Callable[[np.ndarray], np.ndarray]
