"""The modules that quantize inside a network.

`WeightFakeQuant` and `Dequantize` are torch parametrizations, so that a quantized layer stays an ordinary `nn.Conv2d`
or `nn.Linear`; `ActFakeQuant` is a module on a value of the graph.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ptq.quant.affine import QParams, dequantize, fake_quantize, quantize, stored_scale
from ptq.quant.masks import random_mask
from ptq.spec import QuantSpec

BIAS_LIMIT = 2**30  # half of int32: the accumulator itself needs room beside the bias


class _Grid(nn.Module):
    """A module with one integer grid: parameter `scale`, buffer `zero_point`, attribute `spec`."""

    def __init__(self, q: QParams) -> None:
        super().__init__()
        self.scale = nn.Parameter(q.scale.clone(), requires_grad=False)
        self.register_buffer("zero_point", q.zero_point.clone())
        self.spec: QuantSpec = q.spec

    @property
    def qparams(self) -> QParams:
        """The grid as it stands."""
        return QParams(self.scale, self.zero_point, self.spec)  # type: ignore[arg-type]


class ActFakeQuant(_Grid):
    """Fake-quantizes an activation `[B, …]`, per tensor.

    While `drop` > 0, each element stays float with that probability (QDrop, Wei et al., ICLR 2022, eq. 8);
    `mask_rng` then draws the mask. `frozen`: its scale is settled and no longer trained. `idle`: it gives back what it gets.
    """

    frozen: bool = False
    idle: bool = False
    drop: float = 0.0
    mask_rng: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.idle:
            return x
        skip = random_mask(x, self.drop, self.mask_rng) if self.drop > 0 else None
        return fake_quantize(x, self.qparams, skip)


class WeightFakeQuant(_Grid):
    """Parametrization of `weight`: the float weight rounded to the nearest code."""

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.qparams)


class Dequantize(_Grid):
    """Parametrization of a tensor that is stored as integer codes (the `original`): codes → real values."""

    def forward(self, codes: Tensor) -> Tensor:
        return dequantize(codes.to(torch.int32), self.qparams)


def weight_grid(layer: nn.Module) -> _Grid | None:
    """The module that holds the grid of `layer.weight`, or None where the weight is float."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return layer.parametrizations["weight"][0]  # type: ignore[index, return-value]


class FloatBias(nn.Module):
    """Parametrization of a bias that is still float."""

    def forward(self, bias: Tensor) -> Tensor:
        return bias


class _Rounded(torch.autograd.Function):
    """A bias on the accumulator's grid, in as few passes as there can be: there is one in every step for each layer."""

    @staticmethod
    def forward(ctx, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        step = input_scale * weight_scale
        return (bias / step).round_().clamp_(-BIAS_LIMIT, BIAS_LIMIT).mul_(step)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None, None


class BiasFakeQuant(nn.Module):
    """Parametrization of a float bias in training: rounded to the accumulator's grid as it stands, the gradient straight through.

    source: the quantizer of the layer's input. layer: the layer itself, whose weight's grid counts, whatever holds it.
    """

    def __init__(self, source: ActFakeQuant, layer: nn.Module) -> None:
        super().__init__()
        self.held = [source, layer]  # in a list: they are no parts of this module

    def forward(self, bias: Tensor) -> Tensor:
        source, layer = self.held
        return _Rounded.apply(bias, source.scale, weight_grid(layer).scale)  # type: ignore[union-attr, return-value]


def set_weight_fake_quant(layer: nn.Module, q: QParams) -> None:
    """Makes `layer.weight` fake-quantized to the nearest code, and its bias ready to become integer.

    Both are parametrized here, once, and only swapped afterwards: copies of a parametrized module share its class, so that
    adding or removing a parametrization on a copy would break the original.
    """
    parametrize.register_parametrization(layer, "weight", WeightFakeQuant(q))
    if layer.bias is not None:
        parametrize.register_parametrization(layer, "bias", FloatBias())


def swap(layer: nn.Module, name: str, module: nn.Module, original: Tensor | None = None) -> None:
    """Replaces the parametrization of `layer.<name>`, and the tensor it reads where one is given."""
    held = layer.parametrizations[name]  # type: ignore[index]
    held[0] = module  # pyright: ignore[reportArgumentType]
    if original is not None:
        held.original = nn.Parameter(original, requires_grad=False)  # pyright: ignore[reportAttributeAccessIssue]


def store_integer(layer: nn.Module, name: str, codes: Tensor, q: QParams) -> None:
    """Stores `layer.<name>` as integer codes, int8 (weights, with `stored_scale`) or int32 (biases); reading it then dequantizes
    them."""
    if name == "weight":
        swap(layer, name, Dequantize(replace(q, scale=stored_scale(q.scale, q.spec))), codes.to(torch.int8))
    else:
        swap(layer, name, Dequantize(q), codes.to(torch.int32))


def bias_params(input_scale: Tensor, weight_scale: Tensor) -> QParams:
    """The grid of an integer bias, s_x · s_w per output channel: the accumulator's own.

    The 32-bit codes do not pass through a `QuantSpec` of 32 bits, which no tensor of the plan has; its `bits` are unused.
    """
    scale = (input_scale * weight_scale).detach().clone()
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), QuantSpec(8, True, True, axis=0))


def store_integer_bias(layer: nn.Module, input_scale: Tensor, weight_scale: Tensor) -> None:
    """Rounds `layer.bias` to the accumulator's grid and stores its int32 codes. No bias: nothing happens."""
    bias = layer.bias
    if bias is None:
        return
    q = bias_params(input_scale, weight_scale)
    codes = torch.round(bias.detach().double() / q.scale.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)  # pyright: ignore[reportCallIssue]
    store_integer(layer, "bias", codes, q)


def integer_codes(layer: nn.Module, name: str) -> tuple[Tensor, QParams] | None:
    """Codes (int32) and grid of `layer.<name>`, or None where it is float.

    Works for stored integers and for fake-quantized float weights (nearest code).
    """
    if not parametrize.is_parametrized(layer, name):
        return None
    held = layer.parametrizations[name]  # type: ignore[index]
    grid, original = held[0], held.original  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(grid, Dequantize):
        return original.detach().to(torch.int32), grid.qparams
    return (quantize(original.detach(), grid.qparams), grid.qparams) if isinstance(grid, WeightFakeQuant) else None
