"""Soft rounding: what is trained at which rate, what is dropped, and channels that differ in size."""

from typing import Any

import pytest
import torch
from torch import nn

from ptq.contracts import Feedback, make_rng
from ptq.quant.affine import QParams
from ptq.quant.fake_quant import ActFakeQuant, integer_codes
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct._soft_round import SoftRound, annealed_beta, attach_soft, dropped_input, sped_up
from ptq.reconstruct.genie_m import GenieM
from ptq.spec import QuantSpec
from tests.stages import prepare, prepared
from tests.zoo import images

_CPU = torch.device("cpu")


class _Tiny(nn.Module):
    """One channel's weights are a ten-thousandth of the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 1)
        with torch.no_grad():
            self.conv.weight *= 3
            self.conv.weight[2] *= 1e-4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(x).relu()).mean(dim=(2, 3))


def test_a_channel_with_a_tiny_scale_keeps_a_positive_one():
    """Adam's steps have one size for all: on absolute scales, the tiny one would be driven below zero and the block lost."""
    made = prepared(_Tiny(), "w2a4")
    notes: list[str] = []
    method = GenieM(steps=300, batch_size=16)
    student, reports = reconstruct_blocks(
        made.teacher, made.student, images(), method, seed=0, device=_CPU, feedback=Feedback(note=notes.append)
    )
    assert [r.kept for r in reports] == ["fitted"] * len(reports) and notes == []
    for path in ("conv", "last"):
        held, first = integer_codes(student.get_submodule(path), "weight"), made.weights[path].scale
        assert held is not None
        ratio = held[1].scale / first
        assert bool(((ratio > 0.5) & (ratio < 2)).all()) and bool((ratio != 1).any())


def _idle_in_training(bits: str) -> tuple[set[int], set[int]]:
    """Bits of the activation quantizers that were idle in training, and of the others, on a net with additions."""
    made, idle, busy = prepare("residual", bits), set[int](), set[int]()
    loss = GenieM.loss

    def watched(self: GenieM, block: nn.Module, *args: Any) -> torch.Tensor:
        for m in block.modules():
            if isinstance(m, ActFakeQuant):
                (idle if m.idle else busy).add(m.spec.bits)
        return loss(self, block, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GenieM, "loss", watched)
        student, _ = reconstruct_blocks(
            made.teacher,
            made.student,
            images(),
            GenieM(steps=2, batch_size=4),
            seed=0,
            device=_CPU,
            feedback=Feedback(),
        )
    assert not any(m.idle for m in student.modules() if isinstance(m, ActFakeQuant)), "afterwards all quantize again"
    return idle, busy


@pytest.mark.parametrize(
    ("bits", "idle", "busy"),
    [("w4a4", {8}, {4, 8}), ("w2a2", {8}, {2, 8}), ("w4a6", set(), {6, 8}), ("w4a8", set(), {8})],
)
def test_much_finer_grids_are_left_out_of_training(bits: str, idle: set[int], busy: set[int]):
    """Those of 8 bits beside 4; alone in a block, as behind the first layer, they are trained."""
    assert _idle_in_training(bits) == (idle, busy)


def test_an_element_is_from_the_teacher_with_the_probability_of_dropping():
    """QDrop, equation 8: of the block's input, and of every quantizer inside that is trained."""
    method, rng = GenieM(drop=0.25), make_rng(0, "drop")
    seen = dropped_input(method, torch.ones(200, 200), torch.zeros(200, 200), rng)
    assert float(seen.mean()) == pytest.approx(0.25, abs=0.01) and set(seen.unique().tolist()) == {0.0, 1.0}
    block = prepare("residual", "w4a4").student
    attach_soft(method, block, rng)
    drops = {m.drop for m in block.modules() if isinstance(m, ActFakeQuant) and not m.idle}
    assert drops == {0.25}


