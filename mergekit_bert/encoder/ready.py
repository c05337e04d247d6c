"""Ready: a task's classifier with all that it takes to answer rows of texts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergekit_bert.data.batches import Tokens
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.head import Classifier


@dataclass(frozen=True)
class Ready:
    """A classifier, what makes tokens of rows (cut at ``max_length``), and what puts outputs in the task's units."""

    model: Classifier
    tokens: Callable[[Rows], Tokens]
    max_length: int
    units: Callable[[np.ndarray], np.ndarray]
