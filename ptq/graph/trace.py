"""From any `nn.Module` to the teacher: a `torch.fx` graph of known operations, every tensor named.

    trace(model) = symbolic trace → run once, to learn every shape → lower to the operations of `ops.py` → name values
                   → compare with the original on random input

The name of a value is the FX name of the node that made it, kept in `node.meta["value"]`; passes move it along, so that
teacher and student can be aligned at any time. `meta["shape"]` is the value's shape without the batch, `meta["owner"]`
the innermost module that is not a `Sequential` and in whose forward the node ran.
"""

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ptq.errors import ModelError
from ptq.graph.lower import GATED, IN_PLACE, Call, TensorShape, Unsupported, lower_call, lower_module
from ptq.graph.ops import OPS, find_op, output_node
from ptq.graph.source_line import first_line, source_of, user_line

# Float kernels differ with batch size and memory layout in the last bits; lowering changes no more than the order of sums.
_RELATIVE = 1e-5


class _Tracer(fx.Tracer):
    """Keeps known layers whole, by exact type: a subclass may compute something else, so it is traced into."""

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OPS or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps, per node, its concrete arguments and result."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.calls: dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        shapes = fx.node.map_aggregate((args, kwargs), _shape_only)  # pyright: ignore[reportAttributeAccessIssue]
        result = super().run_node(n)
        self.calls[n] = (*shapes, _shape_only(result))  # type: ignore[misc]
        return result


def _shape_only(a: Any) -> Any:
    return TensorShape(tuple(a.shape)) if isinstance(a, Tensor) else a


@contextmanager
def rewrite(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The frame of every pass: yields a deep copy to edit, then removes dead nodes, lints and recompiles it."""
    out = copy.deepcopy(gm)
    yield out
    out.graph.eliminate_dead_code()
    out.delete_all_unused_submodules()
    out.graph.lint()
    out.recompile()


def trace(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The teacher: `model` in eval mode and float32 as a graph of known operations, frozen. `model` is not changed.

    Args:
        model: any float network with one tensor in, `[B, C, H, W]`, and one out.
        input_shape: (C, H, W), without the batch.

    Raises:
        ModelError: the network cannot be traced, does not accept the input, or holds an unknown operation; the message
            names the line of its source.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    try:
        original = copy.deepcopy(model).float().eval().requires_grad_(False)
    except RuntimeError as e:  # the old weight_norm keeps a tensor that cannot be copied
        raise ModelError(
            f"the network cannot be copied: {first_line(e)}; remove weight_norm with remove_weight_norm"
        ) from e
    _refuse_hooks(original)
    gm = _symbolic(copy.deepcopy(original))
    calls = _record(gm, input_shape)
    _redirect_in_place(gm)
    _lower(gm, calls)
    gm.eval().requires_grad_(False)
    _compare(original, gm, input_shape)
    return gm


def _refuse_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"module {path or 'the network itself'} has a forward hook, which a graph cannot hold; remove it "
                "(spectral_norm is one: use torch.nn.utils.parametrizations.spectral_norm and remove_parametrizations)"
            )
        if parametrize.is_parametrized(module):
            raise ModelError(
                f"module {path} is parametrized; bake the weight in with torch.nn.utils.parametrize.remove_parametrizations"
            )


def _symbolic(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as e:  # whatever the user's forward raises when it meets a symbolic tensor
        raise ModelError(
            f"the network cannot be traced: {user_line(e)}: {first_line(e)}; make this independent of tensor values "
            "(shapes are fine), or quantize the sub-module without it"
        ) from e
    gm = fx.GraphModule(tracer.root, graph)
    inputs = graph.find_nodes(op="placeholder")
    if str(inputs[0].target).startswith("*"):
        raise ModelError(
            "the network takes any number of inputs (*args); wrap it in a module whose forward takes one tensor"
        )
    for extra in inputs[1:]:
        if extra.users or not (extra.args or str(extra.target).startswith("*")):
            raise ModelError(
                f"the network takes {len(inputs)} inputs, {', '.join(n.name for n in inputs)}; one is supported"
            )
        graph.erase_node(extra)
    if not isinstance(output_node(gm), fx.Node):
        raise ModelError(
            "the network returns more than one tensor; wrap it in a module that returns the one to quantize"
        )
    return gm


def _random_input(gm: nn.Module, batch: int, shape: tuple[int, int, int]) -> Tensor:
    first = next((p for p in gm.parameters()), torch.zeros(()))
    rng = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *shape, generator=rng).to(first.device)


def _record(gm: fx.GraphModule, input_shape: tuple[int, int, int]) -> dict[fx.Node, tuple[Any, ...]]:
    recorder = _Recorder(gm)
    try:
        with torch.no_grad():
            recorder.run(_random_input(gm, 2, input_shape))
    except ModelError:
        raise
    except Exception as e:  # whatever the network raises on an input it does not fit
        raise ModelError(
            f"the network does not run on input [B, {_x(input_shape)}]: {first_line(e)}; check the input shape"
        ) from e
    return recorder.calls


def _x(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _redirect_in_place(gm: fx.GraphModule) -> None:
    """Makes in-place operations pure: what is read after `y += s` reads the sum, as it did.

    y ──► iadd ──► a          y ──► add ──┬─► a
    └───────────► b     →                 └─► b       (b comes after the sum)
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        if not _in_place(gm, node):
            continue
        changed = node.args[0]
        if not isinstance(changed, fx.Node):
            continue
        for user in [u for u in changed.users if order[u] > order[node]]:
            user.replace_input_with(changed, node)


def _in_place(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    return node.op in ("call_function", "call_method") and (
        node.target in IN_PLACE or bool(node.kwargs.get("inplace", False))
    )


def _lower(gm: fx.GraphModule, calls: dict[fx.Node, tuple[Any, ...]]) -> None:
    """Replaces every node by its steps. Nodes that only compute sizes have no tensor result and fall away."""
    used: set[str] = set()
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
        if not isinstance(shape, TensorShape) or not _has_tensor_input(node, calls[node]):
            continue
        steps = _steps(modules.get(node), node, calls[node])
        _replace(gm, node, steps, used, owners[node])
    _drop_sizes(gm)
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()


def _has_tensor_input(node: fx.Node, call: tuple[Any, ...]) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate(call[:2], lambda a: found.append(a) if isinstance(a, TensorShape) else None)  # pyright: ignore[reportAttributeAccessIssue]
    return node.op != "get_attr" and bool(found)


def _steps(module: nn.Module | None, node: fx.Node, recorded: tuple[Any, ...]) -> list[Any]:
    args, kwargs, out = recorded
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, TensorShape)), _first_of_list(args))
    call = Call(args, kwargs, first.dims[1:], out.dims[1:])
    try:
        if module is not None:
            what, steps = f"module {node.target} of type {type(module).__name__}", lower_module(module, call)
        else:
            what = f"operation {getattr(node.target, '__name__', node.target)}"
            steps = lower_call(node.target, call)
    except Unsupported as e:
        raise ModelError(f"not supported in {node.name}: {e} ({source_of(node)})") from e
    if steps is None:
        raise ModelError(
            f"unknown {what} at {node.name} ({source_of(node)}); known: {', '.join(sorted(o.name for o in OPS.values()))}"
        )
    return steps


