"""One ONNX emitter per operation of `ptq/graph/ops.py`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ptq.exporters._onnx_builder import Builder
from ptq.exporters._onnx_codes import add_channel, bias_of, dequantized, multiplied_out, weight_of
from ptq.exporters._onnx_region import float_region, region
from torch import Tensor, fx, nn

from ptq.graph.insert import quantizer_of
from ptq.graph.ops import find_op, is_global_mean, is_read_as_float
from ptq.graph.runtime_functions import resize_scale, window_weights
from ptq.quant.fake_quant import integer_codes

# What a Conv does where its attributes do not say otherwise.
_UNSAID = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "pads": [0, 0, 0, 0]}


def absorbed_pad(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a zero padding of height and width that the convolutions reading it can do themselves."""
    op = find_op(gm, node)
    if op is None or op.name != "pad" or any(gm.get_submodule(str(node.target)).pads[4:]):  # pyright: ignore[reportIndexIssue]
        return False
    users = [find_op(gm, u) for u in node.users]
    return all(u is not None and u.name == "conv" for u in users)


def _conv(b: Builder, node: fx.Node, out: str) -> str:
    m, source = b.module(node), node.all_input_nodes[0]
    left, right, top, bottom = 0, 0, 0, 0
    if absorbed_pad(b.gm, source):
        left, right, top, bottom = (*b.module(source).pads, 0, 0)[:4]
        source = source.all_input_nodes[0]
    ph, pw = m.padding
    x = b.names[source]
    kept, held = _stays_float(b, node), dequantized(b, x)
    filled = b.profile.fill_channels and held is not None and not kept and m.groups == 1 and m.in_channels == 3
    weight = weight_of(b, node, filled=filled)
    inputs = [add_channel(b, held) if filled else x, weight, *bias_of(b, node, x, weight)]
    given = {
        "strides": list(m.stride), "dilations": list(m.dilation), "group": m.groups,
        "pads": [top + ph, left + pw, bottom + ph, right + pw],
    }  # fmt: skip
    told = {key: value for key, value in given.items() if value != _UNSAID[key]}
    return _add(b, "Conv", inputs, out, kept=kept, kernel_shape=list(m.kernel_size), **told)


def _add(b: Builder, op: str, inputs: list[str], out: str, *, kept: bool, **attributes: Any) -> str:
    """A node; where it is to be `kept` in float, with a sum of one tensor between it and the QuantizeLinear behind it, which
    keeps onnxruntime from making one integer kernel of both."""
    if not kept:
        return b.add(op, inputs, out, **attributes)
    return b.add("Sum", [b.add(op, inputs, f"{out}.float", **attributes)], out)


def _stays_float(b: Builder, node: fx.Node) -> bool:
    """Whether a layer's weight is float between quantized tensors.

    onnxruntime rounds such a weight to 8 bits on its own (its WeightBiasQuantization), unless the layer is kept in float.
    """
    return integer_codes(b.module(node), "weight") is None


def _linear(b: Builder, node: fx.Node, out: str) -> str:
    x = b.inputs(node)[0]
    if len(node.meta["shape"]) == 1:
        weight = weight_of(b, node)
        return _add(b, "Gemm", [x, weight, *bias_of(b, node, x, weight)], out, kept=_stays_float(b, node), transB=1)
    weight = weight_of(b, node, transpose=True)
    bias = bias_of(b, node, x, weight)
    if dequantized(b, x) is None:
        weight = multiplied_out(b, weight)
    product = b.add("MatMul", [x, weight], f"{out}.product" if bias else out)
    return b.add("Add", [product, *bias], out) if bias else product


def _pair(v: Any) -> list[int]:
    return [v, v] if isinstance(v, int) else list(v)


def _max_pool(b: Builder, node: fx.Node, out: str) -> str:
    m = b.module(node)
    pads = _pair(m.padding)
    return b.add(
        "MaxPool", b.inputs(node), out, kernel_shape=_pair(m.kernel_size), strides=_pair(m.stride),
        dilations=_pair(m.dilation), pads=pads + pads, ceil_mode=int(m.ceil_mode),
    )  # fmt: skip


