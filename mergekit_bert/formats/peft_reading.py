"""What a PEFT folder is on its base: LoRA, DoRA and LoHa with patterns, biases and whole modules, and a head.

Tensors are named ``base_model.model.<module>.<ending>``, with the endings that the family of the adapter says; biases
and the modules saved whole (the head among them) are there as values, not as changes. Names and sizes are compared with
the base before a value is read.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import Options
from mergekit_bert.adapters.delta import Delta, Dense, norm
from mergekit_bert.adapters.family import FAMILIES, Family, Size
from mergekit_bert.adapters.record import options_of
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import classifier, head_shapes
from mergekit_bert.encoder.folder import RECORD, unscale_head
from mergekit_bert.encoder.heads.native import native_prefix
from mergekit_bert.encoder.load import Base, Encoder
from mergekit_bert.encoder.sites import TARGETS, find_sites, linear_layers, of_the_head, shift_names
from mergekit_bert.errors import CompositionError, EncoderError, MbertError, ModelFileError
from mergekit_bert.formats.peft import AGAIN, CONFIG, PREFIX, AdapterRecord, PeftFolder
from mergekit_bert.patterns import exactly

_COPIES = (r"\.modules_to_save\.", r"\.modules_to_save\.[^.]+\.", r"\.original_module\.")
"""What copies have in their names, which ``bias="all"`` saves of the biases of modules that are saved whole."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST = 1e4
"""The norm of a change or of a head's tensor. A trained one is below 100; far beyond, float32 overflows inside."""
_NAME_BASE = "name the `base` it was trained on"


@dataclass
class _Names:
    """The folder's tensors by what they are; names as the model with a head has them, with those in the file.

    ``factors`` are the adapter's by module, ``values`` saved whole by parameter, ``copies`` repeat a value.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


def adapter_of(
    folder: PeftFolder, encoder: Encoder, task: Task, body: bool = False
) -> tuple[Adapter, dict[str, Delta]]:
    """The folder's adapter for ``task`` on ``encoder``, and the Deltas of linear layers that are saved whole, by site.

    The adapter is without these. A ``body`` has no head, and ``task`` only stands in. Raises ModelFileError where
    tensors do not fit the encoder or are left over, CompositionError where the head does not fit the task.
    """
    family = _family(folder)
    shell = native_prefix(encoder.config, task)
    names, shapes = _by_name(folder, family), head_shapes(encoder.config, task)
    if not any(name.startswith(shell) for name in names.factors or names.values):
        shell = ""  # it was trained on the encoder itself, as AutoModel loads it
    if body:
        _leave_out_pooler(names, encoder, shell)
    sites = _sites(folder, family, names, encoder, shell, shapes)
    changed = _changed(folder, names, encoder, shell, task, shapes, body)
    config = _read_config(folder, family, encoder, sites, shell, changed)
    for site, size in sites.items():
        assert family.sites is not None
        _check_factors(folder, site, names.factors[f"{shell}{site}"], family.sites.shapes(config.at(site), size))
    _check_copies(folder, names)
    tensors = {
        site: {letter: _value(folder, name) for letter, name in sorted(names.factors[f"{shell}{site}"].items())}
        for site in sites
    }
    changes = {name: _value(folder, stored) - _weight(encoder, name) for name, stored in changed.items()}
    whole = {site: changes.pop(f"{site}.weight") for site in linear_layers(encoder) if f"{site}.weight" in changes}
    dense: dict[str, Delta] = {site: Dense(change) for site, change in whole.items() if bool(change.any())}
    stored = {} if body else {name: _value(folder, names.values[name]) for name in shapes}
    head = _head(stored, encoder, task) if stored else {}
    adapter = Adapter(
        type=family.name,
        config=config,
        task=task,
        base=Base.of(encoder),
        max_length=min(folder.max_length or encoder.max_length, encoder.max_length),
        sites=sites,
        tensors=tensors,
        shifts=changes,
        head=head,
        basis=None,
        training={"peft_version": str(folder.config.peft_version)} | _switches(folder),
        scores={},
    ).on(encoder)
    _check_sizes(str(folder.path), {**adapter.deltas(), **dense}, {**changes, **head})
    return (_as_written(folder, folder.written, adapter) if folder.written else adapter), dense


def _family(folder: PeftFolder) -> Family:
    """The family of the folder's kind whose switches are the folder's."""
    kinds = {one: one.peft for one in FAMILIES if one.peft and one.peft.type == folder.config.peft_type}
    on = {name for peft in kinds.values() for name in peft.switches if getattr(folder.config, name)}
    found = next((one for one, peft in kinds.items() if peft.switches == on), None)
    if found is None:
        raise ModelFileError(str(folder.path / CONFIG), f"{' and '.join(sorted(on))}", "one of them", AGAIN)
    return found


def _switches(folder: PeftFolder) -> dict[str, bool]:
    """Which switches are on, of those that tell families of the folder's kind apart."""
    kinds = [one.peft for one in FAMILIES if one.peft and one.peft.type == folder.config.peft_type]
    return {
        name: bool(getattr(folder.config, name)) for name in sorted({name for one in kinds for name in one.switches})
    }


