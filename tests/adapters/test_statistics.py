"""Statistics: against autograd row by row in float64, in the file, through training, and strictly read."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.adapters.statistics import Fisher, Gram
from mergekit_bert.composing.merge_input import of_adapter
from mergekit_bert.composing.merging import kept_inputs, merge
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import linear_layers, of_the_head
from mergekit_bert.errors import MbertError, ModelFileError, TrainingError, UnknownNameError
from mergekit_bert.evaluation.describe import describe, description_tables
from mergekit_bert.files import file_fingerprint
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.hardware import generator
from mergekit_bert.models.composition import Ensemble
from mergekit_bert.training import run
from mergekit_bert.training.manifest import Control, run_folder
from tests.adapters.helpers import edit_metadata, edit_tensors, quick, random_adapter, same_adapter, try_odd_values
from tests.tiny import DISTINCT, tiny_rows

EMBEDDED = sorted((Path(mb.__file__).parents[1] / "adapters").glob("*.safetensors"))
SITE = "encoder.layer.0.attention.self.query"
KINDS = ("gram", "fisher")


def measure(encoder: Encoder, adapter: Adapter, kind: str, rows: int = 7, seed: int = 0) -> Mapping[str, Any]:
    return collect(kind, encoder, [adapter.part(adapter.name)], [tiny_rows(adapter.task, rows, seed)])


def measured(encoder: Encoder, adapter: Adapter) -> Adapter:
    """The adapter with both statistics."""
    return dataclasses.replace(adapter, statistics={kind: measure(encoder, adapter, kind) for kind in KINDS})


def one_by_one(encoder: Encoder, adapter: Adapter, rows: int = 7) -> tuple[Classifier, list[dict[str, Tensor]]]:
    """A float64 copy of the folded model that transformers itself runs, and every row's inputs."""
    part = adapter.part(adapter.name)
    model = copy.deepcopy(classifier(fold(encoder, part), part.task, part.head)).double()
    tokens = tokenise(tiny_rows(part.task, rows), part.task, encoder.tokenizer, part.max_length, encoder.pad_token)
    return model, [tokens.batch([row]).padded() for row in range(rows)]


