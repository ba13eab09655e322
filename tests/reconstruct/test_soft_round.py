"""Soft rounding where channels differ in size."""

from typing import Any

import pytest
import torch
from torch import nn

from ptq.contracts import Feedback
from ptq.quant.fake_quant import ActFakeQuant, integer_codes
from ptq.reconstruct._loop import reconstruct_blocks
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
