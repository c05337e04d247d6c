"""What the checker of the tests finds: wrong types and shapes, everywhere that the package has annotations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import beartype
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from mergekit_bert.data.rows import Rows
from mergekit_bert.hardware import generator
from tests.checker import _checked

checked: Callable[[Any], Any] = _checked(typechecker=beartype.beartype)


def outer(start: int) -> Callable[[Any], int]:
    @checked
    def inner(more: int, *rest: int) -> int:
        return start + more + sum(rest)

    return inner  # type: ignore[no-any-return]


def result(kind: Any) -> Callable[[Any], Any]:
    @checked
    def inner(value: Any) -> kind:
        return value

    return inner  # type: ignore[no-any-return]


@checked
def product(one: Float[Tensor, "m k"], two: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    return one @ two if len(one) > 1 else one


@checked
def numbers(count: int) -> Iterator[int]:
    yield from range(count)


@checked
@dataclass
class Pair:
    one: Float[Tensor, " n"]
    two: Float[Tensor, " n"]
    name: str = ""


@checked
@dataclass
class Name:
    name: str


def test_the_package_is_checked() -> None:
    for wrong in (lambda: generator("0", 1), lambda: Rows(3, None, "here")):  # type: ignore[arg-type]
        with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
            wrong()


def test_types_of_arguments_results_and_fields() -> None:
    assert (list(numbers(2)), Name("a").name) == ([0, 1], "a")
    for wrong in (lambda: list(numbers("2")), lambda: Name(3), lambda: result(int)("a")):  # type: ignore[arg-type]
        with pytest.raises(BeartypeCallHintViolation):
            wrong()


def test_a_nested_function_keeps_what_is_around_it_and_its_own_signature() -> None:
    one, two = outer(1), outer(10)
    assert [one(1), two(1), one(2), two(2, 3)] == [2, 11, 3, 15]  # type: ignore[call-arg]
    for function in (one, two):
        with pytest.raises(BeartypeCallHintViolation):
            function("1")
        with pytest.raises(BeartypeCallHintViolation):
            function(1, "2")  # type: ignore[call-arg]
    assert [result(int)(1), result(str)("a")] == [1, "a"]
    for kind, value in ((int, "a"), (str, 1)):
        with pytest.raises(BeartypeCallHintViolation):
            result(kind)(value)


def test_shapes_fit_together() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert Pair(torch.ones(2), torch.ones(2), "a").name == "a"
    for wrong in (
        lambda: product(torch.ones(2, 3), torch.ones(2, 3)),
        lambda: product(torch.ones(1, 3), torch.ones(3, 4)),
        lambda: Pair(torch.ones(2), torch.ones(3)),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