def test_grams_are_means_over_every_token_that_counts(bert: mb.Encoder) -> None:
    adapter = random_adapter(bert, "para")
    model, rows = one_by_one(bert, adapter)
    seen: dict[str, list[Tensor]] = {}
    for site in linear_layers(bert):
        hook: Callable[..., None] = lambda module, x, y, site=site: seen.setdefault(site, []).append(x[0][0])  # noqa: E731
        model.encoder.get_submodule(site).register_forward_hook(hook)
    for row in rows:
        model(**row)
    found = measure(bert, adapter, "gram")
    assert found.keys() == {site for site in seen if not of_the_head(site)}
    for site, gram in found.items():
        first_alone = site.startswith("encoder.layer.1.") and ".self." not in site
        inputs = torch.cat([x[:1] if first_alone else x for x in seen[site]])
        assert gram.count == len(inputs)
        exact = inputs.T @ inputs / len(inputs)
        compact = Gram.of(exact, len(inputs))
        np.testing.assert_allclose(gram.dense(), compact.dense(), atol=1e-5 * float(exact.abs().max()))
        assert gram.lost == pytest.approx(compact.lost, abs=1e-6)
        if len(exact) <= 32:
            np.testing.assert_allclose(gram.dense(), exact, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("task", ["sst", "sts", "para"])
def test_fishers_are_squared_gradients_over_the_models_own_labels(bert: mb.Encoder, task: str) -> None:
    adapter = random_adapter(bert, task)
    model, rows = one_by_one(bert, adapter)
    found = measure(bert, adapter, "fisher")
    weights = {site: model.encoder.get_submodule(site).weight.requires_grad_() for site in found}  # type: ignore[union-attr, operator]
    exact = {site: torch.zeros_like(weight) for site, weight in weights.items()}
    for row in rows:
        outputs = model(**row)[0]
        if adapter.task.kind == "classify":
            scores, chances = list(outputs.log_softmax(0)), outputs.detach().softmax(0).tolist()
        else:  # log N(y; z, 1) has the derivative (y - z) by z, whose square is 1 on the mean
            scores, chances = [outputs[0]], [1.0]
        for score, chance in zip(scores, chances, strict=True):
            gradients = torch.autograd.grad(score, list(weights.values()), retain_graph=True)
            for site, gradient in zip(weights, gradients, strict=True):
                exact[site] += chance * gradient.square() / len(rows)
    for site, fisher in found.items():
        assert float(exact[site].max()) > 0
        scale = float(exact[site].mean())
        np.testing.assert_allclose(fisher.left, exact[site].mean(1), rtol=1e-3, atol=1e-4 * scale)
        np.testing.assert_allclose(fisher.right, exact[site].mean(0) / scale, rtol=1e-3, atol=1e-4)
        assert fisher.lost == pytest.approx(Fisher.of(exact[site], 7).lost, rel=1e-2)
        assert fisher.count == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", DISTINCT)
def test_rows_together_are_the_mean_of_rows_alone(
    encoders: dict[str, mb.Encoder], architecture: str, kind: str
) -> None:
    encoder = encoders[architecture]
    adapter = random_adapter(encoder, "para")
    rows, part = tiny_rows(adapter.task, 5), adapter.part("para")
    together = collect(kind, encoder, [part], [rows])
    alone = [collect(kind, encoder, [part], [rows.take([row])]) for row in range(5)]
    assert together.keys() == {site for site in linear_layers(encoder) if not of_the_head(site)}
    for site, one in together.items():
        counts = [own[site].count for own in alone]
        assert one.count == sum(counts) > 0
        if isinstance(one, Gram):
            trace = sum(float(own[site].dense().trace()) * n for own, n in zip(alone, counts, strict=True))
            assert float(one.dense().trace()) == pytest.approx(trace / sum(counts), rel=1e-4)
            wide = one.shape[0] <= one.shape[1]
            exact = sum(n * own[site].dense() for own, n in zip(alone, counts, strict=True)) / sum(counts)
            assert not wide or float((one.dense() - exact).abs().max()) < 1e-4 * float(exact.abs().max())
        else:
            left = sum(own[site].left for own in alone) / 5
            np.testing.assert_allclose(one.left, left, rtol=1e-3, atol=1e-5 * float(left.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_not_read_and_the_encoder_is_left_alone(bert: mb.Encoder, kind: str) -> None:
    adapter = random_adapter(bert, "sts")
    rows, part = tiny_rows(adapter.task, 20), adapter.part("sts")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bert.model.modules()]
    values = {name: value.clone() for name, value in bert.model.state_dict().items()}
    one = collect(kind, bert, [part], [rows])
    two = collect(kind, bert, [part], [dataclasses.replace(rows, labels=None)])
    assert all(torch.equal(one[site].dense(), two[site].dense()) for site in one)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bert.model.modules()]
    assert all(torch.equal(value, values[name]) for name, value in bert.model.state_dict().items())
    assert not any(p.requires_grad for p in bert.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_several_parts_count_by_what_they_saw(bert: mb.Encoder, kind: str) -> None:
    adapters = [random_adapter(bert, "sst", targets=SITE), random_adapter(bert, "sts", start=3, targets="qv")]
    rows = [tiny_rows(one.task, count) for one, count in zip(adapters, (3, 8), strict=True)]
    parts = [one.part(one.name) for one in adapters]
    together = collect(kind, bert, parts, rows)
    one, two = (collect(kind, bert, [part], [own]) for part, own in zip(parts, rows, strict=True))
    for site, found in together.items():
        assert found.count == one[site].count + two[site].count
        share = one[site].count / found.count
        if isinstance(found, Fisher):
            mixed = share * one[site].left + (1 - share) * two[site].left
            np.testing.assert_allclose(found.left, mixed, rtol=1e-4)
        else:
            diagonals = [own[site].dense().diagonal() for own in (together, one, two)]
            np.testing.assert_allclose(diagonals[0], share * diagonals[1] + (1 - share) * diagonals[2], rtol=1e-4)


@settings(quick, max_examples=30)
@given(width=st.integers(1, 12), rank=st.integers(1, 12), inputs=st.integers(0, 15), seed=st.integers(0, 99))
def test_a_compact_gram_keeps_the_diagonal_and_tells_its_loss(width: int, rank: int, inputs: int, seed: int) -> None:
    x = torch.randn(inputs, width, generator=generator(seed), dtype=torch.float64)
    exact = x.T @ x
    gram = Gram.of(exact, inputs, rank)
    dense, scale = gram.dense(), max(1.0, float(exact.abs().max()))
    np.testing.assert_allclose(dense.diagonal(), exact.diagonal(), atol=1e-5 * scale)
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-5 * scale
    energy = float(exact.square().sum())
    assert gram.lost == pytest.approx(float((dense - exact).square().sum()) / energy if energy else 0.0, abs=1e-6)
    if rank >= min(width, inputs):
        assert gram.lost < 1e-12
    assert gram.factor.shape == (width, min(width, rank))


@settings(quick, max_examples=30)
@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 99), zeros=st.floats(0, 1))
def test_a_compact_fisher_keeps_row_and_column_means(shape: tuple[int, int], seed: int, zeros: float) -> None:
    source = generator(seed)
    exact = torch.rand(shape, generator=source, dtype=torch.float64)
    exact *= torch.rand(shape, generator=source) >= zeros
    dense = Fisher.of(exact, 1).dense()
    np.testing.assert_allclose(dense.mean(0), exact.mean(0), atol=1e-6)
    np.testing.assert_allclose(dense.mean(1), exact.mean(1), atol=1e-6)
    energy = float(exact.square().sum())
    lost = float((dense - exact).square().sum()) / energy if energy else 0.0
    assert Fisher.of(exact, 1).lost == pytest.approx(lost, abs=1e-5)
    assert Fisher.of(dense, 1).lost < 1e-10, "what is of rank one already is kept"


