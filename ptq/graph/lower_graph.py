"""Replaces every node of a recorded graph by the known operations that it becomes, in its place."""

import copy
import operator
import sys
from typing import Any

import torch
from torch import fx, nn

from ptq.errors import ModelError
from ptq.graph.aten import aten_name, lower_aten
from ptq.graph.call import Call, TensorShape, Unsupported
from ptq.graph.float_region import FloatRegion
from ptq.graph.lower import GATED, IN_PLACE, lower_call, lower_module
from ptq.graph.ops import find_op
from ptq.graph.recorder import Recorder
from ptq.graph.source_line import first_line, source_of

LAYER = "torch.nn.modules."  # how the names of torch's own modules begin
_NESTED = (f"{LAYER}container.", f"{LAYER}transformer.", f"{LAYER}rnn.")  # of those, made of others, or of many steps


def redirect_in_place(gm: fx.GraphModule) -> None:
    """Makes in-place operations pure: what is read after `y += s` reads the sum, as it did.

    y ──► iadd ──► a          y ──► add ──┬─► a
    └───────────► b     →                 └─► b       (b comes after the sum)
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        if not _in_place(gm, node):
            continue
        changed = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(changed, fx.Node):
            continue
        for user in [u for u in changed.users if order[u] > order[node]]:
            user.replace_input_with(changed, node)


def _in_place(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    return node.op in ("call_function", "call_method") and (
        node.target in IN_PLACE
        or bool(node.kwargs.get("inplace", False))
        or (aten_name(node.target) or "").endswith("_")
    )


def select_parts(gm: fx.GraphModule, recorder: Recorder) -> None:
    """Makes each part of a split tensor a slice of it.

    x ──► chunk ──┬─► getitem 0      →      x ──┬─► slice
                  └─► getitem 1                 └─► slice
    """
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        (parts, index), _, out = recorder.calls[node]
        split = node.args[0]
        if not isinstance(parts, tuple | list) or not isinstance(split, fx.Node) or not split.all_input_nodes:
            continue
        args, kwargs, _ = recorder.calls[split]
        whole, *rest = args or (kwargs.get("input", kwargs.get("tensor")),)
        dim = kwargs.get("dim", rest[1] if len(rest) > 1 else 0)
        if (
            not isinstance(whole, TensorShape)
            or not isinstance(out, TensorShape)
            or not isinstance(dim, int)
            or not out.dims
        ):
            continue
        dim, start = dim % len(out.dims), sum(p.dims[dim % len(out.dims)] for p in parts[:index])
        cut = (*[slice(None)] * dim, slice(start, start + out.dims[dim]))
        node.args = (split.all_input_nodes[0], cut)
        recorder.calls[node] = ((whole, cut), {}, out)


def lower(gm: fx.GraphModule, recorder: Recorder) -> None:
    """Replaces every node by its steps. Nodes that only compute sizes have no tensor result and fall away."""
    used, calls = set[str](), recorder.calls
    owners = {n: _owner(n) for n in gm.graph.nodes}
    # Looked up before any is replaced: a module that is called twice is lowered twice.
    modules = {n: gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"}
    for node in list(gm.graph.nodes):
        shape = calls[node][2]
        if node.op in ("placeholder", "output"):
            if node.op == "placeholder":
                node.meta["shape"] = shape.dims[1:]
                node.meta["owner"] = ""
                node.meta["value"] = node.name
            continue
        if not isinstance(shape, TensorShape) or node in recorder.constants:
            continue
        steps = _steps(modules.get(node), node, calls[node], node in recorder.same)
        _replace(gm, node, steps, used, owners[node], recorder)
    _drop_sizes(gm)
    gm.delete_all_unused_submodules()
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for path, module in gm.named_modules():  # parameters that were read on their own are in the steps now
        if not any(path == c or path.startswith(f"{c}.") for c in called):
            module._parameters.clear()
            module._buffers.clear()
    gm.graph.lint()
    gm.recompile()


def _steps(module: nn.Module | None, node: fx.Node, recorded: tuple[Any, ...], same: bool) -> list[Any]:
    try:
        steps = steps_of(module, node, recorded)
    except Unsupported as e:
        raise ModelError(f"not supported in {node.name}: {e} ({source_of(node)})") from e
    if steps is None and same:  # whatever it is, its result is its argument
        return []
    if steps is None:
        what = f"operation {getattr(node.target, '__name__', node.target)}"
        if module is not None:
            what = f"module {node.target} of type {type(module).__name__}"
        raise ModelError(f"unknown {what} at {node.name} ({source_of(node)})")
    return steps


def steps_of(module: nn.Module | None, node: fx.Node, recorded: tuple[Any, ...]) -> list[Any] | None:
    """What replaces a node as it was recorded, or None where it is unknown; `module`: the one it calls.

    Raises:
        Unsupported: it is known, but not in this form.
    """
    args, kwargs, out = recorded
    if not args and "input" in kwargs:  # torch.sub(input=x, other=1.0)
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, TensorShape)), _first_of_list(args))
    call = Call(args, kwargs, first.dims[1:], out.dims[1:])
    try:
        if module is not None:
            return lower_module(module, call)
        return lower_aten(node.target, call) if aten_name(node.target) else lower_call(node.target, call)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:  # arguments of a form that no rule knows
        raise Unsupported(f"it is called in an unusual form ({first_line(e)})") from e


def _first_of_list(args: tuple[Any, ...]) -> TensorShape:
    listed = args[0] if args and isinstance(args[0], list | tuple) else ()
    return next((a for a in listed if isinstance(a, TensorShape)), TensorShape((0,)))


def _replace(
    gm: fx.GraphModule, node: fx.Node, steps: list[Any], used: set[str], owner: str, recorder: Recorder
) -> None:  # fmt: skip
    """Puts the steps in the node's place, one after another."""
    tensors = [n for n in node.all_input_nodes if recorder.varies(n)]
    if not tensors:
        raise ModelError(f"not supported in {node.name}: it reads a list of tensors as a whole ({source_of(node)})")
    current = tensors[0]
    named = next(
        (k for k, step in enumerate(steps) if isinstance(step, nn.Conv2d)), 0
    )  # behind the padding that it needs
    for k, step in enumerate(steps):
        with gm.graph.inserting_before(node):
            if isinstance(step, nn.Module):
                own = path = (_path(gm, node, step) if k == named else None) or f"fn_{node.name}" + (
                    f"_{k}" if k else ""
                )
                # A module that is called twice gets a copy per call: each call has its own place in the plan.
                if path in used:
                    path, step = f"{path}_again_{node.name}", copy.deepcopy(step)
                used.add(path)
                gm.add_submodule(path, step)
                new = gm.graph.call_module(path, tuple(tensors) if isinstance(step, FloatRegion) else (current,))
                new.meta["module"] = own
            elif step is GATED:
                new = gm.graph.call_function(operator.mul, (tensors[0], current))
            else:
                rank = len(recorder.calls[node][2].dims)  # type: ignore[union-attr]
                new = gm.graph.call_function(step, *tensor_args(node, step, tensors, rank))
        new.meta["owner"] = owner
        new.meta["value"] = node.name if k == len(steps) - 1 else f"{node.name}.step{k}"  # no FX name has a dot
        current = new
    node.replace_all_uses_with(current)
    gm.graph.erase_node(node)


