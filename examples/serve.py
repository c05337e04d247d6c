"""Answer requests for several tasks from several threads: an ensemble of the shipped adapters.

Usage: python examples/serve.py [FOLDER WITH ADAPTERS]
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mergekit_bert as mb

SHIPPED = Path(__file__).parent.parent / "adapters"
REQUESTS: list[tuple[str, list[str | tuple[str, str]]]] = [
    ("sst", ["A warm, funny, engaging film.", "A lifeless mess from start to finish."]),
    ("para", [("How do I learn to swim?", "What is the best way to learn swimming?")]),
    ("sts", [("A man plays a guitar.", "Someone is playing an instrument."), ("A dog runs.", "Stocks fell.")]),
]


def main(folder: Path) -> None:
    files = [folder / f"{task}.safetensors" for task, _ in REQUESTS]
    predictor = mb.predictor(mb.merge(files, "ensemble"))
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda request: predictor.predict(*request), REQUESTS)
    for (task, texts), answered in zip(REQUESTS, answers, strict=True):
        for text, answer in zip(texts, answered, strict=True):
            print(f"{task}: {text} -> {answer.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED)
