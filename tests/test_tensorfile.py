"""The container: bytes that repeat, and reading that is strict."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mergekit_bert import tensorfile
from mergekit_bert.errors import ModelFileError
from tests.adapters.helpers import quick, read_raw, same_tensors, write_raw


def test_equal_tensors_give_equal_bytes_in_whatever_order_and_layout(tmp_path: Path) -> None:
    square = torch.arange(6.0).reshape(2, 3)

    def written(tensors: dict[str, torch.Tensor], metadata: Any) -> bytes:
        tensorfile.write_tensors(tmp_path / "x.safetensors", tensors, metadata)
        data = (tmp_path / "x.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest() == tensorfile.tensor_file_sha256(tensors, metadata)
        return data

    one = written({"a": square, "b": torch.ones(2)}, {"x": 1, "y": 2})
    assert one == written({"b": torch.ones(2), "a": square.T.contiguous().T}, {"y": 2, "x": 1})
    assert one != written({"a": square, "b": torch.ones(2)}, {"x": 1, "y": 3})


def test_the_container_is_byte_for_byte_what_safetensors_writes() -> None:
    kinds = ["bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "float64", "int64"]
    kinds += ["float8_e4m3fn", "float8_e5m2"]
    tensors = {f"{n}.{kind}": torch.ones(2, 3).to(getattr(torch, kind)) for n, kind in enumerate(kinds)}
    tensors |= {"empty": torch.ones(0, 4), "scalar": torch.tensor(2.0), 'ü "\n\t\x01': torch.ones(1)}
    for metadata in ({"mbert": 'ü "quoted" \\ \n \x7f \x1f'}, {"mbert": ""}):
        told = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        header, order = tensorfile.safetensors_header(told, metadata)
        assert header + b"".join(bytes(tensorfile._bytes_of(tensors[name])) for name in order) == save(
            tensors, metadata
        )


def test_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    both = torch.arange(4.0)
    tensors = {"one": both, "same": both, "tail": both[2:]}
    tensorfile.write_tensors(tmp_path / "x.safetensors", tensors, {})
    assert same_tensors(tensorfile.read_tensors(tmp_path / "x.safetensors")[0], tensors)


@pytest.fixture
def container(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    tensorfile.write_tensors(path, {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(4)}, {"n": [1, None, "ü"]})
    return path


def test_what_was_written_is_read(container: Path) -> None:
    tensors, metadata = tensorfile.read_tensors(container)
    assert same_tensors(tensors, {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(4)})
    assert metadata == {"n": [1, None, "ü"]}


def _metadata(value: str | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        header, data = read_raw(path)
        header["__metadata__"] = {"format": "pt"} if value is None else {"mbert": value}
        write_raw(path, header, data)

    return change


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def _huge_header(path: Path) -> None:
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def _holding(value: float, dtype: torch.dtype) -> Callable[[Path], None]:
    data = b"".join(tensorfile._pieces({"w": torch.tensor([1.0, value]).to(dtype)}, {}))
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "it is a folder"),
        (lambda path: path.write_bytes(b""), "not readable as safetensors"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a zip of pickles"), "not readable as safetensors"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "not readable as safetensors"),
        (_flip, "contents that do not fit their checksum"),
        (
            lambda path: save_file({"w": torch.ones(2)}, path, {"mbert": "{}"}),
            "contents that do not fit their checksum",
        ),
        (
            lambda path: save_file({"w": torch.ones(2)}, path, {"mbert": "{}", "more": ""}),
            "a foreign header .*mbert, more",
        ),
        (_metadata('{"n": 1}'), "a header in another form"),
        (_metadata('{"n":1,"n":1}'), "broken metadata .the key 'n' twice"),
        (_metadata("[]"), "metadata that is a list"),
        (_huge_header, "a header of 1,099,511,627,776 bytes"),
        (_metadata(None), "a foreign header .metadata keys: format"),
        (_metadata("{'n': 1}"), "broken metadata"),
        (_metadata("[" * 100_000), "broken metadata"),
        (_holding(float("nan"), torch.float32), "tensor 'w' holds NaN or values beyond"),
        (_holding(float("-inf"), torch.float32), "tensor 'w' holds NaN or values beyond"),
        (_holding(float("inf"), torch.bfloat16), "tensor 'w' holds NaN or values beyond"),
        (_holding(-2e18, torch.float32), r"tensor 'w' holds NaN or values beyond 1e\+18"),
    ],
)
def test_a_broken_container_is_its_own_one_line_error(
    container: Path, change: Callable[[Path], object], message: str
) -> None:
    change(container)
    with pytest.raises(ModelFileError, match=message) as caught:
        tensorfile.read_tensors(container)
    assert str(container) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_container_cut_anywhere_is_refused(container: Path) -> None:
    whole = container.read_bytes()
    for size in range(len(whole)):
        container.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            tensorfile.read_tensors(container)


@quick
@given(st.binary(max_size=200))
def test_no_bytes_bring_the_reader_down(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(ModelFileError):
        tensorfile.read_tensors(path)
