"""Cross-layer equalization: the same function, on channels of equal size."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ptq.graph.equalize import equalize
from ptq.graph.fold_bn import fold_batch_norm
from ptq.graph.ops import weighted_nodes
from ptq.graph.trace import trace
from tests.stages import assert_unchanged, fingerprint, prepare, relative_error, values
from tests.zoo import SHAPE, ZOO, images

_CPU = torch.device("cpu")


def _run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def _uneven(activation: nn.Module) -> nn.Sequential:
    """Channels whose weights differ by four orders of magnitude, one of them dead, behind each other and depthwise."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), activation, nn.Conv2d(8, 8, 3, padding=1, groups=8), copy.deepcopy(activation),
        nn.AvgPool2d(2), nn.Conv2d(8, 6, 1), copy.deepcopy(activation), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(),
        nn.Linear(4 * 36, 10),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight *= torch.logspace(-3, 1, 8).view(-1, 1, 1, 1)
        net[0].weight[5] = 0
        net[5].weight[:, 2] = 0
    return net


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1)], ids=lambda m: type(m).__name__)
def test_the_network_computes_what_it_did(activation: nn.Module):
    folded = fold_batch_norm(trace(_uneven(activation), SHAPE))
    before, x = fingerprint(folded), images()
    out, factors = equalize(folded, [x], _CPU)
    assert_unchanged(folded, before)
    old, new = values(folded, x), values(out, x)
    assert len(factors) == 7  # of all but the last convolution: the linear layer behind it reads pixels, not channels
    for name, s in factors.items():
        assert relative_error(new[name] * s.view(1, -1, 1, 1), old[name]) < 1e-5, name
    assert relative_error(_run(out, x), _run(folded, x)) < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_on_every_network(name: str):
    made = prepare(name)
    out, _ = equalize(made.folded, [images()], _CPU)
    assert relative_error(_run(out, images()), _run(made.folded, images())) < 1e-4


def test_channels_are_as_large_behind_as_before():
    folded = fold_batch_norm(trace(_uneven(nn.ReLU()), SHAPE))
    out, _ = equalize(folded, [images()], _CPU)
    first, second = (out.get_submodule(str(n.target)).weight.detach() for n in weighted_nodes(out)[:2])
    r1, r2 = first.abs().flatten(1).amax(1), second.abs().flatten(1).amax(1)
    alive = torch.arange(8) != 5
    assert r1[alive].tolist() == pytest.approx(r2[alive].tolist(), rel=0.05)
    assert float(r1[5]) == 0 and torch.isfinite(second).all()


def test_relu6_stays_where_it_cuts():
    """Pictures that drive half of the channels beyond 6: those channels keep their weights, and no other is pushed there."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight *= torch.tensor([1e-3, 1e-2, 0.1, 0.3, 20, 30, 40, 50]).view(-1, 1, 1, 1)
        net[2].weight *= torch.tensor([5.0, 1, 1, 1, 1, 1, 1, 1]).view(1, -1, 1, 1)
    folded = fold_batch_norm(trace(net, SHAPE))
    x = images()
    out, _ = equalize(folded, [x], _CPU)
    old, new = (gm.get_submodule("0").weight.detach().flatten(1) for gm in (folded, out))
    moved = ((old - new).abs().amax(1) > 1e-6 * old.abs().amax(1)).tolist()
    assert moved == [True, True, True, True, False, False, False, False]
    assert relative_error(_run(out, x), _run(folded, x)) < 1e-5


def test_weights_that_two_layers_share():
    """Scaled in place, they would be scaled for both."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3)
    )
    net[2].weight = net[0].weight
    with torch.no_grad():
        net[4].weight[:, 1] *= 20
    gm = fold_batch_norm(trace(net, SHAPE))
    equal, factors = equalize(gm, [images()], torch.device("cpu"))
    assert any(float((s - 1).abs().max()) > 0.5 for s in factors.values())
    assert relative_error(equal(images()), _run(net, images())) < 1e-5
