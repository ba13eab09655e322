"""Soft rounding: weights between two codes, decided by training, hardened at the end.

    W_q = s · (clip(B + h(V) + z, n, p) - z),    h(V) = clip(sigmoid(V) · 1.2 - 0.1, 0, 1),    B = ⌊W/s₀⌋

B is frozen at the first scale s₀, so that s and V can be trained together.

Ref: Nagel et al., AdaRound, ICML 2020, arXiv 2004.10568, eq. 21-23; Jeon et al., GENIE, CVPR 2023, eq. 11-13, algorithm 2.
"""

import torch
from torch import Tensor, nn

from ptq.quant.affine import QParams, along_axis
from ptq.quant.fake_quant import WeightFakeQuant, swap, weight_grid

_ZETA, _GAMMA = 1.1, -0.1  # the rectified sigmoid's stretch


class SoftRound(nn.Module):
    """Parametrization of `weight`: codes between ⌊W/s⌋ and the next, by the trained `v`; `scale` is trained on request."""

    def __init__(self, weight: Tensor, q: QParams) -> None:
        super().__init__()
        self.spec = q.spec
        self.scale = nn.Parameter(q.scale.clone(), requires_grad=False)
        self.register_buffer("zero_point", q.zero_point.clone())
        s = along_axis(q.scale, weight.ndim, q.spec.axis)
        z = along_axis(q.zero_point, weight.ndim, q.spec.axis).float()
        ratio = weight.detach() / s
        base = torch.floor(ratio)
        self.register_buffer("base", base + z)
        self.register_buffer("shift", z)
        # h(V) starts at the fraction: the network starts unrounded.
        fraction = ((ratio - base - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-6, 1 - 1e-6)
        self.v = nn.Parameter(torch.log(fraction / (1 - fraction)))

    def softness(self) -> Tensor:
        """h(V), in [0, 1]."""
        return (torch.sigmoid(self.v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        soft = (self.base + self.softness()).clamp(self.spec.qmin, self.spec.qmax)  # type: ignore[operator]
        return (soft - self.shift) * along_axis(self.scale, soft.ndim, self.spec.axis)  # pyright: ignore[reportOperatorIssue]

    @torch.no_grad()
    def harden(self) -> tuple[Tensor, QParams]:
        """Codes (int32) with every weight decided, and the grid as trained."""
        decided = self.base + (self.softness() >= 0.5).float()  # type: ignore[operator]
        codes = decided.clamp(self.spec.qmin, self.spec.qmax).to(torch.int32)
        return codes, QParams(self.scale.detach().clone(), self.zero_point, self.spec)  # type: ignore[arg-type]

    def penalty(self, beta: float) -> Tensor:
        """Σ (1 - |2h(V) - 1|^β): 0 where every weight is decided. Ref: AdaRound, eq. 24."""
        return (1 - (2 * self.softness() - 1).abs().pow(beta)).sum()


def soften(layer: nn.Module) -> SoftRound:
    """Replaces nearest rounding of `layer.weight` by soft rounding on the same grid."""
    grid = weight_grid(layer)
    assert isinstance(grid, WeightFakeQuant)
    weight = layer.parametrizations["weight"].original.detach()  # type: ignore[index]
    soft = SoftRound(weight, grid.qparams)
    swap(layer, "weight", soft)
    return soft


def annealed_beta(progress: float, warmup: float, start: float, end: float) -> float | None:
    """β of the penalty: none during the warm-up, then from `start` to `end` linearly. Ref: AdaRound, §5."""
    if progress < warmup:
        return None
    return end + (start - end) * max(0.0, 1 - (progress - warmup) / (1 - warmup))


def rounding_penalty(block: nn.Module, beta: float) -> Tensor:
    """The penalty summed over every soft weight of a block."""
    return torch.stack([m.penalty(beta) for m in block.modules() if isinstance(m, SoftRound)]).sum()
