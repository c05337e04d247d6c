"""Sites: the named linear layers of an encoder that an adapter may change, and the target sets that choose them."""

from torch import nn

from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import EncoderError
from mergekit_bert.patterns import PatternError, matches

ROLES = {
    "query": r".*\.(query|query_proj|q_lin)",
    "key": r".*\.(key|key_proj|k_lin)",
    "value": r".*\.(value|value_proj|v_lin)",
    "qkv": r".*\.(Wqkv|in_proj)",
    "attention_out": r".*\.(attention\.output\.dense|out_lin|attn\.Wo)",
}
"""What a site does, by its whole name, for the architectures whose layers have such names."""

TARGETS = {
    "qv": ("query", "value", "qkv"),
    "qkv": ("query", "key", "value", "qkv"),
    "attention": ("query", "key", "value", "qkv", "attention_out"),
    "all-linear": None,
}
"""Target sets by name. If q, k and v are one layer (ModernBERT), it counts as each of them."""


def of_the_head(name: str) -> bool:
    """Whether a site or parameter comes after the layers and is used only by the head: BERT's pooler."""
    return name.startswith("pooler.")


def linear_layers(encoder: Encoder) -> dict[str, tuple[int, int]]:
    """Every linear layer of the encoder: name -> (out_features, in_features)."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in encoder.model.named_modules()
        if isinstance(module, nn.Linear)
    }


def find_sites(encoder: Encoder, targets: str) -> dict[str, tuple[int, int]]:
    """The sites of a target set, or of a regular expression that must match whole names; raises EncoderError."""
    layers = linear_layers(encoder)
    if targets in TARGETS:
        roles = TARGETS[targets]
        patterns = [".*"] if roles is None else [ROLES[role] for role in roles]
    else:
        patterns = [targets]
    try:
        chosen = {name: size for name, size in layers.items() if any(matches(p, name) for p in patterns)}
    except PatternError as error:
        raise EncoderError(
            f"targets {targets!r}",
            f"not a pattern ({error})",
            f"{', '.join(TARGETS)} or a regular expression",
            "correct `targets`",
        ) from error
    if not chosen:
        names = list(layers)
        raise EncoderError(
            f"targets {targets!r}",
            f"no linear layer of base {encoder.name!r} matches",
            f"{', '.join(TARGETS)} or a pattern of whole names such as {names[0] if names else 'none'}",
            "correct `targets`",
        )
    return chosen


def shift_names(tree: nn.Module, bias: bool, layernorm: bool) -> list[str]:
    """The parameters that ``train_bias`` (biases of linear layers) and ``train_layernorm`` train."""
    names = []
    for name, module in tree.named_modules():
        if bias and isinstance(module, nn.Linear) and module.bias is not None:
            names.append(f"{name}.bias")
        if layernorm and "norm" in type(module).__name__.lower():
            names += [f"{name}.{child}" for child, _ in module.named_parameters(recurse=False)]
    return names
