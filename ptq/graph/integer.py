"""The network on integers: what onnxruntime's integer kernels compute, to the last bit.

A student multiplies and adds real numbers and rounds afterwards; an integer kernel accumulates codes exactly and rounds the
rescaled accumulator once. Both round the same values, but for ties and float noise: one element in 100,000 comes out a step
apart, and travels on. Here every operation between quantizers is replaced by the kernel's arithmetic (`integer_kernels`), and
what stays float by the runtime's own formula (`runtime_functions`).

Tensors between them stay real numbers on their grids, `s · (code - z)`.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ptq.graph import runtime_functions as runtime
from ptq.graph.insert import quantizer_of
from ptq.graph.integer_kernels import (
    IntegerAdd,
    IntegerAverage,
    IntegerLayer,
    IntegerMean,
    IntegerMul,
    IntegerTable,
    Requantize,
    RequantizeSum,
    Rescale,
)
from ptq.graph.layers import AdaptiveAverage, ResizeBilinear
from ptq.graph.ops import BATCH_NORMS, find_op, is_global_mean, output_node
from ptq.graph.plan import merged_clamp
from ptq.graph.trace import rewrite
from ptq.quant.affine import QParams, quantize
from ptq.quant.fake_quant import ActFakeQuant, integer_codes

# Of one tensor, element by element, by the runtime's formula; others (`_TABLES`) as torch has them.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": runtime.sigmoid, "hard_sigmoid": runtime.hard_sigmoid, "tanh": runtime.tanh,
}  # fmt: skip
_TABLES = (*_FUNCTIONS, "leaky_relu", "elu", "gelu")


def code_bounds(gm: fx.GraphModule, raw: fx.Node, q: QParams) -> tuple[int, int]:
    """The codes that the quantizer reading `raw` may yield: its grid's, narrowed by a ReLU or ReLU6 that it does itself."""
    op = find_op(gm, raw)
    low, high = q.spec.qmin, q.spec.qmax
    if op is not None and op.role == "clamp":
        zero, six = quantize(torch.tensor([0.0, 6.0], device=q.scale.device), q).tolist()
        low = max(low, zero)
        high = min(high, six) if op.name == "relu6" else high
    return low, high


def to_integer(student: fx.GraphModule) -> fx.GraphModule:
    """The integer network of a hardened student, on the CPU.

    conv ──► relu ──► quant ──►      →      integer layer ──► requantize ──►
    """
    with rewrite(student) as out:
        out.to("cpu")
        for node in list(out.graph.nodes):
            if node.op == "call_module" and isinstance(out.get_submodule(str(node.target)), ActFakeQuant):
                _replace_quantizer(out, node, student)
        out.graph.eliminate_dead_code()
        for node in list(out.graph.nodes):
            _replace_float(out, node, student)
        result = _before_moves(out, output_node(out))
        op, source = find_op(out, result), None
        if op is not None and op.role == "weighted":
            source = quantizer_of(student, result.all_input_nodes[0].meta["value"])
        if source is not None and integer_codes(out.get_submodule(str(result.target)), "weight") is not None:
            _replace_result(out, result, source.qparams)
    return out.eval().requires_grad_(False)


def _replace_quantizer(gm: fx.GraphModule, node: fx.Node, student: fx.GraphModule) -> None:
    """Puts the kernel that ends in quantizer `node` in its place; grids are looked up in `student`, which still has them all."""
    q, raw = gm.get_submodule(str(node.target)).qparams, node.all_input_nodes[0]  # type: ignore[operator, union-attr]
    bounds = code_bounds(gm, raw, q)  # pyright: ignore[reportArgumentType]
    merged = (
        raw.op == "call_module" and len(raw.all_input_nodes) == 1 and merged_clamp(gm, raw.all_input_nodes[0]) is raw
    )
    producer = raw.all_input_nodes[0] if merged else raw
    sources = [_grid(student, n) for n in producer.all_input_nodes]
    if not sources or any(s is None for s in sources):
        return
    if (found := _weighted(gm, producer, sources[0])) is not None:  # pyright: ignore[reportArgumentType]
        total = _insert(gm, node, found, (producer.all_input_nodes[0],), "layer")
        summed = isinstance(found.layer, nn.Linear) and found.bias is not None and len(producer.meta["shape"]) > 1
        _become(gm, node, (RequantizeSum if summed else Requantize)(found, q, bounds), (total,))  # type: ignore[arg-type]
    elif (kernel := _kernel(gm, producer, sources, q, bounds)) is not None:  # type: ignore[arg-type]
        _become(gm, node, kernel, tuple(a for a in producer.args if isinstance(a, fx.Node)))
        node.meta["operation"] = find_op(gm, producer).name  # type: ignore[union-attr]


