"""Long texts: read only as far as they count, with the tokens of the whole text, by many threads and after a fork."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from mergekit_bert.data import batches
from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.sample import generate
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import Encoder
from tests.tiny import tiny_rows

MIB = 1 << 20
GUARD = 5.0
"""Seconds that no short text ever waits, however slow the machine."""


def _wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(_corpus(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def _byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([*_corpus(), " " * 64, "-" * 64], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return backend


def _unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(_corpus(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


def _corpus() -> list[str]:
    return [text for texts, _ in generate("sts", "train") for text in texts]


BUILDERS = {"wordpiece": _wordpiece, "byte-level": _byte_level, "unigram": _unigram}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=build(), model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        )
        for name, build in BUILDERS.items()
    }


WORDS = sorted({word for text in _corpus()[:300] for word in text.split()})
PIECES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(WORDS),
    st.integers(1, 40).map(lambda count: " " * count),
    st.sampled_from(
        ["\n\n", "\t ", "\u3000", "\u200b", ".", "?!", "-" * 70, "don't", "we'll", "[SEP]", "</s>", "<pad>"]
    ),
    st.sampled_from(["你好世界", "é", "e\u0301", "a\u0323\u0302", "ﷺ", "👩‍👩‍👧", "ﬁ", "１２３", "Å" * 9, "2024-01-01"]),
    st.integers(90, 130).map(lambda count: ("xyz" * 50)[:count]),
    st.text(max_size=12).filter(lambda text: not any("\ud800" <= one <= "\udfff" for one in text)),
)
TEXTS = st.tuples(st.lists(PIECES, max_size=15), st.sampled_from(["", " "]), st.integers(1, 4)).map(
    lambda drawn: drawn[1].join(drawn[0] * drawn[2])
)
ORDINARY = st.lists(st.sampled_from(WORDS), min_size=1, max_size=900).map(" ".join)


def by_the_library(tokenizer: Any, texts: tuple[str, ...], length: int) -> dict[str, list[int]]:
    """The columns of one row, all of it tokenised and cut by the tokenizers library."""
    encoded = tokenizer(*([text] for text in texts), truncation="longest_first", max_length=length)
    return {name: column[0] for name, column in encoded.items() if name != "attention_mask"}


def row_of(tokenizer: Any, texts: tuple[str, ...], length: int) -> tuple[dict[str, list[int]], int]:
    """The columns of one row as mbert has them, and whether it counts as cut."""
    tokens = tokenise(Rows((texts,), None, "here"), get_task("sts" if len(texts) == 2 else "sst"), tokenizer, length, 0)
    return {name: column[0] for name, column in tokens.columns.items()}, tokens.truncated


def settled(tokenizer: Any, text: str, read: str, length: int, right: bool) -> bool:
    """Whether the part that is read has ``length`` tokens without the two words beside the cut."""
    words = [word for word in tokenizer([read], add_special_tokens=False).word_ids(0) if word is not None]
    beside = sorted(set(words))[-2:] if right else sorted(set(words))[:2]
    return read == text or sum(word not in beside for word in words) >= length


def part(text: str, most: int, right: bool) -> str:
    return text[:most] if right else text[-most:]


FEW = settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("side", ["right", "left"])
@FEW
@given(st.data())
def test_what_is_read_gives_the_tokens_of_the_whole_text(
    tokenizers: dict[str, Any], name: str, side: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[name]
    text, length, each = data.draw(TEXTS), data.draw(st.integers(4, 24)), data.draw(st.sampled_from([3, 8, 64]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "CHARACTERS", each)
        patch.setattr(tokenizer, "truncation_side", side)
        found, cut = row_of(tokenizer, (text,), length)
        read = part(text, each * length, side == "right")
        assert found == by_the_library(tokenizer, (read,), length)
        if settled(tokenizer, text, read, length, side == "right"):
            assert found == by_the_library(tokenizer, (text,), length)
            assert cut == (len(tokenizer(text)["input_ids"]) > length)
        assert cut or read == text


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("side", ["right", "left"])
@FEW
@given(st.data())
def test_of_a_pair_too(tokenizers: dict[str, Any], name: str, side: str, data: st.DataObject) -> None:
    tokenizer, right = tokenizers[name], side == "right"
    texts = data.draw(TEXTS), data.draw(TEXTS)
    length, each = data.draw(st.integers(5, 24)), data.draw(st.sampled_from([3, 8, 64]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "CHARACTERS", each)
        patch.setattr(tokenizer, "truncation_side", side)
        found, cut = row_of(tokenizer, texts, length)
        read = (part(texts[0], each * length, right), part(texts[1], each * length, right))
        assert found == by_the_library(tokenizer, read, length)
        assert cut or read == texts
        if all(settled(tokenizer, text, seen, length, right) for text, seen in zip(texts, read, strict=True)):
            expected = by_the_library(tokenizer, texts, length)
            room = length - tokenizer.num_special_tokens_to_add(pair=True)
            half = min(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) > room // 2
            if half and room % 2 and read != texts:  # the odd token may have gone to the other text
                assert len(found["input_ids"]) == len(expected["input_ids"]) == length
            else:
                assert found == expected


@pytest.mark.parametrize("name", BUILDERS)
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.lists(ORDINARY, min_size=1, max_size=2), st.integers(8, 24))
def test_ordinary_text_is_read_far_enough(tokenizers: dict[str, Any], name: str, texts: list[str], length: int) -> None:
    row = tuple(texts)
    if len(row) == 2 and min(map(len, row)) > batches.CHARACTERS * length:
        row = (row[0], row[1][:100])
    found, cut = row_of(tokenizers[name], row, length)
    assert found == by_the_library(tokenizers[name], row, length)
    assert cut == (len(tokenizers[name](*row)["input_ids"]) > length)


def test_a_tokenizer_without_special_tokens_is_cut_too() -> None:
    backend = _unigram()
    backend.post_processor = processors.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=["input_ids"])
    for texts in (("a man plays " * 9,), ("a man plays " * 9, "a dog"), ("a dog " * 5, "a man plays " * 5)):
        found, cut = row_of(tokenizer, texts, 7)
        assert (found, cut) == (by_the_library(tokenizer, texts, 7), 1)


def test_a_tokenizer_written_in_python_is_cut_too() -> None:
    tokenizer = CanineTokenizer()
    for texts in (("abc" * 9,), ("abc" * 9, "ab"), ("abc" * 5000, "xyz" * 5000)):
        found, cut = row_of(tokenizer, texts, 12)
        assert (found, cut) == (by_the_library(tokenizer, texts, 12), 1)


def test_what_is_left_out_is_counted_though_the_row_is_short(tokenizers: dict[str, Any]) -> None:
    found, cut = row_of(tokenizers["wordpiece"], ("a man" + " " * 5000 + "plays",), 8)
    assert (found, cut) == (by_the_library(tokenizers["wordpiece"], ("a man",), 8), 1)


def test_rows_keep_their_places_over_many_calls(bert: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task("sts")
    rows = tiny_rows(task, 50)
    at_once = tokenise(rows, task, bert.tokenizer, 12, bert.pad_token)
    monkeypatch.setattr(batches, "_ROWS", 7)
    assert tokenise(rows, task, bert.tokenizer, 12, bert.pad_token) == at_once
    assert 0 < at_once.truncated < 50


def test_a_tokenizer_is_loaded_without_state_and_keeps_none(encoder: Encoder) -> None:
    task = get_task("sts")
    tokenise(tiny_rows(task, 20), task, encoder.tokenizer, 9, encoder.pad_token)
    backend = encoder.tokenizer.backend_tokenizer
    assert (backend.truncation, backend.padding) == (None, None)


def test_eight_threads_get_the_tokens_of_one(tokenizers: dict[str, Any]) -> None:
    task, tokenizer = get_task("sts"), tokenizers["byte-level"]
    lengths = [8 + number % 9 for number in range(64)]
    many = [
        Rows(tuple((one * (1 + number % 5), two) for one, two in tiny_rows(task, 20, number).texts), None, "here")
        for number in range(64)
    ]

    def work(number: int) -> Tokens:
        return tokenise(many[number], task, tokenizer, lengths[number], 0)

    expected = [work(number) for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, [*range(64)] * 4)) == expected * 4


@pytest.mark.parametrize("piece", ["good film ", "x", " ", "\u4f60"])
def test_a_short_text_does_not_wait_for_a_huge_one(tokenizers: dict[str, Any], piece: str) -> None:
    huge = piece * (10 * MIB // len(piece))
    tokenizer, started = tokenizers["wordpiece"], threading.Event()

    def work() -> None:
        started.set()
        row_of(tokenizer, (huge,), 512)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    begin = time.perf_counter()
    row_of(tokenizer, ("a man plays",), 512)
    waited = time.perf_counter() - begin
    thread.join()
    assert waited < GUARD


MEMORY = """
import resource, sys
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import load_encoder
tokenizer, sst = load_encoder(sys.argv[1]).tokenizer, get_task("sst")
tokenise(Rows((("good film",),), None, "here"), sst, tokenizer, 512, 0)
text = "good film " * (1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = tokenise(Rows(((text,),) * 3, None, "here"), sst, tokenizer, 512, 0)
assert [tokens.length(row) for row in range(3)] == [512] * 3 and tokens.truncated == 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_a_huge_text_takes_little_memory(tiny_folders: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tiny_folders["bert"])], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200 * 1024


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_tokenises_can_go_on(bert: Encoder) -> None:
    task, stop = get_task("sst"), threading.Event()
    rows = Rows((("good film " * 4000,),) * 20, None, "here")

    def work() -> None:
        while not stop.is_set():
            tokenise(rows, task, bert.tokenizer, 40, bert.pad_token)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            assert _forked(lambda: tokenise(rows, task, bert.tokenizer, 40, bert.pad_token)) == 0
    finally:
        stop.set()
        thread.join()


def _forked(work: Callable[[], object]) -> int | None:
    """The exit code of a child that does ``work``; None for one that hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
