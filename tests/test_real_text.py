"""What only real text can show. Needs the folder named by MBERT_DATA (sst/, cfimdb/, para/, sts/)."""

from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.data.task import TASKS
from mergekit_bert.evaluation.records import read_record

ADAPTERS = Path(__file__).parent.parent / "adapters"


@pytest.mark.parametrize("name", TASKS.names())
@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_line_is_read(real_data: Path, name: str, split: str) -> None:
    task = mb.get_task(name)
    rows = mb.load_rows(task, split, real_data)
    lines = (real_data / name / f"{split}.tsv").read_text(encoding="utf-8")
    assert len(rows) > 100
    assert len(rows) <= lines.count("\n")
    assert rows.labels is not None
    assert len(set(rows.labels)) >= len(task.labels)


def test_shipped_adapter_scores_what_its_record_says(real_data: Path, tmp_path: Path) -> None:
    record = read_record(ADAPTERS / "sts.scores.json")
    assert record is not None
    known = {(score.metric, score.data): score.value for score in record.scores}
    for score in mb.evaluate(mb.load(ADAPTERS / "sts.safetensors"), real_data).scores:
        assert score.value == pytest.approx(known[score.metric, score.data], abs=1e-4)


def test_adapters_learn_and_compose(real_data: Path, tmp_path: Path) -> None:
    encoder = mb.load_encoder("minilm")
    folder = tmp_path / "data" / "sts"
    folder.mkdir(parents=True)
    for split, count in (("train", 640), ("dev", 200)):
        lines = (real_data / "sts" / f"{split}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.tsv").write_text("".join(lines[: count + 1]), encoding="utf-8")
    file = tmp_path / "sts.safetensors"
    mb.train_adapter("sts", tmp_path / "data", file, base=encoder, train=mb.TrainConfig(epochs=2, lr=3e-3))
    alone = mb.evaluate(file, tmp_path / "data", base=encoder).scores[0]
    assert alone.ci_low > 0
    both = mb.merge([file, ADAPTERS / "para.safetensors"], "ensemble")
    routed = mb.evaluate(both, tmp_path / "data", base=encoder, tasks=["sts"]).scores[0]
    assert routed.value == pytest.approx(alone.value, abs=1e-6)
