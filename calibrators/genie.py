"""GENIE-D: a generator and its latent vectors, trained together to match the teacher's BatchNorm statistics.

    min over z, G of   Σ_l ‖μ_l(G(z)) - μ_l‖² + ‖σ_l(G(z)) - σ_l‖²      (swing convolutions in the teacher)

Ref: Jeon et al., GENIE: Show Me the Data for Quantization, CVPR 2023, §3.1, algorithm 1, eq. 7, appendix A.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from ptq.calibrators._generators import GenieGenerator, seeded
from ptq.calibrators._input_space import input_space
from ptq.calibrators._losses import Taps, tap_batch_norms
from ptq.calibrators._swing import with_swing
from torch import Tensor, nn

from ptq.contracts import CalibrationContext, Presets
from ptq.errors import CalibrationError

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

    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256, "steps": 250}, "standard": {"count": 512, "steps": 500}}

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        mean, std = input_space(ctx)
        model = with_swing(ctx.model, ctx.rng) if self.swing else copy.deepcopy(ctx.model)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        done, total = 0, len(ctx.sizes()) * self.steps
        with tap_batch_norms(model) as taps:
            for size in ctx.sizes():
                # A lone image has no batch statistics to match: distil two, keep one.
                yield self._distil(model, taps, max(size, 2), ctx, (mean, std), (done, total))[:size]
                done += self.steps

    @torch.enable_grad()
    def _distil(
        self, model: nn.Module, taps: Taps, size: int, ctx: CalibrationContext,
        space: tuple[Tensor, Tensor], progress: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        z = torch.randn(size, self.latent, generator=ctx.rng).to(ctx.device).requires_grad_()
        g = seeded(lambda: GenieGenerator(ctx.input_shape, self.latent), ctx.rng).to(ctx.device)
        g.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        place = _Placement(*space).to(ctx.device)
        adam_z = torch.optim.Adam([z], lr=self.lr_latent)
        adam_g = torch.optim.Adam([*g.parameters(), *place.trained()], lr=self.lr_generator)
        decay = torch.optim.lr_scheduler.StepLR(adam_g, self.decay_every, self.decay)
        plateau = _Plateau(adam_z, self.patience, every=1 if ctx.device.type == "cpu" else 50)
        images = z
        for step in range(self.steps):
            taps.seen.clear()
            adam_z.zero_grad()
            adam_g.zero_grad()
            normalized = g(z)
            images = place(normalized)
            model(images)
            loss = taps.loss() + _input_loss(normalized)
            loss.backward()
            adam_z.step()
            adam_g.step()
            decay.step()
            plateau.step(loss.detach())
            ctx.feedback.progress("synthesis", progress[0] + step + 1, progress[1])
        if not bool(torch.isfinite(images).all()):
            raise CalibrationError("distillation diverged: the images are not finite; lower lr_latent or lr_generator")
        # The images belong to the loss of this last forward pass, not to the parameters after the last step.
        return images.detach().contiguous()

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(count=6, batch_size=4, steps=3, latent=8)


def _input_loss(x: Tensor) -> Tensor:
    """Each image's mean towards 0 and deviation towards 1, per channel: the input as one more layer of statistics."""
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    return mean.square().mean() + ((var + 1e-8).sqrt() - 1).square().mean()


class _Placement(nn.Module):
    """Normalized images → the network's input space, `mean·… + std·x`; trained where the space is not (0, 1)."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.normalized = bool((mean == 0).all()) and bool((std == 1).all())
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
        self.shift = nn.Parameter(torch.zeros_like(self.mean))
        self.growth = nn.Parameter(torch.zeros_like(self.std))

    def trained(self) -> list[nn.Parameter]:
        return [] if self.normalized else [self.shift, self.growth]

    def forward(self, x: Tensor) -> Tensor:
        return x if self.normalized else self.mean + self.std * (self.shift + self.growth.exp() * x)


class _Plateau:
    """`ReduceLROnPlateau` that reads the losses `every` so many steps, so that a GPU need not wait in each."""

    def __init__(self, optimizer: torch.optim.Optimizer, patience: int, every: int) -> None:
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=1e-4)
        self.every, self.waiting = every, []

    def step(self, loss: Tensor) -> None:
        self.waiting.append(loss)
        if len(self.waiting) == self.every:
            for value in torch.stack(self.waiting).tolist():
                self.scheduler.step(value)
            self.waiting.clear()
