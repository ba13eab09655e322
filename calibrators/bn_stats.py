"""BN-Statistics scheme, `BNS`: pixels fitted to the teacher's BatchNorm statistics by a divergence; `BNS+I` with classes.

    min over x of   γ · J_KL(x) + α · exp( -logit[target] / scale ) + β · MSE( x, smooth(x) )
    J_KL = mean over layers and channels of KL( N(μ_l, σ_l²) ‖ N(m_l, s_l²) ),   the input as one more layer

Ref: Haroush et al., The Knowledge Within, CVPR 2020, §3.3, §3.4, eq. 1-3, algorithm 1.
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
from ptq.calibrators._losses import inception, input_kl, input_moments, kl_loss, moment_loss, smoothness
from ptq.calibrators._pixels import fit_pixels
from ptq.calibrators._progress import StepCount
from ptq.calibrators._teachers import teachers
from torch import Tensor

from ptq.contracts import CalibrationContext, Presets
from ptq.errors import CalibrationError
from ptq.graph.taps import Taps, dead_channels, tap_batch_norms

__all__ = ["BnStats"]


@dataclass(frozen=True)
class BnStats:
    """Pixels fitted to BatchNorm statistics, every batch from noise.

    count: images. batch_size: images fitted together. steps: optimizer steps a batch. lr: Adam's rate, in deviations of the
    input, ×0.1 after `patience` steps without gain. objective: "kl", or "mse" of the moments. inception: weight α of the
    class term, above 0 for BNS+I; scale: of the logit. smoothness: weight β. augment: views of each image a step, N.
    """

    count: int = 1024
    batch_size: int = 128
    steps: int = 1000
    lr: float = 0.25
    patience: int = 100
    objective: Literal["kl", "mse"] = "kl"
    inception: float = 0.0
    scale: float = 10.0
    smoothness: float = 0.0
    augment: int = 4

    needs: ClassVar[tuple[str, ...]] = ("BatchNorm",)
    paper: ClassVar[str] = "Haroush et al., The Knowledge Within, CVPR 2020, BNS and BNS+I"
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
        space, count = pixel_space(ctx), StepCount(ctx, self.steps)
        dead = dead_channels(ctx.model)
        if dead and self.objective == "kl":
            shown = ", ".join(f"{path} ({number})" for path, number in list(dead.items())[:5])
            ctx.feedback.note(f"channels that were constant in training are left out of the divergence: {shown}")
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
        model = teachers(ctx)
        targets = None
        if self.inception:
            targets = (
                balanced_labels(size, common_classes((ctx.model, *ctx.others)), rng).repeat(self.augment).to(ctx.device)
            )
        start = space.clip(torch.randn(size, *ctx.input_shape, generator=rng).to(ctx.device))
        with tap_batch_norms(model.models) as taps:

            def loss(u: Tensor) -> Tensor:
                taps.seen.clear()
                views = duplicates(u, self.augment, rng)
                logits = model(space.place(views))
                value = self._statistics(taps, views) + self.smoothness * smoothness(views)
                if targets is None:
                    return value
                return value + self.inception * average(lambda out: inception(out, targets, self.scale), logits)

            return space.place(
                fit_pixels(
                    start, loss, steps=self.steps, lr=self.lr, patience=self.patience, clip=space.clip, done=done
                )
            )

    def _statistics(self, taps: Taps, views: Tensor) -> Tensor:
        """The mean over layers, the normalized input as one more of them."""
        layers = len(taps.seen)
        rest, first = (kl_loss, input_kl) if self.objective == "kl" else (moment_loss, input_moments)
        return (layers * rest(taps) + first(views)) / (layers + 1)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(count=6, batch_size=4, steps=3, augment=2)
