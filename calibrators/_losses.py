"""BatchNorm statistics as a loss: what the running statistics of a network say about the images it was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.errors import CalibrationError

# Inside the square root: the gradient of a standard deviation is infinite at a constant channel.
_EPS = 1e-8


@dataclass
class Taps:
    """Statistics of every BatchNorm's input in the last forward pass: (mean [C], std [C], the layer), in order."""

    seen: list[tuple[Tensor, Tensor, nn.Module]] = field(default_factory=list)

    def loss(self) -> Tensor:
        """Sum over layers l of mean_c (m_l - μ_l)² + mean_c (s_l - σ_l)²; m, s of the batch, μ, σ the running statistics.

        Ref: Jeon et al., GENIE, CVPR 2023, eq. 7.
        Differs: the mean over channels, as in the authors' program, where the equation reads as a sum.
        """
        total = torch.zeros((), device=self.seen[0][0].device)
        for mean, std, norm in self.seen:
            running_std = (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
            total = total + (mean - norm.running_mean).square().mean() + (std - running_std).square().mean()
        return total


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that keep running statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]


@contextmanager
def tap_batch_norms(model: nn.Module) -> Iterator[Taps]:
    """Collects the statistics of every BatchNorm's input while the context is open; forget them with `seen.clear()`.

    Raises:
        CalibrationError: the model has no BatchNorm.
    """
    norms = batch_norms(model)
    if not norms:
        raise CalibrationError(
            "this source draws on the network's BatchNorm statistics, and the network has none; "
            "use '--data gaussian' or real pictures, '--data images:PATH'"
        )
    taps = Taps()

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        var, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
        taps.seen.append((mean, (var + _EPS).sqrt(), module))

    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
