"""The adapted linear layer against its formula: forward and every gradient, in float64 by autograd's own products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_bert.adapters.delta import LowRank
from mergekit_bert.adapters.linear import adapted_linear
from mergekit_bert.hardware import generator

NAMES = ("x", "bias", "a", "b")


def parts(shape: tuple[int, ...], out: int, rank: int, bias: bool, seed: int = 0) -> dict[str, Tensor | None]:
    source = generator(seed)
    return {
        "x": torch.randn(shape, generator=source),
        "weight": torch.randn(out, shape[-1], generator=source),
        "bias": torch.randn(out, generator=source) if bias else None,
        "a": torch.randn(rank, shape[-1], generator=source),
        "b": torch.randn(out, rank, generator=source),
    }


def run(given: dict[str, Tensor | None], plain: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a weighted sum of it."""
    own = {name: None if value is None else value.detach().clone() for name, value in given.items()}
    for name in NAMES:
        value = own[name]
        if value is not None:
            value.requires_grad_(True)
    x, weight, bias, a, b = own["x"], own["weight"], own["bias"], own["a"], own["b"]
    assert x is not None
    assert weight is not None
    assert a is not None
    assert b is not None
    if plain:
        out = x @ (weight + b @ a).T + (0 if bias is None else bias)
    else:
        out = adapted_linear(x, weight, bias, LowRank(b, a))
    (out.double() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
    grads = {name: value.grad for name in NAMES if (value := own[name]) is not None and value.grad is not None}
    return out.detach(), grads


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_the_formula(
    outer: list[int], width: int, out: int, rank: int, bias: bool, seed: int
) -> None:
    given_ = parts((*outer, width), out, rank, bias, seed)
    found, grads = run(given_, plain=False)
    exact, wanted = run({name: None if v is None else v.double() for name, v in given_.items()}, plain=True)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), wanted[name], rtol=1e-4, atol=1e-4)


def test_half_precision_is_that_of_the_weights_and_gradients_stay_wide() -> None:
    given_ = parts((7, 5, 64), 48, 8, bias=True)
    weight = given_["weight"]
    assert weight is not None
    half = {**given_, "weight": weight.bfloat16()}
    found, grads = run(half, plain=False)
    exact, wanted = run({name: None if v is None else v.double() for name, v in given_.items()}, plain=True)
    assert found.dtype == torch.bfloat16
    assert float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert float((grad - wanted[name]).abs().max()) < 0.02 * float(wanted[name].abs().max()), name


@pytest.mark.parametrize("needed", [(), ("b",), ("a", "b"), ("x",), ("x", "bias", "b")])
def test_only_the_gradients_that_are_needed_are_made(needed: tuple[str, ...]) -> None:
    given_ = parts((6, 5), 4, 2, bias=True)
    own = {name: value.requires_grad_(name in needed) for name, value in given_.items() if value is not None}
    out = adapted_linear(own["x"], own["weight"], own["bias"], LowRank(own["b"], own["a"]))
    assert out.requires_grad == bool(needed)
    if needed:
        out.sum().backward()
    assert {name for name, value in own.items() if value.grad is not None} == set(needed)


def test_with_a_frozen_basis_the_input_is_not_kept() -> None:
    given_ = {name: value for name, value in parts((6, 5), 4, 2, bias=True).items() if value is not None}
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapted_linear(
            given_["x"], given_["weight"], given_["bias"], LowRank(given_["b"].requires_grad_(), given_["a"])
        )
    assert (6, 5) not in kept
    assert (6, 2) in kept
