"""How scales are chosen: functions (tensor or samples, spec) → `QParams`.

An estimator is a plain function `f(x, spec, ends) -> QParams`; `ESTIMATORS` names them for the command line. `ends` [N, 2]:
least and greatest value of each image, where `x` are activations; None for weights.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ptq.errors import SpecError
from ptq.quant.affine import QParams, fake_quantize, stored_scale
from ptq.spec import QuantSpec

Estimator = Callable[[Tensor, QuantSpec, Tensor | None], QParams]
_CHUNK = 16  # images, of the smoothed range

# A channel whose largest weight is below this share of the layer's largest is dead: rounding noise of training, which
# must not be blown up to the full integer range. (Trained ImageNet MobileNets hold filters of 1e-15.)
_DEAD = 1e-6
_TINY, _HUGE = 1e-9, 1e12  # errors below or beyond, to the power of 2.4, leave float32's range
_NOTHING = 1e-30  # scales of what is smaller still may be no normal numbers
_STEEP = 4  # greater powers of errors leave it wherever they start


def _per_channel(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` as [C, n] (C = 1 without an axis)."""
    if spec.axis is None:
        return x.reshape(1, -1)
    return x.movedim(spec.axis, 0).flatten(1) if x.ndim > 1 else x.reshape(-1, 1)


def _grid(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float, [C]) of the grid that covers low ≤ 0 ≤ high.

    Per-tensor zero points are even: onnxruntime's integer addition adds the zero point before it rounds, so that an odd
    one would break exact ties the other way round than QuantizeLinear does.
    """
    if spec.symmetric:
        bound = torch.maximum(high, -low) if spec.signed else high
        scale = bound / spec.qmax
        return (next_power_of_two(scale) if spec.power_of_two else scale), torch.zeros_like(bound)
    scale = (high - low) / (spec.qmax - spec.qmin)
    if spec.power_of_two:
        scale = next_power_of_two(scale)
    offset = -low / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    zero = torch.round(offset) if spec.axis is not None else 2 * torch.round(offset / 2)
    last = spec.qmax if spec.axis is not None else spec.qmax - 1  # qmax is odd
    return scale, (spec.qmin + zero).clamp(spec.qmin, last)


def next_power_of_two(scale: Tensor) -> Tensor:
    """The smallest powers of two that are not below `scale`; 0 stays."""
    mantissa, exponent = torch.frexp(scale)
    return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int()), scale)


def _bounds(flat: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and greatest value [C], and 0, of `flat` [C, n]; of activations, of which `flat` is a sample, those of all images."""
    low, high = torch.aminmax(flat, dim=1) if ends is None else (ends[:, 0].min().view(1), ends[:, 1].max().view(1))
    return low.clamp_max(0), high.clamp_min(0)


def _finish(scale: Tensor, zero: Tensor, reach: Tensor, spec: QuantSpec) -> QParams:
    """`QParams`; dead channels (reach: largest magnitude per channel) get the layer's median scale."""
    alive = (reach > _DEAD * reach.max()) & (scale > 0)
    ordinary = scale[alive].median() if bool(alive.any()) else scale.new_tensor(1.0)
    scale = torch.where(alive, scale, ordinary).float()
    scale = scale if spec.axis is None else stored_scale(scale, spec)
    zero = torch.where(alive, zero, zero.clamp(0, 0)).to(torch.int32)
    return QParams(scale if spec.axis is not None else scale[0], zero if spec.axis is not None else zero[0], spec)


def minmax(x: Tensor, spec: QuantSpec, ends: Tensor | None = None) -> QParams:
    """The whole range of `x`: the grid's ends are its minimum and maximum."""
    low, high = _bounds(_per_channel(x, spec), ends)
    return _finish(*_grid(low, high, spec), torch.maximum(high, -low), spec)


