"""Generators of images from latent vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GenieGenerator(nn.Module):
    """Latent `[B, latent]` → images `[B, C, H, W]` of zero mean and unit deviation per channel over the batch.

    Linear → 128 × H/4 × W/4, BN, up ×2, conv 128→64, BN, LeakyReLU 0.2, up ×2, conv 64→C, tanh, BN(affine=False).
    Sides that are no multiple of 4 are generated larger and cropped.

    Ref: Jeon et al., GENIE, CVPR 2023, appendix D and figure 8.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.start = (128, -(-self.height // 4), -(-self.width // 4))
        self.expand = nn.Linear(latent, self.start[0] * self.start[1] * self.start[2])
        self.norm0 = nn.BatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm0(self.expand(z).view(-1, *self.start))
        x = F.leaky_relu(self.norm1(up_conv(x, self.conv1)), 0.2)
        x = torch.tanh(up_conv(x, self.conv2))
        return self.norm2(x[:, :, : self.height, : self.width])


def up_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(upsample_nearest(x, 2))` for a 3×3 convolution with padding 1, by four 2×2 convolutions on `x` itself.

    After upsampling, two of a kernel's three taps read the same pixel; summing them first leaves 4 taps of 9:

        even output rows:  w0 · x[i-1] + (w1+w2) · x[i]        odd output rows:  (w0+w1) · x[i] + w2 · x[i+1]

    and the same along columns. Equal to the plain form but for the order of summation, at 4/9 of its multiplications.
    """
    w = conv.weight
    rows = (
        torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2),
        torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2),
    )
    batch, _, height, width = x.shape
    parts = []
    for top, row in enumerate(rows):
        kernels = (
            torch.stack([row[..., 0], row[..., 1] + row[..., 2]], 3),
            torch.stack([row[..., 0] + row[..., 1], row[..., 2]], 3),
        )
        for left, kernel in enumerate(kernels):
            full = F.conv2d(x, kernel, conv.bias, padding=1)  # [B, O, H + 1, W + 1]
            parts.append(full[:, :, top : top + height, left : left + width])
    grid = torch.stack(parts, 2).view(batch, w.shape[0], 2, 2, height, width)
    return grid.permute(0, 1, 4, 2, 5, 3).reshape(batch, w.shape[0], 2 * height, 2 * width)


def seeded(build, rng: torch.Generator) -> nn.Module:
    """`build()` with its default initialization drawn from `rng`; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return build()
