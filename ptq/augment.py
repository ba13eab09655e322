"""Random views of images for training, and blends of them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_flip(x: Tensor, rng: torch.Generator, pad: int) -> Tensor:
    """Each image moved by up to `pad` pixels over a border of zeros, half of them mirrored."""
    count, _, height, width = x.shape
    offset = torch.randint(2 * pad + 1, (2, count, 1), generator=rng)
    mirrored = torch.rand(count, 1, generator=rng) < 0.5
    rows = offset[0] + torch.arange(height)
    columns = offset[1] + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    return _window(F.pad(x, (pad, pad, pad, pad)), rows, columns)


def _window(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`x[b, :, rows[b]][:, columns[b]]` for every image b; rows [B, h], columns [B, w]."""
    count, channels, _, width = x.shape
    rows, columns = rows.to(x.device), columns.to(x.device)
    x = x.gather(2, rows[:, None, :, None].expand(count, channels, rows.shape[1], width))
    return x.gather(3, columns[:, None, None, :].expand(count, channels, rows.shape[1], columns.shape[1]))


def beta(a: float, count: int, rng: torch.Generator) -> Tensor:
    """Draws of Beta(a, a), [count]: of two gamma variates X, Y, the share X / (X + Y)."""
    shape = torch.full((count,), a)
    x, y = (torch._standard_gamma(shape, generator=rng) for _ in range(2))  # pyright: ignore[reportPrivateImportUsage]
    return x / (x + y)


def blend(x: Tensor, other: Tensor, a: float, rng: torch.Generator) -> Tensor:
    """λ x_i + (1 - λ) other_i: images `[B, C, H, W]` in pairs, λ ~ Beta(a, a) per pair."""
    w = beta(a, len(x), rng).to(x.device).view(-1, 1, 1, 1)
    return w * x + (1 - w) * other


def mix_up(x: Tensor, a: float, rng: torch.Generator) -> Tensor:
    """Each image of `[B, C, H, W]` blended with another one of the batch.

    Ref: Zhang et al., mixup, ICLR 2018; Haroush et al., The Knowledge Within, CVPR 2020, algorithm 2: inputs alone are mixed,
    targets are what the teacher makes of the mixture.
    """
    return blend(x, x.roll(1, 0), a, rng)
