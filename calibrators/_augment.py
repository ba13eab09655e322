"""Differentiable augmentations, drawn per image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def duplicates(x: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """`n` copies `[n·B, C, H, W]` of `[B, C, H, W]`, each under some of flip, crop-resize and cutout, with one chance in two each.

    Every pixel then gets the mean gradient of n views. For n = 1, the images as they are.

    Ref: Haroush et al., The Knowledge Within, CVPR 2020, §4.1, in-batch augmentations.
    """
    return x if n == 1 else cutout(flip_and_crop(x.repeat(n, 1, 1, 1), rng), rng)


def flip_and_crop(x: Tensor, rng: torch.Generator, least: float = 0.75) -> Tensor:
    """Half of the images mirrored; of half, a window of `least`…1 of its sides, resized to the whole.

    The others keep their finest detail, which resizing smoothes: statistics of smoothed views alone would not be the images' own.
    """
    count = len(x)
    cut = (torch.rand(count, generator=rng) < 0.5).float()
    side = 1 - cut * (1 - least) * torch.rand(count, generator=rng)
    shift = (1 - side[:, None]) * (2 * torch.rand(count, 2, generator=rng) - 1)
    mirror = 1.0 - 2.0 * (torch.rand(count, generator=rng) < 0.5)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * mirror, side, shift
    grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def cutout(x: Tensor, rng: torch.Generator, most: float = 0.25) -> Tensor:
    """Half of the images with a rectangle of up to `most` of their sides set to 0."""
    count, _, height, width = x.shape
    cut = torch.rand(count, 1, generator=rng) < 0.5
    masks = []
    for size in (height, width):
        length = torch.rand(count, 1, generator=rng) * most * size * cut
        start = torch.rand(count, 1, generator=rng) * (size - length)
        at = torch.arange(size).view(1, -1)
        masks.append((at >= start.floor()) & (at < start.floor() + length.round()))
    hole = masks[0][:, :, None] & masks[1][:, None, :]
    return x * (~hole).unsqueeze(1).to(x.device)
