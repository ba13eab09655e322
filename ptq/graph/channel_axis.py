"""Which dimension of a value holds its channels."""

from torch import fx

from ptq.graph.ops import find_op

_LAST = ("linear", "layer_norm")
_SECOND = ("conv", "conv_transpose", "batch_norm", "batch_norm_1d", "group_norm")


def channel_axis(gm: fx.GraphModule, node: fx.Node) -> int:
    """The dimension of a node's result, counted with the batch, that holds channels.

    That of the nearest layer before it: the last behind linear layers, else 1. A permutation takes it along, and so does what
    changes other dimensions only; else four dimensions are read as `[B, C, H, W]`, three as `[B, tokens, C]`.
    """
    shape, op = node.meta["shape"], find_op(gm, node)
    count = len(shape) + 1
    if count < 3 or (op is not None and op.name in _SECOND):
        return 1
    if op is not None and op.name in _LAST:
        return count - 1
    sources = [n for n in node.all_input_nodes if n.meta.get("shape")]
    before = max(
        sources, key=lambda n: len(n.meta["shape"]) + 1 == count, default=None
    )  # the first of as many dimensions
    if before is not None:
        axis, old = channel_axis(gm, before), before.meta["shape"]
        if op is not None and op.name == "permute":
            return list(gm.get_submodule(str(node.target)).dims).index(axis)  # type: ignore[arg-type]
        if axis == 1 and old[0] == shape[0]:
            return 1
        if axis == len(old) and old[-1] == shape[-1]:
            return count - 1
        if len(old) == len(shape):
            return axis
    return 1 if count == 4 else count - 1
