"""Random masks for dropped quantizers, drawn once and read at random places.

In training every activation asks for a mask in every step, and drawing a number per element takes longer than the convolution
beside it. So a generator's bits are drawn once, somewhat more than one activation has elements, and each mask is a window of
them that begins at one of 65,536 random places: bits are independent within a mask, and what an element gets from one mask says
nothing of what it gets from the next, though two masks are one sequence, shifted.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ptq.quant.affine import in_one_piece

_STARTS, _STRIDE = 65536, 16  # places where a window can begin; elements between them: whole cache lines


class _Pool:
    """Bits of one probability, and the places where the next windows begin."""

    def __init__(self, x: Tensor, p: float, rng: torch.Generator) -> None:
        self.size, self.starts = x.numel(), list[int]()
        self.bits = (torch.rand(self.size + _STARTS * _STRIDE, generator=rng) < p).to(x.dtype)

    def window(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """As many bits as `x` has elements, in its layout."""
        if not self.starts:  # some at once: single draws take longer than what is done with them
            self.starts = torch.randint(_STARTS, (256,), generator=rng).tolist()
        strides = x.stride() if in_one_piece(x) else torch.empty(x.shape, device="meta").stride()
        return self.bits.as_strided(x.shape, strides, self.starts.pop() * _STRIDE)


# Freed with their generators: a pool must not hold its own.
_pools: WeakKeyDictionary[torch.Generator, dict[tuple[float, torch.dtype], _Pool]] = WeakKeyDictionary()


def random_mask(x: Tensor, p: float, rng: torch.Generator | None) -> Tensor:
    """A mask shaped like `x`, in its dtype and on its device: 1 with probability `p`, else 0. It must not be written to.

    rng: on the device of `x`; None: torch's own.
    """
    if rng is None or x.device.type != "cpu":  # other devices draw faster than they would wait for a place
        return (torch.rand(x.shape, device=x.device, generator=rng) < p).to(x.dtype)
    pools = _pools.setdefault(rng, {})
    pool = pools.get((p, x.dtype))
    if pool is None or pool.size < x.numel():
        pool = pools[p, x.dtype] = _Pool(x, p, rng)
    return pool.window(x, rng)


def mix_into(x: Tensor, other: Tensor, p: float, rng: torch.Generator | None) -> Tensor:
    """`x`, each element of which `other`'s takes the place of with probability `p`."""
    # torch.where is several times slower than lerp, whose ends are exact.
    return x.lerp_(other, random_mask(x, p, rng))
