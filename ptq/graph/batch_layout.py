"""Where the batch is in each tensor of a network, seen from runs with two batch sizes.

Known operations take tensors `[B, …]`. Networks also fold the batch into other dimensions, as attention in windows does, or
move it elsewhere, as torch's own attention does; a linear layer takes any of them, since it looks at the last dimension alone:

    [64·B, 49, 96] ──► linear ──►      →      ──► reshape ──► [B, 64, 49, 96] ──► linear ──► reshape ──►
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq.errors import ModelError
from ptq.graph.aten import aten_name
from ptq.graph.call import Constant, TensorShape
from ptq.graph.lower_graph import is_layer
from ptq.graph.recorder import node_values, random_input, record

_SIZES = (2, 5)  # of the two batches
_RELATIVE = 1e-5  # float noise


@dataclass(frozen=True, slots=True)
class Batch:
    """A size of `factor` · B."""

    factor: int


class Marks:
    """Every call of a graph with its sizes as functions of the batch: an int, or a `Batch`.

    calls: as `Recorder.calls`. recorder: the run on the first batch.
    """

    def __init__(self, gm: fx.GraphModule, shape: tuple[int, int, int]) -> None:
        self.recorder, other = (record(gm, shape, size) for size in _SIZES)
        self.calls = {n: _merged(n, call, other.calls[n]) for n, call in self.recorder.calls.items()}

    def result(self, node: fx.Node) -> Any:
        """What a node yields: a `TensorShape`, a size, or several."""
        return self.calls[node][2]

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor that a node yields whatever the input is, or None."""
        found = self.recorder.constants.get(node)
        return found if isinstance(found, Tensor) else None

    def varies(self, node: fx.Node) -> bool:
        """Whether a node yields a tensor, or several, that depend on the input."""
        found = self.result(node)
        parts = found if isinstance(found, list | tuple) else [found]
        return node not in self.recorder.constants and any(isinstance(p, TensorShape) for p in parts)

    def by_image(self, node: fx.Node) -> bool:
        """Whether a node yields a float32 tensor [B, …]."""
        found = self.result(node)
        if not isinstance(found, TensorShape) or found.dtype != torch.float32 or not found.dims:
            return False
        return found.dims[0] == Batch(1) and not any(isinstance(d, Batch) for d in found.dims[1:])


def _merged(node: fx.Node, a: Any, b: Any) -> Any:
    if isinstance(a, TensorShape) and isinstance(b, TensorShape):
        return TensorShape(_merged(node, a.dims, b.dims), a.dtype)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return type(a)(_merged(node, x, y) for x, y in zip(a, b)) if type(a) in (list, tuple) else tuple(
            _merged(node, x, y) for x, y in zip(a, b)
        )  # fmt: skip
    if isinstance(a, dict):
        return {k: _merged(node, v, b[k]) for k, v in a.items()}
    if isinstance(a, Constant | slice) or a == b:
        return a
    factor, rest = divmod(a, _SIZES[0]) if isinstance(a, int) else (0, 1)
    if rest or b != factor * _SIZES[1]:
        raise ModelError(f"{node.name} has a size that is no multiple of the batch size")
    return Batch(factor)


def straighten_linears(gm: fx.GraphModule, marks: Marks, shape: tuple[int, int, int]) -> bool:
    """Gives linear layers tensors [B, …] where the batch is elsewhere; whether there were any such. Others stay as they are."""
    found = [n for n in gm.graph.nodes if aten_name(n.target) == "linear" and _is_bent(marks, n)]
    if not found:
        return False
    seen = _seen(gm, {n.args[0] for n in found}, shape)
    for node in found:
        dims = marks.result(node.args[0]).dims
        layout = _layout(dims, *seen[node.args[0]])
        if layout is not None:
            _straighten(gm, node, dims, *layout)
    gm.recompile()
    return True


