"""The second front end: networks that `torch.fx` cannot trace come through `torch.export`, as aten operations.

    conv2d(x, layer1.0.conv1.weight, None, [1, 1], [1, 1])      →      nn.Conv2d, at layer1.0.conv1

Lowering makes modules of them again, with their weights and statistics, where the network had them, so that the rest of the
toolkit sees one kind of graph.
"""

import copy
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from ptq.graph import lower_constant as constant
from ptq.graph import lower_spatial as spatial
from ptq.graph.call import Call
from ptq.graph.lower import FUNCTIONS


def _transposed(call: Call) -> list[Any]:
    """aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, weight, bias, stride, padding, dilation, transposed, extra, groups = call.args
    if transposed:
        args = (x, weight, bias, stride, padding, extra, groups, dilation)
        return constant.conv_transpose(Call(args, {}, call.shape, call.out))
    return constant.conv(Call((x, weight, bias, stride, padding, dilation, groups), {}, call.shape, call.out))


def _reversed(call: Call) -> list[Any]:
    """aten.rsub(x, other): other - αx."""
    alpha = call.get(2, "alpha", 1)
    return constant.subtract(Call((call.get(1, "other"), call.args[0]), {"alpha": alpha}, call.shape, call.out))


def _instance_norm(call: Call) -> list[Any]:
    """aten.instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn)."""
    weight, bias, mean, var = (call.get(k, name, None) for k, name in enumerate(("weight", "bias", "mean", "var"), 1))
    rest = (call.get(5, "use_input_stats", True), call.get(6, "momentum", 0.1), call.get(7, "eps", 1e-5))
    return constant.instance_norm(Call((call.args[0], mean, var, weight, bias, *rest), {}, call.shape, call.out))


# Name without overload and without the underscore of in-place operations → steps. Arguments stand as in torch.nn.functional,
# but where a function of its own says otherwise.
ATEN: dict[str, Callable[[Call], list[Any]]] = {
    "conv2d": constant.conv, "convolution": _transposed, "conv_transpose2d": constant.conv_transpose,
    "linear": constant.linear, "batch_norm": constant.batch_norm(aten=True), "layer_norm": constant.layer_norm,
    "group_norm": constant.group_norm, "instance_norm": _instance_norm,
    "softmax": constant.softmax(nn.Softmax), "log_softmax": constant.softmax(nn.LogSoftmax),
    "prelu": constant.prelu, "sub": constant.subtract, "rsub": _reversed, "div": constant.divide,
    "add": constant.arithmetic(operator.add),
    "mul": constant.arithmetic(operator.mul), "upsample_nearest2d": spatial.resize("nearest"),
    "_upsample_nearest_exact2d": spatial.resize("nearest-exact"),
    "upsample_bilinear2d": spatial.resize("bilinear"), "slice": spatial.select_slice,
    "select": spatial.select,
} | {
    name: FUNCTIONS[function]
    for name, function in {
        "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu, "elu": F.elu, "silu": F.silu,
        "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
        "gelu": F.gelu, "softplus": F.softplus, "mish": F.mish, "max_pool2d": F.max_pool2d,
        "avg_pool2d": F.avg_pool2d, "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
        "clamp": torch.clamp, "clamp_min": torch.clamp,
        "mean": torch.mean, "permute": torch.permute, "transpose": torch.transpose, "pad": F.pad,
    }.items()
} | dict.fromkeys(("flatten", "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze"), spatial.reshape) | dict.fromkeys(
    ("dropout", "feature_dropout", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "lift_fresh_copy"),
    FUNCTIONS[F.dropout],  # nothing is left of them
)  # fmt: skip


def aten_name(target: Any) -> str | None:
    """The operation's name, "relu_" for aten.relu_.default; None for what is no aten operation."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    return target._schema.name.partition("::")[2]


def lower_aten(target: Any, call: Call) -> list[Any] | None:
    """The steps for an aten operation, or None where it is unknown or none."""
    name = aten_name(target)
    if name is None:
        return None
    if name.rstrip("_") in ("cat", "concat"):
        return [torch.cat]
    found = ATEN.get(name) or ATEN.get(name.rstrip("_"))
    return None if found is None else found(call)


def exported(model: nn.Module, example: Tensor, *, functional: bool = False) -> fx.GraphModule:
    """The network as a graph of aten operations, with its parameters under their own names.

    Args:
        model: in eval mode. example: two images `[2, C, H, W]`. functional: no operation writes into a tensor.

    Raises:
        Exception: whatever `torch.export` raises for a network it does not take either.
    """
    with warnings.catch_warnings(), _silenced():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
        if functional:
            program = program.run_decompositions({})
        gm = plain(program.module(check_guards=False))
    if functional:
        _restore(gm)
    return gm


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing of what torch prints and logs of a network that it cannot export: the error says it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def fixed_batch(model: nn.Module) -> int | None:
    """The number of images that an exported network was exported for, where it is one."""
    if not is_exported(model):
        return None
    inputs = model.graph.find_nodes(op="placeholder")  # type: ignore[union-attr, operator]
    example = inputs[0].meta.get("val") if inputs else None
    return example.shape[0] if isinstance(example, Tensor) and isinstance(example.shape[0], int) else None


def _restore(gm: fx.GraphModule) -> None:
    """Takes out what making a graph functional put in: copies, and BatchNorms that also yield the statistics they were given.

    x ──► native_batch_norm ──► getitem 0      →      x ──► batch_norm
    """
    for node in list(gm.graph.nodes):
        name = aten_name(node.target)
        if name in ("view", "_unsafe_view"):  # which the copy made possible
            node.target = torch.ops.aten.reshape.default
        elif name in ("clone", "contiguous", "alias", "detach", "lift_fresh_copy"):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif name == "copy" and _alike(*node.args[:2]):  # into a tensor, or a slice, that was written into
            node.replace_all_uses_with(node.args[1])
            gm.graph.erase_node(node)
        elif name == "_native_batch_norm_legit_no_training":
            *args, momentum, eps = node.args
            with gm.graph.inserting_before(node):
                norm = gm.graph.call_function(
                    torch.ops.aten.batch_norm.default, (*args, False, momentum, eps, False), name=node.name
                )
            norm.meta = dict(node.meta)
            for part in list(node.users):
                part.replace_all_uses_with(norm)
                gm.graph.erase_node(part)
            gm.graph.erase_node(node)
    gm.recompile()


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have one shape and dtype."""
    first, second = (n.meta.get("val") for n in (a, b))
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.dtype == second.dtype
        and first.shape == second.shape
    )


def plain(gm: fx.GraphModule) -> fx.GraphModule:
    """An exported network as an ordinary graph: no guards, inputs and outputs as they are."""
    root, graph = gm, copy.deepcopy(gm.graph)
    graph.set_codegen(CodeGen())
    for node in reversed(graph.nodes):
        if node.op == "call_module" and not node.users and "guards" in str(node.target):
            graph.erase_node(node)
    return fx.GraphModule(root, graph)


def is_exported(model: nn.Module) -> bool:
    """Whether a network is a graph of aten operations already."""
    return isinstance(model, fx.GraphModule) and any(aten_name(n.target) is not None for n in model.graph.nodes)
