"""One training step taken apart: microseconds a token, share of the machine's bf16 rate, and where the time goes.

Usage: python -m benchmarks.step --data DIR

Also the two findings on which the attention stands: the softmax of a bf16 block, and q, k and v as one product.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.machine import matrix_rates, provenance, write_result

STEPS = 30
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
_ATTENTION = ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::index_select")
_POINTWISE = ("aten::gelu", "aten::gelu_backward", "aten::native_layer_norm", "aten::native_layer_norm_backward")


def group_of(name: str, shapes: Any, rank: int) -> str:
    """Which part of the step an operation belongs to; a product with the adapter's rank as a size is thin."""
    if name in _PRODUCTS:
        return "thin products" if any(rank in shape for shape in shapes if shape) else "wide products"
    if name in _ATTENTION:
        return "attention"
    return "GELU and layer norms" if name in _POINTWISE else "all else"


def main(data: Annotated[Path, typer.Option(help="Folder with sst/.")], rows: int = 2000) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    import mergekit_bert as mb
    from benchmarks import sides
    from mergekit_bert.adapters.basis import BasisRows
    from mergekit_bert.adapters.family import FAMILIES
    from mergekit_bert.encoder.sites import find_sites
    from mergekit_bert.training.bench import tokens_of
    from mergekit_bert.training.config import ADAPTER_RATES
    from mergekit_bert.training.loop import make_optimizer, step
    from mergekit_bert.training.supervised import Supervised, TrainingRun
    from mergekit_bert.training.trainable import adapter_trainable

    torch.set_num_threads(os.cpu_count() or 1)

    def milliseconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times)

    encoder, task, adapter = mb.load_encoder("minilm"), mb.get_task("sst"), mb.AdapterConfig()
    train, sites = mb.TrainConfig(precision="bf16"), find_sites(encoder, adapter.targets)
    family, taken = FAMILIES.get("lora"), mb.load_rows(task, "train", data).take(range(rows))
    tokens = tokens_of(encoder, task, taken, family, adapter, train)
    work = adapter_trainable(encoder, task, family.name, adapter, sites, BasisRows(0, 0, adapter.rank), train)
    objective = Supervised(work, TrainingRun(task, tokens, tokens, train, *ADAPTER_RATES, torch.bfloat16, Path(), {}))
    optimizer = make_optimizer(objective)
    each, shares, rates = list[float](), list[float](), matrix_rates()
    for number in range(STEPS + 3):
        index, start = objective.batches.rows(number), time.perf_counter()
        step(objective, optimizer, number)
        if number > 2:
            seconds, lengths = time.perf_counter() - start, [tokens.length(row) for row in index]
            each.append(1e6 * seconds / sum(lengths))
            shares.append(sides.operations(encoder, lengths, 4, last_whole=False) / seconds / rates["bf16"])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for number in range(3, 13):
            step(objective, optimizer, number)
    parts: dict[str, float] = {}
    for event in found.key_averages(group_by_input_shape=True):
        name = group_of(event.key, event.input_shapes, adapter.rank)
        parts[name] = parts.get(name, 0.0) + event.self_cpu_time_total
    total = sum(parts.values())
    told: dict[str, Any] = {
        "microseconds_a_token": median(each),
        "share_of_bf16_rate": median(shares),
        "shares": {name: value / total for name, value in sorted(parts.items(), key=lambda one: -one[1])},
    }
    scores = torch.randn(384, 27, 27).bfloat16()
    x, w = torch.randn(640, 384).bfloat16(), torch.randn(1152, 384).bfloat16()
    told["milliseconds"] = {
        "softmax of 384 blocks of 27 x 27 in bf16": milliseconds(lambda: scores.softmax(-1)),
        "the same in float32 and back": milliseconds(lambda: scores.float().softmax(-1).bfloat16()),
        "q, k and v as one product": milliseconds(lambda: x @ w.T),
        "q, k and v apart": milliseconds(lambda: [x @ part.T for part in w.split(384)]),
    }
    print(f"{told['microseconds_a_token']:.0f} microseconds a token, {told['share_of_bf16_rate']:.0%} of the bf16 rate")
    for name, share in told["shares"].items():
        print(f"{share:5.0%}  {name}")
    for name, value in told["milliseconds"].items():
        print(f"{value:.2f} ms  {name}")
    write_result("step", {**provenance(), "rate": rates, **told})


if __name__ == "__main__":
    typer.run(main)