def _by_name(folder: PeftFolder, family: Family) -> _Names:
    """What each tensor is, by its name."""
    kinds = [one.peft for one in FAMILIES if one.peft and one.peft.type == folder.config.peft_type]
    endings = {f".{end}": name for peft in kinds for name, end in peft.tensors.items()}
    names, shapes = _Names(), folder.tensors.shapes
    for key, shape in shapes.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".ln_tuning_layers.", ".")
        plain = {PREFIX + re.sub(part, ".", name) for part in _COPIES} - {PREFIX + name}
        repeated = next((one for one in sorted(plain) if shapes.get(one) == shape), None)
        ending = next((one for one in endings if name.endswith(one)), None)
        if repeated is not None:
            if ".original_module." not in name:  # which has the value before training
                names.copies[key] = repeated
            continue
        if ending is None or not key.startswith(PREFIX):
            found, short = names.values, name if key.startswith(PREFIX) else key
        else:
            found, short = names.factors.setdefault(name.removesuffix(ending), {}), endings[ending]
        if short in found:
            raise ModelFileError(str(folder.path), f"{found[short]!r} and {key!r}", "one tensor for each place", AGAIN)
        found[short] = key
    if family.sites and not names.factors:
        expected = f"{', '.join(end.strip('.') for end in endings)} of some layers"
        raise ModelFileError(str(folder.path), f"no {folder.config.title} tensors", expected, AGAIN)
    return names


def _leave_out_pooler(names: _Names, encoder: Encoder, shell: str) -> None:
    """Drop what belongs to a pooler that AutoModel adds and the encoder under a head does not have (RoBERTa's)."""
    there = {name for name, _ in (*encoder.model.named_modules(), *encoder.model.named_parameters())}
    for found in (names.factors, names.values):
        for name in [one for one in found if of_the_head(one.removeprefix(shell))]:
            if name.removeprefix(shell) not in there:
                del found[name]


def _value(folder: PeftFolder, name: str) -> Tensor:
    """A tensor in float32, read now."""
    tensor: Tensor = folder.tensors[name]
    if tensor.dtype not in _DTYPES:
        raise ModelFileError(str(folder.path), f"tensor {name!r} of {tensor.dtype}", "floating-point numbers", AGAIN)
    return tensor.float()


def _weight(encoder: Encoder, name: str) -> Tensor:
    return encoder.model.get_parameter(name).detach().cpu().float()


