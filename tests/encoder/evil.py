"""Folders whose author wishes mbert's user ill: ways to spoil a good one, and what must not have happened."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], object]
MARK = "mark"
"""The file beside a folder that its code would write, were it run."""


def says(file: str = "config.json", **values: Any) -> Spoil:
    """The folder's JSON ``file`` says ``values`` besides."""

    def spoil(folder: Path) -> None:
        path = folder / file
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | values))

    return spoil


def code(file: str = "config.json", **values: Any) -> Spoil:
    """The folder brings ``evil.py``, and its ``file`` asks for the classes in it."""

    def spoil(folder: Path) -> None:
        mark = str(folder.parent / MARK)
        (folder / "evil.py").write_text(
            f"open({mark!r}, 'w').close()\n"
            "from transformers import BertConfig, BertForSequenceClassification, BertTokenizer\n"
            "class C(BertConfig):\n    model_type = 'evil'\n"
            "class M(BertForSequenceClassification):\n    config_class = C\n"
            "class T(BertTokenizer):\n    pass\n"
        )
        classes: Any = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}
        classes |= {"AutoTokenizer": ["evil.T", None]}
        says(file, auto_map=classes, **values)(folder)

    return spoil


class _Marks:
    """What writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def pickled(folder: Path) -> None:
    """Weights in a pickle alone."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Marks(folder.parent / MARK)))


def distributed(folder: Path) -> None:
    """A distributed checkpoint of torch's besides, whose list of contents is a pickle."""
    (folder / ".metadata").write_bytes(pickle.dumps(_Marks(folder.parent / MARK)))
    (folder / "__0_0.distcp").write_bytes(b"")
