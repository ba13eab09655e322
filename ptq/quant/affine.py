"""Uniform affine quantization as pure tensor functions.

    code = clamp(round_half_even(x / s) + z, qmin, qmax)        x̂ = s * (code - z)

The division and the rounding are those of ONNX QuantizeLinear, so simulation and runtime agree on every tie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptq.spec import QuantSpec

_INSIDE = 0.5001  # steps that rounding moves a value inside the range, and what float32 adds


@dataclass(frozen=True, slots=True)
class QParams:
    """One tensor's grid: `scale` ([] or [C], float32, > 0), `zero_point` (same shape, int32), `spec`."""

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def to(self, device: torch.device) -> "QParams":
        """The same grid on another device."""
        return QParams(self.scale.to(device), self.zero_point.to(device), self.spec)


def along_axis(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """`values` ([] or [C]) shaped to broadcast along dimension `axis` of an `ndim`-dimensional tensor."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scales of weights as they are stored: of fewer than 8 bits, rounded to half precision (11 significant bits), in which files
    and accelerators hold them beside such weights. What its normal numbers do not reach stays what it is."""
    if spec.bits >= 8:
        return scale
    half = torch.finfo(torch.float16)
    return torch.where((scale >= half.tiny) & (scale <= half.max), scale.half().float(), scale)


def quantize(x: Tensor, q: QParams) -> Tensor:
    """Integer codes of `x` (int32, same shape)."""
    s = along_axis(q.scale, x.ndim, q.spec.axis)
    z = along_axis(q.zero_point, x.ndim, q.spec.axis)
    return (torch.round(x / s) + z).clamp(q.spec.qmin, q.spec.qmax).to(torch.int32)


def dequantize(codes: Tensor, q: QParams) -> Tensor:
    """Real values (float32) of integer codes."""
    s = along_axis(q.scale, codes.ndim, q.spec.axis)
    z = along_axis(q.zero_point, codes.ndim, q.spec.axis)
    return (codes - z).to(torch.float32) * s


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize. Gradient: straight-through inside the range for x, LSQ's for the scale.

    Elements where `skip` is 1 stay as they are and let the gradient through.

    Ref: Esser et al., LSQ, ICLR 2020, eq. 3. Differs: inside is what rounds to a code of the grid, half a step more at either end
    than there, as the value itself is rounded first and clamped then; a ten-thousandth of a step beyond counts as inside.
    """

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, z: Tensor | None, qmin: int, qmax: int, skip: Tensor | None) -> Tensor:
        out = (x / s).round_()  # one tensor, passed over in place: these are what a step of training waits for
        out = out.clamp_(qmin, qmax) if z is None else out.add_(z).clamp_(qmin, qmax).sub_(z)
        out.mul_(s)
        if skip is not None:
            out.lerp_(x, skip)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, s, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        x, s, out = ctx.saved_tensors
        error = out - x  # at most half a step inside, 0 where skipped
        # ∂x̂/∂s = (x̂ - x · [inside]) / s: round(v) - v inside, the clamped code outside, 0 where skipped. In two sums, of which
        # the first has no large parts that cancel, and the second none inside.
        grad_s = sum_of_products(grad, error, s.shape) if ctx.needs_input_grad[1] else None
        if s.numel() == 1 and s.device.type == "cpu":  # reading a number off a GPU would wait for it
            half = _INSIDE * float(s.detach())
        else:
            error, half = error.div_(s), _INSIDE
        # One pass that writes floats: comparing into booleans costs as much as ten of the other operations here.
        grad_x = torch.ops.aten.hardtanh_backward.grad_input(grad, error, -half, half, grad_input=error)
        if grad_s is not None:
            grad_s = (grad_s + sum_of_products(grad - grad_x, x, s.shape)) / s
        return grad_x if ctx.needs_input_grad[0] else None, grad_s, None, None, None, None


def sum_of_products(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Σ a · b over all dimensions in which `shape` has but one index, or none."""
    if shape.numel() == 1 and a.stride() == b.stride() and a.dtype == b.dtype and in_one_piece(a):
        a, b = (t.as_strided((t.numel(),), (1,)) for t in (a, b))  # in the order in which they lie
        return torch.dot(a, b).reshape(shape)  # no tensor of products in between
    return (a * b).sum_to_size(shape)


def in_one_piece(x: Tensor) -> bool:
    """Whether a tensor's elements fill a stretch of memory, as those of images and activations do."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def fake_quantize(x: Tensor, q: QParams, skip: Tensor | None = None) -> Tensor:
    """`dequantize(quantize(x))` in float32, with gradients to `x` and, where it asks for them, to `q.scale`.

    skip: same shape as `x`, of its dtype, 1 where an element stays float and 0 elsewhere.
    """
    x = x.float()  # what layers give in bfloat16 is too coarse to be told from its code
    skip = None if skip is None else skip.float()
    s = along_axis(q.scale, x.ndim, q.spec.axis)
    z = None if _zero(q) else along_axis(q.zero_point, x.ndim, q.spec.axis).float()
    return _FakeQuantize.apply(x, s, z, q.spec.qmin, q.spec.qmax, skip)  # type: ignore[return-value]


def _zero(q: QParams) -> bool:
    """Whether the zero point is known to be 0, so that it need not be added; looking at one on a GPU would wait for it."""
    return q.spec.symmetric or (q.zero_point.device.type == "cpu" and not bool(q.zero_point.any()))
