"""Linear probe: a head on the encoder as it is; the baseline that says what the adapter itself is worth."""

from dataclasses import dataclass
from typing import Any

from mergekit_bert.adapters import config
from mergekit_bert.adapters.family import Family


@dataclass(frozen=True)
class Options(config.Options):
    """None; files name the defaults of a LoRA, as they always did, and mean nothing by them."""

    def to_json(self) -> dict[str, Any]:
        """The defaults of a LoRA."""
        return config.AdapterConfig().to_json()

    @classmethod
    def from_json(cls, value: Any) -> "Options":
        """Nothing, from the options of any LoRA."""
        config.AdapterConfig.from_json(value)
        return cls()


RECORD = Family(
    name="probe",
    description="the head alone, on a frozen encoder",
    source="Alain & Bengio 2016, arXiv 1610.01644",
    options=Options,
    lr=3e-2,
    head_lr=3e-2,
)