def _is_bent(marks: Marks, node: fx.Node) -> bool:
    source, weight = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or marks.constant(weight) is None:
        return False
    found = marks.result(source)
    return isinstance(found, TensorShape) and found.dtype == torch.float32 and not marks.by_image(source)


def two_pairs(model: nn.Module, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Two batches of two images that differ in the second image only."""
    first, other = random_input(model, 2, shape), random_input(model, 3, shape)
    return first, torch.cat([first[:1], other[2:]])


def _seen(gm: fx.GraphModule, wanted: set[Any], shape: tuple[int, int, int]) -> dict[fx.Node, list[Tensor]]:
    """What nodes yield for two batches that differ in the second image."""
    runs = [node_values(gm, x, wanted) for x in two_pairs(gm, shape)]
    return {n: [kept[n] for kept in runs] for n in wanted}


def _layout(dims: tuple[Any, ...], x: Tensor, y: Tensor) -> tuple[int, int, int] | None:
    """(d, outer, inner): dimension `d` is outer · B · inner long, in this order; None where that is not seen.

    x, y: the tensor for two batches of two images that differ in the second.
    """
    where = [d for d, size in enumerate(dims[:-1]) if isinstance(size, Batch)]
    if len(where) != 1 or isinstance(dims[-1], Batch):
        return None
    (d,) = where
    factor = dims[d].factor
    changed = (x != y).movedim(d, 0).flatten(1).any(1)
    for inner in range(factor, 0, -1):
        if factor % inner == 0:
            second = torch.zeros(factor // inner, 2, inner, dtype=torch.bool, device=changed.device)
            second[:, 1] = True
            if torch.equal(changed, second.flatten()):
                return d, factor // inner, inner
    return None


def _straighten(gm: fx.GraphModule, node: fx.Node, dims: tuple[Any, ...], d: int, outer: int, inner: int) -> None:
    aten = torch.ops.aten
    parts = [*([outer] if outer > 1 else []), -1, *([inner] if inner > 1 else [])]
    split = [*dims[:d], *parts, *dims[d + 1 :]]
    batch = split.index(-1)
    order = [batch, *(k for k in range(len(split)) if k != batch)]
    back = [order.index(k) for k in range(len(split))]
    meta = _meta_around(node)

    def add(target: Any, source: fx.Node, argument: list[int]) -> fx.Node:
        made = gm.graph.call_function(target, (source, argument))
        made.meta = dict(meta)
        return made

    source: Any = node.args[0]
    with gm.graph.inserting_before(node):
        x = add(aten.reshape.default, source, split) if len(parts) > 1 else source
        x = add(aten.permute.default, x, order) if batch else x
    node.args = (x, *node.args[1:])
    users = list(node.users)
    with gm.graph.inserting_after(node):
        y = add(aten.permute.default, node, back) if batch else node
    if len(parts) > 1:
        width = node.meta["val"].shape[-1]
        with gm.graph.inserting_after(y):
            y = add(aten.reshape.default, y, [*dims[:d], -1, *dims[d + 1 : -1], int(width)])
    for user in users:
        user.replace_input_with(node, y)


def _meta_around(node: fx.Node) -> dict[str, Any]:
    """Where a node stands, but for the layer that it is."""
    stack = node.meta.get("nn_module_stack") or {}
    kept = {k: v for k, v in stack.items() if not is_layer(v[1])}
    return {"nn_module_stack": kept, "stack_trace": node.stack_trace}


def keep_images_apart(gm: fx.GraphModule, shape: tuple[int, int, int]) -> None:
    """Raises ModelError where the result for an image depends on the other images of its batch."""
    with torch.no_grad():
        one, other = (gm(x)[0] for x in two_pairs(gm, shape))
    if not bool(one.isfinite().all()):
        raise ModelError("the network's output on random input is not finite")
    if not torch.allclose(one, other, rtol=0, atol=_RELATIVE * float(one.abs().max()) + 1e-30):
        raise ModelError("the result for an image depends on the other images of its batch")
