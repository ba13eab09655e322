"""Integer kernels: one module per arithmetic of onnxruntime's, to the last bit.

Each reads and yields real numbers on grids, `s · (code - z)`, and computes on codes:

    layer     code = clamp(round(f32(Σ q_x q_w + b) · f32(s_x s_w / s_y)) + z_y); on [B, …, C], see `RequantizeSum`
    add       code = clamp(round(fma(A, s_a/s_y, fma(B, s_b/s_y, z_y - fma(s_a/s_y, z_a, s_b/s_y z_b)))))
    multiply  code = clamp(round(f32((A - z_a) (B - z_b) · f32(f32(s_a s_b) / s_y)) + z_y))
    mean      code = clamp(round(Σ q_x · f32(s_x / (s_y H W))) + z_y)
    average   code = clamp(round(f32(f32(Σ s_x q_x / n) / s_y) + z_y)), the sum in float32, row by row
    table     code = table[code_x]: any function of a single tensor

Where `z_y` stands inside the rounding, it is the stored zero point, see `stored_shift`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.quant.affine import QParams, along_axis, dequantize, quantize
from ptq.quant.fake_quant import integer_codes

_EXACT_IN_FLOAT32 = 2**24


def stored_shift(q: QParams) -> int:
    """What a file adds to the codes of an activation's grid, so that they are bytes; only sums feel it, by their rounding."""
    return 128 if q.spec.signed else 0


