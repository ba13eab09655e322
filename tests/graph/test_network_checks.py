"""What a network must be: one line for whatever it is not, and what wraps it for training is taken off."""

import copy
import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from ptq.errors import ModelError
from ptq.graph.trace import trace
from tests.stages import relative_error
from tests.zoo import SHAPE, images


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, 5)).eval()


def _with(**held) -> nn.Sequential:
    net = _net()
    for name, thing in held.items():
        setattr(net, name, thing)
    return net


def _set(name: str, value: float) -> nn.Sequential:
    net = _net()
    tensor = {**dict(net.named_parameters()), **dict(net.named_buffers())}[name]
    tensor.data.view(-1)[0] = value
    return net


class _Failing(nn.Module):
    """A parametrization that works while gradients are asked for."""

    def forward(self, x):
        if torch.is_grad_enabled():
            return x
        raise RuntimeError("no")


def _parametrized(layer: nn.Module, how: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", how, unsafe=True)
    return layer


class NoInput(nn.Module):
    """Computes something from nothing."""

    def forward(self):
        return torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: _set("0.weight", float("nan")), r"0\.weight: 1 of 216 values are NaN"),
        (lambda: _set("5.bias", float("inf")), r"5\.bias: 1 of 5 values"),
        (lambda: _set("1.running_var", -1.0), r"1\.running_var: 1 of 8 values"),
        (lambda: _set("1.running_mean", float("nan")), r"1\.running_mean"),
        (lambda: _net().state_dict(), "an? OrderedDict given as the network"),
        (lambda: None, "NoneType given"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten()), r"0\.weight has no shape yet"),
        (lambda: _net().to("meta"), r"0\.weight is on the meta device"),
        (lambda: _with(lock=threading.Lock()), "cannot be copied"),
        (lambda: nn.Sequential(nn.ModuleDict({"lambda": nn.Conv2d(3, 8, 3)})["lambda"], _with(**{"class": nn.ReLU()})), r"1\.class"),
        (NoInput, "takes no input"),
        (lambda: nn.Sequential(OrderedDict(code=nn.Conv2d(3, 8, 3))), "module code has a name"),
        (lambda: nn.Sequential(OrderedDict(graph=nn.Conv2d(3, 8, 3))), "module graph has a name"),
        (lambda: _parametrized(nn.Conv2d(3, 8, 3), _Failing()), "parametrization of the network itself cannot"),
    ],
)  # fmt: skip
def test_what_it_is_not_is_said(make, says: str):
    with pytest.raises(ModelError, match=says) as caught:
        trace(make(), SHAPE)
    assert "\n" not in str(caught.value)


def _archive(net: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(net, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_parametrized_weights_are_baked_in(norm):
    torch.manual_seed(0)
    net = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Linear(14, 5))).eval()
    with torch.no_grad():
        wanted = net(images(3))
        traced = trace(net, SHAPE)
        assert relative_error(traced(images(3)), wanted) < 1e-5
        assert torch.equal(net(images(3)), wanted), "the user's network stays as it is"
        assert relative_error(trace(net, SHAPE)(images(3)), wanted) < 1e-5, "and can be traced again"
    assert type(traced.get_submodule("0")) is nn.Conv2d
    twin = norm(nn.Conv2d(3, 3, 3, padding=1))
    twice = nn.Sequential(twin, copy.deepcopy(twin)).eval()
    with torch.no_grad():
        assert relative_error(trace(twice, SHAPE)(images(3)), twice(images(3))) < 1e-5


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, _archive, AveragedModel])
def test_what_wraps_it_is_taken_off(wrap):
    with torch.no_grad():
        assert relative_error(trace(wrap(_net()), SHAPE)(images(3)), _net()(images(3))) < 1e-5


def test_an_infinite_mask_is_no_broken_weight():
    net = _net()
    net.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    with torch.no_grad():
        assert relative_error(trace(net, SHAPE)(images(3)), net(images(3))) < 1e-5
