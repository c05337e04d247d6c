"""Avoiding: A against numpy and scipy, orthogonal to what the others read, through training, resume and every file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.avoiding import avoiding, by_identity, quiet
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import Base
from mergekit_bert.encoder.sites import find_sites, of_the_head
from mergekit_bert.errors import BasisError, MbertError, ModelFileError, TrainingError
from mergekit_bert.evaluation.describe import describe
from mergekit_bert.files import file_fingerprint
from mergekit_bert.formats.peft_format import read_peft, write_peft
from mergekit_bert.hardware import generator
from mergekit_bert.training import loop
from mergekit_bert.training.manifest import Control, run_folder
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import quick, random_adapter, same_adapter, same_tensors
from tests.cli.command import mbert, unchanged
from tests.corpus import write_corpus
from tests.tiny import tiny_rows

SITE = "encoder.layer.0.attention.self.query"
AVOID = mb.AdapterConfig(rank=2, basis="avoid")


def known(encoder: mb.Encoder, task: str, seed: int = 0, **options: Any) -> Adapter:
    """A random adapter whose file has Gram matrices."""
    one = random_adapter(encoder, task, seed=seed, **options)
    rows = tiny_rows(one.task, 12, seed)
    return dataclasses.replace(one, statistics={"gram": collect("gram", encoder, [one.part(task)], [rows])})


@pytest.fixture(scope="module")
def others(bert: mb.Encoder) -> list[Adapter]:
    """One with a frozen basis, and one that trained its A."""
    return [known(bert, "sst", start=4), known(bert, "para", seed=1, basis="random", targets="attention")]


def energy_of(others: Sequence[Adapter], site: str) -> np.ndarray:
    grams = [one.statistics["gram"][site].dense().numpy() for one in others]
    total: np.ndarray = sum(gram / np.trace(gram) for gram in grams)
    return total


def symmetric(source: torch.Generator, width: int, rank: int) -> Tensor:
    half = torch.randn(width, rank, generator=source, dtype=torch.float64)
    return half @ half.T


def orthonormal(source: torch.Generator, count: int, width: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(width, max(count, 1), generator=source, dtype=torch.float64))[0]
    return q.T[:count]


@quick
@given(st.integers(0, 50), st.integers(6, 20), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_rows_span_the_smallest_eigenspace_of_what_is_free(
    seed: int, width: int, rank: int, count: int, flat: bool
) -> None:
    """Against scipy in coordinates of the free subspace; ``flat``: most energies are 0, and any of these will do."""
    source = generator(seed)
    energy = symmetric(source, width, 2 if flat else width + 3)
    energy /= energy.trace()
    taken, reference = orthonormal(source, count, width), orthonormal(source, rank, width)
    rows = quiet(energy, taken, reference).numpy()
    np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(rows @ taken.numpy().T, 0, atol=1e-10)
    free = linalg.null_space(taken.numpy()) if count else np.eye(width)
    values, vectors = linalg.eigh(free.T @ energy.numpy() @ free)
    found = np.trace(rows @ energy.numpy() @ rows.T)
    assert found == pytest.approx(values[:rank].sum(), abs=1e-9)
    if values[rank] - values[rank - 1] > 1e-6:
        least = free @ vectors[:, :rank]
        np.testing.assert_allclose(rows.T @ rows, least @ least.T, atol=1e-3)


def test_rows_do_not_depend_on_the_signs_and_order_of_eigenvectors() -> None:
    source = generator(5)
    energy, reference = symmetric(source, 16, 20), orthonormal(source, 3, 16)
    vectors = linalg.eigh(energy.numpy())[1][:, :3]
    turned = vectors @ orthonormal(source, 3, 3).numpy()
    rotation = linalg.orthogonal_procrustes(turned, reference.numpy().T)[0]
    np.testing.assert_allclose(quiet(energy, torch.zeros(0, 16).double(), reference), (turned @ rotation).T, atol=1e-7)


def test_where_all_directions_are_alike_the_reference_decides() -> None:
    reference = orthonormal(generator(1), 4, 12)
    unit = torch.eye(12, dtype=torch.float64)
    for energy in (0 * unit, unit / 12):
        np.testing.assert_allclose(quiet(energy, unit[:0], reference), reference, atol=1e-6)
        free = quiet(energy, unit[:5], reference)
        nearest = reference.clone()
        nearest[:, :5] = 0
        projector = np.linalg.pinv(nearest.numpy()) @ nearest.numpy()
        np.testing.assert_allclose(free.T @ free, projector, atol=1e-5)


def test_every_site_has_what_the_others_use_least(bert: mb.Encoder, others: list[Adapter]) -> None:
    sites, source = find_sites(bert, "all-linear"), generator(3)
    rows = avoiding(others, mb.AdapterConfig(rank=4, basis="avoid"), sites)
    deltas = [one.deltas() for one in others]
    for site, (_, width) in sites.items():
        A = rows.matrix(site, width)
        assert A.dtype == torch.float32
        np.testing.assert_allclose(A @ A.T, np.eye(4), atol=1e-6)
        read = [delta[site].dense().numpy() for delta in deltas if site in delta]
        for one in read:
            np.testing.assert_allclose(one @ A.numpy().T, 0, atol=1e-5)
        if of_the_head(site):
            continue
        energy = energy_of(others, site)
        free = linalg.null_space(np.concatenate(read), rcond=1e-5)
        assert free.shape[1] == width - 3 * len(read)
        least = np.linalg.eigvalsh(free.T @ energy @ free)[:4].sum()
        own = np.trace(A.double().numpy() @ energy @ A.double().numpy().T)
        assert own == pytest.approx(least, abs=1e-7)
        for _ in range(5):
            drawn = free @ np.linalg.qr(torch.randn(free.shape[1], 4, generator=source).numpy())[0]
            assert own <= np.trace(drawn.T @ energy @ drawn)


def test_every_task_counts_alike_and_the_order_does_not(bert: mb.Encoder, others: list[Adapter]) -> None:
    sites = find_sites(bert, SITE)
    one = avoiding(others, AVOID, sites).matrix(SITE, 32)
    gram = others[0].statistics["gram"]
    louder = {site: dataclasses.replace(g, diagonal=64 * g.diagonal, factor=8 * g.factor) for site, g in gram.items()}  # type: ignore[call-arg, union-attr]
    loud = dataclasses.replace(others[0], statistics={"gram": louder})
    torch.testing.assert_close(avoiding([loud, others[1]], AVOID, sites).matrix(SITE, 32), one)
    names = list(by_identity(others))
    assert names == list(by_identity([*reversed(others), others[0]]))
    assert names == [f"{other.name} {other.sha256()}" for other in reversed(others)]


def test_a_rank_may_differ_from_site_to_site(bert: mb.Encoder, others: list[Adapter]) -> None:
    config = mb.AdapterConfig(rank=2, basis="avoid", rank_pattern={"query": 5})
    rows = avoiding(others, config, find_sites(bert, "qv"))
    assert {len(rows.matrix(site, 32)) for site in rows.rows if "query" in site} == {5}
    assert {len(rows.matrix(site, 32)) for site in rows.rows if "value" in site} == {2}


def test_too_few_free_directions_are_told(bert: mb.Encoder, others: list[Adapter]) -> None:
    sites = find_sites(bert, SITE)
    assert len(avoiding(others, dataclasses.replace(AVOID, rank=26), sites).matrix(SITE, 32)) == 26
    for rank, message in ((27, "32 input features, of which the avoided adapters use 6; expected 27 free"), (33, "32")):
        with pytest.raises(BasisError, match=message):
            avoiding(others, dataclasses.replace(AVOID, rank=rank), sites)


def trained(
    bert: mb.Encoder,
    out: Path,
    avoid: Sequence[Adapter],
    resume: bool = False,
    adapter: mb.AdapterConfig = AVOID,
    stats: Sequence[str] = (),
    name: str = "sts",
) -> Adapter:
    task = get_task(name)
    config = mb.TrainConfig(epochs=2, batch_size=8, hold_out=0.2, lr=0.01, precision="fp32", checkpoint_seconds=0.0)
    control = Control(show=False, resume=resume)
    return train_adapter(bert, task, tiny_rows(task, 40), out, "lora", adapter, config, control, stats, avoid)


def test_training_freezes_a_and_the_file_has_it(bert: mb.Encoder, others: list[Adapter], tmp_path: Path) -> None:
    out = tmp_path / "sts.safetensors"
    made = trained(bert, out, others)
    rows = avoiding(others[::-1], AVOID, made.sites)
    for site, (_, width) in made.sites.items():
        assert torch.equal(made.tensors[site]["A"], rows.matrix(site, width))
        assert bool(made.tensors[site]["B"].any())
        norm = float(made.deltas()[site].dense().norm())
        assert norm == pytest.approx(made.config.scale * float(made.tensors[site]["B"].norm()), rel=1e-5)
    found = read_adapter(out)
    assert same_adapter(found, made)
    assert (found.config.basis, found.basis) == ("avoid", None)
    assert found.training["avoid"] == list(by_identity(others))
    assert describe(out)["parts"]["sts"]["training"]["avoid"] == list(by_identity(others))
    assert not (tmp_path / "basis.json").exists(), "it takes no rows of the basis"


def test_adapters_made_one_after_the_other_sum_without_touching_each_other(bert: mb.Encoder, tmp_path: Path) -> None:
    first = trained(bert, tmp_path / "a.safetensors", (), adapter=mb.AdapterConfig(rank=2), stats=["gram"], name="sst")
    second = trained(bert, tmp_path / "b.safetensors", [first], stats=["gram"], name="para")
    third = trained(bert, tmp_path / "c.safetensors", [first, second])
    blind = trained(bert, tmp_path / "d.safetensors", [first])
    made = [first, second, third]
    merged = merge(made, Recipe("task_arithmetic", weights={one.name: 1.0 for one in made}))
    assert isinstance(merged, mb.Merged)
    for site, delta in merged.deltas.items():
        for one in made:
            A, B = (one.tensors[site][name].double() for name in "AB")
            np.testing.assert_allclose(delta.dense().double() @ A.T, one.config.scale * B, atol=1e-6)
        collision = second.tensors[site]["A"] @ blind.tensors[site]["A"].T
        assert float(collision.norm()) > 1, "what avoids the first alone takes the second's directions"
    with pytest.raises(BasisError, match="para, sts trained without an orthogonal basis"):
        merge(made, Recipe("orthoada"))


def test_it_goes_through_peft_and_back(bert: mb.Encoder, others: list[Adapter], tmp_path: Path) -> None:
    made = trained(bert, tmp_path / "x.safetensors", others)
    write_peft(tmp_path / "peft", made, bert, False)
    again = read_peft(tmp_path / "peft", bert, None, lambda name: bert)
    assert isinstance(again, Adapter)
    assert (again.config, again.basis, again.training) == (made.config, None, made.training)
    assert all(same_tensors(again.tensors[site], values) for site, values in made.tensors.items())


def test_a_run_cut_short_ends_in_the_same_bytes_and_no_other_goes_on_with_it(
    bert: mb.Encoder, others: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    trained(bert, whole, others)
    really, count = loop.step, 0

    def step(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return really(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", step)
        with pytest.raises(KeyboardInterrupt):
            trained(bert, cut, others)
    other = known(bert, "para", seed=9, basis="random", targets="attention")
    for avoid in (others[:1], [others[0], other], [*others, other]):
        with pytest.raises(TrainingError, match=r"another run \(avoid was .*, now "):
            trained(bert, cut, avoid, resume=True)
    trained(bert, cut, [*others[::-1], others[0]], resume=True)
    assert cut.read_bytes() == whole.read_bytes()
    assert same_adapter(trained(bert, cut, others, resume=True), read_adapter(whole))
    with pytest.raises(TrainingError, match="avoid was "):
        trained(bert, cut, others[:1], resume=True)


def test_what_cannot_be_avoided_is_told_before_any_work(
    bert: mb.Encoder, others: list[Adapter], tmp_path: Path
) -> None:
    def edited(**changes: Any) -> Adapter:
        return dataclasses.replace(others[0], **changes)

    gram = others[0].statistics["gram"]
    strange = Base("other", "f" * 64, others[0].base.tokenizer_fingerprint)
    refused: list[tuple[Sequence[Adapter], mb.AdapterConfig, type[MbertError], str]] = [
        ([], AVOID, TrainingError, "`basis=avoid`: nothing to avoid; .*`avoid`"),
        (others, mb.AdapterConfig(rank=2), TrainingError, "`avoid`: `basis=orthogonal`; expected `basis=avoid`"),
        (
            [edited(statistics={})],
            AVOID,
            TrainingError,
            "avoid=sst`: no Gram.*file.*--task sst --with-stats gram",
        ),
        (
            [edited(statistics={"gram": {SITE: gram[SITE]}})],
            AVOID,
            TrainingError,
            "avoid=sst`: no Gram matrices of some sites",
        ),
        ([edited(task=get_task("sts"))], AVOID, TrainingError, "`avoid=sts`: an adapter of sts itself"),
        ([edited(base=strange)], AVOID, ModelFileError, "`avoid=sst`: made for base 'other'"),
    ]
    for avoid, config, kind, message in refused:
        with pytest.raises(kind, match=message) as caught:
            trained(bert, tmp_path / "x.safetensors", avoid, adapter=config)
        assert "\n" not in str(caught.value)
        assert not run_folder(tmp_path / "x.safetensors").exists()


def test_the_command_line_does_it_all(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", ("sst", "sts"), train=40, dev=12)
    words = ("--base", tiny_folders["bert"], "--epochs", "1", "--batch-size", "8", "--hold-out", "0.2", "--rank", "2")
    first, last = (f"adapters/{task}.safetensors" for task in ("sst", "sts"))
    assert mbert("train-adapter", "--task", "sst", *words, "--with-stats", "gram", here=tmp_path).code == 0
    avoid = ("--basis", "avoid", "--avoid", first)
    both = mbert("train-adapter", "--task", "para", "--task", "sts", *words, *avoid, here=tmp_path)
    assert (both.code, "2 tasks, which would collide" in both.err) == (1, True)
    for resume in ((), ("--resume",)):
        done = mbert("train-adapter", "--task", "sts", *words, *avoid, *resume, here=tmp_path)
        assert (done.code, f"wrote {last}" in done.out) == (0, True), done.err
    with unchanged(tmp_path):
        again = mbert("train-adapter", "--task", "sts", *words, *avoid, "--avoid", last, "--resume", here=tmp_path)
        assert (again.code, "an adapter of sts itself" in again.err) == (1, True)
        assert mbert("inspect", last, here=tmp_path).code == 0
    assert mbert("merge", first, last, "--method", "ties", here=tmp_path).code == 0
    one, two = (read_adapter(tmp_path / name) for name in (first, last))
    assert two.training["avoid"] == [f"sst {file_fingerprint(tmp_path / first)}"]
    assert all(float((one.tensors[s]["A"] @ two.tensors[s]["A"].T).abs().max()) < 1e-6 for s in one.sites)


def test_a_probe_can_be_avoided_for_its_inputs_alone(bert: mb.Encoder, tmp_path: Path) -> None:
    """Its Gram matrices are those of the encoder as it is."""
    probe = random_adapter(bert, "sst", kind="probe")
    gram = collect("gram", bert, [probe.part("sst")], [tiny_rows(probe.task, 12)])
    probe = dataclasses.replace(probe, statistics={"gram": gram})
    write_adapter(tmp_path / "probe.safetensors", probe)
    sites = find_sites(bert, SITE)
    A = avoiding([read_adapter(tmp_path / "probe.safetensors")], AVOID, sites).matrix(SITE, 32).double().numpy()
    least = np.linalg.eigvalsh(energy_of([probe], SITE))[:2].sum()
    assert np.trace(A @ energy_of([probe], SITE) @ A.T) == pytest.approx(least, abs=1e-9)


def test_the_reference_rows_are_of_no_ledger(bert: mb.Encoder) -> None:
    """Were they those of an avoided adapter, nothing free would be near any of them."""
    first = known(bert, "sst", start=0, rank=4)
    taken = BasisRows(0, 0, 4).matrix(SITE, 32)
    A = avoiding([first], dataclasses.replace(AVOID, rank=4), find_sites(bert, SITE)).matrix(SITE, 32)
    np.testing.assert_allclose(A @ taken.T, 0, atol=1e-6)
    again = avoiding([first], dataclasses.replace(AVOID, rank=4), find_sites(bert, SITE)).matrix(SITE, 32)
    assert torch.equal(A, again)
