"""Changes of safetensors files: header, mbert's metadata in it, tensors; the digest is taken anew or not."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mergekit_bert import tensorfile
from mergekit_bert.files import canonical_json
from tests.fuzz.mutators import any_bytes, any_text
from tests.fuzz.source import Kind, Mutation, Source
from tests.fuzz.trees import Tree, change_tree, is_plain, odd_text, parsed, spell

_METADATA, _DIGESTS = "__metadata__", ("digest", "sha256")


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order of their names; none where an earlier change left no file."""
    try:
        return dict(sorted(load(data).items()))
    except SafetensorError:
        return {}


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header and the values of a safetensors file; None where an earlier change left none."""
    size = int.from_bytes(data[:8], "little")
    header = parsed(data[8 : 8 + size]) if size < len(data) else None
    return (header, data[8 + size :]) if isinstance(header, dict) else None


def put_together(header: Mapping[str, Any], values: bytes) -> bytes:
    """The inverse, in mbert's form where it has one: what is wrong is then the header's contents, not its form."""
    return _framed(_as_written(header, _COMPACT), values)


def _framed(text: bytes, values: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values


_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def _as_written(tree: Tree, write: Callable[[Tree], str]) -> bytes:
    """``tree`` as ``write`` writes it, or spelled where it cannot: a key twice, a number that is none."""
    if is_plain(tree):
        with contextlib.suppress(ValueError, RecursionError):
            return write(tree).encode()
    return spell(tree).encode()


def sealed(tensors: Mapping[str, Tensor], tree: Tree) -> bytes:
    """The file that mbert would write of ``tensors`` and the metadata ``tree``: of format 1, if this bears its digest.

    Where the tree cannot be written as mbert does it, it is spelled as it is, with the digest of what a reader makes of
    it, or with none where no reader could.
    """
    told, plain = tree, parsed(spell(tree).encode())
    if isinstance(tree, dict) and isinstance(plain, dict):
        told, bare = _bare(tree), _bare(plain)
        old = "sha256" in tree
        with contextlib.suppress(TypeError, ValueError, OverflowError, RecursionError):
            digest = tensorfile._values_sha256(tensors) if old else tensorfile._digest(tensors, bare)
            told["sha256" if old else "digest"] = digest
    text = _as_written(told, canonical_json).decode()
    return b"".join(tensorfile._container(tensors, {tensorfile.METADATA_KEY: text}))


def _sealed_anew(before: dict[str, Any], tensors: Mapping[str, Tensor], tree: Tree) -> bytes:
    """The same for a ``tree`` without its digest, sealed as it was ``before``."""
    digest = {key: value for key, value in before.items() if key in _DIGESTS}
    return sealed(tensors, {**tree, **digest} if isinstance(tree, dict) else tree)


def _bare(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in _DIGESTS}


def _metadata(data: bytes) -> tuple[dict[str, Any], Tree, bytes] | None:
    """Header, mbert's metadata and values."""
    apart = taken_apart(data)
    if apart is None or not isinstance(apart[0].get(_METADATA), dict):
        return None
    text = apart[0][_METADATA].get(tensorfile.METADATA_KEY)
    tree = parsed(text.encode()) if isinstance(text, str) else None
    return (apart[0], tree, apart[1]) if isinstance(tree, dict) else None


def _with_metadata(header: dict[str, Any], text: str, values: bytes) -> bytes:
    return put_together({**header, _METADATA: {**header[_METADATA], tensorfile.METADATA_KEY: text}}, values)