def _grid(student: fx.GraphModule, node: fx.Node) -> QParams | None:
    """A tensor's grid, on the CPU, or None where it is float."""
    held = quantizer_of(student, node.meta["value"]) if node.meta.get("value") else None
    if held is None:
        return None
    return QParams(held.scale.detach(), held.qparams.zero_point, held.spec).to(torch.device("cpu"))


def _weighted(gm: fx.GraphModule, node: fx.Node, source: QParams) -> IntegerLayer | None:
    """The integer form of a convolution or linear layer; None where its weight is float or it is none."""
    op = find_op(gm, node)
    if op is None or op.role != "weighted" or integer_codes(gm.get_submodule(str(node.target)), "weight") is None:
        return None
    return IntegerLayer(gm.get_submodule(str(node.target)), source, str(node.target))


def _kernel(
    gm: fx.GraphModule, node: fx.Node, sources: list[QParams], q: QParams, bounds: tuple[int, int]
) -> nn.Module | None:
    """The integer kernel of an operation without weights; None where it has none."""
    op = find_op(gm, node)
    if node.target in (operator.add, operator.mul):
        pair = sources if len(sources) == 2 else sources * 2  # x + x has one source
        return (IntegerAdd if node.target is operator.add else IntegerMul)(pair[0], pair[1], q, bounds)
    if is_global_mean(gm, node):
        return IntegerMean(sources[0], q, bounds)
    if op is not None and op.name == "avg_pool":
        return IntegerAverage(gm.get_submodule(str(node.target)), sources[0], q, bounds)  # type: ignore[arg-type]
    if op is not None and op.name in _TABLES:
        return IntegerTable(_FUNCTIONS.get(op.name, gm.get_submodule(str(node.target))), sources[0], q, bounds)
    return None


def _replace_float(gm: fx.GraphModule, node: fx.Node, student: fx.GraphModule) -> None:
    """Gives an operation that stays float the runtime's arithmetic, where it is not torch's."""
    op = find_op(gm, node)
    if op is None or node.op != "call_module":
        return
    module = gm.get_submodule(str(node.target))
    if isinstance(module, BATCH_NORMS):
        _become(gm, node, runtime.ChannelAffine(module), node.args)  # type: ignore[arg-type]
    elif isinstance(module, ResizeBilinear):
        _become(gm, node, runtime.FourPixels(module), node.args)  # type: ignore[arg-type]
    elif isinstance(module, AdaptiveAverage):
        _become(gm, node, runtime.WindowMeans(module.size), node.args)  # type: ignore[arg-type]
    elif op.name in _FUNCTIONS:
        _become(gm, node, runtime.Elementwise(_FUNCTIONS[op.name]), node.args)  # type: ignore[arg-type]
    elif is_global_mean(gm, node) and (source := _grid(student, node.all_input_nodes[0])) is not None:
        _become(gm, node, runtime.CodeMean(source), node.args)  # type: ignore[arg-type]


def _before_moves(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The convolution or linear layer whose result `node` is, moved about (slices, reshapes), or `node` itself."""
    at = node
    while (op := find_op(gm, at)) is not None and op.role == "same" and len(at.all_input_nodes) == 1:
        at = at.all_input_nodes[0]
    return at if op is not None and op.role == "weighted" else node


def _replace_result(gm: fx.GraphModule, node: fx.Node, source: QParams) -> None:
    layer = IntegerLayer(gm.get_submodule(str(node.target)), source, str(node.target))
    total = _insert(gm, node, layer, (node.all_input_nodes[0],), "layer")
    _become(gm, node, Rescale(layer), (total,))  # type: ignore[arg-type]


def _insert(gm: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple[fx.Node, ...], name: str) -> fx.Node:
    path = f"integer_{name}_{node.name}"
    gm.add_submodule(path, module)
    with gm.graph.inserting_before(node):
        return gm.graph.call_module(path, args)


def _become(gm: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple[fx.Node, ...]) -> None:
    """Makes `node` call another module; its name, value and readers stay, and its metadata says what it was."""
    op = find_op(gm, node)
    if op is not None and op.role != "quant":
        node.meta["operation"] = op.name
    path = f"integer_{node.name}"
    gm.add_submodule(path, module)
    node.target, node.args, node.kwargs, node.op = path, args, {}, "call_module"