def smoothed(x: Tensor, spec: QuantSpec, ends: Tensor | None = None) -> QParams:
    """The mean, over chunks of 16 images, of each chunk's minimum and maximum; for weights, the whole range.

    Ref: Haroush et al., The Knowledge Within, CVPR 2020, §4.2: smoothed-absolute ranges.
    """
    if ends is None:
        return minmax(x, spec)
    chunks = ends.tensor_split(-(-len(ends) // _CHUNK))
    low = torch.stack([chunk[:, 0].min() for chunk in chunks]).mean()
    high = torch.stack([chunk[:, 1].max() for chunk in chunks]).mean()
    return minmax(torch.stack([low, high]), spec)


def lp(x: Tensor, spec: QuantSpec, ends: Tensor | None = None, *, p: float = 2.4, candidates: int = 100) -> QParams:
    """The clip ratio with the smallest L_p rounding error.

        ratio* = argmin over 1.00, 0.99, … 0.01 of mean |x - fq(x; ratio · range)|^p,   per channel

    Ref: Jeon et al., GENIE, CVPR 2023, appendix G, eq. 16; the search over ratios is BRECQ's.
    """
    flat = _per_channel(x, spec)
    low, high = _bounds(flat, ends)
    reach, most = float(torch.maximum(high, -low).max()), min(_HUGE, _HUGE ** (2.4 / p))
    if _NOTHING < reach < _TINY or most < reach < math.inf:
        unit = 2.0 ** math.floor(math.log2(reach))  # exact, and a power of two stays one
        found = lp(x / unit, spec, None if ends is None else ends / unit, p=p, candidates=candidates)
        return replace(found, scale=found.scale * unit)
    row = replace(spec, axis=0)
    even = spec.axis is None
    best_error = torch.full_like(high, torch.inf, dtype=torch.float64 if p > _STEEP else high.dtype)
    best_scale, best_zero = torch.ones_like(high), torch.zeros_like(high)
    for k in range(candidates):
        ratio = 1.0 - k / candidates
        scale, zero = _grid(low * ratio, high * ratio, spec if even else row)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
        error = (flat - fake_quantize(flat, QParams(scale, zero.to(torch.int32), row))).abs_()
        error = (error.double() if p > _STEEP else error).pow_(p).mean(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return _finish(best_scale, best_zero, torch.maximum(high, -low), spec)


def percentile(x: Tensor, spec: QuantSpec, ends: Tensor | None = None, *, share: float = 99.99) -> QParams:
    """The range that holds `share` per cent of the values at either end; for weights, the whole range.

    Ref: Wu et al., Integer Quantization for Deep Learning Inference, 2020, arXiv 2004.09602, §5.2.
    """
    if ends is None:
        return minmax(x, spec)
    ordered = x.reshape(-1).sort().values
    beyond = int((1 - share / 100) * len(ordered))
    found = ordered[[beyond, len(ordered) - 1 - beyond]]
    if beyond == 0 or not bool(found.any()):  # so few values are other than 0
        return minmax(x, spec, ends)
    return minmax(found, spec)


def kl(x: Tensor, spec: QuantSpec, ends: Tensor | None = None, *, bins: int = 2048, candidates: int = 100) -> QParams:
    """The clip ratio that loses least information; for weights, the whole range.

        ratio* = argmin over 1.00, 0.99, … 0.01 of KL( P ‖ Q )

    P: the histogram of `x` within ratio · range, what lies beyond counted in its ends. Q: the histogram of what is within,
    each of the grid's steps as one mean over its bins that are not empty.

    Ref: Migacz, 8-bit Inference with TensorRT, GTC 2017. Differs: both ends of a two-sided range are cut in proportion; zeros,
    of which a ReLU leaves many, are not counted, since every grid holds them exactly.
    """
    if ends is None:
        return minmax(x, spec)
    low, high = (float(v) for v in _bounds(x.reshape(1, -1), ends))
    if high <= low:
        return minmax(x, spec, ends)
    counts = torch.histc(x[x != 0].float(), bins, low, high).double().cpu()
    zero = min(bins - 1, int(bins * (0 - low) / (high - low)))  # the bin that holds 0 stays inside every range
    levels, best, least = spec.qmax - spec.qmin + 1, 1.0, math.inf
    if spec.symmetric and spec.signed:  # a grid about 0, of which the range may hold half
        levels = round((high - low) / max(high, -low) * spec.qmax) + 1
    for k in range(candidates):
        ratio = 1.0 - k / candidates
        first, last = round(zero * (1 - ratio)), zero + max(1, round((bins - zero) * ratio))
        if last - first < levels:
            break
        divergence = _divergence(counts, first, last, levels)
        if divergence < least:
            best, least = ratio, divergence
    return minmax(torch.tensor([low * best, high * best], device=x.device), spec)


def _divergence(counts: Tensor, first: int, last: int, levels: int) -> float:
    """KL( P ‖ Q ) of the bins first…last - 1 merged into `levels` steps; see `kl`."""
    inside = counts[first:last]
    p = inside.clone()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    step = (torch.arange(len(inside)) * levels) // len(inside)
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, step, inside)
    filled = torch.zeros(levels, dtype=torch.float64).index_add_(0, step, (inside > 0).double())
    q = torch.where(inside > 0, (total / filled.clamp_min(1))[step], torch.zeros_like(inside))
    # A bin that only clipping fills has no share in Q; a small one keeps the divergence finite.
    p, q = p / p.sum(), (q / q.sum().clamp_min(1e-300)).clamp_min(1e-9)
    held = p > 0
    return float((p[held] * (p[held] / q[held]).log()).sum())


def lp_norm(p: float) -> Estimator:
    """`lp` with norm `p` for activations; for weights, the ordinary one."""
    return lambda x, spec, ends=None: lp(x, spec, ends, p=2.4 if ends is None else p)


ESTIMATORS: dict[str, Estimator] = {
    "kl": kl, "lp": lp, "minmax": minmax, "mse": partial(lp, p=2.0), "percentile": percentile, "smoothed": smoothed,
}  # fmt: skip
# Norms that `lp_best` tries: a high one spares the few largest values, a low one the many small. Which is better depends on
# the network as a whole: in deep ones small errors add up from block to block.
NORMS = (2.0, 2.4)


# What `--ranges` takes: an estimator, or the search over norms, which looks at the whole network.
RANGES = (*sorted(ESTIMATORS), "lp_best")


def estimators(name: str) -> list[Estimator]:
    """The estimators that `name` stands for; of several, the one that suits the network best is to be taken.

    name: one of `RANGES`; "percentile:99.9" and "lp:2" give the percentile and the norm.

    Raises:
        SpecError: no estimator has that name, or its number is out of range.
    """
    name, _, number = name.partition(":")
    if name not in RANGES:
        raise SpecError(f"unknown range estimator {name!r}; known: {', '.join(RANGES)}")
    if number:
        return [_numbered(name, number)]
    return [lp_norm(p) for p in NORMS] if name == "lp_best" else [ESTIMATORS[name]]


def _numbered(name: str, number: str) -> Estimator:
    try:
        value = float(number)
    except ValueError as e:
        raise SpecError(f"range estimator {name}:{number} given; after the colon stands a number") from e
    if name == "percentile" and 50 < value <= 100:
        return partial(percentile, share=value)
    if name == "lp" and 0 < value <= 16:
        return partial(lp, p=value)
    raise SpecError(
        f"range estimator {name}:{number} given; write percentile:99.9 (50 to 100), lp:2 (0 to 16) or {name}"
    )
