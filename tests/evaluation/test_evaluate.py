"""Evaluating files: figures are recorded beside them, and references count only where everything matches."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, DataError, MbertWarning, ModelFileError
from mergekit_bert.evaluation.evaluate import Evaluation
from mergekit_bert.evaluation.records import find_records, read_record, record_path
from mergekit_bert.training.config import TrainConfig
from tests.adapters.helpers import as_format_1
from tests.corpus import read_tsv, write_corpus

TASKS = ("sst", "sts")
QUICK = TrainConfig(epochs=1, batch_size=8, hold_out=0.2, precision="fp32", lr=0.01)


@dataclass(frozen=True)
class World:
    """A folder as a user has it: corpus/, adapters/, models/, merged.safetensors, all of one base."""

    folder: Path
    encoder: Encoder

    def evaluate(self, name: str, data: str = "corpus", **options: Any) -> Evaluation:
        return mb.evaluate(self.folder / name, self.folder / data, base=self.encoder, **options)


@pytest.fixture(scope="module")
def made(bert: Encoder, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_corpus(folder / "corpus", TASKS)
    for task in TASKS:
        for kind, name in (("lora", task), ("probe", f"{task}.probe")):
            mb.train_adapter(
                task,
                folder / "corpus",
                folder / f"adapters/{name}.safetensors",
                base=bert,
                type=kind,
                adapter=AdapterConfig(rank=2) if kind == "lora" else None,
                train=QUICK,
            )
        mb.finetune(task, folder / "corpus", folder / "models" / task, base=bert, train=QUICK)
    files = [folder / f"adapters/{task}.safetensors" for task in TASKS]
    mb.save(mb.merge(files, "fedavg"), folder / "merged.safetensors")
    mb.save(mb.merge(files, "ensemble"), folder / "routed.safetensors")
    return World(folder, bert)


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of that folder, to do with as a test likes; nothing is measured yet."""
    shutil.copytree(made.folder, tmp_path / "world")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return World(tmp_path / "world", made.encoder)


REFERENCES = {"adapter": "adapters/{}.safetensors", "probe": "adapters/{}.probe.safetensors", "full": "models/{}"}


def measure_references(world: World, roles: Sequence[str] = tuple(REFERENCES)) -> dict[tuple[str, str, str], float]:
    found = {}
    for role in roles:
        for task in TASKS:
            for score in world.evaluate(REFERENCES[role].format(task)).scores:
                found[role, score.task, score.metric] = score.value
    return found


def shown(evaluation: Evaluation) -> dict[tuple[str, str, str], float | None]:
    return {
        (role, line.score.task, line.score.metric): line.references[role]
        for line in evaluation.comparison.lines
        for role in REFERENCES
    }


def test_without_records_every_reference_is_missing_and_the_commands_are_named(world: World) -> None:
    comparison = world.evaluate("merged.safetensors").comparison
    assert set(shown(world.evaluate("merged.safetensors")).values()) == {None}
    told = " | ".join(comparison.missing)
    for task in TASKS:
        assert f"mbert eval adapters/{task}.safetensors" in told
        assert f"mbert train-adapter --type probe --task {task}" in told
        assert f"mbert finetune --task {task}" in told
    assert len(comparison.missing) == 6
    rest = f"--data {world.folder / 'corpus'} --base {world.encoder.name}"
    assert all(command.endswith(rest) for command in comparison.missing)


def test_the_figures_of_a_file_of_format_1_are_found_too(world: World) -> None:
    for task in TASKS:
        as_format_1(world.folder / f"adapters/{task}.safetensors")
    found = measure_references(world, ["adapter"])
    assert found
    evaluation = world.evaluate("merged.safetensors")
    assert {key: value for key, value in shown(evaluation).items() if key[0] == "adapter"} == found


def test_the_commands_for_what_is_missing_name_a_task_as_the_caller_did(world: World) -> None:
    path = world.folder / "my task.yml"
    path.write_text(
        "name: sst\nkind: classify\ntext: sentence\nlabels: ['0', '1', '2', '3', '4']\nmetric: accuracy\n"
        f"files: {{dev: {world.folder / 'corpus/sst/dev.tsv'}}}\n"
    )
    found = mb.evaluate(world.folder / "merged.safetensors", base=world.encoder, tasks=[path]).comparison.missing
    assert found[1] == f"mbert train-adapter --type probe --task '{path}' --base {world.encoder.name}"


