"""DGH: pixels fitted so that the statistics of the whole set, not of each batch, are the teacher's.

    min over x of   mean_l [ mean_c (m_l - μ_l)² + mean_c (s_l - σ_l)² ] - w · mean_i (max_k logit_ik - min_k logit_ik)

m_l, s_l: of all images. In a step for one batch its fresh statistics join the stored ones of all other batches.

Ref: Dikstein et al., Data Generation for Hardware-Friendly Post-Training Quantization, WACV 2025.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from ptq.calibrators._input_space import Space, pixel_space
from ptq.calibrators._losses import smooth
from ptq.calibrators._progress import StepCount
from ptq.calibrators._teachers import Teachers, teachers
from torch import Tensor

from ptq.augment import shift_and_flip
from ptq.contracts import CalibrationContext, Presets
from ptq.errors import CalibrationError
from ptq.graph.taps import EPS, Taps, tap_batch_norms

__all__ = ["Dgh"]

_PARTS = 10  # stretches of the run after which it can go on


@dataclass(frozen=True)
class Dgh:
    """All batches advance together, in random order; made larger, smoothed, flipped and cropped before the network sees them.

    count: images. batch_size: images a step. steps: steps each batch gets. lr: RAdam's rate, in deviations of the input,
    halved after `patience` steps without gain and reset once below `least_lr`. margin: of the image's side, by which it is
    larger while it is fitted. stretch: weight w of the outputs' range.

    Differs: the finished image is smoothed too, as the images were whose statistics were matched. Gradients are divided by the
    size of the first: RAdam's first steps are as long as the gradient, whose unit is the network's.
    """

    count: int = 1024
    batch_size: int = 128
    steps: int = 500
    lr: float = 0.5
    patience: int = 25
    least_lr: float = 1e-3
    margin: float = 0.125
    stretch: float = 1e-3

    needs: ClassVar[tuple[str, ...]] = ("BatchNorm",)
    paper: ClassVar[str] = "Dikstein et al., DGH, WACV 2025"
    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256, "steps": 250}, "standard": {"count": 512, "steps": 500}}

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        run = _Run(self, ctx)
        ends = [round(part * self.steps / _PARTS) for part in range(_PARTS + 1)]
        for part in range(ctx.restore({"set": run.set}), _PARTS):
            run.advance(ends[part], ends[part + 1], ctx.rng_of(part))
            ctx.keep(part + 1, {"set": run.set})
        ctx.feedback.progress("synthesis", run.count.total, run.count.total)
        for k, size in enumerate(ctx.sizes()):
            yield run.finished(k)[:size]

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(lr=0.1, count=6, batch_size=4, steps=3)


class _ImageSet:
    """All images, their optimizers and every batch's statistics, in host memory."""

    def __init__(
        self, options: Dgh, sizes: list[int], shape: tuple[int, int, int], space: Space, rng: torch.Generator
    ) -> None:
        self.options = options
        self.pixels = [torch.randn(size, *shape, generator=rng).requires_grad_() for size in sizes]
        self.clip([*range(len(sizes))], space)
        self.optimizers = [torch.optim.RAdam([u], lr=options.lr) for u in self.pixels]
        self.schedules = [
            torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=options.patience)
            for o in self.optimizers
        ]
        self.statistics: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sizes]  # per batch and layer: Σx / n, Σx² / n
        self.unit: float | None = None  # root mean square of the first gradient

    def clip(self, batches: list[int], space: Space) -> None:
        """Brings pixels back to valid ones: outside, where they are clipped before use, they would have no gradient."""
        for k in batches:
            self.pixels[k].data.copy_(space.clip(self.pixels[k].detach().to(space.mean.device)))

    def step(self, k: int, gradient: Tensor, loss: float) -> None:
        """One step of batch `k`'s pixels."""
        self.unit = self.unit or max(float(gradient.square().mean().sqrt()), 1e-30)
        self.pixels[k].grad = gradient.cpu() / self.unit
        self.optimizers[k].step()
        self.schedules[k].step(loss)
        for group in self.optimizers[k].param_groups:
            if group["lr"] < self.options.least_lr:
                group["lr"] = self.options.lr

    def state_dict(self) -> dict[str, Any]:
        return {
            "pixels": [u.detach() for u in self.pixels],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedules": [s.state_dict() for s in self.schedules],
            "statistics": [[[m.cpu(), v.cpu()] for m, v in rows] for rows in self.statistics],
            "unit": self.unit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for u, kept in zip(self.pixels, state["pixels"]):
            u.data.copy_(kept)
        for parts, kept in ((self.optimizers, state["optimizers"]), (self.schedules, state["schedules"])):
            for part, rows in zip(parts, kept):
                part.load_state_dict(rows)
        self.statistics, self.unit = [[(m, v) for m, v in rows] for rows in state["statistics"]], state["unit"]


class _Run:
    """The fitting of one set."""

    def __init__(self, options: Dgh, ctx: CalibrationContext) -> None:
        self.options, self.ctx = options, ctx
        # A lone image has no batch statistics to match: make two, keep one.
        self.sizes = [max(size, 2) for size in ctx.sizes()] if len(ctx.sizes()) == 1 else ctx.sizes()
        self.space: Space = pixel_space(ctx)
        channels, height, width = ctx.input_shape
        self.pad = max(1, round(options.margin * max(height, width) / 2)) if options.margin else 0
        larger = (channels, height + 2 * self.pad, width + 2 * self.pad)
        self.set = _ImageSet(options, self.sizes, larger, self.space, ctx.rng)
        self.count = StepCount(ctx, options.steps, len(self.sizes))

    def advance(self, first: int, last: int, rng: torch.Generator) -> None:
        """Steps first … last of every batch."""
        model = teachers(self.ctx)
        with tap_batch_norms(model.models) as taps:
            for k in range(len(self.sizes)):
                if not self.set.statistics[k]:
                    with torch.no_grad():
                        self._look(model, taps, self.set.pixels[k].detach().to(self.ctx.device), rng)
                    self.set.statistics[k] = _raw(taps)
            for step in range(first, last):
                for turn, k in enumerate(torch.randperm(len(self.sizes), generator=rng).tolist()):
                    loss = self._step(model, taps, k, rng)
                    self.count.step(0, step * len(self.sizes) + turn, loss)

    @torch.enable_grad()
    def _step(self, model: Teachers, taps: Taps, k: int, rng: torch.Generator) -> Tensor:
        u = self.set.pixels[k].detach().to(self.ctx.device).requires_grad_()
        outputs = self._look(model, taps, u, rng)
        spread = torch.stack([(out.flatten(1).amax(1) - out.flatten(1).amin(1)).mean() for out in outputs]).mean()
        loss = self._set_loss(taps, k) - self.options.stretch * spread
        (gradient,) = torch.autograd.grad(loss, u)
        value = float(loss.detach())
        if value != value:
            raise CalibrationError("synthesis diverged: the loss is not a number; lower lr")
        self.set.statistics[k] = _raw(taps)
        self.set.step(k, gradient, value)
        self.set.clip([k], self.space)
        return loss

    def _look(self, model: Teachers, taps: Taps, u: Tensor, rng: torch.Generator) -> list[Tensor]:
        """The outputs for an augmented view of the images."""
        taps.seen.clear()
        view = shift_and_flip(smooth(u), rng, pad=0)
        top, left = (int(v) for v in torch.randint(2 * self.pad + 1, (2,), generator=rng))
        height, width = self.ctx.input_shape[1:]
        return model(self.space.place(view[:, :, top : top + height, left : left + width]))

    def _set_loss(self, taps: Taps, k: int) -> Tensor:
        """Distance of the whole set's statistics, batch `k`'s fresh and the others' as stored, averaged over layers."""
        total = sum(self.sizes)
        terms = []
        for layer, tap in enumerate(taps.seen):
            mean, square = self.sizes[k] * tap.mean, self.sizes[k] * (tap.var + tap.mean.square())
            for other, size in enumerate(self.sizes):
                if other != k:
                    m, v = (kept.to(mean.device) for kept in self.set.statistics[other][layer])
                    mean, square = mean + size * m, square + size * v
            mean = mean / total
            std = ((square / total - mean.square()).clamp_min(0) + EPS).sqrt()
            sigma = (tap.running_var + tap.norm.eps).sqrt()  # type: ignore[operator]
            terms.append((mean - tap.running_mean).square().mean() + (std - sigma).square().mean())
        return torch.stack(terms).mean()

    def finished(self, k: int) -> Tensor:
        """Batch `k`: smoothed, the centre, clipped."""
        with torch.no_grad():
            u = smooth(self.set.pixels[k].detach().to(self.ctx.device))
            return self.space.place(F.pad(u, (-self.pad,) * 4)).contiguous()


def _raw(taps: Taps) -> list[tuple[Tensor, Tensor]]:
    """Mean and mean square per layer, without their graph."""
    return [(tap.mean.detach(), (tap.var + tap.mean.square()).detach()) for tap in taps.seen]
