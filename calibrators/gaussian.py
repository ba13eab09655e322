"""Noise: every pixel drawn from a normal distribution with the mean and deviation of the network's inputs.

    x ~ N(0, 1) in normalized space

Ref: Haroush et al., The Knowledge Within, CVPR 2020, §3.1; with the teacher's BatchNorms on the batch's own statistics,
Raikwar and Mishra, Discovering and Overcoming Limitations of Noise-engineered Data-free Knowledge Distillation, NeurIPS 2022.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from ptq.calibrators._input_space import input_space
from torch import Tensor

from ptq.contracts import CalibrationContext, Presets
from ptq.training import Training

__all__ = ["Gaussian"]


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise; needs nothing of the network.

    count: images. batch_size: images per batch; at least 256 is advised with batch statistics. teacher_bn: the statistics
    that the teacher's BatchNorms normalize by on this noise, "running" or "batch"; with "batch" the images serve ranges only.
    """

    count: int = 1024
    batch_size: int = 256
    teacher_bn: Literal["running", "batch"] = "running"

    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "Haroush et al., The Knowledge Within, CVPR 2020, G"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256}, "standard": {"count": 512}}
    in_training: ClassVar[Mapping[str, Any]] = {"teacher_bn": "batch"}
    # The paper does not say for how long: here as many epochs as the other papers', each of 50,000 images.
    training: ClassVar[Training] = Training(
        epochs=200, steps=195, batch_size=256, optimizer="adam", lr=1e-3, warmup=0, clip=0.0, schedule="constant",
        iq=0.0, mix=0.0, pad=-1, feed="stream",
    )  # fmt: skip

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        mean, std = (v.view(1, -1, 1, 1) for v in input_space(ctx))
        done = 0
        for k, size in enumerate(ctx.sizes()):
            yield ctx.batch(k, lambda rng, size=size: _noise(ctx, size, rng) * std + mean)
            done += size
            ctx.feedback.progress("synthesis", done, ctx.count)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A handful of images."""
        return cls(count=6, batch_size=4)


def _noise(ctx: CalibrationContext, size: int, rng: torch.Generator) -> Tensor:
    return torch.randn(size, *ctx.input_shape, generator=rng).to(ctx.device)
