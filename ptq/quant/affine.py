"""Uniform affine quantization as pure tensor functions.

    code = clamp(round_half_even(x / s) + z, qmin, qmax)        x̂ = s * (code - z)

The division and the rounding are those of ONNX QuantizeLinear, so simulation and runtime agree on every tie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.spec import QuantSpec


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
    than there, as the value itself is rounded first and clamped then.
    """

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, z: Tensor | None, qmin: int, qmax: int, skip: Tensor | None) -> Tensor:
        code, train = x / s, any(ctx.needs_input_grad)  # the code, not yet rounded
        if train and skip is not None:
            code.addcmul_(code, skip, value=-1)  # 0, a code inside: the gate in `backward` is then open where skipped
        if z is None:
            out = (code.round() if train else code.round_()).clamp_(qmin, qmax).mul_(s)
        else:
            shifted = code + z if train else None
            out, code = code.round_().add_(z).clamp_(qmin, qmax).sub_(z).mul_(s), shifted
        if skip is not None:
            out.lerp_(x, skip)
        if train:
            ctx.save_for_backward(x, s, code, out)
            ctx.ends = qmin - 0.5, qmax + 0.5
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        x, s, code, out = ctx.saved_tensors
        # One pass that writes floats: comparing into booleans costs as much as ten of the other operations here.
        grad_x = torch.ops.aten.hardtanh_backward(grad, code, *ctx.ends)
        grad_s = None
        if ctx.needs_input_grad[1]:
            # ∂x̂/∂s = (x̂ - x · [inside]) / s: round(v) - v inside, the clamped code outside, 0 where skipped.
            grad_s = (grad * out).addcmul_(grad_x, x, value=-1).sum_to_size(s.shape) / s
        return grad_x if ctx.needs_input_grad[0] else None, grad_s, None, None, None, None


def fake_quantize(x: Tensor, q: QParams, skip: Tensor | None = None) -> Tensor:
    """`dequantize(quantize(x))` in float32, with gradients to `x` and, where it asks for them, to `q.scale`.

    skip: same shape as `x`, of its dtype, 1 where an element stays float and 0 elsewhere.
    """
    s = along_axis(q.scale, x.ndim, q.spec.axis)
    z = None if _zero(q) else along_axis(q.zero_point, x.ndim, q.spec.axis).to(x.dtype)
    return _FakeQuantize.apply(x, s, z, q.spec.qmin, q.spec.qmax, skip)  # type: ignore[return-value]


def _zero(q: QParams) -> bool:
    """Whether the zero point is known to be 0, so that it need not be added; looking at one on a GPU would wait for it."""
    return q.spec.symmetric or (q.zero_point.device.type == "cpu" and not bool(q.zero_point.any()))
