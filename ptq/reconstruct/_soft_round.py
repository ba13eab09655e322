"""Soft rounding: weights between two codes, decided by training, hardened at the end.

    W_q = s · (clip(B + h(V) + z, n, p) - z),    h(V) = clip(sigmoid(V) · 1.2 - 0.1, 0, 1),    B = ⌊W/s₀⌋

B is frozen at the first scale s₀, so that s and V can be trained together.

Ref: Nagel et al., AdaRound, ICML 2020, arXiv 2004.10568, eq. 21-23; Jeon et al., GENIE, CVPR 2023, eq. 11-13, algorithm 2.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ptq.quant.affine import QParams, along_axis
from ptq.quant.fake_quant import ActFakeQuant, WeightFakeQuant, swap, weight_grid
from ptq.quant.masks import mix_into
from ptq.reconstruct._capture import block_error

_WIDER = 4  # bits
_ZETA, _GAMMA = 1.1, -0.1  # the rectified sigmoid's stretch


class _Penalty(torch.autograd.Function):
    """Σ (1 - |2h - 1|^β); the power, which is what costs, is taken once for value and gradient."""

    @staticmethod
    def forward(ctx, h: Tensor, beta: float) -> Tensor:
        d = h * 2 - 1
        size = d.abs()
        slope = size.pow(beta - 1)
        ctx.save_for_backward(slope.copysign(d))
        ctx.beta = beta
        return h.numel() - (slope * size).sum()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (slope,) = ctx.saved_tensors
        return slope * (grads[0] * (-2 * ctx.beta)), None


def _stretched(sigmoid: Tensor) -> Tensor:
    """h(V) before it is cut off at 0 and 1."""
    return sigmoid * (_ZETA - _GAMMA) + _GAMMA


class _SoftWeight(torch.autograd.Function):
    """W_q and h(V) from V and s, with their gradients: autograd would make a dozen small operations of either way."""

    @staticmethod
    def forward(ctx, v: Tensor, s: Tensor, base: Tensor, shift: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        sigmoid = torch.sigmoid(v)
        stretched = _stretched(sigmoid)
        h = stretched.clamp(0, 1)
        code = base + h
        levels = code.clamp(qmin, qmax).sub_(shift)
        ctx.save_for_backward(s, sigmoid, stretched, code, levels)
        ctx.ends = qmin, qmax
        ctx.set_materialize_grads(False)
        return levels * s, h

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        grad_w, grad_h = grads  # of h: only where the penalty counts
        s, sigmoid, stretched, code, levels = ctx.saved_tensors
        # hardtanh's gradient is a clamp's, in one pass instead of five.
        grad, grad_s = grad_h, None
        if grad_w is not None:
            grad = torch.ops.aten.hardtanh_backward(grad_w * s, code, *ctx.ends)
            grad = grad if grad_h is None else grad.add_(grad_h)
            grad_s = (grad_w * levels).sum_to_size(s.shape) if ctx.needs_input_grad[1] else None
        if grad is None:
            return None, None, None, None, None, None
        grad = torch.ops.aten.hardtanh_backward(grad, stretched, 0, 1).mul_(_ZETA - _GAMMA)
        return torch.ops.aten.sigmoid_backward(grad, sigmoid), grad_s, None, None, None, None


class SoftRound(nn.Module):
    """Parametrization of `weight`: codes between ⌊W/s⌋ and the next, by the trained `v`; `gain` is trained on request.

    gain: what the scale is of its first value, per channel. Adam moves all elements by steps of one size: those of ordinary
    channels' scales would drive that of a channel with tiny weights below zero.
    """

    def __init__(self, weight: Tensor, q: QParams) -> None:
        super().__init__()
        self.spec = q.spec
        self.register_buffer("first_scale", q.scale.detach().clone())
        self.gain = nn.Parameter(torch.ones_like(q.scale), requires_grad=False)
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
        self.softened: Tensor | None = None  # h(V) of the weights last computed

    @property
    def scale(self) -> Tensor:
        """The scale as it stands, one per channel."""
        return self.first_scale * self.gain  # type: ignore[operator]

    def softness(self) -> Tensor:
        """h(V), in [0, 1]."""
        return _stretched(torch.sigmoid(self.v)).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        s = along_axis(self.scale, weight.ndim, self.spec.axis)
        w, self.softened = _SoftWeight.apply(self.v, s, self.base, self.shift, self.spec.qmin, self.spec.qmax)  # type: ignore[misc]
        return w

    @torch.no_grad()
    def harden(self) -> tuple[Tensor, QParams]:
        """Codes (int32) with every weight decided, and the grid as trained."""
        decided = self.base + (self.softness() >= 0.5).float()  # type: ignore[operator]
        codes = decided.clamp(self.spec.qmin, self.spec.qmax).to(torch.int32)
        return codes, QParams(self.scale.detach().clone(), self.zero_point, self.spec)  # type: ignore[arg-type]

    def penalty(self, beta: float) -> Tensor:
        """Σ (1 - |2h(V) - 1|^β): 0 where every weight is decided. Ref: AdaRound, eq. 24."""
        h, self.softened = self.softened, None  # that of the weights in use, as long as its gradient is to come
        return _Penalty.apply(h if h is not None and h.requires_grad else self.softness(), beta)  # type: ignore[return-value]


def soften(layer: nn.Module) -> SoftRound:
    """Replaces nearest rounding of `layer.weight` by soft rounding on the same grid."""
    grid = weight_grid(layer)
    assert isinstance(grid, WeightFakeQuant)
    weight = layer.parametrizations["weight"].original.detach()  # type: ignore[index]
    soft = SoftRound(weight, grid.qparams)
    swap(layer, "weight", soft)
    return soft


class SoftOptions(Protocol):
    """The options that every method with soft bits has; see `genie_m` for what they say."""

    @property
    def steps(self) -> int: ...
    @property
    def lr_round(self) -> float: ...
    @property
    def lr_act(self) -> float: ...
    @property
    def penalty(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def beta_start(self) -> float: ...
    @property
    def beta_end(self) -> float: ...
    @property
    def drop(self) -> float: ...
    @property
    def scale_step(self) -> float: ...
    @property
    def full_steps(self) -> int: ...


def attach_soft(
    o: SoftOptions, block: nn.Module, rng: torch.Generator, lr_scale: float = 0.0, lr_bias: float = 0.0
) -> list[dict[str, Any]]:
    """Makes a block's rounding learnable; Adam's parameter groups.

    Soft bits of every layer at `lr_round` (see `sped_up`); where their rates are above 0, along a cosine, weight scales at
    `lr_scale`, biases at `lr_bias` of their mean size, and the scales of activation quantizers that are not settled yet at
    `lr_act`; powers of two stay what they are.
    Activation quantizers skip elements with probability `drop`; those much finer than others of the block are idle in training.

    A scale's rate is at most `scale_step` of the scale itself a step. The papers' absolute rates suit scales near 0.1; on an
    8-bit grid, with scales near 0.002, they would be a twentieth of the scale in each step.
    """
    lr_round = sped_up(o.lr_round, o.full_steps, o.steps)
    groups: list[dict[str, Any]] = []

    def train(parameter: nn.Parameter, rate: float) -> None:
        parameter.requires_grad_(True)
        groups.append({"params": [parameter], "lr": rate, "cosine": True})

    wide = _much_wider(block)
    for layer in list(block.modules()):
        if isinstance(weight_grid(layer) if hasattr(layer, "weight") else None, WeightFakeQuant):
            soft = soften(layer)
            groups.append({"params": [soft.v], "lr": lr_round, "cosine": False})
            if lr_scale > 0 and not soft.spec.power_of_two:
                train(soft.gain, min(lr_scale / float(soft.scale.detach().median()), o.scale_step))
            if lr_bias > 0 and layer.bias is not None:
                bias: nn.Parameter = layer.parametrizations["bias"].original  # type: ignore[index, assignment]
                train(bias, lr_bias * float(bias.detach().abs().mean()))
        elif isinstance(layer, ActFakeQuant) and layer in wide:
            layer.idle = True
        elif isinstance(layer, ActFakeQuant):
            layer.drop, layer.mask_rng = o.drop, rng
            if not (layer.frozen or layer.spec.power_of_two) and o.lr_act > 0:
                train(layer.scale, min(o.lr_act, o.scale_step * float(layer.scale.detach())))
    return groups


def _much_wider(block: nn.Module) -> set[ActFakeQuant]:
    """Activation quantizers whose steps are lost among those of the block's narrowest: sixteen times finer, or more.

    They are those of addends, by default 8 bits beside 4, which the papers leave in float; passing through them would take an
    eighth of the training's time.
    """
    found = [m for m in block.modules() if isinstance(m, ActFakeQuant)]
    narrowest = min((m.spec.bits for m in found), default=0)
    return {m for m in found if m.spec.bits >= narrowest + _WIDER}


def sped_up(lr: float, full_steps: int, steps: int) -> float:
    """The soft bits' rate at fewer than `full_steps` steps: higher in proportion, at most twentyfold.

    So they can travel as far as in the papers' 20,000: 1,000 steps at 0.001 would not decide a weight that starts halfway.
    """
    return lr * min(20.0, max(1.0, full_steps / max(steps, 1)))


def dropped_input(o: SoftOptions, teacher_in: Tensor, student_in: Tensor, rng: torch.Generator) -> Tensor:
    """Each element from the teacher with probability `drop`, else from the student, in whose place they come. Ref: QDrop, eq. 8."""
    return mix_into(student_in, teacher_in, o.drop, rng) if o.drop > 0 else student_in


def soft_loss(
    o: SoftOptions, block: nn.Module, outputs: list[Tensor], targets: list[Tensor], fisher: list[Tensor] | None, progress: float
) -> Tensor:  # fmt: skip
    """Squared error, summed over channels and averaged over the rest, plus λ times the rounding penalty."""
    error = block_error(outputs, targets, fisher)
    beta = annealed_beta(progress, o.warmup, o.beta_start, o.beta_end)
    return error if beta is None else error + o.penalty * rounding_penalty(block, beta)


def annealed_beta(progress: float, warmup: float, start: float, end: float) -> float | None:
    """β of the penalty: none during the warm-up, then from `start` to `end` linearly. Ref: AdaRound, §5."""
    if progress < warmup:
        return None
    return end + (start - end) * max(0.0, 1 - (progress - warmup) / (1 - warmup))


def rounding_penalty(block: nn.Module, beta: float) -> Tensor:
    """The penalty summed over every soft weight of a block; 0 where all of its layers stay float."""
    found = [m.penalty(beta) for m in block.modules() if isinstance(m, SoftRound)]
    return torch.stack(found).sum() if found else torch.zeros(())
