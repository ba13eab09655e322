"""Brings what people write onto the few operations of `ops.py`.

    F.relu(x), x.relu(), torch.relu(x), nn.ReLU(inplace=True)   →   nn.ReLU
    x.view(x.size(0), -1), torch.flatten(x, 1), nn.Flatten()     →   Reshape
    x.mean(dim=(2, 3))                                           →   nn.AvgPool2d, Reshape
    F.avg_pool2d(x, x.size()[3])                                 →   nn.AvgPool2d(8), sizes being known

Each function takes a `Call` and returns the steps that replace it: modules and functions, applied one after another.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ptq.graph.layers import Pad, Permute, Reshape, Slice
from ptq.graph.ops import OPS

Step = nn.Module | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class TensorShape:
    """Stands for a tensor among the recorded arguments of a call: its dimensions, batch included."""

    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it ran: `args` and `kwargs` with tensors replaced by their `TensorShape`.

    shape, out: shapes of the first tensor and of the result, without the batch dimension.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    out: tuple[int, ...]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


class Unsupported(Exception):
    """A known function in a form that is not supported; the message says which."""


def _pair(v: Any) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else (int(v[0]), int(v[1]))


def _reshape(call: Call) -> list[Step]:
    return [] if call.out == call.shape else [Reshape(call.out)]


def _average(call: Call, size: tuple[int, int]) -> nn.Module | None:
    """The pooling that brings `[C, H, W]` to `size`, or None where nothing is to do."""
    h, w = call.shape[-2:]
    if (h, w) == size:
        return None
    if h % size[0] or w % size[1]:
        raise Unsupported(f"adaptive pooling from {h}×{w} to {size[0]}×{size[1]}, which does not divide evenly")
    kernel = (h // size[0], w // size[1])
    return nn.AvgPool2d(kernel, kernel)


def _adaptive(call: Call) -> list[Step]:
    pool = _average(call, call.out[-2:])  # type: ignore[arg-type]
    return [] if pool is None else [pool]


def _mean(call: Call) -> list[Step]:
    dims = call.get(1, "dim")
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    if len(call.shape) != 3 or {d % 4 for d in dims} != {2, 3}:
        raise Unsupported(f"mean over dimensions {dims}; the mean over height and width is supported")
    pool = _average(call, (1, 1))
    return [*([] if pool is None else [pool]), *_reshape(Call((), {}, (call.shape[0], 1, 1), call.out))]


def _avg_pool(call: Call) -> list[Step]:
    if call.get(6, "divisor_override") is not None:
        raise Unsupported("average pooling with divisor_override")
    kernel = _pair(call.get(1, "kernel_size"))
    stride, pads = _pair(call.get(2, "stride") or kernel), _pair(call.get(3, "padding", 0))
    floor = tuple((size + 2 * p - k) // s + 1 for size, p, k, s in zip(call.shape[-2:], pads, kernel, stride))
    ceil = bool(call.get(4, "ceil_mode", False)) and floor != tuple(call.out[-2:])
    counts_pads = bool(call.get(5, "count_include_pad", True)) and any(pads)
    if ceil and counts_pads:
        raise Unsupported("average pooling with ceil_mode that counts its padding, which runtimes disagree on")
    return [nn.AvgPool2d(kernel, stride, pads, ceil, counts_pads)]


def _max_pool(call: Call) -> list[Step]:
    kernel = call.get(1, "kernel_size")
    return [nn.MaxPool2d(
        _pair(kernel), _pair(call.get(2, "stride") or kernel), _pair(call.get(3, "padding", 0)),
        _pair(call.get(4, "dilation", 1)), ceil_mode=call.get(5, "ceil_mode", False),
    )]  # fmt: skip


def _pad(call: Call) -> list[Step]:
    pads, mode, fill = call.get(1, "pad"), call.get(2, "mode", "constant"), call.get(3, "value", None)
    if mode != "constant" or fill not in (None, 0, 0.0):
        raise Unsupported(f"padding with mode {mode!r} and value {fill}; zero padding is supported")
    if len(pads) > 6 or min(pads) < 0 or len(call.shape) != 3:
        raise Unsupported(f"padding {tuple(pads)}; non-negative padding of channels, height and width is supported")
    return [Pad(tuple(pads))]


def _getitem(call: Call) -> list[Step]:
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if not all(isinstance(i, slice) for i in index) or index[0] != slice(None):
        raise Unsupported(f"index {index}; slices along channels, height and width are supported")
    cuts = []
    for dim, (cut, size) in enumerate(zip(index[1:], call.shape), start=1):
        start, stop, step = cut.indices(size)  # pyright: ignore[reportGeneralTypeIssues]
        if (start, stop, step) != (0, size, 1):
            cuts.append((dim, start, stop, step))
    return [Slice(tuple(cuts))] if cuts else []


def _permute(call: Call) -> list[Step]:
    rank = len(call.shape) + 1
    dims = call.args[1:] if isinstance(call.args[1], int) else tuple(call.args[1])
    dims = tuple(d % rank for d in dims)
    if dims[0] != 0:
        raise Unsupported(f"permutation {dims} moves the batch dimension")
    return [Permute(dims)]


def _transpose(call: Call) -> list[Step]:
    dims = list(range(len(call.shape) + 1))
    a, b = call.get(1, "dim0"), call.get(2, "dim1")
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(Call((None, tuple(dims)), {}, call.shape, call.out))


def _join(function: Callable[..., Any]) -> Callable[[Call], list[Step]]:
    def lower(call: Call) -> list[Step]:
        operands = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, TensorShape)]
        if len(operands) != 2 or call.kwargs.get("alpha", 1) != 1:
            raise Unsupported(f"{function.__name__} of a tensor and a constant; two tensors are supported")
        return [function]

    return lower


def _interpolate(call: Call) -> list[Step]:
    if call.get(3, "mode", "nearest") != "nearest":
        raise Unsupported("interpolation other than nearest")
    factor, rest = divmod(call.out[-1], call.shape[-1])
    if rest or call.out[-2] != factor * call.shape[-2]:
        raise Unsupported(
            f"nearest interpolation from {call.shape[-2:]} to {call.out[-2:]}; a whole factor is supported"
        )
    return [nn.UpsamplingNearest2d(scale_factor=factor)]


def _leaky(call: Call) -> list[Step]:
    return [nn.LeakyReLU(call.get(1, "negative_slope", 0.01))]


def _hardtanh(call: Call) -> list[Step]:
    low, high = call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0)
    if (low, high) != (0, 6):
        raise Unsupported(f"clamping to {low}…{high}; 0…6 (ReLU6) is supported")
    return [nn.ReLU6()]


def _nothing(call: Call) -> list[Step]:
    return []


GATED = object()  # a step that multiplies the running value with the call's input: x · f(x)

FUNCTIONS: dict[Any, Callable[[Call], list[Any]]] = {
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.leaky_relu: _leaky,
    F.hardtanh: _hardtanh,
    F.dropout: _nothing,
    torch.mean: _mean,
    operator.getitem: _getitem,
    torch.permute: _permute,
    torch.transpose: _transpose,
    F.silu: lambda call: [nn.Sigmoid(), GATED],
    F.hardswish: lambda call: [nn.Hardsigmoid(), GATED],
    F.hardsigmoid: lambda call: [nn.Hardsigmoid()],
    F.gelu: lambda call: [nn.GELU(call.get(1, "approximate", "none"))],
}
for _functions, _step in (
    ((F.relu, torch.relu, torch.relu_), nn.ReLU),
    ((F.relu6,), nn.ReLU6),
    ((F.sigmoid, torch.sigmoid), nn.Sigmoid),
    ((F.tanh, torch.tanh), nn.Tanh),
):
    FUNCTIONS |= {f: (lambda call, step=_step: [step()]) for f in _functions}
FUNCTIONS |= {f: _join(operator.add) for f in (operator.add, operator.iadd, torch.add)}
FUNCTIONS |= {f: _join(operator.mul) for f in (operator.mul, operator.imul, torch.mul)}
FUNCTIONS |= dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze), _reshape)

METHODS: dict[str, Callable[[Call], list[Any]]] = {
    "relu": FUNCTIONS[F.relu], "relu_": FUNCTIONS[F.relu], "sigmoid": FUNCTIONS[F.sigmoid],
    "tanh": FUNCTIONS[F.tanh], "mean": _mean, "contiguous": _nothing, "view": _reshape, "reshape": _reshape,
    "flatten": _reshape, "squeeze": _reshape, "permute": _permute, "transpose": _transpose,
    "add": FUNCTIONS[torch.add], "add_": FUNCTIONS[torch.add], "mul": FUNCTIONS[torch.mul], "mul_": FUNCTIONS[torch.mul],
}  # fmt: skip

IN_PLACE = {operator.iadd, operator.imul, torch.relu_, "add_", "mul_", "relu_"}


def _conv(m: nn.Conv2d) -> nn.Module:
    if m.padding_mode != "zeros":
        raise Unsupported(f"a convolution that pads with {m.padding_mode!r}; zero padding is supported")
    if isinstance(m.padding, str):
        reach = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size)] if m.padding == "same" else [0, 0]
        if any(r % 2 for r in reach):
            raise Unsupported("a convolution with padding='same' and an even kernel, which pads unevenly")
        m.padding = tuple(r // 2 for r in reach)
    return m


def _max_pool_module(m: nn.MaxPool2d) -> nn.Module:
    if m.return_indices:
        raise Unsupported("max pooling that returns indices")
    return _max_pool(Call((None, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode), {}, (), ()))[0]  # pyright: ignore[reportReturnType]


def _norm(m: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    if m.running_var is None:
        raise Unsupported("a BatchNorm without running statistics, whose result depends on the other images of a batch")
    return m


MODULES: dict[type, Callable[[Any, Call], list[Any]]] = {
    nn.Conv2d: lambda m, call: [_conv(m)],
    nn.BatchNorm1d: lambda m, call: [_norm(m)],
    nn.BatchNorm2d: lambda m, call: [_norm(m)],
    nn.ReLU: lambda m, call: [nn.ReLU()],
    nn.ReLU6: lambda m, call: [nn.ReLU6()],
    nn.Hardtanh: lambda m, call: _hardtanh(Call((None, m.min_val, m.max_val), {}, (), ())),
    nn.LeakyReLU: lambda m, call: [nn.LeakyReLU(m.negative_slope)],
    nn.SiLU: lambda m, call: [nn.Sigmoid(), GATED],
    nn.Hardswish: lambda m, call: [nn.Hardsigmoid(), GATED],
    nn.MaxPool2d: lambda m, call: [_max_pool_module(m)],
    nn.AvgPool2d: lambda m, call: _avg_pool(
        Call(
            (None, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override),
            {},
            call.shape,
            call.out,
        )
    ),
    nn.AdaptiveAvgPool2d: lambda m, call: _adaptive(call),
    nn.ZeroPad2d: lambda m, call: _pad(Call((None, m.padding), {}, call.shape, call.out)),
    nn.ConstantPad2d: lambda m, call: _pad(Call((None, m.padding, "constant", m.value), {}, call.shape, call.out)),
    nn.Upsample: lambda m, call: _interpolate(Call((None, None, None, m.mode), {}, call.shape, call.out)),
    nn.UpsamplingNearest2d: lambda m, call: _interpolate(Call((None, None, None, "nearest"), {}, call.shape, call.out)),
    nn.Flatten: lambda m, call: _reshape(call),
    nn.Identity: lambda m, call: [],
    nn.Dropout: lambda m, call: [],
    nn.Dropout2d: lambda m, call: [],
}


def lower_module(module: nn.Module, call: Call) -> list[Any] | None:
    """The steps for a module call, or None where the type is unknown."""
    if type(module) in MODULES:
        return MODULES[type(module)](module, call)
    return [module] if type(module) in OPS else None


def lower_call(target: Any, call: Call) -> list[Any] | None:
    """The steps for a function (an object) or method (a string), or None where it is unknown."""
    if isinstance(target, str):
        return METHODS[target](call) if target in METHODS else None
    if target in (torch.cat, torch.concat):
        return [torch.cat]
    return FUNCTIONS[target](call) if target in FUNCTIONS else None
