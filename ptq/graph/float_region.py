"""Operations that the table does not know, as one layer that computes them in float: a short program of aten operations.

    value 0 … n-1: the inputs; every step then adds one value, and the last is the result

    ("roll.default", (("value", 0), (-3, -3), (1, 2)), ())
    ("reshape.default", (("value", 1), (-1, 49, 96)), ())

Steps are plain data, so that a network that holds some is saved and loaded like any other. Loaded files may come from anybody:
only operations that read tensors and numbers and yield tensors can be called (`operation`), whatever a file names.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq.errors import ModelError

# Arguments and results of what may be called. Strings only where they choose among ways to compute: none names a file.
_ARGUMENTS = {
    "Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]", "int", "Optional[int]", "List[int]", "Optional[List[int]]",
    "List[Optional[int]]", "float", "Optional[float]", "List[float]", "Optional[List[float]]", "number", "Optional[number]",
    "List[number]", "bool", "Optional[bool]", "List[bool]",
}  # fmt: skip
_STRINGS = {
    "equation", "rounding_mode", "approximate", "mode", "reduce", "indexing", "interpolation", "padding", "side", "norm", "ord",
}  # fmt: skip
_RESULTS = {"Tensor", "List[Tensor]"}
_INTERNAL = {
    "_softmax",
    "_log_softmax",
    "_to_copy",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact2d",
}  # of the names that begin with an underscore
_UNDEFINED = ("empty", "new_empty", "as_strided", "resize")  # results that depend on memory and its layout
# Operations that are random only by an argument, which is looked at where they are called: its place, name, and harmless value.
_DROPPING: dict[str, tuple[int, str, Any]] = {"scaled_dot_product_attention": (4, "dropout_p", 0.0)} | dict.fromkeys(
    ("lstm", "gru", "rnn_tanh", "rnn_relu"), (6, "train", False)
)
# What says where a tensor is and how it lies in memory, not what it holds.
PLACEMENT = ("device", "layout", "pin_memory", "memory_format", "generator")
PART = "getitem"  # one of several results

# Operations that yield what they read, moved, and zeros at most.
_PLAIN = {"reshape", "permute", "transpose", "select", "slice", "unflatten", "flatten", "unsqueeze", "squeeze", PART}
MOVES = _PLAIN | {
    "t", "movedim", "moveaxis", "swapaxes", "narrow", "expand", "roll", "flip", "unbind", "split", "split_with_sizes", "chunk",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "cat", "stack", "repeat",
}  # fmt: skip

_LAYERS = ("conv1d", "conv2d", "conv3d", "convolution", "linear", "addmm")
_PADS = {"pad", "constant_pad_nd"}  # which move if they pad with zeros

Step = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]


def operation(name: str) -> Any:
    """The aten operation "cumsum.default".

    Raises:
        ModelError: there is none of this name, or none that only computes tensors from tensors and numbers.
    """
    base, _, overload = str(name).partition(".")
    packet = getattr(torch.ops.aten, base, None) if base.isidentifier() else None
    found = getattr(packet, overload, None) if packet is not None and overload.isidentifier() else None
    if not isinstance(found, torch._ops.OpOverload) or found.namespace != "aten":
        raise ModelError(f"there is no operation aten.{str(name)[:80]}")
    reason = objection(found)
    if reason is not None:
        raise ModelError(f"operation aten.{name} {reason}")
    return found


def objection(op: torch._ops.OpOverload) -> str | None:
    """Why an operation cannot stand in a graph, or None where it can."""
    schema, base = op._schema, op._schema.name.partition("::")[2]
    if schema.is_mutable:
        return "writes into a tensor"
    if (fickle := fickleness(op)) is not None:
        return fickle
    allowed = all(
        str(a.type) in _ARGUMENTS
        or a.name in PLACEMENT
        or (str(a.type) in ("str", "Optional[str]") and a.name in _STRINGS)
        for a in schema.arguments
    )
    hidden = base.startswith("_") and base not in _INTERNAL
    results = [str(r.type) for r in schema.returns]
    if not allowed or hidden or not results or not set(results) <= _RESULTS or base.startswith(_UNDEFINED):
        return "does more, or less, than compute tensors from tensors and numbers"
    return None


def fickleness(op: torch._ops.OpOverload) -> str | None:
    """Why an operation's result, or its shape, is not the same each time for tensors of the same shapes; None where it is."""
    base = op._schema.name.partition("::")[2]
    checked = base in _DROPPING and op._overloadname != "data"  # packed sequences have their arguments elsewhere
    if torch.Tag.nondeterministic_seeded in op.tags and not checked:
        return "gives random numbers"
    # An index may be of booleans; likewise.
    if torch.Tag.dynamic_output_shape in op.tags and base != "index":
        return "has a result whose shape depends on the values"
    return None


