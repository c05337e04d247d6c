"""Train two adapters, combine them in three ways, and compare the results: the main workflow in Python.

Usage: python examples/compose.py [BASE] [FOLDER]
"""

import sys
from pathlib import Path

import mergekit_bert as mb


def main(base: str, folder: Path) -> None:
    encoder = mb.load_encoder(base)
    files = []
    for task in ("sst", "sts"):
        file = folder / "adapters" / f"{task}.safetensors"
        mb.train_adapter(task, "sample", file, base=encoder, train=mb.TrainConfig(epochs=1), resume=True, progress=True)
        mb.evaluate(file, "sample", base=encoder)
        files.append(file)
    for method in ("fedavg", "orthoada", "ensemble"):
        out = folder / f"{method}.safetensors"
        mb.save(mb.merge(files, method), out, force=True)
        evaluation = mb.evaluate(out, "sample", base=encoder)
        figures = ", ".join(f"{score.task} {score.metric} {score.value:.3f}" for score in evaluation.scores)
        print(f"{method}: {figures}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "minilm", Path(sys.argv[2] if len(sys.argv) > 2 else "compose"))
