"""Inception scheme, `I`: images that raise the logit of a class, kept smooth.

    min over x of   exp( -logit[target] / scale ) + β · MSE( x, smooth(x) )

Ref: Haroush et al., The Knowledge Within, CVPR 2020, §3.2, algorithm 1 with γ = 0.
Differs: classes are drawn in equal numbers, where the algorithm draws each on its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from ptq.calibrators._augment import duplicates
from ptq.calibrators._classifier import average, balanced_labels, common_classes
from ptq.calibrators._input_space import Space, pixel_space
from ptq.calibrators._losses import inception, smoothness
from ptq.calibrators._pixels import fit_pixels
from ptq.calibrators._progress import StepCount
from ptq.calibrators._teachers import teachers
from torch import Tensor

from ptq.contracts import CalibrationContext, Presets
from ptq.errors import CalibrationError

__all__ = ["Inceptionism"]


@dataclass(frozen=True)
class Inceptionism:
    """Images of random classes; needs a classifier, no BatchNorm.

    count: images. batch_size: images fitted together. steps: optimizer steps a batch. lr: Adam's rate, in deviations of the
    input, ×0.1 after `patience` steps without gain. scale: of the logit. smoothness: weight β of the prior. augment: views
    of each image a step, N; 1 leaves them as they are.
    """

    count: int = 1024
    batch_size: int = 128
    steps: int = 1000
    lr: float = 0.1
    patience: int = 100
    scale: float = 10.0
    smoothness: float = 1.0
    augment: int = 4

    needs: ClassVar[tuple[str, ...]] = ("classes",)
    paper: ClassVar[str] = "Haroush et al., The Knowledge Within, CVPR 2020, I"
    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256, "steps": 100}, "standard": {"count": 512, "steps": 250}}

    def __post_init__(self) -> None:
        if self.augment < 1 or self.scale <= 0:
            raise CalibrationError(
                f"augment={self.augment}, scale={self.scale} given; augment is at least 1, scale above 0"
            )

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        space, count, number = pixel_space(ctx), StepCount(ctx, self.steps), common_classes((ctx.model, *ctx.others))
        for k, size in enumerate(ctx.sizes()):
            yield ctx.batch(k, partial(self._distil, ctx, space, (size, number), partial(count.step, k)))
            count.batch(k)

    def _distil(
        self, ctx: CalibrationContext, space: Space, sizes: tuple[int, int], done: Callable[[int, Tensor], None],
        rng: torch.Generator,
    ) -> Tensor:  # fmt: skip
        size, number = sizes
        model = teachers(ctx)
        targets = balanced_labels(size, number, rng).repeat(self.augment).to(ctx.device)
        start = space.clip(torch.randn(size, *ctx.input_shape, generator=rng).to(ctx.device))

        def loss(u: Tensor) -> Tensor:
            views = duplicates(u, self.augment, rng)
            logits = model(space.place(views))
            value = average(lambda out: inception(out, targets, self.scale), logits)
            return value + self.smoothness * smoothness(views)

        return space.place(
            fit_pixels(start, loss, steps=self.steps, lr=self.lr, patience=self.patience, clip=space.clip, done=done)
        )

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(count=6, batch_size=4, steps=3, augment=2)