class FloatRegion(nn.Module):
    """Aten operations from one or more tensors `[B, …]` to one `[B, …]`, computed in float.

    steps: name, arguments and named arguments of each. In arguments a pair that begins with a word stands for something else:
    ("value", k) for a value above, ("constant", k) for a tensor that does not depend on the input, ("batch", k) for k · B,
    ("dtype", "int64"), ("float", "-inf"), ("text", "ij,jk->ik").
    tensors: shape and dtype of the constants, which are buffers `constant_0`, …

    Raises:
        ModelError: a step is damaged, or calls what may not be called.
    """

    def __init__(self, steps: tuple[Step, ...], tensors: tuple[tuple[tuple[int, ...], str], ...]) -> None:
        super().__init__()
        self.steps, self.tensors = tuple(steps), tuple((tuple(shape), kind) for shape, kind in tensors)
        for k, (shape, kind) in enumerate(self.tensors):
            self.register_buffer(f"constant_{k}", torch.zeros(shape, dtype=dtype_of(kind)))
        self._operations = [None if name == PART else operation(name) for name, _, _ in self.steps]
        if not self.steps:
            raise ModelError("a float region without a step")
        for step in self.steps:
            _check(*step)

    @property
    def constants(self) -> list[Tensor]:
        """The tensors that do not depend on the input, in the order of `tensors`."""
        return [self.get_buffer(f"constant_{k}") for k in range(len(self.tensors))]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(inputs, self.constants)

    def compute(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> Tensor:
        """The result, with these constants."""
        values: list[Any] = list(inputs)
        for found, (_, args, kwargs) in zip(self._operations, self.steps):
            given = [_argument(a, values, constants) for a in args]
            if found is None:
                values.append(given[0][given[1]])
                continue
            named = {k: _argument(v, values, constants) for k, v in kwargs}
            if any(a.name == "device" for a in found._schema.arguments):
                named["device"] = inputs[0].device
            values.append(found(*given, **named))
        return values[-1]

    @property
    def names(self) -> list[str]:
        """What it computes: its operations, each once; those that only move values where there are no others."""
        every = list(dict.fromkeys(name.partition(".")[0] for name, _, _ in self.steps if name != PART))
        return [n for n in every if n not in MOVES and n not in _PADS] or [n for n in every if n not in _PLAIN] or every


def _check(name: str, args: Any, kwargs: tuple[tuple[str, Any], ...]) -> None:
    if not isinstance(args, tuple) or not all(isinstance(k, str) and k not in PLACEMENT for k, _ in kwargs):
        raise ModelError(f"step {name} of a float region is damaged")
    place, argument, harmless = _DROPPING.get(name.partition(".")[0], (0, "", None))
    given = [*args[place : place + 1], *(v for k, v in kwargs if k == argument)]
    if argument and given not in ([], [harmless]):
        raise ModelError(f"aten.{name} with dropout gives random numbers")


class MoveRegion(FloatRegion):
    """A region that only moves the values of its one input: the result is on the input's grid."""


def _argument(a: Any, values: Sequence[Any], constants: Sequence[Tensor]) -> Any:
    if not isinstance(a, tuple):
        return a
    if not a or not isinstance(a[0], str):
        return [_argument(v, values, constants) for v in a]
    kind, what = a
    if kind in ("value", "constant"):
        return (values if kind == "value" else constants)[int(what)]
    if kind == "batch":
        return int(what) * values[0].shape[0]
    if kind == "text":
        return str(what)
    return dtype_of(what) if kind == "dtype" else float(what)


def float_remainders(gm: fx.GraphModule) -> list[str]:
    """The float regions of a network, "aten.cumsum at blocks.0.attn": what they compute, and the module or the value."""
    return [f"{', '.join(f'aten.{name}' for name in region.names)} at {place}" for region, place in _regions(gm)]


def layers_in_regions(gm: fx.GraphModule) -> list[str]:
    """The convolutions and linear layers that float regions hold, "conv2d at stem"."""
    steps = [(name, place) for region, place in _regions(gm) for name, _, _ in region.steps]
    return [f"{name} at {place}" for name, place in steps if name.partition(".")[0] in _LAYERS]


def _regions(gm: fx.GraphModule) -> Iterator[tuple[FloatRegion, str]]:
    """The float regions, and the module or the value where each stands."""
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is FloatRegion:
            yield module, node.meta.get("owner") or node.name.removeprefix("region_")


def is_move(steps: tuple[Step, ...], inputs: int, constants: int) -> bool:
    """Whether steps only move values of one tensor."""
    zeros = all(_fills_zeros(step) for step in steps if step[0].partition(".")[0] in _PADS)
    names = {name.partition(".")[0] for name, _, _ in steps} - _PADS
    return inputs == 1 and constants == 0 and zeros and names <= MOVES


def _fills_zeros(step: Step) -> bool:
    _, args, kwargs = step
    given = [*args[2:], *(v for _, v in kwargs)]
    return min(args[1], default=0) >= 0 and all(v in (0, None, ("text", "constant")) for v in given)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name, "int64".

    Raises:
        ModelError: there is none.
    """
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"there is no dtype {str(name)[:80]}")
    return found


def plain_number(v: Any) -> Any:
    """An argument as JSON holds it: numbers that are not finite, dtypes and texts as pairs.

    Raises:
        ModelError: it is something else.
    """
    if isinstance(v, torch.dtype):
        return ("dtype", str(v).removeprefix("torch."))
    if isinstance(v, float) and not math.isfinite(v):
        return ("float", str(v))
    if isinstance(v, str):
        return ("text", v)
    if v is None or isinstance(v, bool | int | float):
        return v
    raise ModelError(f"an argument of type {type(v).__name__}")
