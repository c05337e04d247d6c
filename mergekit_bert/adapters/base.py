"""Which encoder a model file gets: the one that the user names, or one that a file may name.

A file comes from anywhere, so a name in it is not followed just because it is there.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from mergekit_bert.encoder.load import Base, Encoder, check_base, load_encoder
from mergekit_bert.encoder.places import MINILM
from mergekit_bert.encoder.stored import open_encoder
from mergekit_bert.errors import ModelFileError

ALLOWED = "MBERT_ALLOWED_BASES"
"""The environment variable that lists the bases, by commas, which any file may name."""
Loader = Callable[[str], Encoder]


@runtime_checkable
class _Model(Protocol):
    """An adapter, or several in one model."""

    @property
    def base(self) -> Base: ...
    @property
    def needs_base(self) -> bool: ...
    def on(self, encoder: Encoder) -> Any: ...


M = TypeVar("M", bound=_Model)


def on_base(where: str, model: M, given: str | Path | Encoder | None = None) -> M:
    """``model`` on its base, which is opened where its Deltas need weights of it, and else left alone.

    Raises what :func:`encoder_of` raises.
    """
    if not model.needs_base:
        return model
    found: M = model.on(encoder_of(where, model.base, given, open_encoder))
    return found


def encoder_of(
    where: str, base: Base | str, given: str | Path | Encoder | None = None, load: Loader = load_encoder
) -> Encoder:
    """The encoder of a file that says it was made for ``base``: ``given`` by the user, else the one it names.

    A file may name ``minilm``, a base that ``MBERT_ALLOWED_BASES`` lists, and, where it has the base's fingerprints
    too, a folder on this machine. Whichever it is, it must have these fingerprints. ``where`` is what messages call
    the file. Raises ModelFileError, and what ``load`` raises.
    """
    encoder = given if isinstance(given, Encoder) else load(str(given) if given is not None else _named(where, base))
    if isinstance(base, Base):
        check_base(where, base, encoder)
    return encoder


def _named(where: str, base: Base | str) -> str:
    """The name in the file; raises ModelFileError unless a file may name it."""
    name = base.name if isinstance(base, Base) else base
    allowed = {one.strip() for one in os.environ.get(ALLOWED, "").split(",")} - {""}
    if name == MINILM or name in allowed or (isinstance(base, Base) and os.path.isdir(name)):
        return name
    raise ModelFileError(
        where,
        f"it names the base {name!r:.200}, which a file may not choose",
        f"'minilm', a folder that is there and has the file's fingerprint, or a name in {ALLOWED}",
        "name it with `base`",
    )
