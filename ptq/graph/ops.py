"""The one table of known operations and what each means for quantization.

A traced network (`trace.py`) holds only these: modules of the listed types and three functions. Roles:

    weighted   has an integer weight; its input and its output are quantized
    clamp      cuts its input off below 0 (and above 6): merges into the quantizer behind it
    same       moves values without changing them: output and input share one grid
    pool       averages: its output has a grid of its own
    join       adds or multiplies two tensors: both, and the result, are quantized
    concat     joins channels: all its tensors share one grid
    float      computed in float between quantized tensors
    quant      a fake-quant module (student only)
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ptq.graph.float_region import FloatRegion, MoveRegion
from ptq.graph.layers import (
    AdaptiveAverage,
    AddConstant,
    MulConstant,
    Pad,
    Permute,
    Reshape,
    ResizeBilinear,
    ResizeNearest,
    Slice,
)
from ptq.quant.fake_quant import ActFakeQuant

Role = Literal["weighted", "clamp", "same", "pool", "join", "concat", "float", "quant"]


@dataclass(frozen=True, slots=True)
class Op:
    """A known operation: its `name`, its role, whether its output is non-negative, and what rebuilds it.

    nonneg: "always", "never", or "keep" (when all its inputs are).
    fields: the constructor arguments of the module, each also an attribute of it (`bias` stands for "has a bias").
    """

    name: str
    role: Role
    nonneg: Literal["always", "keep", "never"] = "never"
    fields: tuple[str, ...] = ()


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
_CONV_TRANSPOSE = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "bias", "dilation",
)  # fmt: skip

OPS: dict[type | Callable[..., Any], Op] = {
    nn.Conv2d: Op("conv", "weighted", fields=_CONV),
    nn.Linear: Op("linear", "weighted", fields=("in_features", "out_features", "bias")),
    nn.ReLU: Op("relu", "clamp", "always"),
    nn.ReLU6: Op("relu6", "clamp", "always"),
    nn.MaxPool2d: Op("max_pool", "same", "keep", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    nn.UpsamplingNearest2d: Op("upsample_nearest", "same", "keep", ("scale_factor",)),
    ResizeNearest: Op("resize_nearest", "same", "keep", ("size",)),
    Pad: Op("pad", "same", "keep", ("pads",)),
    Slice: Op("slice", "same", "keep", ("cuts",)),
    Reshape: Op("reshape", "same", "keep", ("tail",)),
    Permute: Op("permute", "same", "keep", ("dims",)),
    nn.AvgPool2d: Op(
        "avg_pool", "pool", "keep", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    ),
    AdaptiveAverage: Op("adaptive_average", "float", "keep", ("size",)),
    ResizeBilinear: Op("resize_bilinear", "float", "keep", ("size", "align_corners")),
    operator.add: Op("add", "join", "keep"),
    operator.mul: Op("mul", "join", "keep"),
    torch.cat: Op("concat", "concat", "keep"),
    nn.BatchNorm1d: Op("batch_norm_1d", "float", fields=("num_features", "eps", "affine")),
    nn.BatchNorm2d: Op("batch_norm", "float", fields=("num_features", "eps", "affine")),
    nn.LeakyReLU: Op("leaky_relu", "float", fields=("negative_slope",)),
    nn.Sigmoid: Op("sigmoid", "float", "always"),
    nn.Hardsigmoid: Op("hard_sigmoid", "float", "always"),
    nn.Tanh: Op("tanh", "float"),
    nn.GELU: Op("gelu", "float", fields=("approximate",)),
    nn.ELU: Op("elu", "float", fields=("alpha",)),
    nn.PReLU: Op("prelu", "float", fields=("num_parameters",)),
    nn.LayerNorm: Op("layer_norm", "float", fields=("normalized_shape", "eps", "elementwise_affine", "bias")),
    nn.GroupNorm: Op("group_norm", "float", fields=("num_groups", "num_channels", "eps", "affine")),
    nn.Softmax: Op("softmax", "float", "always", ("dim",)),
    nn.LogSoftmax: Op("log_softmax", "float", fields=("dim",)),
    nn.Softplus: Op("softplus", "float", "always", ("beta", "threshold")),
    nn.ConvTranspose2d: Op("conv_transpose", "float", fields=_CONV_TRANSPOSE),
    AddConstant: Op("add_constant", "float", fields=("shape",)),
    MulConstant: Op("mul_constant", "float", fields=("shape",)),
    FloatRegion: Op("float_region", "float", fields=("steps", "tensors")),
    MoveRegion: Op("move_region", "same", "keep", ("steps", "tensors")),
    ActFakeQuant: Op("fake_quant", "quant", "keep"),
}

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def find_op(gm: fx.GraphModule, node: fx.Node) -> Op | None:
    """The table's row for `node`, or None for placeholders, the output and unknown operations."""
    if node.op == "call_function":
        return OPS.get(node.target)  # type: ignore[arg-type]
    if node.op != "call_module":
        return None
    # A parametrized layer has a class of its own; any other subclass of a known layer may compute something else.
    return OPS.get(parametrize.type_before_parametrizations(gm.get_submodule(str(node.target))))


def is_global_mean(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node averages all of height and width."""
    op = find_op(gm, node)
    if op is None or op.name != "avg_pool":
        return False
    pool, shape = gm.get_submodule(str(node.target)), node.all_input_nodes[0].meta["shape"]
    sizes: tuple[Any, Any] = (pool.kernel_size, pool.padding)
    kernel, padding = ([v, v] if isinstance(v, int) else list(v) for v in sizes)
    return kernel == list(shape[-2:]) and not any(padding)


def is_read_as_float(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of a student is not quantized: neither it nor a clamp behind it is what a quantizer reads."""
    users = [u for u in node.users if u.op != "output"]
    behind = [find_op(gm, u) for u in users]
    if len(users) == 1 and behind[0] is not None and behind[0].role == "clamp":
        return is_read_as_float(gm, users[0])
    return all(op is None or op.role != "quant" for op in behind)


def moves(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only rearranges values that are on their source's grid already."""
    op = find_op(gm, node)
    return op is not None and op.role in ("same", "concat")


def weighted_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of convolutions and linear layers, in execution order."""
    return [n for n in gm.graph.nodes if (op := find_op(gm, n)) is not None and op.role == "weighted"]


def value(node: fx.Node) -> str:
    """The value name of a node's result; every tensor of a traced network has one."""
    return node.meta["value"]


def values_of(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Value name → the node that yields it."""
    return {n.meta["value"]: n for n in gm.graph.nodes if n.meta.get("value") is not None}


def output_node(gm: fx.GraphModule) -> fx.Node:
    """The node whose tensor the network returns."""
    return gm.graph.output_node().args[0]  # type: ignore[return-value]


def input_node(gm: fx.GraphModule) -> fx.Node:
    """The network's placeholder."""
    return gm.graph.find_nodes(op="placeholder")[0]
