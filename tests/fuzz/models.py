"""Model files and folders: adapters, merged models, ensembles, PEFT folders, Hugging Face folders, and bases."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.composing.merging import Input
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.classifier import fresh_classifier
from mergekit_bert.encoder.load import load_encoder
from mergekit_bert.encoder.stored import open_encoder
from mergekit_bert.evaluation.describe import describe, description_tables
from mergekit_bert.evaluation.evaluate import refuse_seen
from mergekit_bert.evaluation.tables import as_text
from mergekit_bert.formats.checkpoint import read_checkpoint
from mergekit_bert.formats.dense import write_dense
from mergekit_bert.formats.file import read_model
from mergekit_bert.formats.inputs import read_inputs
from mergekit_bert.formats.peft import open_peft
from mergekit_bert.formats.peft_format import read_peft
from mergekit_bert.formats.peft_writing import write_adapter_folder
from mergekit_bert.hardware import generator
from mergekit_bert.models.composition import Model
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.tensorfile import read_tensors
from tests.adapters.helpers import random_adapter
from tests.corpus import write_corpus
from tests.fuzz.containers import MODEL, WEIGHTS, sealed
from tests.fuzz.format import BASE, Format, Workshop, answered, measured, saved, shown, strict_json
from tests.fuzz.trees import JSON

Stages = Iterator[tuple[str, Any]]
FILE = "one.safetensors"
KNOWN = ("sst", "sts")


def inspected(path: Path) -> Any:
    """What `mbert inspect` says, without what any other bytes change."""
    told = describe(path)
    text = "\n".join(shown(as_text(table)) for table in description_tables(told))
    kept = {key: value for key, value in told.items() if key not in ("file", "bytes", "sha256")}
    strict_json(kept)
    assert text
    return kept


def merged_with(shop: Workshop, inputs: list[Input], method: str, folder: Path, path: Path) -> list[Any]:
    """A merge of ``inputs`` and one more, written, read, and its answers."""
    model = api.merge([*inputs, shop.spare], method)
    return [model.tasks, answered(shop, saved(model, folder), path)]


def use_file(shop: Workshop, folder: Path) -> Stages:
    """Read a model file, look at it, let it answer, merge it with another, and take one of its inputs out."""
    path = folder / FILE
    read_tensors(path, old=True)
    yield "container", None
    model = read_model(path)
    yield "read", model
    yield "inspect", inspected(path)
    yield "predict", answered(shop, model, path)
    if isinstance(model, mb.Merged):
        refuse_seen(str(path), model.seen(), {name: shop.rows(name, seed=7) for name in KNOWN})
        yield "seen", model.seen()
    inputs = read_inputs(path, load=shop.load)
    for method in _methods(model):
        yield f"merge by {method}", merged_with(shop, inputs, method, folder, path)
    if isinstance(model, mb.Merged) and model.kept:
        left, recipe = api.changed_inputs([path], [], [model.tasks[0].name])
        yield "change", answered(shop, api.merge([*left, shop.spare], recipe), path)


def _methods(model: Model) -> list[str]:
    """Methods that look at what this model has."""
    if isinstance(model, mb.Adapter):
        more = ["regmean", "fisher"] if model.statistics else []
        return ["orthoada" if model.basis else "ties", *more]
    return ["fedavg", "tsv"]


Maker = Callable[[Workshop, Path], None]


def _adapter(**options: Any) -> Maker:
    def make(shop: Workshop, folder: Path) -> None:
        mb.save(random_adapter(shop.encoder, **options), folder / FILE)

    return make


def _measured(shop: Workshop, folder: Path) -> None:
    """An adapter with statistics, on rows of a basis."""
    mb.save(measured(shop.encoder, shop.trio[0]), folder / FILE)


ADAPTER = Format(
    name="adapter",
    specimens={
        "orthogonal": _adapter(task="sst"),
        "shifts": _adapter(task="sts", basis="random", train_bias=True, train_layernorm=True),
        "patterns": _adapter(
            task="sst", basis="random", rank_pattern={r".*\.query": 2, "value": 5}, alpha_pattern={"layer.1.*": 7.0}
        ),
        "statistics": _measured,
        "probe": lambda shop, folder: mb.save(random_adapter(shop.encoder, "sst", kind="probe"), folder / FILE),
        "dora": _adapter(task="sst", kind="dora", targets="qv"),
        "prefix": _adapter(task="sst", kind="prefix", length=3),
        "prompt": _adapter(task="sts", kind="lora+prompt", basis="random", targets="qv", length=3),
    },
    targets={FILE: MODEL},
    use=use_file,
    share=5,
    digest=True,
)


def _two(shop: Workshop) -> list[Adapter]:
    return list(shop.trio[:2])


def _merged(method: str, **options: Any) -> Maker:
    def make(shop: Workshop, folder: Path) -> None:
        mb.save(api.merge(_two(shop), method, **options), folder / FILE)

    return make


def _dense(shop: Workshop, folder: Path) -> None:
    """A merge whose Deltas are whole matrices, of adapters that shift biases."""
    pair = [
        random_adapter(shop.encoder, task, seed=place, basis="random", train_bias=True, targets="attention")
        for place, task in enumerate(("sst", "sts"))
    ]
    mb.save(
        api.merge(pair, "ties", private=2, weights={"sst": 0.7}, layers={r".*\.1\..*": {"sts": 0.2}}), folder / FILE
    )


def _extras(shop: Workshop, folder: Path) -> None:
    """A merge whose tasks keep a prefix and a prompt."""
    kinds = {"sst": "lora+prefix", "sts": "prompt"}
    pair = [random_adapter(shop.encoder, task, kind=kind, targets="qv", length=3) for task, kind in kinds.items()]
    mb.save(api.merge(pair, "fedavg"), folder / FILE)


def _traced(shop: Workshop, folder: Path) -> None:
    """A merge that was searched and calibrated, made of one that was calibrated before."""
    data, base = write_corpus(folder / "data", KNOWN, 40, 8), shop.encoder
    first = api.calibrate(
        api.merge(shop.trio[:1], "fedavg"), data, steps=["scales"], rows=4, inputs=shop.trio[:1], base=base
    )
    both = [first, shop.trio[1]]
    model = api.search(both, "ties", 2, data, held_out=6, base=base)
    mb.save(api.calibrate(model, data, steps=["scales", "heads"], rows=12, inputs=both, base=base), folder / FILE)
    shutil.rmtree(data)


MERGED = Format(
    name="merged",
    specimens={
        "poolers": _merged("orthoada", weights={"sst": 0.5, "sts": 1.5}),
        "dense": _dense,
        "extras": _extras,
        "kept": _merged("fedavg", keep_inputs=True),
        "traced": _traced,
    },
    targets={FILE: MODEL},
    use=use_file,
    share=5,
    digest=True,
)


def _old(method: str) -> Maker:
    def make(shop: Workshop, folder: Path) -> None:
        """A file of format 1, whose digest leaves the metadata out."""
        path = folder / FILE
        model = api.merge(_two(shop), method, keep_inputs=True) if method else shop.trio[0]
        mb.save(model, path)
        tensors, told = read_tensors(path)
        path.write_bytes(sealed(tensors, {**told, "format": 1, "sha256": ""}))

    return make


OLD = Format(
    name="format-1",
    specimens={"adapter": _old(""), "merged": _old("fedavg"), "ensemble": _old("ensemble")},
    targets={FILE: MODEL},
    use=use_file,
    share=2,
)
ENSEMBLE = Format(
    name="ensemble",
    specimens={
        "two": _merged("ensemble"),
        "measured": lambda shop, folder: mb.save(
            api.merge([measured(shop.encoder, shop.trio[1]), shop.trio[0]], "ensemble"), folder / FILE
        ),
    },
    targets={FILE: MODEL},
    use=use_file,
    share=3,
    digest=True,
)


def use_peft(shop: Workshop, folder: Path) -> Stages:
    """Read a PEFT folder, let it answer, and merge it."""
    path = folder / "sst"
    yield "open", _without_path(open_peft(path))
    model = read_peft(path, load=shop.load)
    yield "read", model
    yield "predict", answered(shop, model, path)
    yield "merge", merged_with(shop, [model], "ties", folder, path)


def _without_path(one: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(one).items() if key != "path"}


def _peft(foreign: bool, **options: Any) -> Maker:
    def make(shop: Workshop, folder: Path) -> None:
        write_adapter_folder(folder / "sst", random_adapter(shop.encoder, "sst", **options), shop.encoder)
        if foreign:
            (folder / "sst/mbert.json").unlink()

    return make


PEFT = Format(
    name="peft",
    specimens={
        "own": _peft(False),
        "shifts": _peft(False, basis="random", train_bias=True, train_layernorm=True),
        "patterns": _peft(True, basis="random", rank_pattern={"value": 2}, alpha_pattern={r".*query": 3.0}),
        "dora": _peft(True, kind="dora", targets="qv"),
    },
    targets={"*.json": JSON, "*.safetensors": WEIGHTS},
    use=use_peft,
    share=3,
)


def use_folder(shop: Workshop, folder: Path) -> Stages:
    """Read a model folder, look at it, let it answer, and merge what it changed."""
    path = folder / "sst"
    model = read_model(path)
    yield "read", model
    yield "inspect", inspected(path)
    yield "predict", answered(shop, model, path)
    one = read_checkpoint(path, shop.encoder)
    yield "open", [one.name, one.base, one.parts]
    yield "merge", merged_with(shop, [one], "fedavg", folder, path)


def _folder(shop: Workshop, folder: Path) -> None:
    write_dense(folder, api.merge(_two(shop), "fedavg"), shop.encoder, only=["sst"])


def _sharded(shop: Workshop, folder: Path) -> None:
    """The same in two files of weights and an index."""
    _folder(shop, folder)
    whole = folder / "sst/model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / "sst" / file, {"format": "pt"})
    told = {
        "metadata": {"total_size": whole.stat().st_size},
        "weight_map": {n: f for f, own in parts.items() for n in own},
    }
    (folder / "sst/model.safetensors.index.json").write_text(json.dumps(told))
    whole.unlink()


def _pooled(shop: Workshop, folder: Path) -> None:
    """One whose head lies beside the weights."""
    head = fresh_classifier(shop.encoder, get_task("sst"), generator(0), "mean").head()
    values = {name: parameter.detach().clone() for name, parameter in head.items()}
    adapter = dataclasses.replace(random_adapter(shop.encoder, "sst", targets="qv"), head=values)
    write_dense(folder, api.merge([adapter], "fedavg"), shop.encoder)


FOLDER = Format(
    name="folder",
    specimens={"whole": _folder, "sharded": _sharded, "mean": _pooled},
    targets={"*mbert.json": JSON, "*config.json": JSON, "*.index.json": JSON, "*.json": JSON, "*.safetensors": WEIGHTS},
    use=use_folder,
    share=2,
)


def use_base(shop: Workshop, folder: Path) -> Stages:
    """Load a base, open it without loading, put an adapter on it, and let that answer."""
    path = folder / "encoder"
    encoder = load_encoder(path)
    yield "load", [encoder.fingerprint, encoder.tokenizer_fingerprint, encoder.max_length, encoder.pad_token]
    stored = open_encoder(path)
    yield "open", [stored.fingerprint, stored.tokenizer_fingerprint]
    adapter = random_adapter(encoder, "sts")
    texts = [("a good film", "the cat"), ("not very fine", "a [MASK] unknown word")]
    yield "predict", Predictor(adapter, encoder).predict("sts", texts)


BASES = Format(
    name="base",
    specimens={"bert": lambda shop, folder: shutil.copytree(BASE, folder / "encoder") and None},
    targets={"*config.json": JSON, "*.json": JSON, "*.safetensors": WEIGHTS},
    use=use_base,
    share=2,
)