def test_they_come_back_from_the_file_bit_for_bit(bert: mb.Encoder, tmp_path: Path) -> None:
    one = measured(bert, random_adapter(bert, "sst", targets="qv"))
    write_adapter(tmp_path / "x.safetensors", one)
    two = read_adapter(tmp_path / "x.safetensors")
    assert same_adapter(one, two)
    assert two.statistics.keys() == set(KINDS)
    for kind, found in one.statistics.items():
        assert found.keys() == two.statistics[kind].keys()
        for site, statistic in found.items():
            assert torch.equal(statistic.dense(), two.statistics[kind][site].dense())
            assert (statistic.count, statistic.lost) == (
                two.statistics[kind][site].count,
                two.statistics[kind][site].lost,
            )
    assert two.sha256() == file_fingerprint(tmp_path / "x.safetensors")
    assert "statistics" not in two.provenance()


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: path.stem)
def test_a_file_without_them_keeps_its_bytes(path: Path) -> None:
    found = read_adapter(path)
    assert found.statistics == {}
    assert "statistics" not in found.pack()[1]
    assert found.sha256() == file_fingerprint(path)


def test_models_that_keep_adapters_keep_them_whole(bert: mb.Encoder, tmp_path: Path) -> None:
    adapters = [measured(bert, random_adapter(bert, task, start=3 * n)) for n, task in enumerate(("sst", "sts"))]
    merged = merge(adapters, Recipe("regmean"))
    assert isinstance(merged, mb.Merged)
    models = (
        merged.keeping(kept_inputs([of_adapter(one) for one in adapters])),
        Ensemble({one.name: one for one in adapters}),
    )
    for model in models:
        write_model(tmp_path / "x.safetensors", model)
        again = read_model(tmp_path / "x.safetensors")
        assert isinstance(again, mb.Merged | Ensemble)
        kept = again.kept if isinstance(again, mb.Merged) else again.experts
        assert all(same_adapter(kept[one.name], one) for one in adapters)


def stats(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit_metadata(lambda m: change(m["adapter"]["statistics"]))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing tensor": (edit_tensors(lambda t: t.pop(f"gram.{SITE}.factor")), f"'gram.{SITE}.factor' is missing"),
    "an extra tensor": (edit_tensors(lambda t: t.update({"gram.x.factor": torch.ones(1)})), "an extra tensor"),
    "no record of them": (edit_metadata(lambda m: m["adapter"].pop("statistics")), "an extra tensor 'fisher"),
    "nothing measured": (stats(lambda s: s.clear()), "statistics: dictionary should have at least 1"),
    "a kind without sites": (
        stats(lambda s: s.update(fisher={})),
        "statistics.fisher: dictionary should have at least 1",
    ),
    "an unknown kind": (stats(lambda s: s.update(hessian=s.pop("gram"))), "broken metadata"),
    "a site left out": (
        lambda path: (
            stats(lambda s: s["fisher"].pop(SITE))(path),
            edit_tensors(lambda t: [t.pop(f"fisher.{SITE}.{name}") for name in ("left", "right")])(path),
        )[0],
        f"no fisher of {SITE}",
    ),
    "another shape": (stats(lambda s: s["gram"][SITE].update(shape=[32, 3])), r"expected \(32, 3\)"),
    "a site of another size": (
        lambda path: (
            stats(lambda s: s["fisher"][SITE].update(shape=[32, 31]))(path),
            edit_tensors(lambda t: t.update({f"fisher.{SITE}.right": torch.ones(31)}))(path),
        )[0],
        f"fisher of {SITE} does not fit",
    ),
    "a negative entry": (edit_tensors(lambda t: t[f"gram.{SITE}.diagonal"].fill_(-1)), "does not fit the site"),
    "a negative count": (stats(lambda s: s["gram"][SITE].update(count=-1)), "count: input should be greater"),
    "an extra number": (stats(lambda s: s["gram"][SITE].update(mean=1)), "mean: extra inputs are not permitted"),
    "float64": (
        edit_tensors(lambda t: t.update({f"gram.{SITE}.diagonal": t[f"gram.{SITE}.diagonal"].double()})),
        "torch.float64",
    ),
}


