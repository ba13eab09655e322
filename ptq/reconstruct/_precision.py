"""The arithmetic that blocks are trained in: convolutions in bfloat16 where that is faster and fine enough.

A bfloat16 number has 8 significant bits: it cannot tell neighbouring codes of an 8-bit weight apart, but is sixteen times finer
than a weight of 4 bits, so only blocks all of whose weights are that narrow are trained with it. Everything but the layers'
own sums of products stays in float32: grids, soft bits, the loss and the error by which a block is judged.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ptq.quant.fake_quant import weight_grid

_WIDEST = 4  # bits


@contextmanager
def in_bfloat16(layers: Iterable[nn.Module], wanted: bool) -> Iterator[bool]:
    """Yields whether a block's layers are to run in bfloat16, and meanwhile makes them give float32 nevertheless."""
    layers = list(layers)
    grids = [weight_grid(layer) for layer in layers]
    narrow = wanted and all(grid is not None and grid.spec.bits <= _WIDEST for grid in grids)
    hooks = [layer.register_forward_hook(_as_float32) for layer in layers] if narrow else []
    try:
        yield narrow
    finally:
        for hook in hooks:
            hook.remove()


def _as_float32(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # What follows are single operations on each element, which take longer in bfloat16.
    return output.float()
