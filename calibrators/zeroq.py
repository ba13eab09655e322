"""ZeroQ: pixels fitted directly to the teacher's BatchNorm statistics, without a generator.

    min over x of   Σ_l ‖μ_l(x) - μ_l‖² + ‖σ_l(x) - σ_l‖²

Ref: Cai et al., ZeroQ, CVPR 2020; as rows M1 (and, with swing convolutions, M2) of Jeon et al., GENIE, CVPR 2023, table 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from ptq.calibrators._input_space import Space, pixel_space
from ptq.calibrators._losses import image_std_loss, std_loss
from ptq.calibrators._pixels import fit_pixels
from ptq.calibrators._progress import StepCount
from ptq.calibrators._teachers import teachers
from torch import Tensor

from ptq.contracts import CalibrationContext, Presets
from ptq.graph.taps import tap_batch_norms

__all__ = ["ZeroQ"]


@dataclass(frozen=True)
class ZeroQ:
    """Pixels as parameters, every batch from noise.

    count: images. batch_size: images fitted together. steps: optimizer steps a batch. lr: Adam's rate, in deviations of the
    input, ×0.1 after `patience` steps without gain. swing: swing convolutions.
    """

    count: int = 1024
    batch_size: int = 128
    steps: int = 4000
    lr: float = 0.1
    patience: int = 100
    swing: bool = False

    needs: ClassVar[tuple[str, ...]] = ("BatchNorm",)
    paper: ClassVar[str] = "Cai et al., ZeroQ, CVPR 2020; GENIE, table 2, M1 and M2"
    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256, "steps": 250}, "standard": {"count": 512, "steps": 500}}

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        space, count = pixel_space(ctx), StepCount(ctx, self.steps)
        for k, size in enumerate(ctx.sizes()):
            yield ctx.batch(k, partial(self._distil, ctx, space, max(size, 2), partial(count.step, k)))[:size]
            count.batch(k)

    def _distil(
        self,
        ctx: CalibrationContext,
        space: Space,
        size: int,
        done: Callable[[int, Tensor], None],
        rng: torch.Generator,
    ) -> Tensor:
        model = teachers(ctx, rng if self.swing else None)
        start = torch.randn(size, *ctx.input_shape, generator=rng).to(ctx.device)
        with tap_batch_norms(model.models) as taps:

            def loss(u: Tensor) -> Tensor:
                taps.seen.clear()
                model(space.place(u))
                return std_loss(taps) + image_std_loss(u)

            return space.place(
                fit_pixels(start, loss, steps=self.steps, lr=self.lr, patience=self.patience, clip=None, done=done)
            )

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(count=6, batch_size=4, steps=3)
