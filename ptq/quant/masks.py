"""Random masks for dropped quantizers, drawn once and read at random places.

In training every activation asks for a mask in every step, and drawing a number per element takes longer than the convolution
beside it. So a generator's bits are drawn once, somewhat more than one activation has elements, and each mask is a window of
them that begins at a random place: bits are independent within a mask, and masks of one element are draws of their own.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_STARTS, _STRIDE = 65536, 16  # places where a window can begin; elements between them: whole cache lines

_pools: WeakKeyDictionary[torch.Generator, dict[tuple[float, torch.dtype], Tensor]] = WeakKeyDictionary()


def random_mask(x: Tensor, p: float, rng: torch.Generator | None) -> Tensor:
    """A mask shaped like `x`, in its dtype, layout and on its device: 1 with probability `p`, else 0. It must not be written to.

    rng: on the device of `x`; None: torch's own.
    """
    if rng is None or x.device.type != "cpu":  # other devices draw faster than they would wait for a place
        return (torch.rand(x.shape, device=x.device, generator=rng) < p).to(x.dtype)
    pools = _pools.setdefault(rng, {})
    pool = pools.get((p, x.dtype))
    if pool is None or len(pool) < x.numel() + _STARTS * _STRIDE:
        pool = pools[p, x.dtype] = (torch.rand(x.numel() + _STARTS * _STRIDE, generator=rng) < p).to(x.dtype)
    start = int(torch.randint(_STARTS, (), generator=rng)) * _STRIDE
    return pool.as_strided(x.shape, torch.empty_like(x, device="meta").stride(), start)


def mix(x: Tensor, other: Tensor, p: float, rng: torch.Generator | None) -> Tensor:
    """Element-wise: `x` with probability `p`, else `other`."""
    # torch.where is several times slower than torch.lerp, whose ends are exact.
    return torch.lerp(other, x, random_mask(x, p, rng))
