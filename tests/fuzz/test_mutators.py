"""The mutators: they spoil anything, the same way every time, and say what they did."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_bert.documents import DocumentError, parse_json
from tests.adapters.helpers import quick
from tests.fuzz.containers import MODEL, WEIGHTS
from tests.fuzz.source import Kind, Source, changed
from tests.fuzz.trees import BINARY, JSON, JSON_LINES, LINES, YAML, Raw, Twin, change_tree, spell

KINDS = {
    "json": JSON,
    "yaml": YAML,
    "json lines": JSON_LINES,
    "lines": LINES,
    "binary": BINARY,
    "model": MODEL,
    "weights": WEIGHTS,
}
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FILE = save({"a": torch.ones(2, 3), "b": torch.zeros(2)}, {"mbert": '{"format":1,"x":[1,2],"sha256":""}'})

OTHER = save({"a": torch.zeros(2, 3), "c": torch.ones(1)}, {"mbert": '{"format":2,"y":"z","sha256":""}'})


@quick
@given(TREES)
def test_a_plain_tree_reads_back_as_it_was(tree: Any) -> None:
    assert json.loads(spell(tree)) == tree


def test_what_python_would_not_write_is_spelled() -> None:
    assert spell({"a": Raw("1e999"), Twin("a"): [float("nan")], "b": "\ud800"}) == '{"a":1e999,"a":[NaN],"b":"\\ud800"}'


@quick
@given(TREES, st.integers(0, 2**32))
def test_one_thing_is_wrong_in_a_copy(tree: Any, seed: int) -> None:
    before = spell(tree)
    source = Source(str(seed))
    found = spell(change_tree(source, tree))
    assert spell(tree) == before
    assert source.told
    assert found == spell(change_tree(Source(str(seed)), tree))
    found.encode("ascii")


@quick
@given(TREES, st.integers(0, 2**32))
def test_the_strict_reader_takes_or_refuses_any_tree(tree: Any, seed: int) -> None:
    text = spell(change_tree(Source(str(seed)), tree))
    try:
        found = parse_json(text)
    except DocumentError:
        return
    assert found == json.loads(text)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@quick
@given(
    st.binary(max_size=60) | st.sampled_from([FILE, b'{"a": [1, "x"]}', b"a: 1\nb: [x, 2]\n"]), st.integers(0, 2**32)
)
def test_any_bytes_can_be_spoiled_again_in_the_same_way(kind: Kind, data: bytes, seed: int) -> None:
    found, mutation = changed(Source(str(seed)), kind, data, OTHER)
    assert (found, mutation) == changed(Source(str(seed)), kind, data, OTHER)
    assert mutation in kind


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_way_of_a_kind_is_taken_and_nearly_always_changes_something(kind: Kind) -> None:
    data = {JSON: b'{"a": [1, "x"]}', YAML: b"a: 1\nb: [x, 2]\n"}.get(kind, FILE)
    found = [changed(Source(str(seed)), kind, data, OTHER) for seed in range(400)]
    assert {mutation for _, mutation in found} == set(kind)
    assert sum(one == data for one, _ in found) < 8
