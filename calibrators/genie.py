"""GENIE-D: a generator and its latent vectors, trained together to match the teacher's BatchNorm statistics.

    min over z, G of   Σ_l ‖μ_l(G(z)) - μ_l‖² + ‖σ_l(G(z)) - σ_l‖²      (swing convolutions in the teacher)

Ref: Jeon et al., GENIE: Show Me the Data for Quantization, CVPR 2023, §3.1, algorithm 1, eq. 7, appendix A.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from ptq.calibrators._generators import GenieGenerator, seeded
from ptq.calibrators._input_space import input_space
from ptq.calibrators._losses import image_std_loss, std_loss
from ptq.calibrators._plateau import Plateau
from ptq.calibrators._progress import StepCount
from ptq.calibrators._teachers import teachers
from torch import Tensor, nn

from ptq.contracts import CalibrationContext, Presets
from ptq.errors import CalibrationError
from ptq.graph.taps import tap_batch_norms

__all__ = ["Genie"]


@dataclass(frozen=True)
class Genie:
    """Images distilled through a generator whose latent vectors are trained too; every batch from scratch.

    count: images. batch_size: images distilled together. steps: optimizer steps a batch. latent: size of a latent vector.
    lr_latent: Adam's rate for the latent vectors, on a plateau schedule (patience `patience` steps, ×0.1, at least 1e-4).
    lr_generator: Adam's rate for the generator, ×`decay` every `decay_every` steps. swing: swing convolutions.

    Differs: where the network's inputs are not normalized, the generator's normalized output is brought to the inputs'
    mean and deviation per channel, which are trained along with it.
    """

    count: int = 1024
    batch_size: int = 128
    steps: int = 4000
    latent: int = 256
    lr_latent: float = 0.1
    lr_generator: float = 0.01
    decay: float = 0.95
    decay_every: int = 100
    patience: int = 100
    swing: bool = True

    needs: ClassVar[tuple[str, ...]] = ("BatchNorm",)
    paper: ClassVar[str] = "Jeon et al., GENIE, CVPR 2023"
    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256, "steps": 250}, "standard": {"count": 512, "steps": 500}}

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        space, count = input_space(ctx), StepCount(ctx, self.steps)
        for k, size in enumerate(ctx.sizes()):
            # A lone image has no batch statistics to match: distil two, keep one.
            yield ctx.batch(k, partial(self._distil, ctx, space, max(size, 2), partial(count.step, k)))[:size]
            count.batch(k)

    @torch.enable_grad()
    def _distil(
        self, ctx: CalibrationContext, space: tuple[Tensor, Tensor], size: int, done: Callable[[int, Tensor], None],
        rng: torch.Generator,
    ) -> Tensor:  # fmt: skip
        z = torch.randn(size, self.latent, generator=rng).to(ctx.device).requires_grad_()
        g = seeded(lambda: GenieGenerator(ctx.input_shape, self.latent), rng).to(ctx.device)
        g.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model, place = teachers(ctx, rng if self.swing else None), _Placement(*space)
        adam_z = torch.optim.Adam([z], lr=self.lr_latent)
        adam_g = torch.optim.Adam([*g.parameters(), *place.trained()], lr=self.lr_generator)
        decay = torch.optim.lr_scheduler.StepLR(adam_g, self.decay_every, self.decay)
        plateau = Plateau(adam_z, self.patience, ctx.device)
        images = z
        with tap_batch_norms(model.models) as taps:
            for step in range(self.steps):
                taps.seen.clear()
                adam_z.zero_grad()
                adam_g.zero_grad()
                normalized = g(z)
                images = place(normalized)
                model(images)
                loss = std_loss(taps) + image_std_loss(normalized)
                loss.backward()
                adam_z.step()
                adam_g.step()
                decay.step()
                plateau.step(loss.detach())
                done(step, loss)
        if not bool(torch.isfinite(images).all()):
            raise CalibrationError("distillation diverged: the images are not finite; lower lr_latent or lr_generator")
        # The images belong to the loss of this last forward pass, not to the parameters after the last step.
        return images.detach().contiguous()

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(count=6, batch_size=4, steps=3, latent=8)


class _Placement(nn.Module):
    """Normalized images → the network's input space, `mean·… + std·x`; trained where the space is not (0, 1)."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.normalized = bool((mean == 0).all()) and bool((std == 1).all())
        self.mean, self.std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
        self.shift = nn.Parameter(torch.zeros_like(self.mean))
        self.growth = nn.Parameter(torch.zeros_like(self.std))

    def trained(self) -> list[nn.Parameter]:
        return [] if self.normalized else [self.shift, self.growth]

    def forward(self, x: Tensor) -> Tensor:
        return x if self.normalized else self.mean + self.std * (self.shift + self.growth.exp() * x)
