"""Batches: every row once an epoch, orders that repeat, padding on the right, cut rows counted."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bert.data import batches
from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.load import Encoder
from tests.tiny import tiny_rows


def tokens_of(lengths: list[int], task: str = "sst", labels: tuple[float, ...] | None = None) -> Tokens:
    """Rows whose ids all are 1000 + their number, as a tokeniser would give them."""
    columns = {
        "input_ids": [[1000 + row] * length for row, length in enumerate(lengths)],
        "token_type_ids": [[row % 2] * length for row, length in enumerate(lengths)],
    }
    return Tokens(
        columns,
        [(len(ids),) for ids in columns["input_ids"]],
        labels,
        0,
        {"input_ids": 77, "token_type_ids": 0},
        get_task(task),
    )


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_has_every_row_once_in_full_batches(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    tokens = tokens_of(lengths)
    order = tokens.shuffled(size, seed, epoch)
    assert sorted(itertools.chain(*order)) == list(range(len(lengths)))
    assert sorted(map(len, order), reverse=True) == [size] * (len(lengths) // size) + [
        rest for rest in [len(lengths) % size] if rest
    ]
    assert order == tokens.shuffled(size, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    tokens = tokens_of([3] * 64)
    orders = [tokens.shuffled(8, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({str(order) for order in orders}) == 9
    assert len({str(sorted(map(sorted, order))) for order in orders}) == 9, "other batches, not only another order"


def test_an_epochs_order_needs_no_earlier_one_and_no_global_state() -> None:
    tokens = tokens_of(list(range(1, 50)))
    alone = tokens.shuffled(4, 7, 3)
    torch.rand(5)
    for epoch in range(3):
        tokens.shuffled(4, 7, epoch)
    before = torch.get_rng_state()
    assert tokens.shuffled(4, 7, 3) == alone
    assert torch.equal(before, torch.get_rng_state())


def test_batches_hold_rows_of_like_length_and_come_in_random_order() -> None:
    size, rows = 4, 4 * batches._WINDOW * 3
    source = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 60, (rows,), generator=source).tolist()
    order = tokens_of(lengths).shuffled(size, 0, 0)
    within = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in order]
    assert sum(within) / len(within) < 8  # rows taken at random lie about 36 apart
    means = [sum(lengths[i] for i in batch) / size for batch in order]
    rising = sum(a < b for a, b in itertools.pairwise(means))
    assert 0.3 < rising / (len(means) - 1) < 0.7


def test_rows_are_sorted_only_within_a_window() -> None:
    size = 2
    count = size * batches._WINDOW
    rows = 3 * count
    order = tokens_of(list(range(1, rows + 1))).shuffled(size, 5, 1)
    whole_sorted = {tuple(range(start, start + size)) for start in range(0, rows, size)}
    assert {tuple(sorted(batch)) for batch in order} != whole_sorted
    one_window = tokens_of(list(range(1, count + 1))).shuffled(size, 5, 1)
    assert {tuple(batch) for batch in one_window} == {(start, start + 1) for start in range(0, count, size)}


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 200))
def test_in_order_has_every_row_once_the_longest_first(lengths: list[int], budget: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "TOKEN_BUDGET", budget)
        found = list(tokens_of(lengths).in_order())
    order = [row for batch in found for row in batch.index]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    for batch, after in itertools.pairwise(found):
        assert sum(batch.lengths) <= budget or len(batch.index) == 1
        assert sum(batch.lengths) + after.lengths[0] > budget, "the next row would have fitted"


@settings(deadline=None)
@given(LENGTHS, st.data())
def test_rows_lie_end_to_end_and_padding_is_on_the_right_and_no_wider_than_the_longest(
    lengths: list[int], data: st.DataObject
) -> None:
    rows = st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=9)
    index = data.draw(rows)
    batch = tokens_of(lengths).batch(index)
    assert batch.inputs["input_ids"].tolist() == [1000 + row for row in index for _ in range(lengths[row])]
    assert batch.lengths == tuple(lengths[row] for row in index)
    padded = batch.padded()
    assert padded.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    ids, mask = padded["input_ids"], padded["attention_mask"]
    assert ids.shape == mask.shape == (len(index), max(lengths[row] for row in index))
    assert torch.equal(padded["token_type_ids"], mask * (torch.tensor(index) % 2)[:, None])
    for place, row in enumerate(index):
        assert ids[place, : lengths[row]].tolist() == [1000 + row] * lengths[row]
        assert ids[place, lengths[row] :].eq(77).all()
        assert mask[place].tolist() == [1] * lengths[row] + [0] * (ids.shape[1] - lengths[row])
    assert batch.index == index
    assert batch.targets is None


def test_labels_are_indices_or_scaled_to_the_unit() -> None:
    found = tokens_of([1, 2, 3], labels=(4.0, 0.0, 2.0)).batch([2, 0]).targets
    assert found is not None
    assert (found.dtype, found.tolist()) == (torch.int64, [2, 4])
    scaled = tokens_of([1, 2, 3], "sts", (5.0, 0.0, 1.25)).batch([0, 1, 2]).targets
    assert scaled is not None
    assert (scaled.dtype, scaled.tolist()) == (torch.float32, [1.0, 0.0, 0.25])


def test_a_range_need_not_start_at_zero() -> None:
    task = Task(name="t", kind="regress", text=("a",), metrics=("pearson",), range=(-2.0, 6.0))
    tokens = Tokens({"input_ids": [[1], [2]]}, [(1,), (1,)], (-2.0, 4.0), 0, {"input_ids": 0}, task)
    labels = tokens.batch([0, 1]).targets
    assert labels is not None
    assert labels.tolist() == [0.0, 0.75]


@settings(deadline=None, max_examples=25)
@given(st.integers(8, 20), st.integers(0, 10_000), st.sampled_from(["sst", "sts"]))
def test_long_rows_are_cut_and_counted_and_the_rest_left_alone(bert: Encoder, limit: int, seed: int, name: str) -> None:
    task = get_task(name)
    rows = tiny_rows(task, 20, seed)
    whole = tokenise(rows, task, bert.tokenizer, 1000, bert.pad_token)
    cut = tokenise(rows, task, bert.tokenizer, limit, bert.pad_token)
    long = [row for row in range(len(rows)) if whole.length(row) > limit]
    assert (whole.truncated, cut.truncated) == (0, len(long))
    for row in range(len(rows)):
        if row in long:
            assert cut.length(row) == limit
            for column in cut.columns.values():
                assert len(column[row]) == limit
            ids = cut.columns["input_ids"][row]
            assert ids[0] == bert.tokenizer.cls_token_id
            assert ids[-1] == bert.tokenizer.sep_token_id
        else:
            for column_name, column in cut.columns.items():
                assert column[row] == whole.columns[column_name][row]


def test_of_a_pair_the_longer_text_is_cut_first(bert: Encoder, sts: Task) -> None:
    rows = Rows((("a", "good " * 30), ("good " * 30, "a b")), (0.0, 1.0), "here")
    cut = tokenise(rows, sts, bert.tokenizer, 12, bert.pad_token)
    words = [bert.tokenizer.convert_ids_to_tokens(ids) for ids in cut.columns["input_ids"]]
    assert words[0] == ["[CLS]", "a", "[SEP]", *["good"] * 8, "[SEP]"]
    assert words[1] == ["[CLS]", *["good"] * 7, "[SEP]", "a", "[UNK]", "[SEP]"]


def test_a_pair_is_one_input_with_two_token_types(bert: Encoder, sts: Task) -> None:
    rows = Rows((("good cat", "dog"),), None, "here")
    tokens = tokenise(rows, sts, bert.tokenizer, 40, bert.pad_token)
    assert bert.tokenizer.convert_ids_to_tokens(tokens.columns["input_ids"][0]) == (
        ["[CLS]", "good", "cat", "[SEP]", "dog", "[SEP]"]
    )
    assert tokens.columns["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert tokens.labels is None


def test_every_architectures_own_padding_is_used(encoder: Encoder, sst: Task) -> None:
    tokens = tokenise(tiny_rows(sst, 6), sst, encoder.tokenizer, 40, encoder.pad_token)
    inputs = tokens.batch(list(range(6))).padded()
    widths = [tokens.length(row) for row in range(6)]
    assert len(set(widths)) > 1
    for row, width in enumerate(widths):
        assert inputs["input_ids"][row, width:].eq(encoder.tokenizer.pad_token_id).all()
        assert inputs["attention_mask"][row].sum() == width
    assert ("token_type_ids" in inputs) == ("token_type_ids" in encoder.tokenizer.model_input_names)


@pytest.mark.parametrize("text", ["", " ", "\u2028", "zzz unheard of"])
def test_odd_texts_still_give_a_row(bert: Encoder, sst: Task, text: str) -> None:
    tokens = tokenise(Rows(((text,),), None, "here"), sst, bert.tokenizer, 40, bert.pad_token)
    assert tokens.length(0) >= 2
    assert len(tokens) == 1
