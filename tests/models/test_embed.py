"""Embedding: vectors are the means that the head reads, whatever texts stand beside a text."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.patch import Patch
from mergekit_bert.errors import CompositionError, DataError
from tests.cli.command import mbert
from tests.contracts.test_heads import with_head

TEXTS = ["a good film", "the cat sat on the mat", "bad", "a dog and a cat", "good"]


def expected(encoder: mb.Encoder, adapter: mb.Adapter, texts: list[str]) -> np.ndarray:
    """By transformers' own forward pass, text by text."""
    part = adapter.part(adapter.name)
    model = fold(encoder, Patch(part.deltas, part.shifts)).model
    with torch.no_grad():
        states = [model(**encoder.tokenizer(text, return_tensors="pt"))[0][0] for text in texts]
    return np.stack([state.double().mean(0).numpy() for state in states])


@pytest.mark.parametrize(("task", "head"), [("sts", "matching"), ("sts", "cosine"), ("sst", "mean")])
def test_vectors_are_the_means_of_the_last_states(encoder: mb.Encoder, task: str, head: str) -> None:
    adapter = with_head(encoder, task, head)
    predictor = mb.predictor(adapter, base=encoder)
    assert predictor.embed(task, TEXTS) == pytest.approx(expected(encoder, adapter, TEXTS), abs=2e-5)
    assert predictor.embed(task, TEXTS[2:3]) == pytest.approx(expected(encoder, adapter, TEXTS[2:3]), abs=2e-5)


def test_the_answer_of_a_cosine_follows_from_the_vectors(bert: mb.Encoder) -> None:
    adapter = with_head(bert, "sts", "cosine")
    merged = mb.merge([adapter, with_head(bert, "sst", "native")], "ties")
    assert isinstance(merged, mb.Merged)
    u, v = merged.embed(TEXTS[:2], "sts", base=bert).astype(float)
    weight, bias = (float(adapter.head[f"cosine.linear.{name}"]) for name in ("weight", "bias"))
    (answer,) = merged.predict([(TEXTS[0], TEXTS[1])], "sts", base=bert)  # type: ignore[misc]
    value = weight * (u @ v) / np.linalg.norm(u) / np.linalg.norm(v) + bias
    assert answer.outputs[0] == pytest.approx(5 * value, abs=1e-4)
    with pytest.raises(CompositionError, match="a head that does not use the mean of each text separately"):
        merged.embed(TEXTS, "sst", base=bert)


def test_a_mean_of_two_texts_together_is_no_vector_of_a_text(bert: mb.Encoder) -> None:
    with pytest.raises(CompositionError, match="a head that does not use the mean of each text separately"):
        with_head(bert, "para", "mean").embed(TEXTS, base=bert)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no texts"), ([("a", "b")], "row 1: 2 texts"), ("a text", "list"), (["a", 3], "row 2")],
)
def test_what_is_no_list_of_texts_is_refused(bert: mb.Encoder, texts: object, message: str) -> None:
    with pytest.raises((DataError, mb.MbertError), match=message):
        mb.predictor(with_head(bert, "sts", "cosine"), base=bert).embed("sts", texts)  # type: ignore[arg-type]


def test_the_command_writes_them(bert: mb.Encoder, tmp_path: Path) -> None:
    adapter = with_head(bert, "sts", "matching")
    mb.save(adapter, tmp_path / "sts.safetensors")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    command = ("embed", "sts.safetensors", "--base", bert.name)
    done = mbert(*command, "--input", "texts.txt", "--out", "v.npy", here=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert np.load(tmp_path / "v.npy") == pytest.approx(expected(bert, adapter, TEXTS), abs=2e-5)
    assert mbert(*command, *TEXTS[:2], "--out", "two.npy", here=tmp_path).code == 0
    assert np.load(tmp_path / "two.npy") == pytest.approx(expected(bert, adapter, TEXTS[:2]), abs=2e-5)
    again = mbert(*command, *TEXTS, "--out", "v.npy", here=tmp_path)
    assert (again.code, "--force" in again.err) == (1, True)
    neither = mbert(*command, here=tmp_path)
    assert (neither.code, "texts, or --input FILE" in neither.err) == (1, True)