def test_annealing():
    """No penalty for a fifth of the training, then β from 20 to 2."""
    found = [annealed_beta(p, 0.2, 20.0, 2.0) for p in (0.0, 0.19, 0.2, 0.6, 1.0)]
    assert found[:2] == [None, None] and found[2:] == pytest.approx([20.0, 11.0, 2.0])


def test_soft_bits_are_faster_where_steps_are_few():
    assert [sped_up(1e-3, 20000, n) for n in (40000, 20000, 5000, 1000, 100)] == pytest.approx(
        [1e-3, 1e-3, 4e-3, 2e-2, 2e-2]
    )


def test_biases_are_trained_on_request():
    """At a rate relative to their mean size; at 0 no group has them."""
    counts = {}
    for rate in (0.0, 1e-2):
        block = prepare("residual", "w4a4").student
        groups = attach_soft(GenieM(), block, make_rng(0, "drop"), lr_bias=rate)
        biases = {id(p) for name, p in block.named_parameters() if name.endswith("bias.original")}
        mine = [g for g in groups if id(g["params"][0]) in biases]
        counts[rate] = len(mine)
        for group in mine:
            assert group["cosine"] and group["lr"] == pytest.approx(
                rate * float(group["params"][0].detach().abs().mean())
            )
    assert counts[0.0] == 0 and counts[1e-2] > 2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_soft_weights_and_their_gradients_are_those_of_the_formula(bits: int, symmetric: bool):
    """The weight, h(V) and the penalty, and what each sends back, against autograd on the equations as they stand."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 3.0, 0.1, 1.0]).view(4, 1, 1, 1)  # some beyond the range
    scale, zero = torch.full((4,), 2.5 / 2**bits), torch.full((4,), 0 if symmetric else -1, dtype=torch.int32)
    soft = SoftRound(weight, QParams(scale, zero, spec := QuantSpec(bits, True, symmetric, axis=0)))
    soft.gain.requires_grad_()
    with torch.no_grad():
        soft.v += 2 * torch.randn_like(soft.v)  # some of h are cut off at 0 and 1
    v, gain = (p.detach().clone().requires_grad_() for p in (soft.v, soft.gain))
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    z = zero.view(4, 1, 1, 1)
    base = torch.floor(weight / scale.view(4, 1, 1, 1)) + z
    expected = ((base + h).clamp(spec.qmin, spec.qmax) - z) * (scale * gain).view(4, 1, 1, 1)
    penalty = (1 - (2 * h - 1).abs().pow(7.5)).sum()
    toward = torch.randn_like(weight)
    (0.7 * penalty + (expected * toward).sum()).backward()

    found = soft(weight)
    assert torch.allclose(found, expected)
    cost = soft.penalty(7.5)
    assert torch.allclose(cost, penalty)
    (0.7 * cost + (found * toward).sum()).backward()
    for mine, theirs in ((soft.v.grad, v.grad), (soft.gain.grad, gain.grad)):
        assert mine is not None and theirs is not None and torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert torch.allclose(soft.penalty(7.5), penalty)  # without weights computed before

    soft(weight)
    with torch.no_grad():
        soft(weight)  # somebody looks at the weights in between
    soft.v.grad = None
    soft.penalty(7.5).backward()
    soft.v.grad, again = None, soft.v.grad
    soft(weight)
    soft.penalty(7.5).backward()  # the penalty alone
    assert again is not None and bool(again.any()) and torch.equal(again, soft.v.grad)
    two = soft(weight) + soft(weight)  # a layer that is called twice
    soft.v.grad = None
    (0.7 * soft.penalty(7.5) + (two * toward / 2).sum()).backward()
    assert soft.v.grad is not None and torch.allclose(soft.v.grad, v.grad, rtol=1e-4, atol=1e-6)


def test_without_a_penalty_soft_bits_are_trained_all_the_same():
    soft = SoftRound(
        torch.randn(4, 3), QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), QuantSpec(4, True, True, axis=0))
    )
    soft(torch.zeros(4, 3)).sum().backward()
    assert soft.v.grad is not None and bool((soft.v.grad > 0).any()) and soft.gain.grad is None
