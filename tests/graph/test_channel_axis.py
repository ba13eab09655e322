"""Where channels are, behind every kind of layer."""

import pytest
import torch
from torch import Tensor, nn

from ptq.graph.channel_axis import channel_axis
from ptq.graph.ops import output_node
from ptq.graph.trace import trace


class _Tokens(nn.Module):
    """A patch embedding, then linear layers on `[B, H, W, C]` or `[B, tokens, C]`, and back."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.patches, self.norm, self.mix = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 10)
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        if self.stage == "conv":
            return x
        if self.stage == "stream":
            x = x.flatten(2).transpose(1, 2)
            return x + self.norm(x) * 2.0
        x = x.permute(0, 2, 3, 1)
        if self.stage == "permuted":
            return x
        if self.stage == "tokens":
            x = x.flatten(1, 2)
        x = self.mix(self.norm(x)) + 1.0
        return x.permute(0, 3, 1, 2) if self.stage == "back" else x


@pytest.mark.parametrize(
    ("stage", "axis", "channels"),
    [("conv", 1, 6), ("permuted", 3, 6), ("linear", 3, 10), ("tokens", 2, 10), ("back", 1, 10), ("stream", 2, 6)],
)
def test_axis(stage: str, axis: int, channels: int):
    gm = trace(_Tokens(stage), (3, 8, 8))
    node = output_node(gm)
    assert channel_axis(gm, node) == axis
    assert gm(torch.randn(2, 3, 8, 8)).shape[axis] == channels


def test_axis_of_scores_and_pooled_maps():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    gm = trace(net, (3, 8, 8))
    assert [channel_axis(gm, n) for n in gm.graph.nodes if n.op != "output"] == [1] * 6
