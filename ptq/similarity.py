"""How much a set of images looks like the training data, to a network: the divergence of its BatchNorm statistics.

    J_KL = 1/N Σ_l mean_c KL( N(μ_l, σ_l²) ‖ N(m_l, s_l²) )

μ_l, σ_l: running statistics of BatchNorm l; m_l, s_l: those of its input over the whole set. Small: looks alike.

Ref: Haroush et al., The Knowledge Within, CVPR 2020, §3.3, eq. 1-3, §4.4, table 4.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ptq.contracts import Feedback
from ptq.errors import CalibrationError
from ptq.graph.ops import BATCH_NORMS
from ptq.graph.taps import alive, batch_norms, gaussian_kl, moments, tap_batch_norms


@dataclass(frozen=True, slots=True)
class Similarity:
    """The divergence of one set of images. mean: J_KL; layers: BatchNorm's module path (and "input") → its part.

    odd: layers with channels that were constant in training; those channels are left out.
    """

    mean: float
    layers: Mapping[str, float]
    images: int
    odd: tuple[str, ...] = ()


class _Sums:
    """Σ x and Σ x² per channel of one layer's input, in double precision."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        mean, var = mean.double().cpu(), var.double().cpu()
        self.first, self.second = self.first + count * mean, self.second + count * (var + mean.square())
        self.count += count

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.first / self.count
        return mean, (self.second / self.count - mean.square()).clamp_min(0)


def similarity(
    teacher: fx.GraphModule, batches: Iterable[Tensor], *, device: torch.device, normalized: bool,
    total: int = 0, feedback: Feedback | None = None,
) -> Similarity:  # fmt: skip
    """J_KL of images, in memory that does not grow with their number.

    Args:
        teacher: a traced network with its BatchNorms, on `device`. batches: `[B, C, H, W]` in its input space.
        normalized: inputs have zero mean and unit deviation over the training data; they then count as one more layer.
        total: how many images there are, for progress.

    Raises:
        CalibrationError: the network has no BatchNorm, or there are no images.
    """
    feedback = feedback or Feedback()
    paths = {norm: path for path, norm in batch_norms(teacher).items()}
    sums = {name: _Sums() for name in (["input"] if normalized else []) + list(paths.values())}
    seen = 0
    with tap_batch_norms([teacher]) as taps, torch.no_grad():
        for batch in batches:
            taps.seen.clear()
            batch = batch.to(device)
            teacher(batch)
            if normalized:
                sums["input"].add(*moments(batch), len(batch))
            for tap in taps.seen:
                sums[paths[tap.norm]].add(tap.mean, tap.var, len(batch))
            seen += len(batch)
            feedback.progress("statistics", seen, max(total, seen))
    if not seen:
        raise CalibrationError("there are no images to compare")
    return _result(teacher, sums, seen)


def _running(teacher: fx.GraphModule, path: str) -> tuple[Tensor, Tensor]:
    norm = teacher.get_submodule(path)
    assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def _result(teacher: fx.GraphModule, sums: Mapping[str, _Sums], images: int) -> Similarity:
    layers, odd = {}, []
    for name, total in sums.items():
        if not total.count:
            continue
        mean, var = total.moments()
        running_mean, running_var = torch.zeros_like(mean), torch.ones_like(var)
        if name != "input":
            running_mean, running_var = (v.double().cpu() for v in _running(teacher, name))
        counted = alive(running_var)
        if not bool(counted.all()):
            odd.append(name)
        if bool(counted.any()):
            kl = gaussian_kl(running_mean, running_var, mean, var)
            layers[name] = float(kl[counted].mean())
    if not layers:
        raise CalibrationError(
            "all channels of the network's BatchNorms were constant in training: nothing to compare with"
        )
    return Similarity(sum(layers.values()) / len(layers), layers, images, tuple(odd))
