"""Which encoder a model file gets: the one that the user names, or one that a file may name.

A file comes from anywhere, so a name in it is not followed just because it is there.
"""

import os
from collections.abc import Callable
from pathlib import Path

from mergekit_bert.adapters.adapter import Base
from mergekit_bert.adapters.file import check_base
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.encoder.places import MINILM
from mergekit_bert.errors import ModelFileError

ALLOWED = "MBERT_ALLOWED_BASES"
"""The environment variable that lists the bases, by commas, which any file may name."""
Loader = Callable[[str], Encoder]


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
