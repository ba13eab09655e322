"""One run of a network on example images, to learn every shape and what does not depend on the images."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq.errors import ModelError
from ptq.graph.call import Constant, TensorShape
from ptq.graph.source_line import first_line


class _Values(fx.Interpreter):
    """Keeps what nodes yield."""

    def __init__(self, gm: fx.GraphModule, wanted: Collection[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted, self.found = wanted, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.found[n] = result
        return result


@torch.no_grad()
def node_values(gm: fx.GraphModule, x: Tensor, wanted: Collection[fx.Node] | None = None) -> dict[fx.Node, Any]:
    """What nodes yield for the input `x`: those of `wanted`, or all."""
    run = _Values(gm, set(gm.graph.nodes) if wanted is None else wanted)
    run.run(x)
    return run.found


class Recorder(fx.Interpreter):
    """Runs a graph and keeps, per node, its concrete arguments and result.

    constants: what does not depend on the network's input. same: nodes that gave back one of their arguments, untouched.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.calls: dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.same: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        sources = n.all_input_nodes
        first = self.env[sources[0]] if sources else None
        before = getattr(first, "_version", None)
        recorded = fx.node.map_arg((n.args, n.kwargs), self._argument)  # pyright: ignore[reportAttributeAccessIssue]
        result = super().run_node(n)
        if n.op not in ("placeholder", "output") and all(m in self.constants for m in sources):
            self.constants[n] = result
        self.calls[n] = (*recorded, shapes_only(result))  # type: ignore[misc]
        if sources and first is result and getattr(first, "_version", None) == before:  # not written into
            self.same.add(n)
        return result

    def varies(self, n: fx.Node) -> bool:
        """Whether a node yields a tensor that depends on the input; nodes that lowering put in do."""
        return n not in self.constants and (n not in self.calls or isinstance(self.calls[n][2], TensorShape))

    def _argument(self, n: fx.Node) -> Any:
        if isinstance(self.constants.get(n), Tensor):
            return Constant(self.constants[n])
        return shapes_only(self.env[n])


def shapes_only(a: Any) -> Any:
    return fx.node.map_aggregate(a, lambda v: TensorShape(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v)  # pyright: ignore[reportAttributeAccessIssue]


_BATCHES = (2, 3, 5)  # all that networks are run on while they are traced
_POSITIVE: ContextVar[bool] = ContextVar("positive", default=False)


@contextmanager
def noise_for(model: nn.Module, shape: tuple[int, int, int]) -> Iterator[None]:
    """Within it, `random_input` is noise that the network yields numbers for: uniform over [0, 1) where normal noise gives none.

    So it is with networks that begin with a logarithm or a root, of spectra or of light.
    """
    token = _POSITIVE.set(False)
    try:
        if not _finite(model, shape):
            _POSITIVE.set(True)
            _POSITIVE.set(_finite(model, shape))
        yield
    finally:
        _POSITIVE.reset(token)


def _finite(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    found: list[Tensor] = []
    try:
        with torch.no_grad():
            result = [copy.deepcopy(model)(random_input(model, batch, shape)) for batch in _BATCHES]
        fx.node.map_aggregate(result, lambda v: found.append(v) if isinstance(v, Tensor) else None)  # pyright: ignore[reportAttributeAccessIssue]
        return all(bool(v.isfinite().all()) for v in found)
    except Exception:  # what is wrong with it is found and said where it is traced
        return True


def random_input(model: nn.Module, batch: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise [batch, C, H, W] where the network is, the same for the same batch size; see `noise_for`."""
    first = next((p for p in model.parameters()), torch.zeros(()))
    rng = torch.Generator().manual_seed(batch)
    draw = torch.rand if _POSITIVE.get() else torch.randn
    return draw(batch, *shape, generator=rng).to(first.device)


def record(gm: fx.GraphModule, shape: tuple[int, int, int], batch: int = 2) -> Recorder:
    """A run on noise.

    Raises:
        ModelError: the network does not take input of this shape.
    """
    recorder = Recorder(gm)
    try:
        with torch.no_grad():
            recorder.run(random_input(gm, batch, shape))
    except ModelError:
        raise
    except Exception as e:  # whatever the network raises on an input it does not fit
        raise ModelError(
            f"the network does not run on input [B, {', '.join(map(str, shape))}]: {first_line(e)}; check the input shape"
        ) from e
    return recorder
