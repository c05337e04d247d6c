"""Changes of safetensors files: header, mbert's metadata in it, tensors; the digest is taken anew or not."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mergekit_bert import tensorfile
from tests.fuzz.mutators import any_bytes, any_text
from tests.fuzz.source import Kind, Mutation, Source
from tests.fuzz.trees import Tree, change_tree, parsed, spell

_METADATA, _DIGEST = "__metadata__", "sha256"


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order of their names."""
    return dict(sorted(load(data).items()))


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header and the values of a safetensors file; None where an earlier change left none."""
    size = int.from_bytes(data[:8], "little")
    header = parsed(data[8 : 8 + size]) if size < len(data) else None
    return (header, data[8 + size :]) if isinstance(header, dict) else None


def put_together(header: str, values: bytes) -> bytes:
    """The inverse; the header may be any text."""
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values


def _sealed(tensors: Mapping[str, Tensor], tree: Tree) -> bytes:
    """The file that mbert would write of ``tensors`` and the metadata ``tree``, were it made to.

    Where the tree cannot be written as mbert does it (a key twice, say), its digest is that of what a reader makes of
    it, or the old one where no reader could.
    """
    text = spell(tree)
    plain = parsed(text.encode())
    try:
        data = b"".join(tensorfile._pieces(tensors, {key: one for key, one in plain.items() if key != _DIGEST}))
    except (AttributeError, TypeError, ValueError, RecursionError, OverflowError):
        data = save(dict(tensors), {tensorfile.METADATA_KEY: text})
    apart = taken_apart(data)
    assert apart is not None
    header, values = apart
    told = parsed(header[_METADATA][tensorfile.METADATA_KEY].encode())
    if isinstance(tree, dict) and isinstance(told, dict) and _DIGEST in told:
        text = spell({**tree, _DIGEST: told[_DIGEST]})
    header[_METADATA][tensorfile.METADATA_KEY] = text
    return put_together(spell(header), values)


def _metadata(data: bytes) -> tuple[dict[str, Any], Tree, bytes] | None:
    """Header, mbert's metadata and values."""
    apart = taken_apart(data)
    if apart is None or not isinstance(apart[0].get(_METADATA), dict):
        return None
    text = apart[0][_METADATA].get(tensorfile.METADATA_KEY)
    tree = parsed(text.encode()) if isinstance(text, str) else None
    return (apart[0], tree, apart[1]) if isinstance(tree, dict) else None


def metadata_tree(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong in mbert's metadata."""
    found = _metadata(data)
    if found is None:
        return any_bytes(source, data, other)
    header, tree, values = found
    header[_METADATA][tensorfile.METADATA_KEY] = spell(change_tree(source, tree))
    return put_together(spell(header), values)


def metadata_text(source: Source, data: bytes, other: bytes) -> bytes:
    """Another text where mbert's metadata stood."""
    found, foreign = _metadata(data), _metadata(other)
    if found is None or foreign is None:
        return any_bytes(source, data, other)
    header, tree, values = found
    text = any_text(source, spell(tree).encode(), spell(foreign[1]).encode())
    header[_METADATA][tensorfile.METADATA_KEY] = text.decode("utf-8", "replace")
    return put_together(json.dumps(header), values)


def foreign_metadata(source: Source, data: bytes, other: bytes) -> bytes:
    """The metadata, or the values, of another file."""
    one, two = taken_apart(data), taken_apart(other)
    if one is None or two is None:
        return any_bytes(source, data, other)
    if source.random() < 0.5:
        source.tell("metadata of another file")
        return put_together(spell({**one[0], _METADATA: two[0].get(_METADATA)}), one[1])
    source.tell("values of another file")
    return put_together(spell(one[0]), two[1][: len(one[1])].ljust(len(one[1]), b"\0"))


def header_tree(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong in the header, or the header as another text."""
    apart = taken_apart(data)
    if apart is None:
        return any_bytes(source, data, other)
    header, values = apart
    if source.random() < 0.15:
        text = any_text(source, json.dumps(header).encode(), other[:500])
        return len(text).to_bytes(8, "little") + text + values
    return put_together(spell(change_tree(source, header)), values)


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
    return put_together(spell(header), values)


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
        found[name] = source.choice(
            (
                one.T if one.dim() == 2 else one[None],
                flat,
                one[None],
                one[:0],
                one[:-1],
                torch.cat([one, one]),
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
    if found is None:
        return data
    digest = found[1].pop(_DIGEST, None)
    tree = change_tree(source, found[1])
    return _sealed(tensors_in(data), {**tree, _DIGEST: digest} if isinstance(tree, dict) else tree)


def sealed_tensors(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong with a tensor, and a digest that fits."""
    found = _metadata(data)
    return data if found is None else _sealed(_changed_tensors(source, data), found[1])


def unsealed_tensors(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong with a tensor of mbert's, in a container that is whole; the digest is the old one."""
    found = _metadata(data)
    if found is None:
        return any_bytes(source, data, other)
    header, tree, _ = found
    apart = taken_apart(_sealed(_changed_tensors(source, data), tree))
    assert apart is not None
    return put_together(spell({**apart[0], _METADATA: header[_METADATA]}), apart[1])


def plain_tensors(source: Source, data: bytes, other: bytes) -> bytes:
    """One thing wrong with a tensor of a file without a digest."""
    try:
        return save(_changed_tensors(source, data), {"format": "pt"})
    except Exception:  # an earlier change left no container
        return any_bytes(source, data, other)


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
)
