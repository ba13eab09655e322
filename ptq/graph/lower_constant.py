"""Lowering of operations with tensors that do not depend on the input: functional layers, and arithmetic with parameters.

    F.conv2d(x, self.weight, self.bias)      →   nn.Conv2d
    F.layer_norm(x, (64,), weight, bias)     →   nn.LayerNorm
    x * self.scale, x + 3, x / 6             →   MulConstant, AddConstant

Each function takes a `Call` and returns the steps that replace it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq.graph.call import Call, Constant, Step, TensorShape, Unsupported, pair
from ptq.graph.layers import AddConstant, MulConstant, Pad


def _filled(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            getattr(module, name).data = tensor.detach().clone().float()
    return module.eval()


def _weight(call: Call) -> Tensor:
    weight = call.tensor(1, "weight")
    if weight is None:
        raise Unsupported("a layer without a weight")
    return weight


def padding(given: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[list[Step], tuple[int, int]]:
    """A convolution's padding, "same" and "valid" in numbers: a step before it where that differs from side to side."""
    if not isinstance(given, str):
        return [], pair(given)
    h, w = [d * (k - 1) for d, k in zip(dilation, kernel)] if given == "same" else [0, 0]
    if h % 2 or w % 2:
        return [Pad((w // 2, w - w // 2, h // 2, h - h // 2))], (0, 0)
    return [], (h // 2, w // 2)


def conv(call: Call) -> list[Step]:
    """conv2d(x, weight, bias, stride, padding, dilation, groups)."""
    weight, bias, groups = _weight(call), call.tensor(2, "bias"), call.get(6, "groups", 1)
    kernel, dilation = (weight.shape[2], weight.shape[3]), pair(call.get(5, "dilation", 1))
    before, pads = padding(call.get(4, "padding", 0), kernel, dilation)
    module = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], kernel, pair(call.get(3, "stride", 1)),
        pads, dilation, groups, bias is not None,
    )  # fmt: skip
    return [*before, _filled(module, weight=weight, bias=bias)]


def conv_transpose(call: Call) -> list[Step]:
    """conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)."""
    weight, bias, groups = _weight(call), call.tensor(2, "bias"), call.get(6, "groups", 1)
    module = nn.ConvTranspose2d(
        weight.shape[0], weight.shape[1] * groups, (weight.shape[2], weight.shape[3]), pair(call.get(3, "stride", 1)),
        pair(call.get(4, "padding", 0)), pair(call.get(5, "output_padding", 0)), groups, bias is not None,
        pair(call.get(7, "dilation", 1)),
    )  # fmt: skip
    return [_filled(module, weight=weight, bias=bias)]


def linear(call: Call) -> list[Step]:
    """linear(x, weight, bias)."""
    weight, bias = _weight(call), call.tensor(2, "bias")
    return [_filled(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight=weight, bias=bias)]


def batch_norm(*, aten: bool) -> Callable[[Call], list[Step]]:
    """F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), or aten's, which has weight and bias first."""
    order = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4} if aten else {
        "running_mean": 1, "running_var": 2, "weight": 3, "bias": 4,
    }  # fmt: skip

    def lower(call: Call) -> list[Step]:
        if call.get(5, "training", False):
            raise Unsupported("a BatchNorm in training mode, whose result depends on the other images of a batch")
        parts = {name: call.tensor(at, name) for name, at in order.items()}
        var = parts["running_var"]
        if var is None:
            raise Unsupported("a BatchNorm without running statistics")
        if len(call.shape) > 3:
            raise Unsupported(f"a BatchNorm of {len(call.shape) + 1} dimensions; 2 to 4 are supported")
        kind = nn.BatchNorm2d if len(call.shape) == 3 else nn.BatchNorm1d
        module = kind(len(var), call.get(7, "eps", 1e-5), affine=parts["weight"] is not None)
        return [_filled(module, **parts)]

    return lower


def layer_norm(call: Call) -> list[Step]:
    """layer_norm(x, shape, weight, bias, eps)."""
    shape, weight, bias = call.get(1, "normalized_shape"), call.tensor(2, "weight"), call.tensor(3, "bias")
    module = nn.LayerNorm(
        list(shape), call.get(4, "eps", 1e-5), elementwise_affine=weight is not None, bias=bias is not None
    )
    return [_filled(module, weight=weight, bias=bias)]


def group_norm(call: Call) -> list[Step]:
    """group_norm(x, groups, weight, bias, eps)."""
    weight, bias = call.tensor(2, "weight"), call.tensor(3, "bias")
    return [_group_norm(call, call.get(1, "num_groups"), call.get(4, "eps", 1e-5), weight, bias)]


def instance_norm(call: Call) -> list[Step]:
    """instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps) with its input's statistics: a group a channel."""
    if not call.get(5, "use_input_stats", True):
        raise Unsupported("an instance_norm with running statistics; BatchNorm2d computes the same")
    weight, bias = call.tensor(3, "weight"), call.tensor(4, "bias")
    return [_group_norm(call, call.shape[0], call.get(7, "eps", 1e-5), weight, bias)]


def _group_norm(call: Call, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    channels = call.shape[0]
    if weight is None and bias is None:
        return nn.GroupNorm(groups, channels, eps, affine=False)
    parts = {
        "weight": torch.ones(channels) if weight is None else weight,
        "bias": torch.zeros(channels) if bias is None else bias,
    }
    return _filled(nn.GroupNorm(groups, channels, eps), **parts)


def softmax(kind: type[nn.Softmax] | type[nn.LogSoftmax]) -> Callable[[Call], list[Step]]:
    """softmax(x, dim), over any dimension but that of the batch."""

    def lower(call: Call) -> list[Step]:
        dim, rank = call.get(1, "dim", None), len(call.shape) + 1
        if dim is None or dim % rank == 0:
            raise Unsupported("a softmax over the images of a batch" if dim is not None else "a softmax without dim")
        return [kind(dim % rank)]

    return lower


def prelu(call: Call) -> list[Step]:
    """prelu(x, weight)."""
    weight = _weight(call)
    return [_filled(nn.PReLU(weight.numel()), weight=weight.flatten())]


def arithmetic(function: Callable[..., Any]) -> Callable[[Call], list[Step]]:
    """+ or *: of two tensors the function itself, of a tensor and a constant a module that holds the constant."""

    def lower(call: Call) -> list[Step]:
        given = [*call.args, *(v for k, v in call.kwargs.items() if k != "alpha")]
        if call.kwargs.get("alpha", 1) != 1:
            raise Unsupported(f"{function.__name__} with alpha")
        if sum(isinstance(a, TensorShape) for a in given) == 2:
            return [function]
        other = _number(next(a for a in given if not isinstance(a, TensorShape)), call)
        return [(AddConstant if function is operator.add else MulConstant).of(other)]

    return lower


def subtract(call: Call) -> list[Step]:
    """x - αc and c - αx, with a constant c."""
    first, second, alpha = call.args[0], call.get(1, "other"), call.kwargs.get("alpha", 1)
    if isinstance(first, TensorShape) and isinstance(second, TensorShape):
        raise Unsupported("the difference of two tensors")
    if isinstance(first, TensorShape):
        return [AddConstant.of(-alpha * _number(second, call))]
    return [MulConstant.of(-float(alpha)), AddConstant.of(_number(first, call))]


def divide(call: Call) -> list[Step]:
    """x / c, with a constant c."""
    if not isinstance(call.args[0], TensorShape) or isinstance(call.get(1, "other"), TensorShape):
        raise Unsupported("a division by a tensor")
    if call.kwargs.get("rounding_mode") is not None:
        raise Unsupported("a division that rounds")
    return [MulConstant.of(1.0 / _number(call.get(1, "other"), call))]


def _number(other: Any, call: Call) -> Tensor:
    """A constant operand as a tensor that broadcasts whatever the batch size is."""
    value = other.value if isinstance(other, Constant) else other
    if not isinstance(value, Tensor | int | float) or isinstance(value, bool):
        raise Unsupported(f"arithmetic with a {type(value).__name__}")
    value = torch.as_tensor(value, dtype=torch.float32)
    rank = len(call.shape) + 1
    if value.ndim > rank or (value.ndim == rank and value.shape[0] != 1):
        raise Unsupported(f"arithmetic with a constant of shape {tuple(value.shape)}, which fixes the batch")
    if len(call.out) + 1 != rank or tuple(torch.broadcast_shapes((1, *call.shape), value.shape)[1:]) != call.shape:
        raise Unsupported(f"arithmetic with a constant of shape {tuple(value.shape)}, which makes the tensor larger")
    return value
