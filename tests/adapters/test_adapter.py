"""Adapters in memory: which base one belongs to, as a file says it."""

from typing import Any

import pytest

import mergekit_bert as mb
from mergekit_bert.encoder.load import Base
from mergekit_bert.schema import SchemaError, validate

GOOD = {"name": "minilm", "fingerprint": "0" * 64, "tokenizer_fingerprint": "f" * 64}


def test_a_base_is_its_encoders_name_and_fingerprints(bert: mb.Encoder) -> None:
    base = Base.of(bert)
    assert validate(Base, vars(base)) == base
    assert validate(Base, GOOD) == Base("minilm", "0" * 64, "f" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name: "),
        ({"name": ["minilm"]}, "name: "),
        ({"name": ""}, "name: "),
        ({"name": "x" * 5000}, "name: "),
        ({"name": "mini\x1b[2Jlm"}, "name: .*control characters"),
        ({"name": "\udc80"}, ""),
        ({"fingerprint": "0" * 63}, "fingerprint: "),
        ({"fingerprint": 0}, "fingerprint: "),
        ({"tokenizer_fingerprint": "F" * 64}, "tokenizer_fingerprint: "),
        ({"revision": "main"}, "revision: "),
    ],
)
def test_a_files_base_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=f"^{message}") as caught:
        validate(Base, GOOD | change)
    assert str(caught.value).isprintable()
