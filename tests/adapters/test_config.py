"""The options of an adapter: the scale, values out of range, and those that a file says."""

import dataclasses
import json
import math
from typing import Any

import pytest

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.errors import ArgumentError, TrainingError, UnknownNameError
from mergekit_bert.option import read_pairs
from mergekit_bert.schema import SchemaError, validate
from tests.hang import HANGS, in_time


@pytest.mark.parametrize(
    ("rank", "alpha", "stabilized", "scale"),
    [(8, 32.0, False, 4.0), (4, 2.0, False, 0.5), (16, 8.0, True, 2.0), (8, 1.0, True, 1 / math.sqrt(8))],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(rank: int, alpha: float, stabilized: bool, scale: float) -> None:
    assert AdapterConfig(rank=rank, alpha=alpha, rank_stabilized=stabilized).scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    "option",
    [
        {"rank": 0},
        {"rank": -1},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": math.nan},
        {"alpha": math.inf},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
    ],
)
def test_a_value_out_of_range_names_its_option(option: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=f"`{next(iter(option))}`: .*correct `"):
        AdapterConfig(**option)


def test_an_unknown_basis_is_told() -> None:
    with pytest.raises(UnknownNameError, match=r"'orthogonl'; expected one of orthogonal, random, avoid; did you mean"):
        AdapterConfig(basis="orthogonl")


def read(**value: Any) -> AdapterConfig:
    """Options from a file that has the rest as they are."""
    return AdapterConfig.from_json(AdapterConfig(basis="random").to_json() | value)


def test_options_come_back_from_a_file() -> None:
    one = AdapterConfig(
        rank=3, alpha=8.0, basis="avoid", targets="qv", rank_pattern={"z": 2, "a": 5}, alpha_pattern={"key|q": 1.0}
    )
    again = AdapterConfig.from_json(json.loads(json.dumps(one.to_json() | {"alpha": 8}, sort_keys=True)))
    assert again == one
    assert list(again.rank_pattern) == ["z", "a"], "the first that matches counts"
    assert type(again.alpha) is float
    assert validate(AdapterConfig, one.to_json()) == one


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "rank as a text": ({"rank": "3"}, "rank: "),
    "rank as a truth": ({"rank": True}, "rank: "),
    "no rank": ({"rank": None}, "rank: "),
    "a huge rank": ({"rank": 2**16 + 1}, "`rank`: 65537; expected a whole number from 1 to 65536"),
    "a rank beyond 64 bits": ({"rank": 2**64}, "`rank`"),
    "a huge alpha": ({"alpha": 1e7}, "`alpha`: 10000000.0; expected a positive number up to 1e"),
    "an infinite alpha": ({"alpha": math.inf}, "not JSON compliant"),
    "targets as a list": ({"targets": ["query"]}, "targets: "),
    "targets without end": ({"targets": "x" * 70_000}, "`targets`: 70000 characters"),
    "a foreign option": ({"use_dora": True}, "use_dora: "),
    "a basis of nobody's": ({"basis": "other"}, "basis: 'other'"),
    "a pattern of a text": ({"rank_pattern": [["q", "3"]]}, "rank_pattern.q: "),
    "a pattern of nothing": ({"alpha_pattern": [["q", None]]}, "alpha_pattern.q: "),
    "a pattern that is a number": ({"rank_pattern": [[1, 3]]}, "rank_pattern: a pattern that is no text"),
    "a pattern that is a list": ({"rank_pattern": [[["q"], 3]]}, "rank_pattern: a pattern that is no text"),
    "a pattern twice": ({"rank_pattern": [["q", 3], ["q", 4]]}, "rank_pattern: a pattern twice"),
    "three in a pair": ({"rank_pattern": [["q", 3, 4]]}, "rank_pattern: "),
    "a text for pairs": ({"rank_pattern": "q"}, "rank_pattern: "),
    "rank 0 in a pattern": ({"rank_pattern": [["q", 0]]}, "`rank`: 0; .* in rank_pattern"),
    "alpha 0 in a pattern": ({"alpha_pattern": [["q", 0]]}, "`alpha`: 0.0; .* in alpha_pattern"),
    "a pattern that is none": ({"alpha_pattern": [["(", 2]]}, r"`targets`: '\(' \(missing"),
    "lookaround": ({"alpha_pattern": [["(?=q)", 2]]}, "neither lookaround nor backreferences"),
    "too many patterns": ({"rank_pattern": [[f"q{n}", 3] for n in range(3000)]}, "too many patterns"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_files_options_are_checked_one_by_one(name: str) -> None:
    value, message = FOREIGN[name]
    with pytest.raises((SchemaError, TrainingError, UnknownNameError), match=message) as caught:
        read(**value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_options_that_are_no_mapping_are_refused(value: Any) -> None:
    with pytest.raises(SchemaError):
        AdapterConfig.from_json(value)


def test_a_pattern_that_would_hang_does_not() -> None:
    with in_time():
        config = read(rank_pattern=[[HANGS, 3]], alpha_pattern=[[HANGS, 2.0]])
        for layer in range(100):
            assert config.at(f"encoder.layer.{layer}.attention.output.dense").rank == 12
    assert config.at("encoder.layer.0.query!").rank == 3


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("lora", {"rank, alpha": "3, 32, rank-stabilised", "targets": "qv", "basis": "orthogonal"}),
        ("loha", {"rank, alpha": "3, 32, rank-stabilised", "targets": "qv", "basis": "random"}),
        ("prefix", {"length": "4", "projection": "False"}),
        (
            "loha+prefix",
            {
                "rank, alpha": "3, 32, rank-stabilised",
                "targets": "qv",
                "basis": "random",
                "length": "4",
                "projection": "False",
            },
        ),
        ("bitfit", {}),
    ],
)
def test_all_that_a_family_has_is_shown(kind: str, facts: dict[str, str]) -> None:
    family = FAMILIES.get(kind)
    own = {one.name for one in dataclasses.fields(family.options)}
    given = {"rank": 3, "rank_stabilized": True, "targets": "qv", "length": 4}
    assert family.configured({name: value for name, value in given.items() if name in own}).facts() == facts


@pytest.mark.parametrize(
    ("text", "value"), [("rank=8", 8), ("alpha=1e1", 10.0), ("rank_stabilized=true", True), ("targets=12", "12")]
)
def test_an_option_is_read_from_a_text_by_its_own_type(text: str, value: object) -> None:
    name, _, _ = text.partition("=")
    (found,) = FAMILIES.get("loha").read(read_pairs([text])).values()
    assert (found, type(found)) == (value, type(value))
    assert getattr(FAMILIES.get("loha").configured({name: found}), name) == value


@pytest.mark.parametrize("text", ["rank=8.5", "rank=many", "alpha=nan", "rank_stabilized=2", "rank_pattern=query"])
def test_a_text_of_another_type_is_refused(text: str) -> None:
    name, _, value = text.partition("=")
    with pytest.raises(ArgumentError, match=f"`{name}` of LowRankOptions: '{value}'"):
        FAMILIES.get("loha").read(read_pairs([text]))
