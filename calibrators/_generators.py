"""Generators of images from latent vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ptq.precision import pays


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


class ConvGenerator(nn.Module):
    """Latent `[B, latent]` → images `[B, C, H, W]` of zero mean and unit deviation per channel over the batch.

    Linear, BN, spectrally normalized 3 × 3 convolutions with BN and LeakyReLU between upsamplings (two for inputs below 128
    pixels, four above), sigmoid, BN(affine=False). Sides that do not divide are generated larger and cropped. Sums of products
    are in bfloat16 where that pays: images are whatever a generator yields, and are seen in float32.

    Ref: Tran et al., NAYER, CVPR 2024, tables 6 and 7.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        widths = (128, 64) if max(shape[1:]) < 128 else (128, 128, 64, 64)
        part = 2 ** len(widths)
        self.start = (128, -(-self.height // part), -(-self.width // part))
        size = self.start[0] * self.start[1] * self.start[2]
        self.expand, self.norm = nn.Linear(latent, size), nn.BatchNorm1d(size)
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 3, padding=1)) for a, b in zip((128, *widths), (*widths, channels))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.last = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        with narrow(z.device):
            x = self.norm(self.expand(z)).view(-1, *self.start)
            x = F.leaky_relu(self.norms[0](self.convs[0](x)), 0.2)
            for conv, norm in zip(self.convs[1:], self.norms[1:]):
                x = F.leaky_relu(norm(up_conv(x, conv)), 0.2)  # type: ignore[arg-type]
            x = up_conv(x, self.convs[-1])  # type: ignore[arg-type]
        return self.last(torch.sigmoid(x.float())[:, :, : self.height, : self.width])


class Encoder(nn.Module):
    """Images `[B, C, H, W]` → mean and log-variance `[B, latent]` each.

    Conv 64 (stride 2), conv 128 (stride 2), conv 128, pooled to at most 8 × 8, two linear heads.

    Ref: Binici et al., PRE-DFKD, AAAI 2022. Differs: the pooling, so that its size does not grow with the pictures'.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers = []
        for a, b, stride in ((channels, 64, 2), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        sides = (min(8, -(-height // 4)), min(8, -(-width // 4)))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(sides), nn.Flatten())
        self.mean, self.log_var = (nn.Linear(128 * sides[0] * sides[1], latent) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with narrow(x.device):
            x = self.body(x)
        return self.mean(x.float()), self.log_var(x.float())


def up_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(upsample_nearest(x, 2))` for a 3×3 convolution with padding 1, by one 2×2 convolution of `x` itself.

    After upsampling, two of a kernel's three taps read the same pixel; summing them first leaves 4 taps of 9:

        even output rows:  w0 · x[i-1] + (w1+w2) · x[i]        odd output rows:  (w0+w1) · x[i] + w2 · x[i+1]

    and the same along columns: four kernels, for even and odd rows and columns, stacked as outputs of one convolution. Equal to
    the plain form but for the order of summation, at 4/9 of its multiplications.
    """
    w = conv.weight
    channels, (batch, _, height, width) = len(w), x.shape
    kernels = [
        torch.stack(columns, 3)
        for rows in _pairs(w[:, :, 0], w[:, :, 1], w[:, :, 2])
        for columns in _pairs(*torch.stack(rows, 2).unbind(3))
    ]
    bias = None if conv.bias is None else conv.bias.repeat(4)
    full = F.conv2d(x, torch.cat(kernels), bias, padding=1)  # [B, 4 · O, H + 1, W + 1]
    parts = [
        part[:, :, top : top + height, left : left + width]
        for part, (top, left) in zip(full.split(channels, 1), ((0, 0), (0, 1), (1, 0), (1, 1)))
    ]
    grid = torch.stack(parts, 2).view(batch, channels, 2, 2, height, width)
    return grid.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, 2 * height, 2 * width)


def _pairs(w0: Tensor, w1: Tensor, w2: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two taps left of three, at even and at odd positions."""
    return (w0, w1 + w2), (w0 + w1, w2)


def narrow(device: torch.device) -> torch.autocast:
    """Within it, layers multiply in bfloat16 if that pays on `device`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=pays("auto", device))


def seeded(build, rng: torch.Generator) -> nn.Module:
    """`build()` with its default initialization drawn from `rng`; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return build()