def metadata_tree(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong in mbert's metadata."""
    found = _metadata(data)
    if found is None:
        return any_bytes(source, data, other)
    header, tree, values = found
    return _with_metadata(header, _as_written(change_tree(source, tree), canonical_json).decode(), values)


def metadata_text(source: Source, data: bytes, other: bytes) -> bytes:
    """Another text where mbert's metadata stood."""
    found, foreign = _metadata(data), _metadata(other)
    if found is None or foreign is None:
        return any_bytes(source, data, other)
    header, tree, values = found
    text = any_text(source, spell(tree).encode(), spell(foreign[1]).encode())
    return _with_metadata(header, text.decode("utf-8", "replace"), values)


def foreign_metadata(source: Source, data: bytes, other: bytes) -> bytes:
    """The metadata, or the values, of another file."""
    one, two = taken_apart(data), taken_apart(other)
    if one is None or two is None:
        return any_bytes(source, data, other)
    if source.random() < 0.5:
        source.tell("metadata of another file")
        return put_together({**one[0], _METADATA: two[0].get(_METADATA)}, one[1])
    source.tell("values of another file")
    return put_together(one[0], two[1][: len(one[1])].ljust(len(one[1]), b"\0"))


def header_tree(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong in the header, or the header as another text."""
    apart = taken_apart(data)
    if apart is None:
        return any_bytes(source, data, other)
    header, values = apart
    if source.random() < 0.15:
        text = any_text(source, json.dumps(header).encode(), other[:500])
        return len(text).to_bytes(8, "little") + text + values
    return _framed(_as_written(change_tree(source, header), _COMPACT), values)


_TYPES = ("F32", "F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "U64", "I1", "", None)


def entries(source: Source, data: bytes, other: bytes) -> bytes:
    """What the header says of one tensor: where its bytes lie, its shape, its type, its name."""
    apart = taken_apart(data)
    names = [name for name in apart[0] if name != _METADATA] if apart is not None else []
    if apart is None or not names:
        return any_bytes(source, data, other)
    header, values = apart
    name, second = source.choice(names), source.choice(names)
    entry = header[name]
    way = source.choice(("offsets", "shape", "type", "exchanged", "over another", "renamed", "gone", "more"))
    begin, end = entry["data_offsets"]
    if way == "offsets":
        entry["data_offsets"] = source.choice(
            ([begin + 4, end + 4], [end, begin], [begin, end - 4], [begin, end + 4], [-4, end], [begin, 2**63],
             [2**64 - 4, 2**64], [begin], [begin, end, end], [0, len(values)], [float(begin), float(end)])
        )  # fmt: skip
    elif way == "shape":
        shape = entry["shape"]
        entry["shape"] = source.choice(
            (shape[::-1], [*shape, 1], shape[:-1], [-one for one in shape], [2**32, 2**32], [0, 2**60], [1] * 70,
             [2**61] * 8, [end - begin], shape * 2, [0], [], [shape], [2**64])
        )  # fmt: skip
    elif way == "type":
        entry["dtype"] = source.choice(_TYPES)
    elif way == "exchanged":
        header[name], header[second] = header[second], header[name]
    elif way == "over another":
        entry["data_offsets"] = list(header[second]["data_offsets"])
    elif way == "renamed":
        header[source.choice((name + "x", "", "\x00", name.upper(), "\ud800", "a" * 9999))] = header.pop(name)
    elif way == "gone":
        del header[name]
    else:
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(values), len(values)]}
    source.tell(f"{name}: {way} {second if way in ('exchanged', 'over another') else header.get(name)}")
    return put_together(header, values)


_BITS = (
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\0\0\x80\xff",
    b"\xff\xff\x7f\x7f",
    b"\1\0\0\0",
    b"\0\0\0\0",
    b"\1\0\xa0\x7f",
)
"""NaN, both infinities, the largest and the smallest number, zero, and a NaN that signals, in float32."""


def values(source: Source, data: bytes, other: bytes) -> bytes:
    """The numbers of the tensors."""
    apart = taken_apart(data)
    if apart is None or not apart[1]:
        return any_bytes(source, data, other)
    found = bytearray(apart[1])
    for _ in range(source.choice((1, 1, 3, 100))):
        place = 4 * source.randrange(max(1, len(found) // 4))
        if source.random() < 0.5:
            found[place : place + 4] = source.choice(_BITS)
        else:
            found[min(place, len(found) - 1)] ^= 1 << source.randrange(8)
        source.tell(f"the number at byte {place}")
    return data[: len(data) - len(found)] + bytes(found[: len(apart[1])])


def change_tensors(source: Source, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with one thing wrong that leaves the container whole."""
    if not tensors:
        return {"more": torch.zeros(1)}
    found, name, second = dict(tensors), source.choice(list(tensors)), source.choice(list(tensors))
    one, way = found[name], source.choice(("values", "values", "shape", "type", "exchanged", "renamed", "gone", "more"))
    wide = one.double()
    if way == "values":
        worst = float(torch.finfo(torch.float32).max)
        number = source.choice((float("nan"), float("inf"), -float("inf"), worst, -worst, 0.0, 1e-45, 1e20, -1.0))
        if source.random() < 0.5 and one.numel():
            wide.view(-1)[source.randrange(one.numel())] = number
        else:
            wide = wide * number if source.random() < 0.5 else torch.full_like(wide, number)
        found[name] = wide.to(one.dtype)
        way = f"values {number}"
    elif way == "shape":
        flat = one.reshape(-1)
        rows = one if one.dim() else flat
        found[name] = source.choice(
            (
                one.T if one.dim() == 2 else one[None],
                flat,
                one[None],
                rows[:0],
                rows[:-1],
                torch.cat([rows, rows]),
                one.sum(),
            )
        ).contiguous()
    elif way == "type":
        kind = source.choice((torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool))
        found[name] = one.to(kind)
    elif way == "exchanged":
        found[name], found[second] = found[second], found[name]
    elif way == "renamed":
        found[source.choice((name + "x", name.upper(), name.replace("site", "head"), ""))] = found.pop(name)
    elif way == "gone":
        del found[name]
    else:
        found[source.choice(("more", name + ".more", "head.more", "site.x.A"))] = torch.zeros(2, 2)
    source.tell(f"tensor {name}: {way}")
    return found


def _changed_tensors(source: Source, data: bytes) -> dict[str, Tensor]:
    return {name: one.contiguous().clone() for name, one in change_tensors(source, tensors_in(data)).items()}


def sealed_metadata(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong in mbert's metadata, and a digest that fits."""
    found = _metadata(data)
    return data if found is None else _sealed_anew(found[1], tensors_in(data), change_tree(source, _bare(found[1])))


def sealed_tensors(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong with a tensor, and a digest that fits."""
    found = _metadata(data)
    return data if found is None else sealed(_changed_tensors(source, data), found[1])


def sealed_names(source: Source, data: bytes, other: bytes) -> bytes:
    """A name that is another everywhere: in the metadata and in the names of tensors."""
    found = _metadata(data)
    words = sorted(set(re.findall(r"[A-Za-z_][\w.]*", canonical_json(found[1])))) if found is not None else []
    if found is None or not words:
        return data
    old, new = source.choice(words), str(source.choice((source.choice(words), odd_text(source), odd_text(source))))
    source.tell(f"{old!r} everywhere {new[:20]!r}")
    pattern = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)")
    tree = _mapped(_bare(found[1]), lambda one: pattern.sub(lambda _: new, one) if isinstance(one, str) else one)
    tensors = {pattern.sub(lambda _: new, name): one for name, one in tensors_in(data).items()}
    return data if any("\ud800" <= letter <= "\udfff" for letter in new) else _sealed_anew(found[1], tensors, tree)


_MOST = 2**18


def sealed_sizes(source: Source, data: bytes, other: bytes) -> bytes:
    """A size that is another everywhere, in the metadata and in the tensors; a second one may be huge if one is 0."""
    found, tensors = _metadata(data), tensors_in(data)
    sizes = sorted({size for one in tensors.values() for size in one.shape})
    if found is None or not sizes:
        return data
    sizes_now = {source.choice(sizes): source.choice((0, 0, 1, 2, 5, 64, 2**16))}
    if 0 in sizes_now.values():
        sizes_now.setdefault(source.choice(sizes), source.choice((2**16, 2**24, 2**31, 2**40)))
    source.tell(", ".join(f"{old} everywhere {new}" for old, new in sizes_now.items()))
    made = {}
    for name, one in tensors.items():
        shape = [sizes_now.get(size, size) for size in one.shape]
        if math.prod(shape) > _MOST:
            return data
        flat = one.reshape(-1)
        many = math.prod(shape) // max(1, len(flat)) + 1
        made[name] = flat.repeat(many)[: math.prod(shape)].reshape(shape) if len(flat) else torch.zeros(shape)
    tree = _mapped(_bare(found[1]), lambda one: sizes_now.get(one, one) if type(one) is int else one)
    return _sealed_anew(found[1], made, tree)


def _mapped(tree: Tree, change: Callable[[Any], Any]) -> Tree:
    """``tree`` with every key and every leaf changed."""
    if isinstance(tree, dict):
        return {change(key): _mapped(value, change) for key, value in tree.items()}
    return [_mapped(one, change) for one in tree] if isinstance(tree, list) else change(tree)


def unsealed_tensors(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong with a tensor of mbert's, in a container that is whole; the digest is the old one."""
    found = _metadata(data)
    if found is None:
        return any_bytes(source, data, other)
    header, tree, _ = found
    apart = taken_apart(sealed(_changed_tensors(source, data), tree))
    assert apart is not None
    return put_together({**apart[0], _METADATA: header[_METADATA]}, apart[1])


def plain_tensors(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong with a tensor of a file without a digest."""
    return save(_changed_tensors(source, data), {"format": "pt"})


_CONTAINER = (
    Mutation("bytes", any_bytes, 4),
    Mutation("header", header_tree, 3),
    Mutation("entries", entries, 3),
    Mutation("values", values, 2),
)
WEIGHTS: Kind = (*_CONTAINER, Mutation("tensors", plain_tensors, 8))
MODEL: Kind = (
    *_CONTAINER,
    Mutation("metadata", metadata_tree, 6),
    Mutation("metadata text", metadata_text, 2),
    Mutation("of another", foreign_metadata, 1),
    Mutation("tensors", unsealed_tensors, 3),
    Mutation("sealed metadata", sealed_metadata, 20, sealed=True),
    Mutation("sealed tensors", sealed_tensors, 5, sealed=True),
    Mutation("sealed names", sealed_names, 4, sealed=True),
    Mutation("sealed sizes", sealed_sizes, 4, sealed=True),
)
