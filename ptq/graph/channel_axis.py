"""Which dimension of a value holds its channels."""

from torch import fx

from ptq.graph.ops import find_op

_LAST = ("linear", "layer_norm")
_SECOND = ("conv", "conv_transpose", "batch_norm", "batch_norm_1d", "group_norm")


def channel_axis(gm: fx.GraphModule, node: fx.Node) -> int:
    """The dimension of a node's result, counted with the batch, that holds channels.

    That of the nearest layer before it: the last behind linear layers, else 1. A permutation takes it along; where only the number
    of dimensions changed, four are read as `[B, C, H, W]`, fewer as `[B, tokens, C]`.
    """
    count = len(node.meta["shape"]) + 1
    op = find_op(gm, node)
    if count < 3 or (op is not None and op.name in _SECOND):
        return 1
    if op is not None and op.name in _LAST:
        return count - 1
    before = next((n for n in node.all_input_nodes if len(n.meta["shape"]) + 1 == count), None)
    if before is None:
        return 1 if count == 4 else count - 1
    axis = channel_axis(gm, before)
    if op is not None and op.name == "permute":
        return list(gm.get_submodule(str(node.target)).dims).index(axis)  # type: ignore[arg-type]
    return axis
