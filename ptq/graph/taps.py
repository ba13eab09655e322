"""Statistics of what enters each BatchNorm, beside those it kept from training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ptq.errors import CalibrationError
from ptq.graph.ops import BATCH_NORMS

# Added to variances: the gradient of a standard deviation is infinite at a constant channel, and so is a KL divergence.
EPS = 1e-8


_DEAD = 1e-6  # running variance below which a channel was constant in training


def alive(running_var: Tensor) -> Tensor:
    """Channels [C] that varied in training: of the others, a divergence says nothing, and would be of any size."""
    return running_var > _DEAD


def dead_channels(model: nn.Module) -> dict[str, int]:
    """BatchNorm's module path → how many of its channels were constant in training, where there are any."""
    counts = {path: int((~alive(m.running_var)).sum()) for path, m in batch_norms(model).items()}  # type: ignore[arg-type]
    return {path: count for path, count in counts.items() if count}


class Tap(NamedTuple):
    """One BatchNorm in one forward pass: mean and variance [C] of its input, and the layer."""

    mean: Tensor
    var: Tensor
    norm: nn.Module

    @property
    def running_mean(self) -> Tensor:
        """μ_l [C], of the training images."""
        return self.norm.running_mean  # type: ignore[return-value]

    @property
    def running_var(self) -> Tensor:
        """σ_l² [C], of the training images."""
        return self.norm.running_var  # type: ignore[return-value]


@dataclass
class Taps:
    """Every BatchNorm's statistics in the last forward pass, in order. models: how many networks are tapped."""

    models: int = 1
    seen: list[Tap] = field(default_factory=list)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Module path → BatchNorm layer, of those that keep running statistics."""
    return {path: m for path, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel [C] of `[B, C, …]`."""
    return _Moments.apply(x)  # type: ignore[return-value]


class _Moments(torch.autograd.Function):
    """Mean and variance, in a few passes that follow the layout of `x`.

    On a CPU torch's own variance of `[B, H, W, C]` in memory takes some eight times as long, and its gradient comes in another
    layout than that of `x`, which makes whatever is added to it slow too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        dims = [d for d in range(x.ndim) if d != 1]
        if x.device.type == "cpu":
            mean = x.mean(dims, keepdim=True)
            var = (x - mean).square_().mean(dims)
        else:
            var, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean.flatten(), var.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:  # type: ignore[override]
        # d mean / dx = 1 / N,  d var / dx = 2 (x - mean) / N
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = (2 / n * grad_var).view_as(mean)
        return torch.addcmul(grad_mean.view_as(mean) / n - slope * mean, x, slope)


def gaussian_kl(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> Tensor:
    """KL( N(μ, σ²) ‖ N(m, s²) ) per element, μ, σ² = mean, var, m, s² = other_mean, other_var.

        log(s/σ) - ½ (1 - (σ² + (μ - m)²) / s²)

    Ref: Haroush et al., The Knowledge Within, CVPR 2020, eq. 1.
    Differs: ε = 1e-8 is added to both variances, where the paper adds it to s² alone: σ² may be 0.
    """
    var, other_var = var + EPS, other_var + EPS
    return 0.5 * ((other_var / var).log() - 1 + (var + (mean - other_mean).square()) / other_var)


@contextmanager
def tap_batch_norms(models: Iterable[nn.Module], *, required: bool = True) -> Iterator[Taps]:
    """Collects the statistics of every BatchNorm's input while the context is open; forget them with `seen.clear()`.

    Raises:
        CalibrationError: one of the models has no BatchNorm, and `required`.
    """
    models = list(models)
    found = [batch_norms(model) for model in models]
    if required and not all(found):
        raise CalibrationError(
            "this source draws on the network's BatchNorm statistics, and the network has none; "
            "use a source that needs none ('ptq list' says which), such as '--data auto', or real pictures, '--data images:PATH'"
        )
    taps = Taps(len(models))

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        taps.seen.append(Tap(*moments(args[0]), module))

    handles = [norm.register_forward_pre_hook(look) for norms in found for norm in norms.values()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
