"""Heads: their shapes, their values, and the module trees that carry them."""

import copy

import torch

import mergekit_bert as mb
from mergekit_bert.encoder.classifier import classifier, fresh_classifier, head_shapes, share
from mergekit_bert.encoder.head import HEADS, head_config
from mergekit_bert.hardware import generator

WIDE = {"dense.weight": (32, 32), "dense.bias": (32,)}
OUTPUTS = {"classifier.weight": (5, 32), "classifier.bias": (5,)}
ROBERTA = {f"classifier.{name}": shape for name, shape in WIDE.items()} | {
    "classifier.out_proj.weight": (5, 32),
    "classifier.out_proj.bias": (5,),
}
SHAPES = {
    "bert": OUTPUTS,
    "minilm": {"classifier.weight": (5, 24), "classifier.bias": (5,)},
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": ROBERTA,
    "distilbert": OUTPUTS | {"pre_classifier.weight": (32, 32), "pre_classifier.bias": (32,)},
    "deberta-v2": OUTPUTS | {f"pooler.{name}": shape for name, shape in WIDE.items()},
    "modernbert": OUTPUTS | {"head.dense.weight": (32, 32), "head.norm.weight": (32,)},
}


def test_shapes_of_a_five_class_head(encoders: dict[str, mb.Encoder], sst: mb.Task) -> None:
    assert {name: head_shapes(one.config, sst) for name, one in encoders.items()} == SHAPES


def test_a_regression_has_one_output(encoder: mb.Encoder, sst: mb.Task, sts: mb.Task) -> None:
    five, one = head_shapes(encoder.config, sst), head_shapes(encoder.config, sts)
    changed = {name for name in five if five[name] != one[name]}
    assert five.keys() == one.keys()
    assert {five[name][0] for name in changed} == {5}
    assert {one[name][0] for name in changed} == {1}
    assert len(changed) == 2


def test_labels_keep_their_names_and_order(bert: mb.Encoder, sst: mb.Task, sts: mb.Task) -> None:
    config = head_config(bert.config, sst)
    assert config.id2label == dict(enumerate(sst.label_names))
    assert config.label2id == {name: index for index, name in enumerate(sst.label_names)}
    assert head_config(bert.config, sts).problem_type == "regression"
    assert bert.config.num_labels == 2


def test_a_fresh_head_follows_from_its_generator(encoder: mb.Encoder, sst: mb.Task) -> None:
    one, same, other = (fresh_classifier(encoder, sst, generator(seed)).head() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for name, parameter in one.items():
        assert parameter.device == next(encoder.model.parameters()).device
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.dim() == 2:
            assert 0.01 < float(parameter.std()) < 0.03


def test_a_head_is_copied_in_and_never_aliased(encoder: mb.Encoder, sst: mb.Task) -> None:
    given = {
        name: torch.randn(shape, generator=generator(3)) for name, shape in head_shapes(encoder.config, sst).items()
    }
    kept = copy.deepcopy(given)
    model = classifier(encoder, sst, given)
    assert all(torch.equal(model.head()[name], kept[name]) for name in kept)
    with torch.no_grad():
        for parameter in model.head().values():
            parameter.zero_()
    assert all(torch.equal(given[name], kept[name]) for name in kept)


def test_sharing_copies_modules_and_shares_memory(encoder: mb.Encoder) -> None:
    tree = share(encoder.model)
    mine = dict(encoder.model.named_parameters()) | dict(encoder.model.named_buffers())
    theirs = dict(tree.named_parameters()) | dict(tree.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    modules = {id(module) for module in encoder.model.modules()}
    assert not any(id(module) in modules for module in tree.modules())


def test_the_outputs_come_from_the_last_linear_layer(encoder: mb.Encoder, sst: mb.Task) -> None:
    model = fresh_classifier(encoder, sst, generator(0))
    layer = HEADS.get("native").output_layer(model)
    assert layer is not None
    assert layer.out_features == 5
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.arange(5.0))
        outputs = model(**encoder.tokenizer(["good film", "a"], padding=True, return_tensors="pt"))
    assert torch.equal(outputs, torch.arange(5.0).expand(2, 5))
