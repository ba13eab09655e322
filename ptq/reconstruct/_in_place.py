"""ReLUs that write over what they read, while a block is trained: a tensor less for each to pass through the cache."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from ptq.graph.ops import find_op

_FREE = ("weighted", "join")  # their gradients do not need what they gave


@contextmanager
def relus_in_place(module: fx.GraphModule) -> Iterator[None]:
    """Lets those ReLUs of a block work in place for which autograd allows it, as long as the block is used within."""
    changed = []
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.ReLU | nn.ReLU6) and not layer.inplace:
            source = node.args[0]
            op = find_op(module, source)
            if op is not None and op.role in _FREE and len(source.users) == 1:
                changed.append(layer)
    try:
        for layer in changed:
            layer.inplace = True
        yield
    finally:
        for layer in changed:
            layer.inplace = False
