"""Soft rounding: what is trained at which rate, what is dropped, and channels that differ in size."""

from typing import Any

import pytest
import torch
from torch import nn

from ptq.contracts import Feedback, make_rng
from ptq.quant.fake_quant import ActFakeQuant, integer_codes
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct._soft_round import annealed_beta, attach_soft, dropped_input, sped_up
from ptq.reconstruct.genie_m import GenieM
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
