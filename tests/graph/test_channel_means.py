"""What BatchNorm parameters tell of means."""

import math

import pytest
import torch
from torch import nn

from ptq.graph.channel_means import clipped_mean, expected_means
from ptq.graph.trace import trace
from tests.stages import prepare
from tests.zoo import SHAPE


@pytest.mark.parametrize("top", [math.inf, 6.0])
def test_mean_of_a_clipped_normal(top: float):
    """Against a million draws."""
    beta, gamma = torch.tensor([-2.0, 0.0, 1.0, 5.0]), torch.tensor([1.0, 2.0, 0.5, 3.0])
    draws = beta + gamma * torch.randn(1_000_000, 4, generator=torch.Generator().manual_seed(0))
    expected = draws.clamp(0, top).mean(0)
    assert clipped_mean(beta.double(), gamma.double(), top).tolist() == pytest.approx(expected.tolist(), abs=0.01)


def test_follows_values_through_the_network():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 5, 1),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    )
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 1.0]))
        net[1].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    gm = trace(net.eval(), SHAPE)
    nodes = {str(n.target): n.meta["value"] for n in gm.graph.nodes if n.op == "call_module"}
    found = expected_means(gm)
    assert found[nodes["1"]].tolist() == [0.0, 1.0, -1.0, 3.0]
    assert float(found[nodes["2"]][0]) == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-6)
    assert torch.equal(found[nodes["3"]], found[nodes["2"]])
    assert nodes["4"] not in found and nodes["5"] not in found  # no BatchNorm tells of them


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_one_mean_per_channel(name: str):
    made = prepare(name)
    shapes = {n.meta["value"]: n.meta["shape"] for n in made.teacher.graph.nodes if n.meta.get("value") is not None}
    found = expected_means(made.teacher)
    assert found and all(len(v) == shapes[k][0] and bool(torch.isfinite(v).all()) for k, v in found.items())
