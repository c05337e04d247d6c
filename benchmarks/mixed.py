"""Batches in which rows of many adapters meet, beside one folded adapter and PEFT's ``adapter_names``.

Usage: python -m benchmarks.mixed --data DIR [--quick]

The adapters are random, of the default rank and sites. PEFT runs the encoder alone (it cannot route heads), which
leaves it less to do. Both sides get tokenised rows and are compared first.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import provenance, write_result

_CAPTURE: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


def memory_of_one(encoder: Any, trained: Any, count: int = 64) -> float:
    """Resident bytes that a further adapter costs in a mixture, by the operating system's count."""
    import mergekit_bert as mb

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def copies() -> list[Any]:
        return [
            dataclasses.replace(
                trained,
                task=dataclasses.replace(trained.task, name=f"t{number}"),
                tensors={site: {k: v.clone() for k, v in one.items()} for site, one in trained.tensors.items()},
            )
            for number in range(count)
        ]

    before = resident()
    predictor = mb.predictor(mb.merge(copies(), "ensemble"), base=encoder)
    predictor.mixed([(f"t{number}", "A fine film.") for number in range(count)])
    return (resident() - before) / count


def main(
    data: Annotated[Path, typer.Option(help="Folder with sst/.")],
    repeats: Annotated[int, typer.Option()] = 7,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    memory_only: Annotated[bool, typer.Option("--memory", hidden=True)] = False,
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    import mergekit_bert as mb
    from benchmarks import sides
    from mergekit_bert.adapters.attach import fold
    from mergekit_bert.data.batches import tokenise
    from mergekit_bert.encoder.classifier import classifier
    from mergekit_bert.encoder.forward import forward_rows
    from mergekit_bert.models.routing import Mixture

    torch.set_num_threads(os.cpu_count() or 1)
    repeats = 2 if quick else repeats
    encoder, trained = mb.load_encoder("minilm"), sides.shipped_one("sst")
    if memory_only:
        print(memory_of_one(encoder, trained))
        return
    console, told = Console(width=140), list[dict[str, Any]]()
    table = Table("adapters", "rows", "way", "rows a second", "spread", "× one folded adapter")
    for count in (1, 8, 64):
        size = max(64, count)
        rows = mb.load_rows(trained.task, "dev", data).take(range(size))
        tokens = tokenise(rows, trained.task, encoder.tokenizer, 256, encoder.pad_token)
        adapters = []
        for number in range(count):
            source = torch.Generator().manual_seed(number)
            tensors = {
                site: {name: torch.randn(value.shape, generator=source) * 0.05 for name, value in one.items()}
                for site, one in trained.tensors.items()
            }
            adapters.append(dataclasses.replace(trained, tensors=tensors, basis=None))
        owners = [row % count for row in range(size)]
        parts = [one.part("sst") for one in adapters]
        mixture = Mixture(encoder, parts)
        whole = classifier(fold(encoder, parts[0]), trained.task, trained.head)
        base = sides.peer_model(trained.task).base_model
        width = mb.AdapterConfig()
        config = LoraConfig(r=width.rank, lora_alpha=int(width.alpha), target_modules="all-linear")
        peer: Any = get_peft_model(base, config, adapter_name="a0")
        for number, one in enumerate(adapters):
            if number:
                peer.add_adapter(f"a{number}", config)
            sides.load_into_peft(peer, one, f"a{number}")
        peer.eval()
        texts = [one[0] for one in rows.texts]
        padded = encoder.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")

        def folded(whole: Any = whole, tokens: Any = tokens) -> np.ndarray:
            return forward_rows(whole, tokens)

        def mixed(mixture: Any = mixture, tokens: Any = tokens, owners: Any = owners) -> np.ndarray:
            return np.stack(mixture.outputs(tokens, owners))

        def peft(peer: Any = peer, padded: Any = padded, owners: Any = owners) -> np.ndarray:
            with torch.inference_mode():
                found: np.ndarray = peer(
                    **padded, adapter_names=[f"a{owner}" for owner in owners]
                ).pooler_output.numpy()
            return found

        head = trained.head
        weight, bias = (head[f"classifier.{name}"].numpy() for name in ("weight", "bias"))
        apart = float(np.abs(peft() @ weight.T + bias - mixed()).max())
        if not apart < 1e-3:
            raise SystemExit(f"{count} adapters: the two sides differ by {apart:.2g}")
        ways: dict[str, Callable[[], np.ndarray]] = {
            "one folded adapter": folded,
            "mbert, mixed": mixed,
            "PEFT adapter_names": peft,
        }
        seconds = {name: list[float]() for name in ways}
        for number in range(repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if number:
                    seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            ratio = median(a / b for a, b in zip(seconds["one folded adapter"], times, strict=True))
            told.append({"adapters": count, "rows": size, "way": name, "seconds": times, "speed": ratio})
            rates = sorted(size / one for one in times)
            spread = f"{rates[0]:.0f} to {rates[-1]:.0f}"
            table.add_row(str(count), str(size), name, f"{size / median(times):.0f}", spread, f"{ratio:.2f}")
    console.print(table)
    for count in (8, 64):
        by_way = {one["way"]: one["seconds"] for one in told if one["adapters"] == count}
        ratio = median(a / b for a, b in zip(by_way["PEFT adapter_names"], by_way["mbert, mixed"], strict=True))
        console.print(f"{count} adapters: mbert is {ratio:.1f} × as fast as PEFT's adapter_names")
        told.append({"adapters": count, "way": "PEFT / mbert", "ratio": ratio})
    ran = subprocess.run([sys.executable, "-m", "benchmarks.mixed", "--data", str(data), "--memory"], **_CAPTURE)
    memory = float(ran.stdout.splitlines()[-1])
    size = (Path(__file__).parent.parent / "adapters" / "sst.safetensors").stat().st_size
    factors = sum(value.nbytes for one in trained.tensors.values() for value in one.values())
    console.print(
        f"a further adapter takes {memory / 2**20:.2f} MiB of memory: {memory / factors:.2f} × its factors, "
        f"{memory / size:.2f} × its file (which holds B and the numbers of A's rows)"
    )
    write_result(
        "mixed_quick" if quick else "mixed",
        {**provenance(), "measured": told, "memory_of_one": memory, "file_bytes": size},
    )


if __name__ == "__main__":
    typer.run(main)
