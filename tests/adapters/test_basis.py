"""The orthogonal basis: orthogonal to float precision, the same for ever, and told when it does not fit."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bert.adapters.basis import BasisRows, shared_basis
from mergekit_bert.errors import BasisError
from mergekit_bert.schema import SchemaError, validate
from tests.adapters.helpers import quick

SITE = "encoder.layer.0.attention.self.query"


@quick
@given(st.integers(0, 10), st.integers(1, 130), st.sampled_from([SITE, "pooler.dense"]))
def test_the_whole_matrix_is_orthogonal(seed: int, width: int, site: str) -> None:
    matrix = BasisRows(seed, 0, width).matrix(site, width).double()
    unit = torch.eye(width, dtype=torch.float64)
    assert float((matrix @ matrix.T - unit).abs().max()) < 1e-6
    assert float((matrix.T @ matrix - unit).abs().max()) < 1e-6


@pytest.mark.parametrize("width", [768, 769, 3072])
def test_disjoint_rows_are_orthonormal_and_orthogonal_to_each_other(width: int) -> None:
    first, second = BasisRows(0, 0, 8).matrix(SITE, width), BasisRows(0, 8, 16).matrix(SITE, width)
    assert first.dtype == torch.float32
    assert float((first.double() @ first.double().T - torch.eye(8)).abs().max()) < 1e-6
    assert float((first.double() @ second.double().T).abs().max()) < 1e-6


def test_rows_depend_on_nothing_but_seed_site_width_and_number() -> None:
    rows = BasisRows(3, 4, 5).matrix(SITE, 48)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(BasisRows(3, 4, 5).matrix(SITE, 48), rows)
    assert torch.equal(BasisRows(3, 2, 10).matrix(SITE, 48)[2:7], rows)


@pytest.mark.parametrize(("seed", "site", "start"), [(1, SITE, 0), (0, SITE.replace("query", "key"), 0), (0, SITE, 1)])
def test_another_seed_site_or_start_gives_other_rows(seed: int, site: str, start: int) -> None:
    one, two = BasisRows(0, 0, 4).matrix(SITE, 64), BasisRows(seed, start, 4).matrix(site, 64)
    assert float((one - two).abs().max()) > 0.1


@pytest.mark.parametrize("width", [64, 65])
def test_rows_are_spread_over_all_inputs(width: int) -> None:
    matrix = BasisRows(0, 0, width).matrix(SITE, width)
    assert float(matrix.abs().max()) < 4.5 / math.sqrt(width)


@pytest.mark.parametrize(
    ("rows", "site", "width", "first", "check"),
    [
        (BasisRows(0, 0, 4), SITE, 32, [0.12785302, -0.1662844, 0.31397554], -22.889818),
        (BasisRows(0, 28, 4), SITE, 32, [0.01615968, -0.1033627, -0.03280095], -12.918132),
        (BasisRows(7, 3, 6), "pooler.dense", 33, [-0.05709254, 0.06304058, 0.10799187], -25.148745),
        (BasisRows(0, 0, 8), SITE, 384, [-0.01723405, -0.04887034, -0.01586143], 67.0303),
    ],
)
def test_the_rows_are_the_ones_that_stored_files_were_trained_with(
    rows: BasisRows, site: str, width: int, first: list[float], check: float
) -> None:
    matrix = rows.matrix(site, width).double()
    np.testing.assert_allclose(matrix[0, :3], first, atol=1e-7)
    numbers = torch.arange(1, matrix.numel() + 1, dtype=torch.float64).reshape(matrix.shape)
    assert float((matrix * numbers.sqrt()).sum()) == pytest.approx(check, abs=1e-4)


@pytest.mark.parametrize("width", [1, 2, 32, 33])
def test_rows_are_those_of_the_product_of_cosine_transforms_and_signs(width: int) -> None:
    half = (width + 7) // 8
    stream = hashlib.shake_256(f"mbert basis 5 {SITE}".encode()).digest(2 * half)
    bits = [(stream[byte] >> (7 - bit)) & 1 for byte in range(2 * half) for bit in range(8)]
    first, second = (np.diag([(-1.0) ** bit for bit in part[:width]]) for part in (bits[: 8 * half], bits[8 * half :]))
    n, k = np.meshgrid(np.arange(width), np.arange(width))
    cosines = np.sqrt(2 / width) * np.cos(np.pi * (2 * n + 1) * k / (2 * width))
    cosines[0] /= np.sqrt(2)
    np.testing.assert_allclose(
        BasisRows(5, 0, width).matrix(SITE, width), cosines @ second @ cosines @ first, atol=1e-6
    )


@pytest.mark.parametrize("numbers", [(0, -1, 4), (0, 0, 0), (0, 0, -2), (0, True, 4)])
def test_numbers_that_name_no_rows_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(BasisError, match="whole numbers, the count at least 1"):
        BasisRows(*numbers)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "0"},
        {"seed": 2**63},
        {"start": -1},
        {"start": 1.0},
        {"count": 0},
        {"count": True},
        {"count": 2**40},
        {"x": 1},
    ],
)
def test_a_files_rows_are_checked(change: dict[str, object]) -> None:
    rows = BasisRows(3, 0, 4)
    assert validate(BasisRows, rows.to_json()) == rows
    with pytest.raises(SchemaError, match=f"^{next(iter(change))}: "):
        validate(BasisRows, rows.to_json() | change)
    with pytest.raises(SchemaError):
        validate(BasisRows, [3, 0, 4])


@pytest.mark.parametrize(("start", "count"), [(0, 33), (32, 1), (30, 3)])
def test_a_site_that_is_too_narrow_is_told(start: int, count: int) -> None:
    with pytest.raises(BasisError, match=f"{SITE}' has 32 input features.*smaller rank"):
        BasisRows(0, start, count).matrix(SITE, 32)
    assert BasisRows(0, start, count).matrix(SITE, start + count).shape == (count, start + count)


ROWS = st.builds(BasisRows, st.integers(0, 1), st.integers(0, 12), st.integers(1, 6))


@quick
@given(ROWS, ROWS)
def test_rows_overlap_when_they_share_one(one: BasisRows, two: BasisRows) -> None:
    shared = set(range(one.start, one.start + one.count)) & set(range(two.start, two.start + two.count))
    assert one.overlaps(two) == two.overlaps(one) == (one.seed == two.seed and bool(shared))


def test_adapters_that_share_a_basis_pass() -> None:
    shared_basis({"a": BasisRows(0, 0, 4), "b": BasisRows(0, 4, 2), "c": BasisRows(0, 6, 4)})
    shared_basis({"a": BasisRows(0, 0, 4)})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": BasisRows(0, 0, 4), "b": None}, "b trained without an orthogonal basis.*`method=fedavg`"),
        ({"a": BasisRows(0, 0, 4), "b": BasisRows(1, 4, 4)}, "a seed 0, b seed 1.*`method=fedavg`"),
        (
            {"a": BasisRows(0, 0, 4), "b": BasisRows(0, 8, 4), "c": BasisRows(0, 3, 4)},
            "a .rows 0–3. and c .rows 3–6. collide.*train c again in the folder of a",
        ),
    ],
)
def test_adapters_that_do_not_are_named_with_the_remedy(rows: dict[str, BasisRows | None], message: str) -> None:
    with pytest.raises(BasisError, match=message) as caught:
        shared_basis(rows)
    assert "\n" not in str(caught.value)
