"""Runs repeat: the same seed gives the same bytes, whatever else the process does."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.encoder.load import Encoder, weights_fingerprint
from tests.training.runs import train, tune

Train = Callable[[Encoder, Path], object]

RUNS: dict[str, Train] = {
    "lora": lambda encoder, out: train(encoder, out / "a.safetensors"),
    "regression": lambda encoder, out: train(encoder, out / "a.safetensors", "sts"),
    "probe": lambda encoder, out: train(encoder, out / "a.safetensors", kind="probe"),
    "bf16": lambda encoder, out: train(encoder, out / "a.safetensors", precision="bf16"),
    "dropout": lambda encoder, out: train(
        encoder,
        out / "a.safetensors",
        adapter=AdapterConfig(rank=2, dropout=0.3, basis="random", train_bias=True, train_layernorm=True),
    ),
    "full": lambda encoder, out: tune(encoder, out / "a"),
}


def weights(out: Path) -> bytes:
    """The bytes of what a run of ``RUNS`` made."""
    return (out / "a.safetensors" if (out / "a.safetensors").exists() else out / "a/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", RUNS)
def test_runs_repeat_whatever_torchs_global_state_is_and_leave_it_alone(
    bert: Encoder, tmp_path: Path, kind: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.get_rng_state()
        RUNS[kind](bert, tmp_path / "one")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        torch.rand(3)
        RUNS[kind](bert, tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert weights_fingerprint(dict(bert.model.named_parameters())) == bert.fingerprint
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind", ["lora", "probe"])
def test_another_seed_gives_another_adapter(bert: Encoder, tmp_path: Path, kind: str) -> None:
    for seed in (0, 1):
        train(bert, tmp_path / str(seed) / "a.safetensors", kind=kind, seed=seed)
    heads = [read_adapter(tmp_path / str(seed) / "a.safetensors").head["classifier.weight"] for seed in (0, 1)]
    assert float((heads[0] - heads[1]).abs().max()) > 1e-3


def test_another_seed_gives_another_fine_tuned_model(bert: Encoder, tmp_path: Path) -> None:
    for seed in (0, 1):
        tune(bert, tmp_path / str(seed), seed=seed, epochs=1)
    assert (tmp_path / "0/model.safetensors").read_bytes() != (tmp_path / "1/model.safetensors").read_bytes()


@pytest.mark.parametrize("pair", [("lora", "regression"), ("dropout", "probe"), ("lora", "full"), ("full", "full")])
def test_two_runs_at_once_give_the_same_bytes_as_one_after_the_other(
    bert: Encoder, tmp_path: Path, pair: tuple[str, str]
) -> None:
    for place, kind in enumerate(pair):
        RUNS[kind](bert, tmp_path / f"after {place}")
    errors: list[BaseException] = []

    def work(place: int, kind: str) -> None:
        try:
            RUNS[kind](bert, tmp_path / f"at once {place}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(pair)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for place in range(2):
        assert weights(tmp_path / f"after {place}") == weights(tmp_path / f"at once {place}")