def test_figures_that_cannot_be_recorded_are_shown_all_the_same(world: World) -> None:
    path = world.folder / "merged.safetensors"
    record_path(path).mkdir()
    with pytest.warns(MbertWarning, match=r"the scores are not recorded: \S+merged.scores.json: it is a folder"):
        evaluation = world.evaluate("merged.safetensors")
    assert {score.task for score in evaluation.scores} == set(TASKS)


def test_references_are_found_where_all_matches(world: World) -> None:
    expected = measure_references(world)
    assert len(expected) == 3 * 4
    for name in ("merged.safetensors", "routed.safetensors"):
        evaluation = world.evaluate(name)
        assert shown(evaluation) == expected
        assert evaluation.comparison.missing == ()
    assert evaluation.comparison.to_json()["scores"][0]["retention_adapter"] == pytest.approx(100)


def test_an_adapter_is_its_own_reference(world: World) -> None:
    comparison = world.evaluate("adapters/sst.safetensors").comparison
    assert all(line.references["adapter"] == line.score.value for line in comparison.lines)
    assert comparison.grid().overall("adapter") == comparison.lines[0].score.value


def other_rows(world: World) -> None:
    write_corpus(world.folder / "corpus", TASKS, dev=20)


def another_file(world: World) -> None:
    """Adapters trained anew: the recorded ones are not those of the merge any more."""
    for task in TASKS:
        path = world.folder / f"adapters/{task}.safetensors"
        train = TrainConfig(epochs=1, batch_size=8, hold_out=0.2, precision="fp32", seed=3)
        mb.train_adapter(
            task,
            world.folder / "corpus",
            path,
            base=world.encoder,
            adapter=AdapterConfig(rank=2),
            train=train,
            force=True,
        )
        world.evaluate(f"adapters/{task}.safetensors")


def changed(key: str, value: Any) -> Callable[[World], None]:
    def change(world: World) -> None:
        for path in world.folder.glob("*/*.scores.json"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps(record | {key: value}))

    return change


def broken(world: World) -> None:
    for path in world.folder.glob("*/*.scores.json"):
        path.write_text(path.read_text()[:-20])


def changed_model(world: World) -> None:
    """The model files are others now; their records are out of date."""
    for path in [*world.folder.glob("adapters/*.safetensors"), *world.folder.glob("models/*/model.safetensors")]:
        path.write_bytes(path.read_bytes() + b" ")


