"""LayerNorm tuning: the gains and biases of the norms, and nothing else of the encoder (Zhao et al. 2024)."""

from mergekit_bert.adapters.family import Family, Peft
from mergekit_bert.encoder.sites import shift_names

RECORD = Family(
    name="layernorm",
    description="the gains and biases of the norms",
    source="arXiv 2312.11420",
    shifts=lambda options, tree: shift_names(tree, bias=False, layernorm=True),
    peft=Peft(type="LN_TUNING", tensors={}, options={}),
    lr=3e-3,  # not tuned: as BitFit
)
