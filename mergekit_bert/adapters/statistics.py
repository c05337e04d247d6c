"""Statistics of a site that data-driven merges need: Gram matrices of inputs, and Fisher information."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_bert.adapters.adapter import Part
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.load import Encoder


def collect(kind: str, encoder: Encoder, parts: Sequence[Part], rows: Sequence[Rows]) -> Mapping[str, Any]:
    """Statistics of ``kind`` (``gram`` or ``fisher``) by site, of ``parts`` on ``rows`` of their tasks."""
    raise NotImplementedError
