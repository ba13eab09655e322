"""A quantized student in training: what it computes, what learns, what stays."""

import copy

import pytest
import torch

from ptq.contracts import Feedback
from ptq.distilling.loop import _clip
from ptq.distilling.quantized import borders, harden, make_trainable, with_values
from ptq.errors import ReconstructionError
from ptq.graph.insert import quantizer_of
from ptq.graph.ops import weighted_nodes
from ptq.quant.fake_quant import ActFakeQuant, Dequantize, integer_codes, weight_grid
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct.genie_m import GenieM
from ptq.reconstruct.nearest import Nearest
from ptq.training import Training
from tests.stages import assert_unchanged, fingerprint, prepare, values
from tests.zoo import images

NETS = ["residual", "depthwise", "concat", "squeeze_excite", "pre_activation", "plain"]


def _hardened(name: str, bits: str = "w2a4", method=None):
    made = prepare(name, bits)
    student, _ = reconstruct_blocks(
        made.teacher, made.student, images(32), method or Nearest(), seed=0, device=torch.device("cpu"), feedback=Feedback()
    )  # fmt: skip
    return made, student


def _trainable(name: str, bits: str = "w2a4", method=None, **options):
    made, student = _hardened(name, bits, method)
    before = copy.deepcopy(student)
    groups = make_trainable(student, made.folded, Training(**options))
    return made, before, student, groups


@pytest.mark.parametrize("bits", ["w2a4", "w4", "w8a8"])
@pytest.mark.parametrize("name", NETS)
def test_before_a_step_it_computes_what_it_did(name: str, bits: str):
    _, before, student, _ = _trainable(name, bits, GenieM(steps=5, batch_size=8))
    x = images(8)
    # The integer bias is read back and rounded to its own grid again: equal to the last bits of a float32.
    assert torch.allclose(student(x), before(x), rtol=1e-5, atol=1e-6)
    harden(student)
    state = student.state_dict()
    assert state.keys() == before.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in before.state_dict().items())


def test_weights_start_at_the_float_network_where_it_has_the_code():
    """With nearest rounding, every weight inside the grid starts where the float network has it."""
    made, _, student, _ = _trainable("residual", "w4a4")
    for node in weighted_nodes(student):
        layer, wanted = student.get_submodule(str(node.target)), made.folded.get_submodule(str(node.target)).weight
        grid = weight_grid(layer)
        w = grid.weight(layer.parametrizations["weight"].original.detach())
        far = (w - wanted).abs() / grid.scale.detach().view(-1, *[1] * (w.ndim - 1))
        # The start stays 0.01 steps inside its code; float32 division by the gain costs a few bits.
        assert float(far.max()) < 0.011


@pytest.mark.parametrize("name", NETS)
def test_ranges_of_activations_are_frozen_and_the_rest_learns(name: str):
    made, before, student, groups = _trainable(name, "w3a4")
    run, teacher = with_values(student, ()), with_values(made.folded, ())
    optimizer = torch.optim.SGD([{k: v for k, v in g.items() if k != "share"} for g in groups], lr=0.01)
    for x in images(24).split(8):
        loss = (run(x)[0] - teacher(x)[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learnt = []
    for node in weighted_nodes(student):
        held = student.get_submodule(str(node.target)).parametrizations
        learnt.append(held["weight"].original.grad.abs().sum() > 0 and held["weight"][0].step.grad.abs().sum() > 0)
    assert sum(learnt) >= len(learnt) - 1  # the gradient of a gate behind a saturated sigmoid may be zero
    scales = {k: v for k, v in before.named_modules() if isinstance(v, ActFakeQuant)}
    assert scales and all(torch.equal(student.get_submodule(k).scale, v.scale) for k, v in scales.items())
    harden(student)
    changed = 0
    for node in weighted_nodes(student):
        layer = student.get_submodule(str(node.target))
        assert isinstance(weight_grid(layer), Dequantize)
        changed += not torch.equal(layer.weight, before.get_submodule(str(node.target)).weight)
        source = quantizer_of(student, node.all_input_nodes[0].meta["value"])
        if layer.bias is None:
            continue
        grid, bias = integer_codes(layer, "weight")[1], integer_codes(layer, "bias")[1]
        assert torch.equal(bias.scale, source.scale * grid.scale)  # the accumulator's own grid, after training too
    assert changed > 0 and not any(p.requires_grad for p in student.parameters())


def test_what_is_trained_is_what_is_stored():
    """Trained weights through their rounding, and after hardening: the same network, biases on their grid included."""
    _, _, student, groups = _trainable("residual", "w3a4")
    with torch.no_grad():
        for group in groups:
            for p in group["params"]:
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    x = images(8)
    expected = student(x)
    harden(student)
    assert torch.allclose(student(x), expected, rtol=1e-4, atol=1e-5)  # one more rounding of scale by step


def test_frozen_weight_scales():
    _, before, student, groups = _trainable("residual", "w3a4", lr_scale=0.0)
    assert not any("share" in group for group in groups)
    harden(student)
    for node in weighted_nodes(student):
        ours, theirs = (integer_codes(gm.get_submodule(str(node.target)), "weight")[1] for gm in (student, before))
        assert torch.equal(ours.scale, theirs.scale)


def test_a_scale_cannot_leave_the_positive_numbers():
    _, _, student, _ = _trainable("residual", "w3a4")
    grids = [weight_grid(student.get_submodule(str(n.target))) for n in weighted_nodes(student)]
    for grid in grids:
        grid.step.data.neg_()
        assert bool((grid.scale > 0).all())


def test_divergence_is_said():
    _, _, student, groups = _trainable("residual", "w3a4")
    groups[0]["params"][0].data.fill_(float("nan"))
    with pytest.raises(ReconstructionError, match=r"conv1.*lower lr"):
        harden(student)


@pytest.mark.parametrize("name", NETS)
def test_blocks_align_and_share_parameters(name: str):
    made, student = _hardened(name)
    names = borders(student)
    assert names and len(set(names)) == len(names)
    for gm in (made.folded, student):
        before, x = fingerprint(gm), images(4)
        found = with_values(gm, names)(x)
        assert_unchanged(gm, before)
        assert torch.equal(found[0], gm(x))
        kept = values(gm, x)
        assert all(torch.equal(v, kept[n]) for n, v in zip(names, found[1:], strict=True))
    assert {id(p) for p in with_values(student, names).parameters()} <= {id(p) for p in student.parameters()}


def test_gradients_of_step_sizes_are_clipped_as_lsq_scales_them():
    """A step size's gradient counts by its share: a long one does not shorten those of the weights."""
    weight, step = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [weight]}, {"params": [step], "share": 0.01}]
    weight.grad, step.grad = torch.tensor([0.3]), torch.tensor([40.0])
    _clip(groups, 1.0)
    assert float(weight.grad) == pytest.approx(0.3) and float(step.grad) == pytest.approx(40)
    weight.grad = torch.tensor([3.0])
    _clip(groups, 1.0)
    assert (float(weight.grad) ** 2 + (0.01 * float(step.grad)) ** 2) ** 0.5 == pytest.approx(1, rel=1e-4)
