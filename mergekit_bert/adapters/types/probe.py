"""Linear probe: a head on the encoder as it is; the baseline that says what the adapter itself is worth."""

import torch
from torch import Tensor

from mergekit_bert.adapters.adapter import AdapterType, Size, Tensors
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import LowRank


def _none(config: AdapterConfig, size: Size, rows: Tensor | None, source: torch.Generator) -> dict[str, Tensor]:
    return {}


def _zero(tensors: Tensors, config: AdapterConfig) -> LowRank:
    raise AssertionError("a probe has no sites")


RECORD = AdapterType(
    name="probe",
    description="the head alone, on a frozen encoder",
    source="Alain & Bengio 2016, arXiv 1610.01644",
    shapes=lambda config, size: {},
    init=_none,
    delta=_zero,
    has_sites=False,
    lr=3e-2,
    head_lr=3e-2,
)
