"""Folding keeps what the network computes, value by value."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq.graph.fold_bn import fold_batch_norm, fold_error, unfolded
from ptq.graph.layers import AddConstant, MulConstant
from ptq.graph.ops import weighted_nodes
from ptq.graph.trace import trace
from tests.stages import assert_unchanged, fingerprint, relative_error, values
from tests.zoo import SHAPE, ZOO, build, images

# One rounding of each weight and other sums: some float32 steps of 6e-8 per layer, over a handful of layers.
_RELATIVE = 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_outputs_are_preserved(name: str, device: torch.device):
    teacher = trace(build(name), SHAPE).to(device)
    x = images(32, seed=1).to(device)
    folded = fold_batch_norm(teacher)
    with torch.no_grad():
        error = relative_error(folded(x), teacher(x))
    assert error < _RELATIVE
    assert fold_error(teacher, folded, x) == pytest.approx(error)


def _trained(net: nn.Module) -> nn.Module:
    """With statistics and parameters of its own in every norm."""
    torch.manual_seed(0)
    for module in net.modules():
        for name, low, high in (("running_mean", -1, 1), ("running_var", 0.3, 3), ("weight", 0.3, 3), ("bias", -1, 1)):
            if hasattr(module, "running_var"):
                getattr(module, name).data.uniform_(low, high)
    return net.eval()


class FrozenNorm(nn.Module):
    """BatchNorm as detection networks have it: buffers and arithmetic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            v.reshape(1, -1, 1, 1) for v in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenNorm])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 6, 3, groups=3), nn.ConvTranspose2d(3, 6, 2, 2), nn.ConvTranspose2d(3, 6, 3, groups=3, bias=False)],
    ids=["conv", "transposed", "transposed, in groups"],
)
def test_norms_in_a_row_and_frozen_ones_are_folded(layer: nn.Module, norm):
    net = _trained(nn.Sequential(layer, norm(6), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    teacher = trace(net, SHAPE)
    folded = fold_batch_norm(teacher)
    kinds = [type(folded.get_submodule(str(n.target))) for n in folded.graph.nodes if n.op == "call_module"]
    assert kinds == [type(layer), nn.ReLU, nn.Conv2d]
    assert fold_error(teacher, folded, images(8)) < _RELATIVE
    with torch.no_grad():
        assert relative_error(folded(images(8)), net(images(8))) < _RELATIVE


@pytest.mark.parametrize("name", ZOO)
def test_every_value_is_the_teachers(name: str):
    teacher = trace(build(name), SHAPE)
    folded = fold_batch_norm(teacher)
    expected, got = (values(gm, images()) for gm in (teacher, folded))
    assert set(got) <= set(expected)
    errors = {name: relative_error(x, expected[name]) for name, x in got.items()}
    assert {name: error for name, error in errors.items() if error > _RELATIVE} == {}


@pytest.mark.parametrize("name", ZOO)
def test_only_batch_norms_without_a_layer_before_them_stay(name: str):
    teacher = trace(build(name), SHAPE)
    left = ["blocks.0.bn1", "blocks.1.bn1", "bn"] if name == "pre_activation" else []
    folded = fold_batch_norm(teacher)
    assert unfolded(folded) == left
    # Modules that no node calls are gone from the copy.
    assert [k for k, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == left


@pytest.mark.parametrize("name", ZOO)
def test_argument_is_unchanged(name: str):
    teacher = trace(build(name), SHAPE)
    before = fingerprint(teacher)
    folded = fold_batch_norm(teacher)
    assert_unchanged(teacher, before)
    for node in weighted_nodes(folded):
        folded.get_submodule(str(node.target)).weight.data.zero_()
    assert_unchanged(teacher, before)


@pytest.mark.parametrize("name", ZOO)
def test_folding_twice_changes_nothing_more(name: str):
    folded = fold_batch_norm(trace(build(name), SHAPE))
    assert_unchanged(fold_batch_norm(folded), fingerprint(folded))


def test_weights_are_those_of_the_formula():
    """W' = W · γ/√(σ²+ε), b' = (b - μ) · γ/√(σ²+ε) + β; here for a grouped convolution with a bias."""
    net = build("grouped")
    conv, norm = net[3], net[4]
    folded = fold_batch_norm(trace(net, SHAPE)).get_submodule("3")
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = conv.weight.double() * gain.view(-1, 1, 1, 1)
    bias = (conv.bias.double() - norm.running_mean.double()) * gain + norm.bias.double()
    assert torch.equal(folded.weight, weight.float()) and torch.equal(folded.bias, bias.float())
    assert not folded.weight.requires_grad and not folded.bias.requires_grad


class Pair(nn.Module):
    """A layer f and a BatchNorm g, and how they are called: `body(f, g, x)`; one behind the other by default."""

    def __init__(self, layer: nn.Module, norm: nn.Module, body: Callable | None = None) -> None:
        super().__init__()
        self.layer, self.norm, self.body = layer, norm, body or (lambda f, g, x: g(f(x)))
        for p in (norm.running_mean, norm.running_var):
            p.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.layer, self.norm, x)


def _also_read(f: nn.Module, g: nn.Module, x: Tensor) -> Tensor:
    y = f(x)
    return g(y) * y


class Scaled(nn.Module):
    """A residual branch whose end is scaled, as EDSR and networks with a layer scale do; nothing but the folded layers stays."""

    def __init__(self, layer: nn.Module, body: Callable, *shape: int) -> None:
        super().__init__()
        self.layer, self.body = layer, body
        self.scale = nn.Parameter(10 ** torch.linspace(-2, 0.5, max(1, *shape, 0)).reshape(shape or (1,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.layer, self.scale, x)


SCALED = {
    "a number": lambda: Scaled(nn.Conv2d(3, 3, 3, padding=1), lambda f, g, x: x + (f(x) * 0.1 + 1)),
    "channels of a convolution": lambda: Scaled(nn.Conv2d(3, 3, 1), lambda f, g, x: x + g * f(x), 3, 1, 1),
    "channels of tokens": lambda: Scaled(
        nn.Linear(3, 3), lambda f, g, x: x.flatten(2).transpose(1, 2) + g * f(x.flatten(2).transpose(1, 2)), 3
    ),
}
UNSCALED = {
    "behind a permutation": lambda: Scaled(
        nn.Linear(3, 3), lambda f, g, x: x + g * f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 3, 1, 1
    ),
    "columns": lambda: Scaled(nn.Conv2d(3, 3, 1), lambda f, g, x: x + g * f(x), 16),
    "tokens": lambda: Scaled(nn.Linear(3, 3), lambda f, g, x: x.flatten(2).mT + g * f(x.flatten(2).mT), 256, 1),
    "read elsewhere": lambda: Scaled(nn.Conv2d(3, 3, 1), lambda f, g, x: (y := f(x)) + g * y, 3, 1, 1),
}


@pytest.mark.parametrize(("cases", "left"), [(SCALED, 0), (UNSCALED, 1)], ids=["folded", "kept"])
def test_products_with_constants(cases: dict, left: int):
    for case, net in cases.items():
        teacher = trace(net(), SHAPE)
        folded = fold_batch_norm(teacher)
        kept = [m for m in folded.modules() if isinstance(m, MulConstant | AddConstant)]
        assert len(kept) == left and fold_error(teacher, folded, images()) < _RELATIVE, case
        wanted, found = values(teacher, images()), values(folded, images())
        assert found.keys() <= wanted.keys(), case
        assert all(relative_error(found[name], wanted[name]) < _RELATIVE for name in found), case


FOLDED = {
    "with an epsilon of its own": lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1)),
    "without affine parameters": lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "behind a linear layer": lambda: Pair(nn.Linear(768, 6), nn.BatchNorm1d(6), lambda f, g, x: g(f(x.flatten(1)))),
    "on a network's only layer": lambda: Pair(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)),
}
KEPT = {
    "before the layer": lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(3), lambda f, g, x: f(g(x))),
    "whose input is read elsewhere": lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), _also_read),
    "behind a ReLU": lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), lambda f, g, x: g(f(x).relu())),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folds(case: str):
    teacher = trace(FOLDED[case](), SHAPE)
    folded = fold_batch_norm(teacher)
    assert unfolded(folded) == [] and fold_error(teacher, folded, images()) < _RELATIVE


@pytest.mark.parametrize("case", KEPT)
def test_keeps(case: str):
    teacher = trace(KEPT[case](), SHAPE)
    folded = fold_batch_norm(teacher)
    assert unfolded(folded) == ["norm"] and fold_error(teacher, folded, images()) == 0


def test_small_variances_cost_no_digits():
    """Channels that were constant in training: the division is by √ε."""
    net = Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    net.norm.running_var.copy_(torch.tensor([0.0, 1e-30, 1e-12, 1e-6, 1.0, 1e6]))
    teacher = trace(net, SHAPE)
    assert fold_error(teacher, fold_batch_norm(teacher), images()) < _RELATIVE