def _sites(
    folder: PeftFolder,
    family: Family,
    names: _Names,
    encoder: Encoder,
    shell: str,
    head: Mapping[str, tuple[int, ...]],
) -> dict[str, Size]:
    """The sites that have an adapter, in the encoder's order: those that the settings say."""
    layers, where, kind = linear_layers(encoder), str(folder.path), folder.config.title
    for module in names.factors:
        if f"{module}.weight" in head:
            raise ModelFileError(
                where,
                f"{kind} at {module!r} of the head",
                f"{kind} in the encoder alone: the base has no weights of a head to add to",
                "train with the head's modules in modules_to_save",
            )
        if not module.startswith(shell) or module.removeprefix(shell) not in layers:
            raise ModelFileError(where, f"{kind} at {module!r}", f"linear layers of {encoder.name!r}", _NAME_BASE)
    for site in layers if family.sites else ():  # without sites, the targets are saved whole
        module = f"{shell}{site}"
        if (wanted := folder.config.targets(module)) not in (None, module in names.factors):
            found, expected = (f"no {kind}", "some") if wanted else (kind, "none")
            raise ModelFileError(where, f"{found} at {module!r}", f"{expected}, by target_modules in {CONFIG}", AGAIN)
    return {site: size for site, size in layers.items() if f"{shell}{site}" in names.factors}


def _check_factors(
    folder: PeftFolder, site: str, found: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]
) -> None:
    shapes = {letter: folder.tensors.shapes[name] for letter, name in found.items()}
    if shapes != expected:
        found_text, expected_text = (
            "{" + ", ".join(f"{name} {shape}" for name, shape in sorted(one.items())) + "}"
            for one in (shapes, expected)
        )
        raise ModelFileError(
            str(folder.path), f"tensors of {site!r} are {found_text}", expected_text, f"name the `base`, or {AGAIN}"
        )


def _changed(
    folder: PeftFolder,
    names: _Names,
    encoder: Encoder,
    shell: str,
    task: Task,
    head: Mapping[str, tuple[int, ...]],
    body: bool,
) -> dict[str, str]:
    """The encoder's parameters that are saved whole, by name; the rest must be the whole head, of a ``body`` none."""
    where, changed = str(folder.path), dict[str, str]()
    parameters = {name: tuple(parameter.shape) for name, parameter in encoder.model.named_parameters()}
    for name, stored in names.values.items():
        shape, expected = folder.tensors.shapes[stored], head.get(name)
        if name.removesuffix(".weight") in names.factors:
            raise ModelFileError(where, f"tensor {stored!r} beside {folder.config.title}", "one of the two", AGAIN)
        if expected and shape != expected and shape[1:] == expected[1:]:
            raise CompositionError(
                where,
                f"a head of {shape[0]} outputs",
                f"{task.outputs}, which task {task.name!r} has",
                "name the task that it was trained on (`mbert convert --task`), or rename the folder",
            )
        if name.startswith(shell) and parameters.get(name.removeprefix(shell)) == shape:
            changed[name.removeprefix(shell)] = stored
        elif shape != expected:
            raise ModelFileError(
                where, f"tensor {name!r} of shape {shape}", f"tensors of {encoder.name!r} and its head", _NAME_BASE
            )
    lacking = sorted(set(head) - set(names.values))
    if lacking and not (body and len(lacking) == len(head)):
        modules = ", ".join(sorted({name.partition(".")[0] for name in head}))
        raise CompositionError(
            where,
            f"no {lacking[0]!r}" if len(lacking) < len(head) else "no head",
            f"the whole head of {encoder.config.model_type} ({', '.join(head)})",
            f"train with modules_to_save=[{modules}]",
        )
    return changed


def _check_copies(folder: PeftFolder, names: _Names) -> None:
    for copy, plain in names.copies.items():
        if not torch.equal(_value(folder, copy), _value(folder, plain)):
            raise ModelFileError(str(folder.path), f"{copy!r} differs from {plain!r}", "the same values", AGAIN)