@pytest.fixture(scope="module")
def whole(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    write_adapter(path, measured(bert, random_adapter(bert, "sst", targets="qv")))
    return path.read_bytes()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_statistics_are_refused(whole: bytes, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    read_adapter(path)
    change(path)
    with pytest.raises(ModelFileError, match=message):
        read_adapter(path)


def test_no_odd_value_is_a_traceback(bert: mb.Encoder, tmp_path: Path) -> None:
    one = measured(bert, random_adapter(bert, "para", targets=SITE))
    few = {kind: {SITE: found[SITE]} for kind, found in one.statistics.items()}
    write_adapter(tmp_path / "x.safetensors", dataclasses.replace(one, statistics=few))
    try_odd_values(tmp_path / "x.safetensors")


def trained(bert: mb.Encoder, out: Path, kinds: tuple[str, ...] = KINDS, resume: bool = False) -> Adapter:
    task = get_task("sst")
    config, control = train_config(), Control(show=False, resume=resume)
    rows = tiny_rows(task, 30)
    return run.train_adapter(bert, task, rows, out, "lora", mb.AdapterConfig(rank=2), config, control, kinds)


def train_config() -> mb.TrainConfig:
    return mb.TrainConfig(epochs=1, batch_size=8, hold_out=0.2, lr=0.01, precision="fp32", checkpoint_seconds=0.0)


def test_training_puts_them_into_the_file(bert: mb.Encoder, tmp_path: Path) -> None:
    found = trained(bert, tmp_path / "a" / "sst.safetensors", ("fisher", "gram", "gram"))
    assert list(found.statistics) == ["fisher", "gram"]
    rows = tiny_rows(found.task, 30)
    for kind in KINDS:
        exact = collect(kind, bert, [found.part("sst")], [rows])
        assert all(torch.equal(exact[site].dense(), one.dense()) for site, one in found.statistics[kind].items())
    assert same_adapter(read_adapter(tmp_path / "a" / "sst.safetensors"), found)
    plain = trained(bert, tmp_path / "b" / "sst.safetensors", ())
    assert plain.statistics == {}
    assert same_adapter(dataclasses.replace(found, statistics={}), plain)


def test_a_run_cut_short_while_measuring_ends_in_the_same_bytes(
    bert: mb.Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole" / "sst.safetensors", tmp_path / "cut" / "sst.safetensors"
    trained(bert, whole)

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(bert, cut)
    assert not cut.exists()
    with pytest.raises(TrainingError, match=r"statistics was \['fisher', 'gram'\], now \['gram'\]"):
        trained(bert, cut, ("gram",), resume=True)
    trained(bert, cut, resume=True)
    assert cut.read_bytes() == whole.read_bytes()
    assert not [path for path in run_folder(cut).iterdir() if "checkpoint" in path.name]


def test_an_unknown_statistic_is_told_before_any_work(bert: mb.Encoder, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"statistic: 'grams'; expected one of gram, fisher; did you mean 'gram'"
    ):
        trained(bert, tmp_path / "sst.safetensors", ("grams",))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MbertError, match="statistic"):
        collect("grams", bert, [], [])


def test_a_description_tells_them_and_what_was_lost(bert: mb.Encoder, tmp_path: Path) -> None:
    one = measured(bert, random_adapter(bert, "sst", targets="qv"))
    write_adapter(tmp_path / "x.safetensors", one)
    told = describe(tmp_path / "x.safetensors")
    assert told["statistics"]["fisher"][SITE]["lost"] == one.statistics["fisher"][SITE].lost
    cells = [list(column.cells) for column in description_tables(told)[0].columns]
    lost = max(found.lost for found in one.statistics["fisher"].values())
    line = str(cells[1][cells[0].index("fisher")])
    assert f"of 12 sites; the stored form loses at most {lost:.1%} of the energy" in line
    write_adapter(tmp_path / "y.safetensors", dataclasses.replace(one, statistics={}))
    assert describe(tmp_path / "y.safetensors")["statistics"] == {}
    description_tables(describe(tmp_path / "y.safetensors"))


def test_merges_need_no_rows_where_they_are_there_and_others_do_not_see_them(bert: mb.Encoder) -> None:
    adapters = [random_adapter(bert, "sst", targets="qv"), random_adapter(bert, "sts", start=3, targets=SITE)]
    rich = [measured(bert, one) for one in adapters]
    for method in ("regmean", "fisher"):
        model = merge(rich, Recipe(method))
        assert isinstance(model, mb.Merged)
        assert model.deltas.keys() == adapters[0].deltas().keys()
    for method in ("ties", "tsv"):
        plain, other = (merge(some, Recipe(method)) for some in (adapters, rich))
        assert isinstance(plain, mb.Merged)
        assert isinstance(other, mb.Merged)
        assert all(torch.equal(plain.deltas[site].dense(), other.deltas[site].dense()) for site in plain.deltas)