class _Quantizer(nn.Module):
    """The end of an integer kernel: a rescaled accumulator → a real number on the output's grid."""

    def __init__(self, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.q, self.bounds = QParams(q.scale.detach().clone(), q.zero_point.clone(), q.spec), bounds

    def finish(self, rounded: Tensor) -> Tensor:
        """Clamps codes (as float) and gives them their real values."""
        return (rounded.clamp(*self.bounds) - self.q.zero_point) * self.q.scale


class IntegerLayer(nn.Module):
    """A convolution or linear layer on codes: `[B, …]` on the input's grid → the int32 accumulator, in float64.

    path: where the layer stands in the network.
    """

    def __init__(self, layer: nn.Module, source: QParams, path: str) -> None:
        super().__init__()
        self.path = path
        held, bias = integer_codes(layer, "weight"), integer_codes(layer, "bias") if layer.bias is not None else None
        assert held is not None
        codes, q = held
        self.layer = layer
        weight = (codes - along_axis(q.zero_point, codes.ndim, q.spec.axis)).double()
        reach = float(weight.abs().flatten(1).sum(1).max()) * (source.spec.qmax - source.spec.qmin)
        # Sums of integers are exact in float32 up to 2^24, whatever their order; in float64 always.
        self.dtype = torch.float32 if reach < _EXACT_IN_FLOAT32 else torch.float64
        self.register_buffer("codes", weight.to(self.dtype))
        self.register_buffer("bias", None if bias is None else bias[0].double())
        self.register_buffer("source_scale", source.scale.detach().clone())
        self.register_buffer("scale", source.scale.detach() * q.scale.detach())

    def by_channel(self, v: Tensor) -> Tensor:
        """`v` [C], shaped to be multiplied with the accumulator: a convolution's channels are second, a linear layer's last."""
        return v.reshape(-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else v

    def forward(self, x: Tensor) -> Tensor:
        q = torch.round(x / self.source_scale).to(self.dtype)  # pyright: ignore[reportOperatorIssue]
        m = self.layer
        if isinstance(m, nn.Conv2d):
            total = F.conv2d(q, self.codes, None, m.stride, m.padding, m.dilation, m.groups).double()  # type: ignore[arg-type]
            total = total if self.bias is None else total + self.bias.view(1, -1, 1, 1)  # pyright: ignore[reportCallIssue]
        else:
            total = F.linear(q, self.codes).double()  # type: ignore[arg-type]
            total = total if self.bias is None else total + self.bias  # pyright: ignore[reportOperatorIssue]
        return total  # in float64, which holds every int32


class Requantize(_Quantizer):
    """Accumulator → the output's grid: round(acc · M) + z, M = f32(s_x s_w / s_y) per output channel."""

    def __init__(self, layer: "IntegerLayer", q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.register_buffer("multiplier", layer.by_channel(layer.scale / q.scale.detach()))  # type: ignore[operator]

    def forward(self, total: Tensor) -> Tensor:
        return self.finish(torch.round(total.float() * self.multiplier) + self.q.zero_point)  # pyright: ignore[reportOperatorIssue]


class RequantizeSum(_Quantizer):
    """Accumulator → the output's grid, of a linear layer with a bias on `[B, …, C]`: its bias is added in float.

    round(f32(f32(acc · s_x s_w) + b) / s_y) + z
    """

    def __init__(self, layer: "IntegerLayer", q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.register_buffer("scale", layer.scale)  # type: ignore[arg-type]
        self.register_buffer("bias", layer.layer.bias.detach().clone())  # type: ignore[operator, union-attr]
        layer.register_buffer("bias", None)

    def forward(self, total: Tensor) -> Tensor:
        real = total.float() * self.scale + self.bias  # pyright: ignore[reportOperatorIssue]
        return self.finish(torch.round(real / self.q.scale) + self.q.zero_point)


class Rescale(nn.Module):
    """Accumulator → float result: acc · s_x s_w."""

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.register_buffer("scale", layer.by_channel(layer.scale))  # type: ignore[arg-type]

    def forward(self, total: Tensor) -> Tensor:
        return total.float() * self.scale  # pyright: ignore[reportOperatorIssue]


class IntegerAdd(_Quantizer):
    """The sum of two tensors on grids of their own, as onnxruntime's QLinearAdd forms it, with fused multiply-adds."""

    def __init__(self, a: QParams, b: QParams, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.a, self.b = a, b
        self.ratio_a, self.ratio_b = (p.scale.detach() / q.scale.detach() for p in (a, b))
        # Rounded as the kernel does it, a product first, then a fused multiply-add: near a tie, the last bit decides.
        zero_a, zero_b, zero = (p.zero_point + stored_shift(p) for p in (a, b, q))
        shift = self.ratio_a.double() * zero_a + (self.ratio_b * zero_b).double()
        self.offset = zero - shift.float()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # A product of a byte and a float32 is exact in float64; one rounding to float32 makes it a fused multiply-add.
        codes_x, codes_y = (quantize(v, p) + stored_shift(p) for v, p in ((x, self.a), (y, self.b)))
        inner = (codes_y.double() * self.ratio_b.double() + self.offset.double()).float()
        outer = (codes_x.double() * self.ratio_a.double() + inner.double()).float()
        return self.finish(torch.round(outer) - stored_shift(self.q))


class IntegerMul(_Quantizer):
    """The product of two tensors on grids of their own, as onnxruntime's QLinearMul forms it, broadcast where they differ."""

    def __init__(self, a: QParams, b: QParams, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.a, self.b = a, b
        self.ratio = (a.scale.detach() * b.scale.detach()) / q.scale.detach()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        codes_x, codes_y = (quantize(v, p) - p.zero_point for v, p in ((x, self.a), (y, self.b)))
        shift = stored_shift(self.q)
        # Two roundings to float32, of the product and of the sum: near a tie, either may decide.
        total = (codes_x * codes_y).float() * self.ratio + (self.q.zero_point + shift).float()
        return self.finish(torch.round(total) - shift)


class IntegerMean(_Quantizer):
    """The mean over height and width, as onnxruntime's QLinearGlobalAveragePool forms it."""

    def __init__(self, source: QParams, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.source = source

    def total(self, x: Tensor) -> Tensor:
        """The accumulator, [B, C, 1, 1]."""
        return quantize(x, self.source).sum((2, 3), keepdim=True) - self.source.zero_point * x.shape[2] * x.shape[3]

    def multiplier(self, x: Tensor) -> Tensor:
        """What rescales the accumulator of so many pixels."""
        return self.source.scale / (self.q.scale * float(x.shape[2] * x.shape[3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.round(self.total(x).float() * self.multiplier(x)) + self.q.zero_point)


class IntegerAverage(_Quantizer):
    """The means of windows, as onnxruntime's QLinearAveragePool forms them: real numbers added one by one, row by row."""

    def __init__(self, pool: nn.AvgPool2d, source: QParams, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.pool, self.source = pool, source
        self.kernel, self.stride, self.padding = (_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding))

    def forward(self, x: Tensor) -> Tensor:
        m = self.pool
        shape = F.avg_pool2d(x[:1, :1], m.kernel_size, m.stride, m.padding, m.ceil_mode).shape[-2:]
        rows, columns = (self._counts(x.shape[axis + 2], shape[axis], axis) for axis in (0, 1))
        mean = self._sums(x, shape) / (rows[:, None] * columns)
        shift = stored_shift(self.q)
        return self.finish(torch.round(mean / self.q.scale + (self.q.zero_point + shift)) - shift)

    def _sums(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The sum of each window, [B, C, *shape]."""
        height, width = ((n - 1) * s + 1 for n, s in zip(shape, self.stride))  # spanned by the windows' first pixels
        (top, left), (kh, kw) = self.padding, self.kernel
        below, right = height + kh - 1 - top - x.shape[2], width + kw - 1 - left - x.shape[3]
        x = F.pad(x, (left, max(0, right), top, max(0, below)))
        total = torch.zeros(*x.shape[:2], *shape)
        for i in range(kh):
            for j in range(kw):
                total = total + x[:, :, i : i + height : self.stride[0], j : j + width : self.stride[1]]
        return total

    def _counts(self, length: int, windows: int, axis: int) -> Tensor:
        """How many pixels of a column (axis 0) or a row (1) each window averages, [windows]."""
        pad = self.padding[axis]
        first = torch.arange(windows) * self.stride[axis] - pad
        low, high = (-pad, length + pad) if self.pool.count_include_pad else (0, length)
        return (first + self.kernel[axis]).clamp_max(high) - first.clamp_min(low)


class IntegerTable(_Quantizer):
    """A function of one tensor, looked up: a byte has at most 256 codes.

    function: real numbers → real numbers, in float32, as the runtime computes it.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], source: QParams, q: QParams, bounds: tuple[int, int]
    ) -> None:
        super().__init__(q, bounds)
        self.source = source
        codes = torch.arange(source.spec.qmin, source.spec.qmax + 1, dtype=torch.int32)
        table = quantize(function(dequantize(codes, source)), self.q)
        self.register_buffer("table", table.clamp(*bounds))  # its first entry is for the least code

    def forward(self, x: Tensor) -> Tensor:
        index = quantize(x, self.source) - self.source.spec.qmin
        return self.finish(self.table[index].float())  # pyright: ignore[reportIndexIssue]


def _pair(v: Any) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else tuple(v)
