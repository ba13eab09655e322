"""Where a network's inputs live: mean and standard deviation per channel of the inputs it was trained on.

Most networks take inputs of zero mean and unit deviation; some take raw 0…255 pixels or [-1, 1]. The first BatchNorm knows:
its statistics are those of the first layers' response to the training images.

    m*, s* = argmin  mean_c ((m_1 - μ_1)/σ_1)² + mean_c log²(s_1/σ_1)     for inputs  x = m + s·u

with u noise that has the spectrum of natural images, 1/f, and their correlation between colours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ptq.contracts import CalibrationContext, of_a_data_set, valid_range
from ptq.graph.blocks import extract
from ptq.graph.ops import BATCH_NORMS
from ptq.graph.taps import batch_norms

_NATURAL_MEAN, _NATURAL_STD = 0.449, 0.226  # of pixels in [0, 1], over natural photographs
_COLOUR = 0.9  # correlation between colour channels of natural photographs
_BATCH, _STEPS = 16, 150


@dataclass(frozen=True, slots=True)
class Space:
    """Where inputs live: `mean + std · u` for normalized `u`. low, high: normalized values of a black and a white pixel.

    All [1, C, 1, 1].
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def place(self, u: Tensor) -> Tensor:
        """Normalized images → the network's input space."""
        return self.mean + self.std * u

    def clip(self, u: Tensor) -> Tensor:
        """`u` within the valid pixels."""
        return torch.minimum(torch.maximum(u, self.low), self.high)


def pixel_space(ctx: CalibrationContext) -> Space:
    """The network's input space, with the valid pixels: as stated, else those of natural photographs."""
    mean, std = input_space(ctx)
    if ctx.mean is not None and ctx.std is not None:
        low, high = ((end.flatten().to(ctx.device) - mean) / std for end in valid_range(ctx.mean, ctx.std))
    else:
        low = torch.full_like(mean, -_NATURAL_MEAN / _NATURAL_STD)
        high = torch.full_like(mean, (1 - _NATURAL_MEAN) / _NATURAL_STD)
    return Space(*(v.view(1, -1, 1, 1) for v in (mean, std, low, high)))


def input_space(ctx: CalibrationContext) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of the inputs the network expects, on `ctx.device`; (0, 1) where it is normalized.

    Says what it found where that is not (0, 1).
    """
    channels = ctx.input_shape[0]
    zero, one = torch.zeros(channels, device=ctx.device), torch.ones(channels, device=ctx.device)
    norm = _first_norm(ctx.model)
    if norm is None or ctx.mean is not None:
        return _from_normalization(ctx, zero, one)
    mean, std = _fit(ctx, norm)
    # One noise spectrum does not fit every data set: within this margin a network counts as normalized.
    if bool((mean.abs() < 0.7).all()) and bool(((std > 0.62) & (std < 1.6)).all()):
        return zero, one
    shown = ", ".join(f"{m:.3g}±{s:.3g}" for m, s in zip(mean.tolist(), std.tolist()))
    ctx.feedback.note(
        f"the network's inputs are not normalized; fitted mean±std per channel from its BatchNorm: {shown}"
    )
    return mean, std


def _from_normalization(ctx: CalibrationContext, zero: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """What a stated normalization makes of natural photographs; a std of 0.15…0.4 is a data set's own: normalized."""
    if ctx.mean is None or ctx.std is None or of_a_data_set(ctx.std):
        return zero, one
    mean, std = ctx.mean.to(ctx.device), ctx.std.to(ctx.device)
    return (_NATURAL_MEAN - mean) / std, _NATURAL_STD / std


def _first_norm(gm: fx.GraphModule) -> fx.Node | None:
    known = set(batch_norms(gm).values())
    for node in gm.graph.nodes:
        if node.op == "call_module" and gm.get_submodule(str(node.target)) in known:
            return node
    return None


def _fit(ctx: CalibrationContext, node: fx.Node) -> tuple[Tensor, Tensor]:
    gm = ctx.model
    front = extract(
        gm, (gm.graph.find_nodes(op="placeholder")[0].meta["value"],), (node.all_input_nodes[0].meta["value"],)
    )
    norm = gm.get_submodule(str(node.target))
    assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None and norm.running_var is not None
    mu, sigma = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    u = natural_noise(_BATCH, ctx.input_shape, ctx.rng).to(ctx.device)

    def loss(mean: Tensor, std: Tensor) -> Tensor:
        (x,) = front(mean.view(1, -1, 1, 1) + std.view(1, -1, 1, 1) * u)
        var, m = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
        return ((m - mu) / sigma).square().mean() + ((var + 1e-12).sqrt() / sigma).log().square().mean()

    one = torch.ones(ctx.input_shape[0], device=ctx.device)
    starts = [(shift * scale * one, scale * one) for scale in (0.1, 0.3, 1, 3, 10, 30, 100) for shift in (0.0, 2.0)]
    with torch.no_grad():
        start_mean, start_std = min(starts, key=lambda s: float(loss(*s)))
    return _descend(loss, start_mean, start_std)


def _descend(loss, start_mean: Tensor, start_std: Tensor) -> tuple[Tensor, Tensor]:
    shift, growth = torch.zeros_like(start_mean).requires_grad_(), torch.zeros_like(start_std).requires_grad_()
    optimizer = torch.optim.Adam([shift, growth], lr=0.05)
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            loss(start_mean + start_std * shift, start_std * growth.exp()).backward()
            optimizer.step()
    return (start_mean + start_std * shift).detach(), (start_std * growth.exp()).detach()


def natural_noise(count: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Noise `[count, C, H, W]` of zero mean and unit deviation, with a 1/f spectrum and correlated channels."""
    channels, height, width = shape
    shared = torch.randn(count, 1, height, width, generator=rng)
    own = torch.randn(count, channels, height, width, generator=rng)
    white = _COLOUR**0.5 * shared + (1 - _COLOUR) ** 0.5 * own
    fy, fx_ = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    radius = (fy[:, None] ** 2 + fx_[None, :] ** 2).sqrt().clamp_min(1 / max(height, width))
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / radius, s=(height, width))
    pink = pink - pink.mean(dim=(0, 2, 3), keepdim=True)
    return pink / pink.std(dim=(0, 2, 3), keepdim=True)
