"""Puts what the table does not know into float regions, so that the rest of a network can be lowered as ever.

    linear ──► view ──► permute ──┬─► select ──► matmul ──► softmax ──► matmul ──► linear      a graph of aten operations
                                  └─► select ──────┘                      │
    linear ──► float region ──► linear                                                         →

A region yields one tensor [B, …] that the rest of the network reads, and holds all that this tensor is computed from since the
last such tensors: unknown operations, and known ones between them that only move values or are computed in float anyhow. What is
no such tensor, an index for instance, is computed again in every region that reads it; so no integer and no tensor with its batch
elsewhere leaves a region, and no two regions can wait for each other.
"""

import operator
from typing import Any

import torch
from torch import fx, nn

from ptq.errors import ModelError
from ptq.graph.aten import aten_name
from ptq.graph.batch_layout import Batch, Marks, straighten_linears
from ptq.graph.call import Unsupported
from ptq.graph.float_region import (
    MOVES,
    PART,
    PLACEMENT,
    FloatRegion,
    MoveRegion,
    Step,
    fickleness,
    is_move,
    objection,
    plain_number,
)
from ptq.graph.layers import AddConstant, MulConstant
from ptq.graph.lower import GATED
from ptq.graph.lower_graph import LAYER, steps_of, tensor_args
from ptq.graph.ops import BATCH_NORMS, OPS

_FILLS = {"new_zeros": 0, "new_ones": 1, "new_full": None}
_ABSORBED = {
    "same",
    "float",
    "scale",
    "join",
    "clamp",
    "concat",
}  # what known operations may be part of a region, see `_role`


