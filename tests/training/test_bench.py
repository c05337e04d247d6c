"""The estimate of a run: its tokens, epochs and held-out rows at the speed that was measured nearest to it."""

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.data.batches import Tokens
from mergekit_bert.data.task import Task
from mergekit_bert.training import bench
from mergekit_bert.training.bench import Speed, seconds_of_run
from mergekit_bert.training.config import TrainConfig
from tests.tiny import tiny_rows

SPEEDS = [Speed("fp32", 8, 10.0), Speed("fp32", 64, 20.0), Speed("bf16", 8, 40.0), Speed("bf16", 64, 100.0)]


@pytest.mark.parametrize("kind", ["bitfit", "dora", "lora", "loha+prefix", "probe", "prompt"])
def test_every_family_can_be_measured(bert: mb.Encoder, sst: Task, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(bench, "BATCH_SIZES", (2, 4))
    family, train = FAMILIES.get(kind), TrainConfig(max_length=40)
    options = family.options()
    tokens = bench.tokens_of(bert, sst, tiny_rows(sst, 12), family, options, train)
    speeds = bench.measure(bert, sst, tokens, family, options, train)
    expected = [(precision, size) for precision in ("fp32", "bf16") for size in (2, 4)]
    assert [(one.precision, one.batch_size) for one in speeds] == expected


@pytest.mark.parametrize(
    ("precision", "size", "rate"), [("fp32", 8, 10), ("fp32", 48, 20), ("bf16", 4, 40), ("bf16", 500, 100)]
)
def test_the_estimate(sst: Task, precision: str, size: int, rate: float) -> None:
    tokens = Tokens(
        {"input_ids": [[1] * 5] * 30 + [[1] * 25] * 70}, [(5,)] * 30 + [(25,)] * 70, None, 0, {"input_ids": 0}, sst
    )
    total = 30 * 5 + 70 * 25
    config = TrainConfig(epochs=4, batch_size=size, hold_out=0.2)
    expected = 4 * total * (0.8 + 0.2 / 2) / rate
    assert seconds_of_run(tokens, config, SPEEDS, precision) == pytest.approx(expected)
    few = TrainConfig(epochs=1, batch_size=size, hold_out=0.2, hold_out_limit=10)
    assert seconds_of_run(tokens, few, SPEEDS, precision) == pytest.approx(total * (0.9 + 0.1 / 2) / rate)