FAULTS: dict[str, tuple[Callable[[World], None], set[str]]] = {
    "other rows": (other_rows, {"adapter", "probe", "full"}),
    "other adapters": (another_file, {"adapter"}),
    "another base": (changed("base", "0" * 64), {"adapter", "probe", "full"}),
    "another version": (changed("format", 99), {"adapter", "probe", "full"}),
    "no scores": (changed("scores", []), {"adapter", "probe", "full"}),
    "odd scores": (changed("scores", [{"task": "sst"}]), {"adapter", "probe", "full"}),
    "broken": (broken, {"adapter", "probe", "full"}),
    "models changed": (changed_model, {"adapter", "probe", "full"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_that_does_not_match_is_not_used(world: World, fault: str) -> None:
    expected = measure_references(world)
    change, gone = FAULTS[fault]
    change(world)
    found = shown(world.evaluate("merged.safetensors"))
    for (role, task, metric), value in found.items():
        if role in gone:
            assert value is None, (role, task, metric)
        else:
            assert value == expected[role, task, metric]


def test_a_record_whose_model_is_gone_still_counts(world: World) -> None:
    expected = measure_references(world, ["full"])
    for task in TASKS:
        shutil.rmtree(world.folder / "models" / task)
    found = shown(world.evaluate("merged.safetensors"))
    assert {key: value for key, value in found.items() if key[0] == "full"} == expected


def test_references_lie_beside_the_model_or_where_the_command_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure_references(world)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(world.folder / "merged.safetensors", elsewhere / "merged.safetensors")

    def found() -> dict[tuple[str, str, str], float | None]:
        path = elsewhere / "merged.safetensors"
        return shown(mb.evaluate(path, world.folder / "corpus", base=world.encoder))

    assert set(found().values()) == {None}
    monkeypatch.chdir(world.folder)
    assert found() == expected


def test_figures_on_other_rows_add_to_the_record(world: World) -> None:
    path = world.folder / "merged.safetensors"
    first = world.evaluate("merged.safetensors").scores
    write_corpus(world.folder / "corpus2", TASKS, dev=20)
    second = world.evaluate("merged.safetensors", "corpus2").scores
    record = read_record(record_path(path))
    assert record is not None
    assert set(record.scores) == {*first, *second}
    assert len(record.scores) == 8
    world.evaluate("merged.safetensors")
    again = read_record(record_path(path))
    assert again is not None
    assert again.scores == record.scores
    assert record.role == "fedavg"


def test_a_record_of_another_file_is_begun_anew(world: World) -> None:
    path = world.folder / "merged.safetensors"
    world.evaluate("merged.safetensors")
    files = [world.folder / f"adapters/{task}.safetensors" for task in TASKS]
    mb.save(mb.merge(files, "fedavg", {"sst": 2.0}), path, force=True)
    assert read_record(record_path(path)) is None
    write_corpus(world.folder / "corpus2", TASKS, dev=20)
    fresh = world.evaluate("merged.safetensors", "corpus2").scores
    record = read_record(record_path(path))
    assert record is not None
    assert set(record.scores) == set(fresh)


def test_records_are_found_once_however_often_a_folder_is_named(world: World) -> None:
    world.evaluate("adapters/sst.safetensors")
    folder = world.folder / "adapters"
    assert len(find_records([folder, folder, folder / ".." / "adapters", world.folder / "none"])) == 1


@pytest.mark.parametrize("name", ["merged.safetensors", "routed.safetensors", "models/sts", "adapters/sst.safetensors"])
def test_the_table_can_be_computed_from_the_written_predictions(world: World, name: str) -> None:
    folder = world.folder / "predictions"
    comparison = world.evaluate(name, predictions=folder).comparison
    main = {
        line.score.task: line.score
        for line in comparison.lines
        if (line.score.task, line.score.metric) in comparison.main
    }
    assert {path.stem for path in folder.iterdir()} == set(main)
    for task, score in main.items():
        rows = read_tsv(folder / f"{task}.tsv")
        given = read_tsv(world.folder / f"corpus/{task}/dev.tsv")
        assert len(rows) == score.n == len(given)
        if task == "sst":
            assert [row["label"] for row in rows] == [row["label"] for row in given]
            assert score.value == pytest.approx(np.mean([row["label"] == row["prediction"] for row in rows]))
        else:
            columns = [np.array([row[key] for row in rows], dtype=np.float32) for key in ("label", "output")]
            assert columns[0] == pytest.approx([float(row["label"]) for row in given])
            assert score.value == pytest.approx(np.corrcoef(*np.float64(columns))[0, 1])


def test_single_tasks_can_be_asked_for(world: World) -> None:
    comparison = world.evaluate("merged.safetensors", tasks=["sts"]).comparison
    assert [line.score.task for line in comparison.lines] == ["sts", "sts"]
    with pytest.raises(CompositionError, match=r"`task`: 'para'; expected one of sst, sts"):
        world.evaluate("merged.safetensors", tasks=["para"])


def test_rows_of_every_task_are_read_before_any_work(world: World) -> None:
    (world.folder / "corpus/sts/dev.tsv").unlink()
    with pytest.raises(DataError, match="no file for the split 'dev'"):
        world.evaluate("merged.safetensors", predictions=world.folder / "predictions")
    assert not (world.folder / "predictions").exists()
    assert not (world.folder / "merged.scores.json").exists()


def test_another_base_is_refused(world: World, encoders: dict[str, Encoder]) -> None:
    with pytest.raises(ModelFileError, match="made for base"):
        mb.evaluate(world.folder / "merged.safetensors", world.folder / "corpus", base=encoders["electra"])


def test_a_model_in_memory_is_scored_and_nothing_is_written(world: World) -> None:
    before = sorted(world.folder.rglob("*"))
    found = mb.evaluate(
        mb.load(world.folder / "merged.safetensors"), world.folder / "corpus", base=world.encoder
    ).scores
    assert sorted(world.folder.rglob("*")) == before
    assert found == world.evaluate("merged.safetensors").scores
