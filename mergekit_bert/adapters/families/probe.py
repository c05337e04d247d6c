"""Linear probe: a head on the encoder as it is; the baseline that says what the adapter itself is worth."""

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.family import Family, Tensors, Weight
from mergekit_bert.adapters.linear import AdaptedLinear


def _none(tensors: Tensors, config: AdapterConfig, weight: Weight) -> Delta:
    raise AssertionError("a probe has no sites")


RECORD = Family(
    name="probe",
    description="the head alone, on a frozen encoder",
    source="Alain & Bengio 2016, arXiv 1610.01644",
    shapes=lambda config, size: {},
    init=lambda config, size, rows, weight, source: {},
    delta=_none,
    module=AdaptedLinear,
    has_sites=False,
    lr=3e-2,
    head_lr=3e-2,
)
