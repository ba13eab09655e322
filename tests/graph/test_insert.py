"""Fake-quant where the plan says, and nowhere else."""

import pytest
import torch
from torch import nn

from ptq.graph.insert import insert_fake_quant, quantizer_of
from ptq.graph.plan import QuantPlan
from ptq.quant.affine import fake_quantize
from ptq.quant.fake_quant import ActFakeQuant, weight_grid
from tests.stages import assert_unchanged, fingerprint, prepare, relative_error, values
from tests.zoo import ZOO, images

EMPTY = QuantPlan({}, {})


@pytest.mark.parametrize("name", ZOO)
def test_an_empty_plan_changes_nothing(name: str, device: torch.device):
    folded = prepare(name).folded.to(device)
    student = insert_fake_quant(folded, EMPTY, {}, {})
    x = images(8).to(device)
    with torch.no_grad():
        assert torch.equal(student(x), folded(x))
    assert_unchanged(student, fingerprint(folded))


@pytest.mark.parametrize("name", ZOO)
def test_argument_is_unchanged(name: str):
    made = prepare(name)
    before = fingerprint(made.folded)
    student = insert_fake_quant(made.folded, made.plan, made.acts, made.weights)
    assert_unchanged(made.folded, before)
    for tensor in student.state_dict().values():
        tensor.zero_()
    assert_unchanged(made.folded, before)


@pytest.mark.parametrize("bits", ["w4a4", "w2a3", "w8a8"])
@pytest.mark.parametrize("name", ZOO)
def test_every_planned_value_lies_on_its_grid(name: str, bits: str):
    """Moved and concatenated ones too, without a quantizer of their own."""
    made = prepare(name, bits)
    found = values(made.student, images(4, seed=1))
    for value in made.plan.values:
        quantizer = quantizer_of(made.student, value)
        assert quantizer is not None and quantizer.spec == made.plan.values[value]
        assert torch.equal(found[value], fake_quantize(found[value], quantizer.qparams)), value


@pytest.mark.parametrize("name", ZOO)
def test_every_planned_weight_lies_on_its_grid(name: str):
    made = prepare(name)
    for path, spec in made.plan.weights.items():
        layer, q = made.student.get_submodule(path), made.weights[path]
        assert weight_grid(layer).spec == spec
        assert torch.equal(layer.weight, fake_quantize(made.folded.get_submodule(path).weight, q))


@pytest.mark.parametrize("name", ZOO)
def test_names_of_values_are_kept(name: str):
    made = prepare(name)
    names = [[n.meta["value"] for n in gm.graph.nodes if n.meta.get("value")] for gm in (made.folded, made.student)]
    assert names[0] == names[1]
    teachers = {n.meta["value"] for n in made.teacher.graph.nodes if n.meta.get("value")}
    assert set(names[1]) <= teachers


@pytest.mark.parametrize("name", ZOO)
def test_ties_share_one_scale(name: str):
    made = prepare(name)
    quantizers = {value: quantizer_of(made.student, value) for value in made.plan.values}
    for tie in made.plan.ties:
        assert len({id(quantizers[value]) for value in tie}) == 1
    groups = {made.plan.group(value) for value in made.plan.values}
    assert len({id(q) for q in quantizers.values()}) == len(groups)
    assert sum(isinstance(m, ActFakeQuant) for m in made.student.modules()) == len(groups)


@pytest.mark.parametrize("name", ZOO)
def test_unplanned_values_have_no_quantizer(name: str):
    made = prepare(name)
    named = {n.meta["value"] for n in made.student.graph.nodes if n.meta.get("value")}
    assert named - set(made.plan.values)  # the logits at least
    assert all(quantizer_of(made.student, value) is None for value in named - set(made.plan.values))


@pytest.mark.parametrize("name", ZOO)
def test_weights_only(name: str):
    made = prepare(name, "w4")
    assert not any(isinstance(m, ActFakeQuant) for m in made.student.modules())
    layer = made.student.get_submodule(next(iter(made.plan.weights)))
    assert isinstance(layer, nn.Conv2d) and weight_grid(layer) is not None


@pytest.mark.parametrize("name", ZOO)
def test_eight_bits_cost_little_and_two_cost_much(name: str, device: torch.device):
    x = images().to(device)  # those that the ranges are from: on others, values are clipped too
    errors = []
    for bits in ("w8a8", "w4a4", "w2a2"):
        made = prepare(name, bits)
        with torch.no_grad():
            errors.append(relative_error(made.student.to(device)(x), made.teacher.to(device)(x)))
    # 8 bits round each tensor by up to 1/510 of its range, over about ten tensors; 2 bits by up to 1/6.
    assert errors[0] < 0.05 < errors[2] and errors[0] < errors[1] < errors[2]