def _check_sizes(where: str, deltas: Mapping[str, Delta], tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelFileError for what would make an encoder's answers infinite."""
    norms = {site: norm(delta) for site, delta in deltas.items()}
    norms |= {name: float(torch.linalg.vector_norm(tensor.double())) for name, tensor in tensors.items()}
    for name, found in norms.items():
        if not found <= _LARGEST:
            raise ModelFileError(
                where,
                f"{name!r} is changed by {found:.3g} (Frobenius norm)",
                f"{_LARGEST:g} at most, for finite answers",
                "train it with a smaller alpha or learning rate",
            )


def _head(head: Mapping[str, Tensor], encoder: Encoder, task: Task) -> dict[str, Tensor]:
    """The head as mbert keeps it: a regression's on 0…1."""
    model = classifier(encoder, task, head)
    unscale_head(model, task)
    return {name: parameter.detach().cpu() for name, parameter in model.head().items()}


def _read_config(
    folder: PeftFolder,
    family: Family,
    encoder: Encoder,
    sites: Mapping[str, Size],
    shell: str,
    changed: Mapping[str, str],
) -> Options:
    """The options that the folder's settings are."""
    assert family.peft is not None
    if not family.sites:
        return family.options()
    names = {f"{shell}{site}": site for site in sites}
    given = {option: getattr(folder.config, setting) for option, setting in family.peft.options.items()}
    whole = {f"{site}.weight" for site in linear_layers(encoder)}
    biases = set(shift_names(encoder.model, bias=True, layernorm=False))
    own = {one.name for one in dataclasses.fields(family.options)}
    seen = {
        "basis": "random",
        "targets": _targets(encoder, sites, folder.config.target_modules),
        "train_bias": not biases.isdisjoint(changed),
        "train_layernorm": not (biases | whole).issuperset(changed),
    }
    given |= {option: value for option, value in seen.items() if option in own}
    try:
        config: Options = family.configured({option: value for option, value in given.items() if value is not None})
        return config.renamed(names)
    except MbertError as error:
        raise ModelFileError(
            str(folder.path / CONFIG), f"broken ({error})", f"options of {family.name}", AGAIN
        ) from error


def _targets(encoder: Encoder, sites: Mapping[str, Size], given: str | list[str] | None) -> str:
    """The shortest way to name the sites: a target set, PEFT's own pattern or endings, or all of them."""
    own = given if isinstance(given, str) else rf"(.*\.)?({'|'.join(map(re.escape, sorted(given or ())))})"
    for candidate in (*TARGETS, own):
        try:
            if find_sites(encoder, candidate).keys() == sites.keys():
                return candidate
        except EncoderError:
            continue
    return exactly(sites)


def _as_written(folder: PeftFolder, record: AdapterRecord, adapter: Adapter) -> Adapter:
    """The adapter as it was before its folder was written; the folder's other files must follow from it."""
    path = str(folder.path / RECORD)
    try:
        family = FAMILIES.get(record.type or adapter.type)
        config = options_of(family.name, record.config.to_json())
    except (MbertError, ValueError) as error:
        raise ModelFileError(path, f"broken ({error})", f"options of {adapter.type}", "remove it") from error
    peft = family.peft
    if peft is None or peft is not adapter.family.peft:
        raise ModelFileError(path, f"type {family.name}", f"{adapter.type}, as the other files say", "remove it")
    frozen = family.frozen(record.basis)
    for site, tensors in adapter.tensors.items():
        own, recorded = adapter.config.at(site), config.at(site)
        same_basis = record.basis is None or any(_is_basis(record.basis, site, tensors[name]) for name in frozen)
        different = [one for one in (*peft.options, *peft.lacks) if getattr(own, one) != getattr(recorded, one)]
        if different or not same_basis:
            what = " and ".join(different or ["basis"])
            raise ModelFileError(path, f"another {what} of {site!r}", "what the other files say", "remove it")
    return dataclasses.replace(
        adapter,
        type=family.name,
        config=config,
        basis=record.basis,
        training=record.training.model_dump(exclude_unset=True),
        scores=record.scores,
    )


def _is_basis(basis: BasisRows, site: str, A: Float[Tensor, "rank in"]) -> bool:
    """Whether ``A`` is what a file of mbert's would rebuild."""
    rank, width = A.shape
    there = basis.count == rank and basis.start + basis.count <= width
    return there and torch.allclose(basis.matrix(site, width), A, rtol=0, atol=1e-6)