def _first_of_list(args: tuple[Any, ...]) -> TensorShape:
    return args[0][0] if args and isinstance(args[0], list | tuple) and args[0] else TensorShape((0,))


def _replace(gm: fx.GraphModule, node: fx.Node, steps: list[Any], used: set[str], owner: str) -> None:
    """Puts the steps in the node's place, one after another."""
    tensors = node.all_input_nodes
    current = tensors[0]
    for k, step in enumerate(steps):
        with gm.graph.inserting_before(node):
            if isinstance(step, nn.Module):
                path = (
                    str(node.target)
                    if node.op == "call_module" and k == 0
                    else f"fn_{node.name}" + (f"_{k}" if k else "")
                )
                # A module that is called twice gets a copy per call: each call has its own place in the plan.
                if path in used:
                    path, step = f"{path}_again_{node.name}", copy.deepcopy(step)
                used.add(path)
                gm.add_submodule(path, step)
                new = gm.graph.call_module(path, (current,))
            elif step is GATED:
                new = gm.graph.call_function(operator.mul, (tensors[0], current))
            else:
                new = gm.graph.call_function(step, *_tensor_args(node, step, tensors))
        new.meta["owner"] = owner
        new.meta["value"] = node.name if k == len(steps) - 1 else f"{node.name}.step{k}"  # no FX name has a dot
        current = new
    node.replace_all_uses_with(current)
    gm.graph.erase_node(node)


def _tensor_args(node: fx.Node, step: Any, tensors: list[fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if step is torch.cat:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 1:
            raise ModelError(
                f"not supported in {node.name}: concatenation along dimension {dim}; channels (1) are supported"
            )
        return (list(node.args[0] if node.args else node.kwargs["tensors"]),), {"dim": 1}  # type: ignore[arg-type]
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
        if path and path != str(node.target) and not (isinstance(kind, type) and issubclass(kind, nn.Sequential)):
            return path
    return ""


def _compare(original: nn.Module, gm: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Raises unless the graph computes what the network does, on another batch size than it was lowered with."""
    x = _random_input(gm, 3, input_shape)
    with torch.no_grad():
        try:
            expected = original(x.clone())
            got = _ShapeWriter(gm).run(x)
        except Exception as e:  # a batch size baked into the network shows here
            raise ModelError(
                f"the network fails on another batch size: {first_line(e)}; is the batch size fixed in it?"
            ) from e
    if not isinstance(expected, Tensor) or expected.ndim < 2:
        raise ModelError(
            "the network's output has no class dimension; wrap it in a module that returns [B, K] or [B, K, H, W]"
        )
    if not bool(torch.isfinite(expected).all()):
        raise ModelError("the network's output on random input is not finite; are there NaNs among its weights?")
    if expected.shape != got.shape or not torch.allclose(
        expected, got, rtol=0, atol=_RELATIVE * float(expected.abs().max()) + 1e-30
    ):
        raise ModelError(
            "the traced network does not compute what the original does; "
            "does its forward depend on the batch size, on random numbers or on state, or write into a slice of a tensor?"
        )


class _ShapeWriter(fx.Interpreter):
    """Writes `meta["shape"]`, without the batch, on every node it runs."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape[1:])
        return result
