"""What a folder's small files may be and say."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergekit_bert as mb
from mergekit_bert.encoder.load import load_encoder
from mergekit_bert.encoder.vetting import read_object, vet_folder, vet_numbers
from mergekit_bert.errors import EncoderError
from tests.encoder.evil import Spoil, says

TOKENIZER = "tokenizer_config.json"


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folders["bert"], tmp_path / "bert"))


def _pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return spoil


def _link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def _long(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(2**28)  # no more on the disk than its length

    return spoil


def rules(**values: Any) -> Spoil:
    return says("tokenizer.json", **values)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa" * 8}
REFUSED: dict[str, tuple[Spoil, str]] = {
    **{
        f"a pipe for {name}": (_pipe(name), "is a device or a pipe")
        for name in (
            *("config.json", "tokenizer.json", TOKENIZER, "special_tokens_map.json", "vocab.txt", "model.safetensors"),
            *("additional_chat_templates/x.jinja", "chat_template.jinja", "model.safetensors.index.json"),
        )
    },
    "a device": (_link("vocab.txt", "/dev/zero"), "'vocab.txt' is a device or a pipe"),
    "a device in place of weights": (_link("model.safetensors", "/dev/zero"), "is a device or a pipe"),
    "a link to itself": (_link("config.json", "config.json"), "config.json"),
    "a long list": (_long("vocab.txt"), "'vocab.txt' has 268435456 bytes; expected at most"),
    "a long configuration": (_long("config.json"), "'config.json' has 268435456 bytes"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a file under another name": (says(TOKENIZER, fast_tokenizer_files=["../tokenizer.4.json"]), "under other names"),
    "arguments": (says(TOKENIZER, init_inputs=["/dev/zero"]), "arguments of its own"),
    "a file of another library": (says(TOKENIZER, sp_model_kwargs={"model_file": "x"}), "other than plain words"),
    "options of another library": (says(TOKENIZER, mecab_kwargs={"mecab_option": "-r /x"}), "other than plain words"),
    "a file among the tokens": (says("special_tokens_map.json", vocab_file="x"), r"asks for a file \(vocab_file\)"),
    "a length below one": (says(TOKENIZER, model_max_length=-1), "model_max_length is -1"),
    "a length in words": (says(TOKENIZER, model_max_length="x"), "model_max_length is 'x'"),
    "a retriever": (says(TOKENIZER, tokenizer_class="RagRetriever"), "tokenizer_class 'RagRetriever' is no tokenizer"),
    "a tokenizer of two": (says(TOKENIZER, tokenizer_class="RagTokenizer"), "'RagTokenizer' is no tokenizer"),
    "the same of the model": (says(tokenizer_class="AutoTokenizer"), "'AutoTokenizer' is no tokenizer"),
    "an id": (rules(model={"type": "WordLevel", "vocab": {"a": 10**9}, "unk_token": "a"}), "1000000000 in tokenizer"),
    "an added id": (says("added_tokens.json", x=10**9), "1000000000 in added_tokens.json"),
    "a decoded id": (says(TOKENIZER, added_tokens_decoder={str(10**9): {"content": "x"}}), "1000000000 in tokenizer_c"),
    "a width to pad to": (rules(padding={"strategy": {"Fixed": 10**12}}), "1000000000000 in tokenizer.json"),
    "long words": (rules(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 4}), "65536 times as long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder: Path, name: str) -> None:
    spoil, message = REFUSED[name]
    spoil(folder)
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoder(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "spoil",
    [
        says(TOKENIZER, model_max_length=None),
        says(TOKENIZER, model_max_length=10**30),
        says(TOKENIZER, sp_model_kwargs={}, init_inputs=[], mecab_kwargs={"mecab_dic": "unidic_lite"}),
        says(
            TOKENIZER,
            special_tokens_map_file="/root/.cache/x",
            name_or_path="someone/x",
            tokenizer_class="OwnTokenizer",
        ),
        _link("nowhere.json", "/no/such"),
        lambda folder: (folder / "checkpoint-1").mkdir(),
    ],
)
def test_what_others_write_is_no_harm(folder: Path, bert: mb.Encoder, spoil: Callable[[Path], object]) -> None:
    spoil(folder)
    assert load_encoder(folder).fingerprint == bert.fingerprint


BROKEN = {
    "twice": '{"a": 1, "a": 2}',
    "twice inside": '{"x": [{"a": 1, "a": 1}]}',
    "deep": '{"a": ' * 100 + "1" + "}" * 100,
    "deeper": '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}",
    "NaN": '{"a": NaN}',
    "infinity": '{"a": -Infinity}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "a list": "[]",
    "a number": "7",
    "nothing": "",
    "half": '{"a": ',
    "no text": "\udcff",
    "long": '{"a": "' + "x" * 2**24 + '"}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(BROKEN[name].encode(errors="surrogateescape"))
    with pytest.raises(EncoderError, match=r"x.json cannot be read \(.+\); expected a JSON object") as caught:
        read_object(path, "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_was_read_is_what_is_there(folder: Path) -> None:
    said = vet_folder(folder, "x")
    assert said.config == json.loads((folder / "config.json").read_text())
    assert said.tokenizer == json.loads((folder / TOKENIZER).read_text())
    assert said.named_files == ()


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"vocab_size": 250_002, "hidden_size": 768, "num_hidden_layers": 12}, True),
        ({"vocab_size": 250_003}, False),
        ({"n_layers": 1025}, False),
        ({"layer_norm_eps": 1e-12, "rope_theta": 160_000.0, "pad_token_id": -1, "id2label": {"0": "x"}}, True),
        ({"max_position_embeddings": 10**7, "rope_theta": 10**9}, True),
        ({"max_position_embeddings": 2**31}, False),
        ({"sizes": [1, [2, {"x": 10**6}]]}, False),
        ({"label2id": {"a": 10**5}}, False),
        ({"hidden_size": -(10**6)}, False),
    ],
)
def test_numbers_are_held_against_the_weights(values: dict[str, Any], fits: bool) -> None:
    if fits:
        vet_numbers(values, 250_002, "x")
    else:
        with pytest.raises(EncoderError, match=r"x: \w+ is -?[0-9]+ in config.json; expected at most [0-9]+ with"):
            vet_numbers(values, 250_002, "x")
