"""Sites: which linear layers each architecture has, and which of them a target set or pattern chooses."""

import dataclasses

import pytest
from torch import nn

import mergekit_bert as mb
from mergekit_bert.encoder.sites import TARGETS, find_sites, linear_layers
from mergekit_bert.errors import EncoderError
from tests.hang import HANGS, in_time
from tests.tiny import ARCHITECTURES

SELF = "encoder.layer.{}.attention.self."
BERT = {
    "query": SELF + "query",
    "key": SELF + "key",
    "value": SELF + "value",
    "out": "encoder.layer.{}.attention.output.dense",
    "rest": "encoder.layer.{}.intermediate.dense encoder.layer.{}.output.dense",
    "once": "",
}
LAYERS = {
    "bert": BERT | {"once": "pooler.dense"},
    "minilm": BERT | {"once": "pooler.dense"},
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT | {"once": "embeddings_project"},
    "distilbert": {
        "query": "transformer.layer.{}.attention.q_lin",
        "key": "transformer.layer.{}.attention.k_lin",
        "value": "transformer.layer.{}.attention.v_lin",
        "out": "transformer.layer.{}.attention.out_lin",
        "rest": "transformer.layer.{}.ffn.lin1 transformer.layer.{}.ffn.lin2",
        "once": "",
    },
    "deberta-v2": BERT
    | {
        "query": SELF + "query_proj",
        "key": SELF + "key_proj",
        "value": SELF + "value_proj",
        "rest": f"{BERT['rest']} {SELF}pos_key_proj {SELF}pos_query_proj",
    },
    "modernbert": {
        "query": "layers.{}.attn.Wqkv",
        "key": "layers.{}.attn.Wqkv",
        "value": "layers.{}.attn.Wqkv",
        "out": "layers.{}.attn.Wo",
        "rest": "layers.{}.mlp.Wi layers.{}.mlp.Wo",
        "once": "",
    },
}
CHOSEN = {
    "qv": ("query", "value"),
    "qkv": ("query", "key", "value"),
    "attention": ("query", "key", "value", "out"),
    "all-linear": ("query", "key", "value", "out", "rest", "once"),
}


def expected(architecture: str, targets: str) -> set[str]:
    names = " ".join(LAYERS[architecture][role] for role in CHOSEN[targets]).split()
    return {name.format(layer) for name in names for layer in (0, 1)}


def test_every_target_set_and_architecture_is_written_down() -> None:
    assert set(CHOSEN) == set(TARGETS)
    assert set(LAYERS) == set(ARCHITECTURES)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_target_sets(encoders: dict[str, mb.Encoder], architecture: str, targets: str) -> None:
    assert set(find_sites(encoders[architecture], targets)) == expected(architecture, targets)


def test_sizes_are_those_of_the_weights(encoder: mb.Encoder) -> None:
    weights = dict(encoder.model.named_parameters())
    for name, size in find_sites(encoder, "all-linear").items():
        assert size == tuple(weights[f"{name}.weight"].shape)


def test_sites_keep_the_order_of_the_layers(encoder: mb.Encoder) -> None:
    layers = list(linear_layers(encoder))
    for targets in TARGETS:
        found = list(find_sites(encoder, targets))
        assert found == [name for name in layers if name in found]


def test_a_pattern_matches_whole_names(bert: mb.Encoder) -> None:
    assert set(find_sites(bert, r".*\.0\..*query|pooler\.dense")) == {
        "encoder.layer.0.attention.self.query",
        "pooler.dense",
    }
    with pytest.raises(EncoderError, match="no linear layer"):
        find_sites(bert, "query")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("nothing-here", "no linear layer of base .* matches.*pattern of whole names such as encoder.layer.0"),
        ("", "no linear layer"),
        ("(", "not a pattern"),
        ("*", "not a pattern"),
        (".*(?=query)", "not a pattern .*RE2 knows neither lookaround nor backreferences"),
        (r"(.)\1.*", "not a pattern .*RE2 knows neither lookaround nor backreferences"),
        ("x" * 5000, "not a pattern .5000 characters"),
    ],
)
def test_targets_that_choose_nothing_are_told(bert: mb.Encoder, targets: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        find_sites(bert, targets)
    assert "correct `targets`" in str(caught.value)


def test_a_pattern_that_would_hang_does_not(bert: mb.Encoder) -> None:
    with in_time(), pytest.raises(EncoderError, match="no linear layer"):
        find_sites(bert, HANGS)


def test_an_encoder_without_linear_layers_is_told(bert: mb.Encoder) -> None:
    bare = dataclasses.replace(bert, model=nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(EncoderError, match="such as none"):
        find_sites(bare, "all-linear")