def _path(gm: fx.GraphModule, node: fx.Node, step: nn.Module) -> str | None:
    """Where the module that a node calls, that it was exported from, or that alone computes it, stands in the network."""
    if node.op == "call_module":
        return str(node.target)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    if not path or aten_name(node.target):
        return path if path and is_layer(kind) else None
    try:
        alone = not list(gm.get_submodule(path).children())  # a convolution of the user's own class
    except AttributeError:
        return None
    return path if alone and isinstance(step, nn.Conv2d | nn.Linear) else None


def is_layer(kind: Any) -> bool:
    """Whether a class, kept by name as export does, is one of torch's own modules, not made of other modules."""
    return isinstance(kind, str) and kind.startswith(LAYER) and not kind.startswith(_NESTED)


def _is_sequential(kind: Any) -> bool:
    """Whether a class, or the one of this name, is a `Sequential`."""
    if isinstance(kind, str):
        module, _, name = kind.rpartition(".")
        kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and issubclass(kind, nn.Sequential)


def tensor_args(node: fx.Node, step: Any, tensors: list[fx.Node], rank: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a function of the table is called with in a node's place; `tensors`: what the node reads that is no constant.

    rank: dimensions of the result.

    Raises:
        ModelError: a concatenation of another kind than of channels.
    """
    if step is torch.cat:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim not in (1, 1 - rank):
            raise ModelError(
                f"not supported in {node.name}: concatenation along dimension {dim}; channels (1) are supported"
            )
        parts = list(node.args[0] if node.args else node.kwargs["tensors"])  # type: ignore[arg-type]
        if not all(part in tensors for part in parts):
            raise ModelError(f"not supported in {node.name}: concatenation with a parameter ({source_of(node)})")
        return (parts,), {"dim": 1}
    operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
    return (tuple(operands[:2]), {})  # x + x has one input node but two operands


def _drop_sizes(gm: fx.GraphModule) -> None:
    for node in reversed(list(gm.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output") and find_op(gm, node) is None:
            raise ModelError(
                f"the value of {node.name} is not computed from the input by known operations ({source_of(node)})"
            )


def _owner(node: fx.Node) -> str:
    """Path of the innermost module around a node that is not a Sequential and not the node's own; "" for the network."""
    for path, kind in reversed((node.meta.get("nn_module_stack") or {}).values()):
        if path and path != str(node.target) and not (_is_sequential(kind) or is_layer(kind)):
            return path
    return ""
