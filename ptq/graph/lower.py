"""Brings what people write onto the few operations of `ops.py`.

    F.relu(x), x.relu(), torch.relu(x), nn.ReLU(inplace=True)   →   nn.ReLU
    x.view(x.size(0), -1), torch.flatten(x, 1), nn.Flatten()     →   Reshape
    x.mean(dim=(2, 3))                                           →   nn.AvgPool2d, Reshape
    F.avg_pool2d(x, x.size()[3])                                 →   nn.AvgPool2d(8), sizes being known

Each function takes a `Call` and returns the steps that replace it: modules and functions, applied one after another.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ptq.graph import lower_constant as constant
from ptq.graph import lower_spatial as spatial
from ptq.graph.call import Call, Constant, Step, Unsupported
from ptq.graph.ops import OPS


def _leaky(call: Call) -> list[Step]:
    return [nn.LeakyReLU(call.get(1, "negative_slope", 0.01))]


def _hardtanh(call: Call) -> list[Step]:
    low, high = call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0)
    if (low, high) != (0, 6):
        raise Unsupported(f"clamping to {low}…{high}; 0…6 (ReLU6) is supported")
    return [nn.ReLU6()]


def _clamp(call: Call) -> list[Step]:
    low, high = call.get(1, "min", None), call.get(2, "max", None)
    if low != 0 or high not in (None, 6):
        raise Unsupported(f"clamping to {low}…{high}; from 0 (ReLU), and to 6 (ReLU6), is supported")
    return [nn.ReLU() if high is None else nn.ReLU6()]


def _softplus(call: Call) -> list[Step]:
    beta, threshold = call.get(1, "beta", 1.0), call.get(2, "threshold", 20.0)
    if beta <= 0 or threshold < 15:  # from there on, the function is its argument but for float32's last bit
        raise Unsupported(f"softplus with beta={beta}, threshold={threshold}")
    return [nn.Softplus(beta, threshold)]


def _nothing(call: Call) -> list[Step]:
    return []


GATED = object()  # a step that multiplies the running value with the call's input: x · f(x)

FUNCTIONS: dict[Any, Callable[[Call], list[Any]]] = {
    F.avg_pool2d: spatial.avg_pool,
    F.adaptive_avg_pool2d: spatial.adaptive,
    F.max_pool2d: spatial.max_pool,
    torch.max_pool2d: spatial.max_pool,
    F.pad: spatial.pad,
    F.interpolate: spatial.resize(),
    F.leaky_relu: _leaky,
    F.hardtanh: _hardtanh,
    torch.clamp: _clamp,
    F.dropout: _nothing,
    torch.mean: spatial.mean,
    operator.getitem: spatial.getitem,
    torch.permute: spatial.permute,
    torch.transpose: spatial.transpose,
    F.silu: lambda call: [nn.Sigmoid(), GATED],
    F.hardswish: lambda call: [nn.Hardsigmoid(), GATED],
    F.hardsigmoid: lambda call: [nn.Hardsigmoid()],
    F.elu: lambda call: [nn.ELU(call.get(1, "alpha", 1.0))],
    F.prelu: constant.prelu,
    torch.prelu: constant.prelu,
    F.conv2d: constant.conv,
    torch.conv2d: constant.conv,
    F.conv_transpose2d: constant.conv_transpose,
    F.linear: constant.linear,
    F.batch_norm: constant.batch_norm(aten=False),
    F.layer_norm: constant.layer_norm,
    F.group_norm: constant.group_norm,
    F.instance_norm: constant.instance_norm,
    F.softplus: _softplus,
    F.mish: lambda call: [nn.Softplus(), nn.Tanh(), GATED],
    F.gelu: lambda call: [nn.GELU(call.get(1, "approximate", "none"))],
}
for _functions, _step in (
    ((F.relu, torch.relu, torch.relu_), nn.ReLU),
    ((F.relu6,), nn.ReLU6),
    ((F.sigmoid, torch.sigmoid), nn.Sigmoid),
    ((F.tanh, torch.tanh), nn.Tanh),
):
    FUNCTIONS |= {f: (lambda call, step=_step: [step()]) for f in _functions}
FUNCTIONS |= dict.fromkeys((operator.add, operator.iadd, torch.add), constant.arithmetic(operator.add))
FUNCTIONS |= dict.fromkeys((operator.mul, operator.imul, torch.mul), constant.arithmetic(operator.mul))
FUNCTIONS |= dict.fromkeys((operator.sub, torch.sub), constant.subtract)
FUNCTIONS |= dict.fromkeys((operator.truediv, torch.div), constant.divide)
FUNCTIONS |= dict.fromkeys((F.softmax, torch.softmax), constant.softmax(nn.Softmax))
FUNCTIONS |= dict.fromkeys((F.log_softmax, torch.log_softmax), constant.softmax(nn.LogSoftmax))
FUNCTIONS |= dict.fromkeys((torch.clip, torch.clamp_min), _clamp)
FUNCTIONS |= dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze), spatial.reshape)

METHODS: dict[str, Callable[[Call], list[Any]]] = {
    "relu": FUNCTIONS[F.relu], "relu_": FUNCTIONS[F.relu], "sigmoid": FUNCTIONS[F.sigmoid],
    "tanh": FUNCTIONS[F.tanh], "mean": spatial.mean, "contiguous": _nothing, "view": spatial.reshape, "reshape": spatial.reshape,
    "flatten": spatial.reshape, "squeeze": spatial.reshape, "permute": spatial.permute, "transpose": spatial.transpose,
    "add": FUNCTIONS[torch.add], "add_": FUNCTIONS[torch.add], "mul": FUNCTIONS[torch.mul], "mul_": FUNCTIONS[torch.mul],
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"), _clamp),
    "sub": constant.subtract, "div": constant.divide,
    "softmax": FUNCTIONS[F.softmax], "log_softmax": FUNCTIONS[F.log_softmax],
}  # fmt: skip

IN_PLACE = {operator.iadd, operator.imul, torch.relu_, "add_", "mul_", "relu_", "clamp_", "clip_", "clamp_min_"}


def _conv(m: nn.Conv2d) -> list[Any]:
    if m.padding_mode != "zeros":
        raise Unsupported(f"a convolution that pads with {m.padding_mode!r}; zero padding is supported")
    before, m.padding = constant.padding(m.padding, m.kernel_size, m.dilation)
    return [*before, m]


def _max_pool_module(m: nn.MaxPool2d, call: Call) -> list[Any]:
    if m.return_indices:
        raise Unsupported("max pooling that returns indices")
    given = (None, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    return spatial.max_pool(Call(given, {}, call.shape, call.out))


def _norm(m: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    if m.running_var is None:
        raise Unsupported("a BatchNorm without running statistics, whose result depends on the other images of a batch")
    return m


def _instance_norm(m: nn.InstanceNorm2d, call: Call) -> list[Any]:
    given = (None, m.running_mean, m.running_var, m.weight, m.bias, not m.track_running_stats, 0.1, m.eps)
    held = tuple(Constant(v) if isinstance(v, torch.Tensor) else v for v in given)
    return constant.instance_norm(Call(held, {}, call.shape, call.out))


MODULES: dict[type, Callable[[Any, Call], list[Any]]] = {
    nn.Conv2d: lambda m, call: _conv(m),
    nn.BatchNorm1d: lambda m, call: [_norm(m)],
    nn.BatchNorm2d: lambda m, call: [_norm(m)],
    nn.ReLU: lambda m, call: [nn.ReLU()],
    nn.ReLU6: lambda m, call: [nn.ReLU6()],
    nn.Hardtanh: lambda m, call: _hardtanh(Call((None, m.min_val, m.max_val), {}, (), ())),
    nn.ELU: lambda m, call: [nn.ELU(m.alpha)],
    nn.LeakyReLU: lambda m, call: [nn.LeakyReLU(m.negative_slope)],
    nn.SiLU: lambda m, call: [nn.Sigmoid(), GATED],
    nn.Hardswish: lambda m, call: [nn.Hardsigmoid(), GATED],
    nn.MaxPool2d: _max_pool_module,
    nn.AvgPool2d: lambda m, call: spatial.avg_pool(
        Call(
            (None, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override),
            {},
            call.shape,
            call.out,
        )
    ),
    nn.AdaptiveAvgPool2d: lambda m, call: spatial.adaptive(call),
    nn.ZeroPad2d: lambda m, call: spatial.pad(Call((None, m.padding), {}, call.shape, call.out)),
    nn.ConstantPad2d: lambda m, call: spatial.pad(
        Call((None, m.padding, "constant", m.value), {}, call.shape, call.out)
    ),
    nn.Upsample: lambda m, call: spatial.resize()(
        Call((None, None, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor), {}, call.shape, call.out)
    ),
    nn.UpsamplingNearest2d: lambda m, call: spatial.resize()(
        Call((None, None, m.scale_factor, "nearest"), {}, call.shape, call.out)
    ),
    nn.InstanceNorm2d: _instance_norm,
    nn.Softmax: lambda m, call: constant.softmax(nn.Softmax)(Call((None, m.dim), {}, call.shape, call.out)),
    nn.LogSoftmax: lambda m, call: constant.softmax(nn.LogSoftmax)(Call((None, m.dim), {}, call.shape, call.out)),
    nn.Softplus: lambda m, call: _softplus(Call((None, m.beta, m.threshold), {}, (), ())),
    nn.Mish: lambda m, call: [nn.Softplus(), nn.Tanh(), GATED],
    nn.Flatten: lambda m, call: spatial.reshape(call),
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