def _avg_pool(b: Builder, node: fx.Node, out: str) -> str:
    if is_global_mean(b.gm, node):
        return _global_mean(b, node, out)
    m, pads = b.module(node), _pair(b.module(node).padding)
    return b.add(
        "AveragePool", b.inputs(node), out, kernel_shape=_pair(m.kernel_size), strides=_pair(m.stride),
        pads=pads + pads, ceil_mode=int(m.ceil_mode), count_include_pad=int(m.count_include_pad),
    )  # fmt: skip


def _global_mean(b: Builder, node: fx.Node, out: str) -> str:
    """The mean over height and width. Where it stays float, of codes, rescaled: in whatever order a sum of whole numbers is
    formed, it is exact."""
    held = quantizer_of(b.gm, node.all_input_nodes[0].meta["value"]) if is_read_as_float(b.gm, node) else None
    (source,) = b.inputs(node)
    dequantize = None if held is None else dequantized(b, source)
    if dequantize is None:
        return b.add("GlobalAveragePool", [source], out)
    codes, scale, zero = dequantize.input
    one = b.constant("float.one", np.array(1, dtype=np.float32))
    whole = b.add("DequantizeLinear", [codes, one, zero], f"{out}.whole")
    return b.add("Mul", [b.add("GlobalAveragePool", [whole], f"{out}.mean"), scale], out)


def _pad(b: Builder, node: fx.Node, out: str) -> str:
    pads = [*b.module(node).pads, 0, 0, 0, 0][:6]
    left, right, top, bottom, front, back = pads
    ends = np.array([0, front, top, left, 0, back, bottom, right], dtype=np.int64)
    return b.add("Pad", [*b.inputs(node), b.constant(f"{out}.pads", ends)], out)


def _slice(b: Builder, node: fx.Node, out: str) -> str:
    columns = zip(*b.module(node).cuts)  # dims, starts, stops, steps
    dims, starts, stops, steps = (np.array(c, dtype=np.int64) for c in columns)
    parts = [("starts", starts), ("ends", stops), ("axes", dims), ("steps", steps)]
    return b.add("Slice", [*b.inputs(node), *(b.constant(f"{out}.{k}", v) for k, v in parts)], out)


def _reshape(b: Builder, node: fx.Node, out: str) -> str:
    tail = b.module(node).tail
    if len(tail) == 1:
        return b.add("Flatten", b.inputs(node), out, axis=1)
    return b.add("Reshape", [*b.inputs(node), b.constant(f"{out}.shape", np.array([0, *tail], dtype=np.int64))], out)


