"""From any `nn.Module` to the teacher: a `torch.fx` graph of known operations, every tensor named.

    trace(model) = symbolic trace → run once, to learn every shape → lower to the operations of `ops.py` → name values
                   → compare with the original on random input

Where an operation is none of those, the network goes through `torch.export`, and what is unknown stays, in float regions
(`regions.py`); networks of known operations alone are never touched by that.

The name of a value is the FX name of the node that made it, kept in `node.meta["value"]`; passes move it along, so that
teacher and student can be aligned at any time. `meta["shape"]` is the value's shape without the batch, `meta["owner"]`
the innermost module that is not a `Sequential` and in whose forward the node ran.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq.errors import ModelError
from ptq.graph.aten import exported, fixed_batch, is_exported
from ptq.graph.batch_layout import keep_images_apart
from ptq.graph.lower_graph import lower, redirect_in_place, select_parts
from ptq.graph.network_checks import own_copy
from ptq.graph.ops import OPS
from ptq.graph.recorder import noise_for, random_input, record
from ptq.graph.regions import make_regions
from ptq.graph.source_line import first_line, user_line

# Float kernels differ with batch size and memory layout in the last bits; lowering changes no more than the order of sums.
_RELATIVE = 1e-5


class _Tracer(fx.Tracer):
    """Keeps known layers whole, by exact type: a subclass may compute something else, so it is traced into."""

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OPS or super().is_leaf_module(m, module_qualified_name)


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
        ModelError: the network cannot be traced, does not accept the input, or holds an unknown operation that cannot stay in
            float either; the message names the line of its source.
    """
    with torch.inference_mode(False):  # whose tensors do not tell whether they were written into
        original = own_copy(model)
        with noise_for(original, input_shape):
            return _traced(original, input_shape)


def _traced(original: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    gm = _symbolic(copy.deepcopy(original), input_shape)
    try:
        recorder = record(gm, input_shape)
    except ModelError as e:
        if (count := fixed_batch(original)) in (None, 2):  # two images are what was tried
            raise
        raise ModelError(
            f"{e}. The archive was exported for {count} images at a time: with a free batch it is exported by "
            "dynamic_shapes=({0: torch.export.Dim('batch')},)"
        ) from e
    try:
        redirect_in_place(gm)
        select_parts(gm, recorder)
        lower(gm, recorder)
        _compare(original, gm.eval().requires_grad_(False), input_shape)
    except ModelError as e:
        gm = _with_regions(original, input_shape, e).eval().requires_grad_(False)
        _compare(original, gm, input_shape)
    return gm


def _with_regions(original: nn.Module, input_shape: tuple[int, int, int], error: ModelError) -> fx.GraphModule:
    """The graph with what the table does not know, or not with the batch where it is, in float regions.

    Raises:
        ModelError: `error`, which says what that is, and why it cannot stay in float either.
    """
    model = copy.deepcopy(original)
    try:
        gm = exported(model, random_input(model, 2, input_shape), functional=True)
    except Exception as e:  # whatever export has to say of a network it does not take
        raise ModelError(f"{error}; nor can it stay in float: {first_line(e)}") from e
    gm = _checked(gm)
    for node in gm.graph.nodes:
        kind = getattr(node.meta.get("val"), "dtype", None)
        if kind in (torch.bfloat16, torch.float16):
            raise ModelError(f"the network computes in {kind} in part; take torch.autocast and such casts out")
    try:
        gm = make_regions(gm, input_shape)
        lower(gm, record(gm, input_shape))
        keep_images_apart(gm, input_shape)
    except ModelError as e:
        raise ModelError(f"{error}; nor can it stay in float: {e}") from e
    return gm


def _symbolic(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The network's graph, by symbolic tracing or, where its forward branches on shapes and the like, by `torch.export`."""
    tracer = _Tracer()
    if is_exported(model):
        return _checked(model)  # pyright: ignore[reportArgumentType]
    try:
        graph = tracer.trace(model)
    except Exception as e:  # whatever the user's forward raises when it meets a symbolic tensor
        try:
            gm = exported(model, random_input(model, 2, input_shape))
        except Exception:  # of the two, the first error names the line
            _refuse_input(model, input_shape)
            raise ModelError(
                f"the network cannot be traced: {user_line(e)}: {first_line(e)}; make this independent of tensor values "
                "(shapes are fine), or quantize the sub-module without it"
            ) from e
        return _checked(gm)
    extra = graph.find_nodes(op="placeholder")[1:]
    if any(n.users for n in extra) and all(n.args for n in extra):  # options, whose defaults export puts in
        with suppress(Exception):  # of what export does not take either, the inputs are named below
            return _checked(exported(model, random_input(model, 2, input_shape)))
    return _checked(fx.GraphModule(tracer.root, graph))


def _refuse_input(model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """Raises ModelError if the network as it is does not run either."""
    try:
        with torch.no_grad():
            model(random_input(model, 2, input_shape))
    except Exception as e:  # whatever the user's forward raises
        shape = ", ".join(map(str, input_shape))
        raise ModelError(f"the network does not run on input [B, {shape}]: {user_line(e)}: {first_line(e)}") from e


def _checked(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with one tensor in and one out.

    Raises:
        ModelError: it has more.
    """
    graph = gm.graph
    inputs = graph.find_nodes(op="placeholder")
    if not inputs:
        raise ModelError("the network takes no input; its forward must take one tensor [B, C, H, W]")
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
    results = tensors_of(graph.output_node().args[0])
    if len(results) != 1:
        raise ModelError(
            f"the network returns {len(results)} tensors; wrap it in a module that returns the one to quantize"
        )
    graph.output_node().args = (results[0],)
    gm.recompile()
    return gm


def tensors_of(result: Any) -> list[Any]:
    """The tensors (or their nodes) of a network's result: a tensor, or a dictionary, list or tuple of some."""
    if isinstance(result, Mapping):
        return tensors_of(list(result.values()))
    if isinstance(result, list | tuple):
        return [t for part in result for t in tensors_of(part)]
    return [] if result is None else [result]


def _compare(original: nn.Module, gm: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Raises unless the graph computes what the network does, on another batch size than it was lowered with."""
    x = random_input(gm, 3, input_shape)
    with torch.no_grad():
        try:
            (expected,) = tensors_of(original(x.clone()))
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
        raise ModelError(
            "the network's output is not finite, neither on normal noise nor on numbers from 0 to 1; are there NaNs among its "
            "weights, or does it take other numbers only?"
        )
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
