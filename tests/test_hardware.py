"""The machine: generators of their own, precisions, threads, meters; torch's global state is left alone."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bert import hardware
from mergekit_bert.errors import UnknownNameError
from mergekit_bert.hardware import (
    GpuMeter,
    autocast,
    generator,
    gpu_meter,
    pick_precision,
    processor,
    set_threads,
    threads,
)

CPU = torch.device("cpu")


def numbers(*seeds: int) -> list[int]:
    return torch.randint(2**31, (4,), generator=generator(*seeds)).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
def test_a_generator_repeats_by_its_seeds(seeds: list[int]) -> None:
    assert numbers(*seeds) == numbers(*seeds)


@settings(deadline=None)
@given(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), st.tuples(st.integers(0, 10_000), st.integers(0, 99)))
def test_other_seeds_give_another_generator(one: tuple[int, int], two: tuple[int, int]) -> None:
    assert (numbers(*one) == numbers(*two)) == (one == two)


def test_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    numbers(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_order_and_number_of_seeds_matter() -> None:
    assert len({tuple(numbers(*seeds)) for seeds in ((0,), (0, 0), (0, 1), (1, 0), (1,), (0, 0, 0))}) == 6


def test_the_processor_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processor() == f"cpu {torch.backends.cpu.get_cpu_capability()}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert processor() == "cuda NVIDIA H100"


@pytest.mark.parametrize(("asked", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_named_precision_is_taken(asked: str, dtype: torch.dtype) -> None:
    assert pick_precision(asked, CPU) == dtype


@pytest.mark.parametrize(("bf16_seconds", "dtype"), [(0.5, torch.bfloat16), (0.9, torch.float32), (2, torch.float32)])
def test_auto_is_bf16_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bf16_seconds: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(hardware, "_seconds", lambda kind, device: 1.0 if kind == torch.float32 else bf16_seconds)
    assert pick_precision("auto", CPU) == dtype


def test_the_probe_measures_both_precisions() -> None:
    assert pick_precision("auto", CPU) in (torch.float32, torch.bfloat16)


def test_an_unknown_precision_is_told_with_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match=r"precision: 'bf61'; expected one of auto, fp32, bf16; did you mean"):
        pick_precision("bf61", CPU)


@pytest.mark.parametrize(("dtype", "found"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_autocast_is_for_the_block_and_the_thread(dtype: torch.dtype, found: torch.dtype) -> None:
    left = torch.ones(2, 2)
    seen: list[torch.dtype] = []
    with autocast(dtype, CPU):
        seen.append((left @ left).dtype)
        other = threading.Thread(target=lambda: seen.append((left @ left).dtype))
        other.start()
        other.join()
    assert [*seen, (left @ left).dtype] == [found, torch.float32, torch.float32]


def test_threads_are_set_only_when_asked() -> None:
    before = threads()
    try:
        set_threads(None)
        assert threads() == before
        set_threads(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_peak_memory_is_in_bytes() -> None:
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert 64 * 2**20 < hardware.peak_memory_bytes() < 2**40


def test_a_gpu_meter_without_a_gpu_has_no_figures() -> None:
    with gpu_meter(CPU) as meter:
        pass
    assert (meter.average_bytes, meter.maximum_bytes) == (None, None)


def test_a_gpu_meter_sums_up_its_samples() -> None:
    meter = GpuMeter([10, 30, 21])
    assert (meter.average_bytes, meter.maximum_bytes) == (20, 30)