def _upsample(b: Builder, node: fx.Node, out: str) -> str:
    factor = float(b.module(node).scale_factor)
    scales = b.constant(f"{out}.scales", np.array([1, 1, factor, factor], dtype=np.float32))
    return b.add(
        "Resize", [*b.inputs(node), "", scales], out, mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _resize_nearest(b: Builder, node: fx.Node, out: str) -> str:
    """Rows, then columns, each picked by its index: a Resize rounds positions in its own way."""
    source = b.inputs(node)[0]
    sizes = zip(node.all_input_nodes[0].meta["shape"][-2:], b.module(node).size)
    rows, columns = (
        F.interpolate(torch.arange(n, dtype=torch.float32).view(1, 1, -1), size=size).flatten().long().numpy()
        for n, size in sizes
    )
    narrow = b.add("Gather", [source, b.constant(f"{out}.rows", rows)], f"{out}.narrow", axis=2)
    return b.add("Gather", [narrow, b.constant(f"{out}.columns", columns)], out, axis=3)


def _resize_bilinear(b: Builder, node: fx.Node, out: str) -> str:
    """By scales: with the sizes of two axes alone, onnxruntime's layout pass loses them."""
    m, shape = b.module(node), node.all_input_nodes[0].meta["shape"]
    scales = np.array([1, 1, *(resize_scale(n, size) for n, size in zip(shape[-2:], m.size))], dtype=np.float32)
    return b.add(
        "Resize", [*b.inputs(node), "", b.constant(f"{out}.scales", scales)], out, mode="linear",
        coordinate_transformation_mode="align_corners" if m.align_corners else "half_pixel",
    )  # fmt: skip


def _adaptive_average(b: Builder, node: fx.Node, out: str) -> str:
    """Windows of different sizes have no operator: averages over rows and over columns, each a product with a matrix; with a sum
    of one tensor behind, see `_stays_float`."""
    source, size = node.all_input_nodes[0].meta["shape"][-2:], b.module(node).size
    height, width = (window_weights(*lengths).numpy() for lengths in zip(source, size))  # [before, after]
    narrow = b.add("MatMul", [b.constant(f"{out}.window_rows", height.T), *b.inputs(node)], f"{out}.narrow")
    return b.add("Sum", [b.add("MatMul", [narrow, b.constant(f"{out}.window_columns", width)], f"{out}.float")], out)


def is_matrix_of_means(name: str) -> bool:
    """Whether an initializer is no layer's weight but a matrix of `_adaptive_average`."""
    return name.endswith((".window_rows", ".window_columns"))


def _conv_transpose(b: Builder, node: fx.Node, out: str) -> str:
    """In float, with a sum of one tensor behind it; see `_stays_float`."""
    m = b.module(node)
    (ph, pw), (eh, ew) = m.padding, m.output_padding
    (x,), weight = b.inputs(node), weight_of(b, node)
    done = b.add(
        "ConvTranspose", [x, weight, *bias_of(b, node, x, weight)], f"{out}.float",
        kernel_shape=list(m.kernel_size), strides=list(m.stride), dilations=list(m.dilation), group=m.groups,
        pads=[ph, pw, ph, pw], output_padding=[eh, ew],
    )  # fmt: skip
    return b.add("Sum", [done], out)


def _layer_norm(b: Builder, node: fx.Node, out: str) -> str:
    m, path = b.module(node), str(node.target)
    weight = m.weight if m.weight is not None else torch.ones(m.normalized_shape)
    parts = [("weight", weight), *([("bias", m.bias)] if m.bias is not None else [])]
    names = [b.constant(f"{path}.{k}", v.detach().cpu().numpy()) for k, v in parts]
    return b.add(
        "LayerNormalization", [*b.inputs(node), *names], out, axis=-len(m.normalized_shape), epsilon=float(m.eps)
    )


def _group_norm(b: Builder, node: fx.Node, out: str) -> str:
    m, path, shape = b.module(node), str(node.target), node.meta["shape"]

    def constant(name: str, value: Any, kind: Any) -> str:
        return b.constant(f"{path}.{name}", np.array(value, dtype=kind))

    ones, zeros = (
        constant("ones", [1.0] * m.num_groups, np.float32),
        constant("zeros", [0.0] * m.num_groups, np.float32),
    )
    grouped = b.add("Reshape", [*b.inputs(node), constant("groups", [0, m.num_groups, -1], np.int64)], f"{out}.grouped")
    normal = b.add("InstanceNormalization", [grouped, ones, zeros], f"{out}.normal", epsilon=float(m.eps))
    x = b.add("Reshape", [normal, constant("shape", [0, *shape], np.int64)], f"{out}.shaped" if m.affine else out)
    if not m.affine:
        return x
    parts = (v.detach().cpu().numpy().reshape(-1, *[1] * (len(shape) - 1)) for v in (m.weight, m.bias))
    weight, bias = (b.constant(f"{path}.{k}", v) for k, v in zip(("weight", "bias"), parts))
    return b.add("Add", [b.add("Mul", [x, weight], f"{out}.scaled"), bias], out)


def _softplus(b: Builder, node: fx.Node, out: str) -> str:
    """log(1 + e^βx) / β: what torch gives up to its threshold, and differs from x by less than a rounding beyond it."""
    beta = float(b.module(node).beta)
    if beta == 1:
        return b.add("Softplus", b.inputs(node), out)
    factor = b.constant(f"{out}.beta", np.array(beta, dtype=np.float32))
    soft = b.add("Softplus", [b.add("Mul", [*b.inputs(node), factor], f"{out}.times")], f"{out}.soft")
    return b.add("Div", [soft, factor], out)


def _softmax(b: Builder, node: fx.Node, out: str) -> str:
    """In float: onnxruntime's kernel for codes is off by single steps and, before 1.32, yields 0 on grids finer than 1/256."""
    return _add(b, "Softmax", b.inputs(node), out, kept=not is_read_as_float(b.gm, node), axis=b.module(node).dim)


def _prelu(b: Builder, node: fx.Node, out: str) -> str:
    slope = b.module(node).weight.detach().cpu().numpy()
    rank = len(node.meta["shape"])  # channels come first, behind the batch
    return b.add("PRelu", [*b.inputs(node), b.constant(f"{out}.slope", slope.reshape(-1, *[1] * (rank - 1)))], out)


def _with_constant(op: str) -> Callable[..., str]:
    def emit(b: Builder, node: fx.Node, out: str) -> str:
        return b.add(
            op, [*b.inputs(node), b.constant(f"{out}.constant", b.module(node).value.detach().cpu().numpy())], out
        )

    return emit


def _batch_norm(b: Builder, node: fx.Node, out: str) -> str:
    m, path = b.module(node), str(node.target)
    ones = torch.ones_like(m.running_var)
    parts: list[tuple[str, Tensor]] = [
        ("weight", m.weight if m.weight is not None else ones), ("bias", m.bias if m.bias is not None else 0 * ones),
        ("mean", m.running_mean), ("var", m.running_var),
    ]  # fmt: skip
    names = [b.constant(f"{path}.{k}", v.detach().cpu().numpy()) for k, v in parts]
    return b.add("BatchNormalization", [*b.inputs(node), *names], out, epsilon=m.eps)


def _relu6(b: Builder, node: fx.Node, out: str) -> str:
    ends = [b.constant(f"float.{v}", np.array(v, dtype=np.float32)) for v in (0, 6)]
    return b.add("Clip", [*b.inputs(node), *ends], out)


def _plain(op: str, attributes: Callable[[nn.Module], dict[str, Any]] = lambda m: {}) -> Callable[..., str]:
    def emit(b: Builder, node: fx.Node, out: str) -> str:
        given = attributes(b.module(node)) if node.op == "call_module" else {}
        return b.add(op, b.inputs(node), out, **given)

    return emit


def _concat(b: Builder, node: fx.Node, out: str) -> str:
    return b.add("Concat", b.inputs(node), out, axis=1)


# Operation name → emitter `(builder, node, output name) -> output name`. "fake_quant" is the exporter's own.
EMITTERS: dict[str, Callable[[Builder, fx.Node, str], str]] = {
    "conv": _conv, "linear": _linear, "relu": _plain("Relu"), "relu6": _relu6, "max_pool": _max_pool,
    "upsample_nearest": _upsample, "pad": _pad, "slice": _slice, "reshape": _reshape,
    "permute": _plain("Transpose", lambda m: {"perm": list(m.dims)}),  # type: ignore[arg-type]
    "avg_pool": _avg_pool, "add": _plain("Add"), "mul": _plain("Mul"), "concat": _concat,
    "batch_norm": _batch_norm, "batch_norm_1d": _batch_norm,
    "leaky_relu": _plain("LeakyRelu", lambda m: {"alpha": float(m.negative_slope)}),  # type: ignore[arg-type]
    "sigmoid": _plain("Sigmoid"), "hard_sigmoid": _plain("HardSigmoid", lambda m: {"alpha": 1 / 6, "beta": 0.5}),
    "elu": _plain("Elu", lambda m: {"alpha": float(m.alpha)}), "prelu": _prelu, "layer_norm": _layer_norm,  # type: ignore[arg-type]
    "group_norm": _group_norm, "softplus": _softplus,
    "softmax": _softmax, "log_softmax": _plain("LogSoftmax", lambda m: {"axis": m.dim}),  # type: ignore[dict-item]
    "conv_transpose": _conv_transpose, "add_constant": _with_constant("Add"), "mul_constant": _with_constant("Mul"),
    "adaptive_average": _adaptive_average, "resize_bilinear": _resize_bilinear, "resize_nearest": _resize_nearest,
    "float_region": float_region, "move_region": region,
    "tanh": _plain("Tanh"), "gelu": _plain("Gelu", lambda m: {"approximate": m.approximate}),  # type: ignore[dict-item]
}  # fmt: skip
