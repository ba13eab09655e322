"""Repairs after rounding."""

import pytest
import torch
from torch import nn

import ptq
from ptq.contracts import Feedback
from ptq.graph.channel_means import expected_means
from ptq.graph.fold_bn import give_biases
from ptq.graph.insert import insert_fake_quant
from ptq.graph.ops import weighted_nodes
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct._repair import mend
from ptq.reconstruct.nearest import Nearest
from ptq.spec import Repair
from tests.stages import prepare
from tests.zoo import SHAPE, ZOO, build, images

_CPU = torch.device("cpu")


def _moments(gm, reference):
    """Path → mean and deviation per channel of each layer's result, from hooks of its own."""
    found = {}
    for node in weighted_nodes(reference):
        path = str(node.target)
        gm.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: found.__setitem__(path, out.detach().movedim(1, 0).flatten(1))
        )
    with torch.no_grad():
        gm(images())
    return {path: (v.mean(1), v.std(1)) for path, v in found.items()}


def _mended(name: str, bits: str, how: str):
    made = prepare(name, bits)
    folded = give_biases(made.folded)
    student = insert_fake_quant(folded, made.plan, made.acts, made.weights)
    common = {"device": _CPU, "feedback": Feedback()}
    nearest, _ = reconstruct_blocks(made.teacher, student, images(), Nearest(), seed=0, **common)
    return folded, nearest, mend(folded, nearest, images(), Repair.parse(how), expected_means(made.teacher), **common)


@pytest.mark.parametrize("name", ZOO)
def test_means_are_given_back(name: str):
    folded, nearest, fixed = _mended(name, "w4a8", "bias")
    real, before, after = (_moments(gm, folded) for gm in (folded, nearest, fixed))
    for path, (mean, std) in real.items():
        lost, left = ((m[path][0] - mean).abs().max() for m in (before, after))
        if float(std.max()) > 0:  # else nothing but zeros enters, on a grid that says nothing of the bias's
            assert float(left) < 0.02 * float(std.max()) + 0.05 * float(lost), path


@pytest.mark.parametrize("name", ["residual", "depthwise", "plain"])
def test_deviations_too(name: str):
    folded, _, fixed = _mended(name, "w4a8", "statistics")
    real, after = (_moments(gm, folded) for gm in (folded, fixed))
    for path, (mean, std) in real.items():
        held = std > 0.01 * std.max()
        near = (after[path][1] / std)[held]
        assert float((near - 1).abs().max()) < 0.1, path
        assert float((after[path][0] - mean).abs().max()) < 0.05 * float(std.max()), path


def test_without_images_a_layer_behind_batch_norm_gains():
    """The analytic correction, on inputs that are what BatchNorm says: normal, then clipped."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 10, 1)).eval()
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net[1].running_mean.copy_(net[0](x).mean((0, 2, 3)))
        net[1].running_var.copy_(net[0](x).var((0, 2, 3)))
        net[1].bias.copy_(torch.linspace(-1, 1, 16))
        wanted = net(x).mean((0, 2, 3))
        lost = {}
        net[0].weight *= torch.logspace(-1, 1, 16).view(-1, 1, 1, 1)  # for equalization to have something to do
        net[0].bias *= torch.logspace(-1, 1, 16)
        net[1].running_mean *= torch.logspace(-1, 1, 16)
        net[1].running_var *= torch.logspace(-1, 1, 16).square()
        net[1].weight.copy_(torch.logspace(-0.5, 0.5, 16))
        wanted = net(x).mean((0, 2, 3))
        for how in ("none", "analytic_bias", "equalize", "equalize+analytic_bias"):
            qm = ptq.quantize(net, "w2a8", x, input_shape=SHAPE, rounding="nearest", repair=how, edges="all")
            lost[how] = float((qm.student(x).mean((0, 2, 3)) - wanted).square().sum())
    # What conv1's own rounding cost is not the second layer's to give back.
    assert lost["analytic_bias"] < 0.5 * lost["none"]
    assert lost["equalize+analytic_bias"] < 0.5 * lost["equalize"]


@pytest.mark.parametrize(
    "how", ["equalize", "bias", "analytic_bias", "statistics", "equalize+analytic_bias", "equalize+statistics"]
)
@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_the_file_still_computes_it(name: str, how: str, tmp_path):
    qm = ptq.quantize(build(name), "w4a4", images(), input_shape=SHAPE, rounding="nearest", repair=how)
    assert qm.manifest.recipe["repair"] == str(Repair.parse(how))
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and proof["differing_outputs"] == 0 and proof["float_layers"] == []
