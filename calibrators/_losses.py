"""What synthetic images are fitted to: BatchNorm statistics, image priors, classes.

μ_l, σ_l: running mean and deviation of BatchNorm l; m_l, s_l: those of its input on the images at hand.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.graph.taps import EPS, Tap, Taps, alive, batch_norms, gaussian_kl, moments


def std_loss(taps: Taps) -> Tensor:
    """Sum over layers l of mean_c (m_l - μ_l)² + mean_c (s_l - σ_l)², averaged over networks.

    Ref: Jeon et al., GENIE, CVPR 2023, eq. 7.
    Differs: the mean over channels, as in the authors' program, where the equation reads as a sum.
    """
    return torch.stack([_moment_distance(tap) for tap in taps.seen]).sum() / taps.models


def moment_loss(taps: Taps) -> Tensor:
    """Mean over layers of mean_c (m_l - μ_l)² + mean_c (s_l - σ_l)².

    Ref: Haroush et al., The Knowledge Within, CVPR 2020, §3.3: the mean square error of moments, which takes the place of
    the divergence.
    """
    return torch.stack([_moment_distance(tap) for tap in taps.seen]).mean()


def _moment_distance(tap: Tap) -> Tensor:
    s, sigma = (tap.var + EPS).sqrt(), (tap.running_var + EPS).sqrt()
    return (tap.mean - tap.running_mean).square().mean() + (s - sigma).square().mean()


def kl_loss(taps: Taps) -> Tensor:
    """J_KL: mean over layers and channels of KL( N(μ_l, σ_l²) ‖ N(m_l, s_l²) ).

    Ref: Haroush et al., The Knowledge Within, CVPR 2020, eq. 1-3.
    Differs: channels that were constant in training are left out; their divergence would drown all others.
    """
    terms = []
    for tap in taps.seen:
        counted = alive(tap.running_var)
        kl = gaussian_kl(tap.running_mean, tap.running_var, tap.mean, tap.var)
        terms.append(torch.where(counted, kl, torch.zeros_like(kl)).sum() / counted.sum().clamp_min(1))
    return torch.stack(terms).mean()


def variance_loss(taps: Taps, past: "PastStatistics | None" = None) -> Tensor:
    """Sum over layers of ‖m_l - μ_l‖₂ + ‖s_l² - σ_l²‖₂; zero where there is no BatchNorm.

    past: statistics of earlier batches, which m_l and s_l² are blended with.

    Ref: Tran et al., NAYER, CVPR 2024, eq. 5, L_BN; Yin et al., DeepInversion, CVPR 2020.
    """
    found = [(tap.mean, tap.var) if past is None else past.blend(tap) for tap in taps.seen]
    terms = [
        _norm(mean - tap.running_mean) + _norm(var - tap.running_var) for tap, (mean, var) in zip(taps.seen, found)
    ]
    return torch.stack(terms).sum() / taps.models if terms else torch.zeros(())


class PastStatistics(nn.Module):
    """A running average of the statistics of earlier batches, of which the batch at hand is to be the missing part:

        m = momentum · m_past + (1 - momentum) · m_now      and the same for variances

    so that a set of batches matches the training statistics where no single one does. Before the first batch, m = m_now.
    """

    def __init__(self, models: Sequence[nn.Module], momentum: float) -> None:
        super().__init__()
        self.momentum, self.place = momentum, dict[int, int]()
        self.follow(models)
        for k, norm in enumerate(norm for model in models for norm in batch_norms(model).values()):
            size = len(norm.running_mean)  # type: ignore[arg-type]
            self.register_buffer(f"mean_{k}", torch.full((size,), torch.nan))  # not a number: nothing seen yet
            self.register_buffer(f"var_{k}", torch.full((size,), torch.nan))

    def follow(self, models: Iterable[nn.Module]) -> None:
        """Looks at these networks from now on: the same ones, or copies of them."""
        norms = [norm for model in models for norm in batch_norms(model).values()]
        self.place = {id(norm): k for k, norm in enumerate(norms)}

    def blend(self, tap: Tap) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] of what enters a BatchNorm, the past's share in them."""
        k = self.place[id(tap.norm)]
        past = self.get_buffer(f"mean_{k}"), self.get_buffer(f"var_{k}")
        mean, var = (
            torch.where(old.isnan(), now, torch.lerp(now, old.nan_to_num(), self.momentum))
            for old, now in zip(past, (tap.mean, tap.var))
        )
        return mean, var

    @torch.no_grad()
    def add(self, seen: Iterable[Tap]) -> None:
        """Takes a batch into the average."""
        for tap in seen:
            mean, var = self.blend(tap)
            k = self.place[id(tap.norm)]
            self.get_buffer(f"mean_{k}").copy_(mean)
            self.get_buffer(f"var_{k}").copy_(var)


def _norm(v: Tensor) -> Tensor:
    return (v.square().sum() + EPS).sqrt()


def image_std_loss(x: Tensor) -> Tensor:
    """Each image's mean towards 0 and deviation towards 1, per channel.

    Ref: the GENIE authors' program. Differs: the mean over channels, as for layers, where it takes the sum.
    """
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    return _from_normalized(mean, var)


def _from_normalized(mean: Tensor, var: Tensor) -> Tensor:
    """Mean square distance of means to 0 and deviations to 1."""
    return mean.square().mean() + ((var + EPS).sqrt() - 1).square().mean()


def input_moments(x: Tensor) -> Tensor:
    """`moment_loss` of the input, as one more layer: normalized images over the batch, against mean 0 and deviation 1."""
    return _from_normalized(*moments(x))


def input_kl(x: Tensor) -> Tensor:
    """The same for the divergence: against N(0, 1)."""
    mean, var = moments(x)
    return gaussian_kl(torch.zeros_like(mean), torch.ones_like(var), mean, var).mean()


def smooth(x: Tensor) -> Tensor:
    """`x` under a 3 × 3 Gaussian kernel of deviation 1 pixel."""
    side = torch.tensor([-0.5, 0.0, -0.5], device=x.device).exp()
    kernel = torch.outer(side, side) / side.sum().square()
    channels = x.shape[1]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, 3, 3), groups=channels)


def smoothness(x: Tensor) -> Tensor:
    """MSE( x, smooth(x) ).

    Ref: Haroush et al., The Knowledge Within, CVPR 2020, §4.1, image prior.
    """
    return F.mse_loss(x, smooth(x))


def inception(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Mean of exp( -logit[target] / scale ).

    Ref: Haroush et al., The Knowledge Within, CVPR 2020, §3.2.
    """
    return (-logits.gather(1, targets.view(-1, 1)) / scale).exp().mean()
