"""BitFit: the biases of the linear layers, and nothing else of the encoder (Ben Zaken et al. 2022, arXiv 2106.10199).

The biases of the norms, which the paper trains as well, are those of the family ``layernorm``: ``bitfit+layernorm``.
"""

from mergekit_bert.adapters.family import Family
from mergekit_bert.encoder.sites import shift_names

RECORD = Family(
    name="bitfit",
    description="the biases of the linear layers",
    source="arXiv 2106.10199",
    shifts=lambda options, tree: shift_names(tree, bias=True, layernorm=False),
    lr=3e-3,  # not tuned: between the usual rate and that of a probe, since few parameters have to move far
)
