"""The modules that quantize inside a network."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ptq.contracts import make_rng
from ptq.quant.affine import QParams, dequantize, fake_quantize, quantize
from ptq.quant.fake_quant import (
    ActFakeQuant,
    BiasFakeQuant,
    integer_codes,
    set_weight_fake_quant,
    store_integer,
    store_integer_bias,
    swap,
    weight_grid,
)
from ptq.quant.ranges import minmax
from ptq.spec import QuantSpec

LAYERS = {
    "conv": lambda: nn.Conv2d(3, 8, 3), "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "no bias": lambda: nn.Conv2d(3, 8, 1, bias=False), "linear": lambda: nn.Linear(12, 5),
}  # fmt: skip
WEIGHT_SPECS = [QuantSpec(bits, True, symmetric, axis=0) for bits in (2, 4, 8) for symmetric in (True, False)]


def _layer(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return LAYERS[name]().requires_grad_(False)


def _quantized(name: str, spec: QuantSpec = WEIGHT_SPECS[2]) -> tuple[nn.Module, QParams, Tensor]:
    """The layer, the grid of its weight, and its float weight."""
    layer = _layer(name)
    weight = layer.weight.detach().clone()
    q = minmax(weight, spec)
    set_weight_fake_quant(layer, q)
    return layer, q, weight


@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_weight_is_rounded_to_nearest(name: str, spec: QuantSpec):
    bias = _layer(name).bias
    layer, q, weight = _quantized(name, spec)
    assert isinstance(layer, type(_layer(name)))
    assert torch.equal(layer.weight, fake_quantize(weight, q))
    codes, grid = integer_codes(layer, "weight")
    assert torch.equal(codes, quantize(weight, q)) and grid.spec == spec
    assert integer_codes(layer, "bias") is None
    assert bias is None or torch.equal(layer.bias, bias)


@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_store_integer_round_trip(name: str, spec: QuantSpec):
    layer, q, weight = _quantized(name, spec)
    codes = quantize(weight, q)
    store_integer(layer, "weight", codes, q)
    found, grid = integer_codes(layer, "weight")
    assert torch.equal(found, codes) and found.dtype == torch.int32
    assert torch.equal(grid.scale, q.scale) and torch.equal(grid.zero_point, q.zero_point) and grid.spec == spec
    assert torch.equal(layer.weight, dequantize(codes, q))
    stored = [t for t in layer.state_dict().values() if t.shape == weight.shape]
    assert [t.dtype for t in stored] == [torch.int8]  # the float weight is gone


def test_float_layers_have_no_codes():
    layer = _layer("conv")
    assert weight_grid(layer) is None
    assert integer_codes(layer, "weight") is None and integer_codes(layer, "bias") is None


def test_integer_bias_lies_on_the_accumulators_grid():
    layer, q, _ = _quantized("conv")
    bias = layer.bias.detach().clone()
    store_integer_bias(layer, torch.tensor(0.03), q.scale)
    codes, grid = integer_codes(layer, "bias")
    step = torch.tensor(0.03) * q.scale
    assert torch.equal(grid.scale, step) and not grid.zero_point.any()
    assert torch.equal(codes, torch.round(bias.double() / step.double()).int())
    assert torch.equal(layer.bias, codes.float() * step)
    assert [t.dtype for k, t in layer.state_dict().items() if k.endswith("bias.original")] == [torch.int32]


def test_integer_bias_leaves_the_accumulator_room():
    layer, q, _ = _quantized("linear")
    layer.parametrizations["bias"].original.data.fill_(1e9)
    store_integer_bias(layer, torch.tensor(1e-3), q.scale)
    assert int(integer_codes(layer, "bias")[0].max()) == 2**30


@pytest.mark.parametrize("scale", [0.03, 3.0, 1e-12])
def test_bias_in_training_is_what_will_be_stored(scale: float):
    layer, q, _ = _quantized("conv")
    source = ActFakeQuant(QParams(torch.tensor(1.0), torch.tensor(0), QuantSpec(8, False, False)))
    swap(layer, "bias", BiasFakeQuant(source, layer))
    source.scale.data.fill_(scale)  # the grid as it stands counts, not as it was
    held = layer.parametrizations["bias"].original.requires_grad_(True)
    now = layer.bias
    now.sum().backward()
    assert torch.equal(held.grad, torch.ones_like(held))
    assert len(list(layer.parameters())) == 3, "weight, its scale, bias: the quantizer of the input is not its part"
    store_integer_bias(layer, source.scale.detach(), q.scale)
    assert torch.equal(now.detach(), layer.bias)


def test_no_bias_stays_no_bias():
    layer, q, _ = _quantized("no bias")
    store_integer_bias(layer, torch.tensor(0.03), q.scale)
    assert layer.bias is None


@pytest.mark.parametrize("first", ["copy", "original"])
@pytest.mark.parametrize("name", LAYERS)
def test_copies_are_independent(name: str, first: str):
    """Copies of a parametrized layer share its class: hardening one must leave the other as it was."""
    layer, q, _ = _quantized(name)
    other = copy.deepcopy(layer)
    hardened, kept = (other, layer) if first == "copy" else (layer, other)
    weight, bias = kept.weight.clone(), None if kept.bias is None else kept.bias.clone()
    changed = QParams(q.scale * 2, q.zero_point, q.spec)
    store_integer(hardened, "weight", torch.ones_like(kept.weight), changed)
    store_integer_bias(hardened, torch.tensor(0.5), changed.scale)
    assert torch.equal(kept.weight, weight) and (bias is None or torch.equal(kept.bias, bias))
    assert torch.equal(hardened.weight, dequantize(torch.ones_like(weight).int(), changed))
    assert not torch.equal(hardened.weight, weight)
    assert integer_codes(kept, "bias") is None
    x = torch.randn(2, *((12,) if name == "linear" else (kept.in_channels, 6, 6)))
    assert not torch.equal(kept(x), hardened(x))


def test_scales_of_copies_are_independent():
    layer, q, _ = _quantized("conv")
    other = copy.deepcopy(layer)
    weight_grid(other).scale.data.mul_(2)
    assert torch.equal(weight_grid(layer).scale, q.scale)


def test_activation_quantizer(device: torch.device):
    q = QParams(torch.tensor(0.1), torch.tensor(4, dtype=torch.int32), QuantSpec(4, False, False))
    module, x = ActFakeQuant(q).to(device), torch.randn(2, 3, 4, 4).to(device)
    assert torch.equal(module(x), fake_quantize(x, q.to(device)))
    assert not module(x).requires_grad
    module.scale.requires_grad_()
    module(x).sum().backward()
    assert module.scale.grad is not None


def test_drop_keeps_some_elements_float(device: torch.device):
    q = QParams(torch.tensor(0.3), torch.tensor(0, dtype=torch.int32), QuantSpec(4, False, True))
    module, x = ActFakeQuant(q).to(device), torch.rand(8, 4, 16, 16).to(device)
    module.drop, module.mask_rng = 0.5, make_rng(0, "drop", device)
    out, rounded = module(x), fake_quantize(x, q.to(device))
    assert bool(((out == x) | (out == rounded)).all())
    # 8192 draws: 5 standard deviations of a fair coin are 0.028.
    assert float((out == x).float().mean()) == pytest.approx(0.5, abs=0.028)