def make_regions(gm: fx.GraphModule, shape: tuple[int, int, int]) -> fx.GraphModule:
    """The graph `gm` of aten operations, none of which writes into a tensor, with float regions; it is edited in place.

    Raises:
        ModelError: an operation can be no part of a graph: it is random, or its shapes depend on values.
    """
    _refuse(gm)
    _free_fills(gm)
    marks = Marks(gm, shape)
    _take_parts(gm, marks)
    _name_layers(gm)
    straighten_linears(gm, marks, shape)
    marks = Marks(gm, shape)
    inside = _inside(gm, marks)
    for root in [n for n in gm.graph.nodes if n in inside and _is_root(n, inside, marks)]:
        _replace(gm, root, inside, marks)
    for node in reversed(gm.graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _refuse(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        reason = None if aten_name(node.target) is None or not node.users else fickleness(node.target)
        if reason is not None:
            raise ModelError(f"aten.{aten_name(node.target)} {reason}")


def _free_fills(gm: fx.GraphModule) -> None:
    """Makes constants of tensors that take no more than their type from the input: x.new_zeros(3, 4) → full((3, 4), 0)."""
    for node in list(gm.graph.nodes):
        name = aten_name(node.target)
        sizes: Any = node.args[1] if name in _FILLS else None
        if sizes is None or any(isinstance(v, fx.Node) for v in sizes):
            continue
        like, fill = node.meta["val"], node.args[2] if name == "new_full" else _FILLS[str(name)]
        with gm.graph.inserting_before(node):
            made = gm.graph.call_function(
                torch.ops.aten.full.default, (sizes, fill), {"dtype": like.dtype, "device": like.device}
            )
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    gm.recompile()


def _take_parts(gm: fx.GraphModule, marks: Marks) -> None:
    """Makes each part of a split tensor a slice of it, and of one taken apart along a dimension a selection."""
    aten = torch.ops.aten
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        split, index = node.args
        name, (source, *_), kwargs = aten_name(split.target), split.args, split.kwargs
        if name not in ("split", "split_with_sizes", "chunk", "unbind") or not isinstance(index, int):
            continue
        at = 1 if name == "unbind" else 2
        dim = split.args[at] if len(split.args) > at else kwargs.get("dim", 0)
        dims = marks.result(source).dims
        dim %= len(dims)
        if isinstance(dims[dim], Batch):
            continue
        start = sum(p.dims[dim] for p in marks.result(split)[:index]) if name != "unbind" else 0
        with gm.graph.inserting_before(node):
            if name == "unbind":
                made = gm.graph.call_function(aten.select.int, (source, dim, index))
            else:
                size = marks.result(node).dims[dim]
                made = gm.graph.call_function(aten.slice.Tensor, (source, dim, start, start + size))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    gm.recompile()


def _name_layers(gm: fx.GraphModule) -> None:
    """Says of a layer that is called as a function which module it is: the one that its weight belongs to."""
    for node in gm.graph.nodes:
        weight = node.args[1] if aten_name(node.target) in ("linear", "conv2d") else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            path = str(weight.target).removesuffix("weight").rstrip("._")  # also of attention's in_proj_weight
            stack = {k: v for k, v in (node.meta.get("nn_module_stack") or {}).items() if v[0] != path}
            node.meta["nn_module_stack"] = stack | {path: (path, LAYER)}


def _inside(gm: fx.GraphModule, marks: Marks) -> set[fx.Node]:
    """The nodes that are computed in regions."""
    varying = [n for n in gm.graph.nodes if n.op == "call_function" and marks.varies(n)]
    empty = set[fx.Node]()  # tensors that take no more than the size of the batch from the input
    for node in varying:
        if all(m in empty or not marks.varies(m) for m in node.all_input_nodes):
            empty.add(node)
    known = {
        n: steps for n in varying if not empty & {n, *n.all_input_nodes} and (steps := _lowered(n, marks)) is not None
    }
    roles = {n: {_role(step) for step in steps} for n, steps in known.items()}
    found = {n for n in varying if n not in known}
    return found | _between(varying, roles, found, marks)


def _between(
    varying: list[fx.Node], roles: dict[fx.Node, set[str]], unknown: set[fx.Node], marks: Marks
) -> set[fx.Node]:
    """The known nodes, of these roles, that are computed with the unknown ones.

    Those between two of them, of which the second does not only move; float ones and moves that alone read one; moves and
    scalings that only lead to some.
    """
    inner = {n for n, found in roles.items() if found <= _ABSORBED}
    while outside := {n for n in inner if any(u not in inner and u not in unknown for u in _readers(n, marks))}:
        inner -= outside
    computed = {n for n in unknown if aten_name(n.target) not in MOVES}  # and what leads to such
    for node in reversed(varying):
        if (node in unknown or node in inner) and any(u in computed for u in _readers(node, marks)):
            computed.add(node)
    found = set(unknown)
    for node in varying:
        sources = [m for m in node.all_input_nodes if marks.varies(m)]
        alone = len(sources) == 1 and sources[0] in found and _readers(sources[0], marks) == [node]
        between = node in inner & computed and any(m in found for m in sources)
        if node in roles and (between or (alone and roles[node] <= {"same", "float", "scale"})):
            found.add(node)
    for node in reversed(varying):
        kinds = {"same", "scale"} if node in computed else {"same"}
        if node in inner and roles[node] <= kinds and all(u in found for u in _readers(node, marks)):
            found.add(node)
    return found


def _readers(node: fx.Node, marks: Marks) -> list[fx.Node]:
    """The nodes that read a node's values, and not its sizes only."""
    return [u for u in node.users if u.op == "output" or marks.varies(u)]


def _role(step: Any) -> str:
    """What an operation is for quantization; here, one with weights or statistics is "weighted", one with a number a "scale"."""
    if step is GATED:
        return "join"
    if isinstance(step, (*BATCH_NORMS, nn.ConvTranspose2d)):
        return "weighted"
    if isinstance(step, AddConstant | MulConstant):
        return "scale"
    return OPS[type(step) if isinstance(step, nn.Module) else step].role


def _lowered(node: fx.Node, marks: Marks) -> list[Any] | None:
    """The known operations that a node becomes; None where it becomes none, or some of its tensors are not [B, …] in float32."""
    tensors = [n for n in node.all_input_nodes if marks.varies(n)]
    if not all(map(marks.by_image, [node, *tensors])):
        return None
    args, kwargs, _ = marks.calls[node]
    try:
        steps = steps_of(None, node, marks.recorder.calls[node])
        if steps is not None and torch.cat in steps:
            tensor_args(node, torch.cat, tensors, len(marks.recorder.calls[node][2].dims))
    except (Unsupported, ModelError):
        return None
    # A size of a batch may say where the batch is, and nothing else.
    if steps is None or (_holds_batch((args, kwargs)) and not {_role(step) for step in steps} <= {"same"}):
        return None
    return steps


def _holds_batch(a: Any) -> bool:
    if isinstance(a, dict):
        a = list(a.values())
    return any(map(_holds_batch, a)) if isinstance(a, list | tuple) else isinstance(a, Batch)


def _is_root(node: fx.Node, inside: set[fx.Node], marks: Marks) -> bool:
    readers = [u for u in _readers(node, marks) if u not in inside]
    if readers and not marks.by_image(node):
        raise ModelError("the network's result is no tensor of numbers with a row per image")
    return bool(readers)


def _replace(gm: fx.GraphModule, root: fx.Node, inside: set[fx.Node], marks: Marks) -> None:
    """Makes `root` a call of the region that yields it."""
    needed, inputs, stack = {root}, dict[fx.Node, None](), [root]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in needed or not marks.varies(source):
                continue
            if source not in inside or _is_root(source, inside, marks):
                inputs[source] = None
            else:
                needed.add(source)
                stack.append(source)
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    read = sorted(inputs, key=lambda n: order[n])
    region = _Writer(read, marks).region(sorted(needed, key=lambda n: order[n]))
    if isinstance(region, MoveRegion) and _moves_nothing(region, marks.result(read[0]).dims):
        root.replace_all_uses_with(read[0])
        return
    path = f"region_{root.name}"
    gm.add_submodule(path, region)
    computing = [n for n in needed if n.target is not operator.getitem and aten_name(n.target) not in MOVES]
    if computing:  # whose module says more of a region than that of a move at its end
        last = max(computing, key=lambda n: order[n])
        root.meta["nn_module_stack"] = last.meta.get("nn_module_stack")
    root.op, root.target, root.args, root.kwargs = "call_module", path, tuple(read), {}


def _moves_nothing(region: MoveRegion, dims: tuple[Any, ...]) -> bool:
    x = torch.rand(2, *dims[1:], generator=torch.Generator().manual_seed(0))
    return torch.equal(region(x), x)


class _Writer:
    """Writes nodes as the steps of a region that reads the nodes `inputs`."""

    def __init__(self, inputs: list[fx.Node], marks: Marks) -> None:
        self.inputs, self.marks = inputs, marks
        self.values: dict[fx.Node, int] = {n: k for k, n in enumerate(inputs)}
        self.constants: dict[fx.Node, int] = {}

    def region(self, nodes: list[fx.Node]) -> FloatRegion:
        """The region of these nodes, in their order."""
        steps = []
        for node in nodes:
            steps.append(self._step(node))
            self.values[node] = len(self.values)
        held = [self.marks.constant(n) for n in self.constants]
        tensors = [t.detach().clone().contiguous() for t in held if t is not None]
        kinds = tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors)
        made = (MoveRegion if is_move(tuple(steps), len(self.inputs), len(kinds)) else FloatRegion)(tuple(steps), kinds)
        for k, tensor in enumerate(tensors):
            setattr(made, f"constant_{k}", tensor)
        return made

    def _step(self, node: fx.Node) -> Step:
        target: Any = node.target
        if target is operator.getitem:
            return PART, (("value", self.values[node.args[0]]), node.args[1]), ()  # type: ignore[index, return-value]
        reason = "is none of torch's own" if aten_name(target) is None else objection(target)
        indices: Any = node.args[1] if aten_name(target) == "index" else ()
        if any(_is_mask(self.marks, n) for n in indices):
            reason = "has a result whose shape depends on the values"
        if reason is not None:
            raise ModelError(f"{target!s} at {node.name} {reason}")
        name = f"{aten_name(target)}.{target._overloadname}"
        args = tuple(map(self._argument, node.args))
        if name == "reshape.default":
            args = (args[0], _with_rest(args[1]))
        kwargs = tuple((k, self._argument(v)) for k, v in node.kwargs.items() if k not in PLACEMENT)
        return name, args, kwargs

    def _argument(self, a: Any) -> Any:
        if isinstance(a, list | tuple):
            return tuple(map(self._argument, a))
        if not isinstance(a, fx.Node):
            return plain_number(a)
        if a in self.values:
            return ("value", self.values[a])
        if self.marks.constant(a) is not None:
            return ("constant", self.constants.setdefault(a, len(self.constants)))
        size = self.marks.result(a)
        return ("batch", size.factor) if isinstance(size, Batch) else plain_number(size)


def _is_mask(marks: Marks, node: Any) -> bool:
    return isinstance(node, fx.Node) and marks.varies(node) and marks.result(node).dtype == torch.bool


def _with_rest(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes of a reshape with -1 for one that holds the batch, where that says it."""
    held = [k for k, size in enumerate(sizes) if isinstance(size, tuple)]
    return (*sizes[: held[0]], -1, *sizes[held[0] + 1 :]) if len(held) == 1 and -1 not in sizes else sizes
