"""Noise: every pixel drawn from a normal distribution with the mean and deviation of the network's inputs.

    x ~ N(0, 1) in normalized space

Ref: Haroush et al., The Knowledge Within, CVPR 2020, §3.1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from ptq.calibrators._input_space import input_space
from torch import Tensor

from ptq.contracts import CalibrationContext, Presets

__all__ = ["Gaussian"]


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise; needs nothing of the network. count: images. batch_size: images per batch."""

    count: int = 1024
    batch_size: int = 128

    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256}, "standard": {"count": 512}}

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        mean, std = (v.view(1, -1, 1, 1) for v in input_space(ctx))
        done = 0
        for size in ctx.sizes():
            noise = torch.randn(size, *ctx.input_shape, generator=ctx.rng).to(ctx.device)
            done += size
            ctx.feedback.progress("synthesis", done, ctx.count)
            yield mean + std * noise

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A handful of images."""
        return cls(count=6, batch_size=4)
