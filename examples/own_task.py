"""Train, score and predict for a task of your own, defined by a short YAML file and two TSV files.

Usage: python examples/own_task.py [BASE] [FOLDER]
"""

import csv
import itertools
import sys
from pathlib import Path

import mergekit_bert as mb

HERE = Path(__file__).parent


def write_rows(folder: Path) -> None:
    """Write weather/train.tsv and weather/dev.tsv; your own data would come from elsewhere."""
    subjects = ("the rain", "the wind", "the fog", "the snow", "the sun", "the storm", "the frost", "the heat")
    places = ("in the north", "on the coast", "over the hills", "in town", "near the river")
    rows = []
    for subject, place in itertools.product(subjects, places):
        rows += [(f"will {subject} stay {place} ?", "question"), (f"{subject} will stay {place} .", "statement")]
    for split, part in (("train", rows[:64]), ("dev", rows[64:])):
        path = folder / "weather" / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerows([("remark", "kind"), *part])


def main(base: str, folder: Path) -> None:
    write_rows(folder / "data")
    task = mb.get_task(HERE / "own_task.yml")
    file = folder / "weather.safetensors"
    train = mb.TrainConfig(epochs=3, batch_size=8, hold_out=0.2)
    mb.train_adapter(task, folder / "data", file, base=base, train=train, resume=True, progress=True)
    for score in mb.evaluate(file, folder / "data", base=base).scores:
        print(f"{score.metric} {score.value:.3f} ({score.ci_low:.3f} to {score.ci_high:.3f}, {score.n} rows)")
    texts = ["will the hail stop ?", "the hail will stop ."]
    for text, answer in zip(texts, mb.predictor(file, base=base).predict("weather", texts), strict=True):
        print(f"{text} -> {answer.name} ({answer.value:.2f})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "minilm", Path(sys.argv[2] if len(sys.argv) > 2 else "own_task"))
