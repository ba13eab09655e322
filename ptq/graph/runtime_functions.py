"""Float operations as onnxruntime computes them on x86, to the last bit.

Between quantized tensors some operations stay float. Torch computes the same functions by other formulas; a last bit that
differs turns into a step of the grid now and then. Here is the runtime's own arithmetic: rational approximations evaluated with
fused multiply-adds, clipped to where they hold,

    sigmoid(x) = x P(x²) / Q(x²) + ½,  |x| ≤ 18        tanh(x) = x P(x²) / Q(x²),  |x| ≤ 9

and plain float32 products and sums elsewhere, each rounded.

Ref: Eigen's `generic_fast_tanh_float` and `scalar_logistic_op`, whose coefficients onnxruntime's MLAS takes over.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.graph.layers import ResizeBilinear
from ptq.quant.affine import QParams, quantize

# Coefficients of P and Q, highest power first.
_SIGMOID_P = (
    4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01,
)  # fmt: skip
_SIGMOID_Q = (
    6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01,
    9.93151921023180e-01,
)  # fmt: skip
_TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
    6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise."""
    return (_rational(x.clamp(-18, 18), _SIGMOID_P, _SIGMOID_Q) + 0.5).clamp(0, 1)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent, elementwise."""
    return _rational(x.clamp(-9, 9), _TANH_P, _TANH_Q)


def hard_sigmoid(x: Tensor) -> Tensor:
    """clamp(x / 6 + ½, 0, 1), by a product with 1/6 in float32."""
    return (x * torch.tensor(1 / 6, dtype=torch.float32) + 0.5).clamp(0, 1)


def _rational(x: Tensor, p: tuple[float, ...], q: tuple[float, ...]) -> Tensor:
    square = x * x
    return x * _horner(square, p) / _horner(square, q)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """A polynomial in float32, by fused multiply-adds: a product of two float32 is exact in float64."""
    first, *rest = (torch.tensor(c, dtype=torch.float32) for c in coefficients)
    total = first.expand_as(x)
    for c in rest:
        total = (total.double() * x.double() + c.double()).float()
    return total


class ChannelAffine(nn.Module):
    """A BatchNorm on stored statistics: a product and a sum per channel, each rounded, `[B, C, …]`."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        ones = torch.ones_like(norm.running_var)
        weight, bias = (norm.weight, norm.bias) if norm.affine else (ones, 0 * ones)
        # By way of float64: torch's root in float32 is not always the nearest.
        deviation = (norm.running_var + norm.eps).double().sqrt().float()
        scale = 1 / deviation * weight.detach()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", bias.detach() - norm.running_mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (self.scale, self.shift))  # pyright: ignore[reportCallIssue]
        return x * scale + shift  # pyright: ignore[reportOperatorIssue]


class Elementwise(nn.Module):
    """A function of every element."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class CodeMean(nn.Module):
    """The mean over height and width of a tensor on a grid, as a real number: the codes' mean times their scale.

    A sum of codes is exact in whatever order it is formed, which for real numbers depends on the processor.
    """

    def __init__(self, source: QParams) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        total = (quantize(x, self.source) - self.source.zero_point).sum((2, 3), keepdim=True)
        return total.float() / (x.shape[2] * x.shape[3]) * self.source.scale


def resize_scale(length: int, size: int) -> np.float32:
    """The float32 scale that brings `length` to `size` pixels in onnxruntime, which multiplies in float32, and in the checker,
    which does in float64."""
    scale = np.float32(size / length)
    while int(np.float32(length) * scale) < size or int(length * float(scale)) < size:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale


class WindowMeans(nn.Module):
    """Means over windows of different sizes, `size` (height, width): products with one matrix for rows and one for columns, their
    terms added one by one by fused multiply-adds."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (window_weights(n, size) for n, size in zip(x.shape[-2:], self.size))
        narrow = _chain(x.transpose(2, 3), rows).transpose(2, 3)
        return _chain(narrow, columns)


def window_weights(length: int, size: int) -> Tensor:
    """What every pixel counts in the mean of every window, [length, size]."""
    return F.adaptive_avg_pool1d(torch.eye(length)[None], size)[0]


def _chain(x: Tensor, weights: Tensor) -> Tensor:
    """x @ weights, [..., length] · [length, size], in float32."""
    total = torch.zeros(*x.shape[:-1], weights.shape[1])
    for k in range(len(weights)):
        total = (x[..., k : k + 1].double() * weights[k].double() + total.double()).float()
    return total


class FourPixels(nn.Module):
    """Bilinear interpolation to `size` (height, width): four products, added one after the other."""

    def __init__(self, resize: ResizeBilinear) -> None:
        super().__init__()
        self.size, self.align_corners = resize.size, resize.align_corners

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom, down, up), (left, right, after, before) = (
            self._weights(x.shape[axis + 2], axis) for axis in (0, 1)
        )
        down, up = down[:, None], up[:, None]
        upper, lower = x[:, :, top], x[:, :, bottom]
        total = before * up * upper[..., left] + after * up * upper[..., right]
        return total + before * down * lower[..., left] + after * down * lower[..., right]

    def _weights(self, length: int, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every output row (axis 0) or column (1): the two pixels beside it, and how far it is from each."""
        size, at = self.size[axis], torch.arange(self.size[axis], dtype=torch.float32)
        if self.align_corners and size != length:
            at = at * (length - 1) / max(1, size - 1)
        elif size != length:
            at = (at + 0.5) / float(resize_scale(length, size)) - 0.5
        at = at.clamp(0, length - 1)
        first = at.long().clamp_max(length - 1)
        second = (first + 1).clamp_max(length - 1)
        halves = torch.full_like(at, 0.5)  # at the far end both are the same pixel
        near, far = (torch.where(first == second, halves, (at - k).abs()) for k in (first, second))
        return first, second, near, far
