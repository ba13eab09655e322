"""Cross-layer equalization: channels rescaled between neighbouring layers, so that one grid suits them all.

    W1' = S⁻¹ W1,   b1' = S⁻¹ b1,   W2' = W2 S,   s_i = √( r1_i / r2_i )        r: largest magnitude of channel i

The network computes what it did, since f(s x) = s f(x) for s > 0 and f a ReLU, LeakyReLU, pool or padding. ReLU6 is cut off at
6 whatever the scale: there a channel that reaches 6 stays as it is, and no other is scaled up to where it would.

Ref: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, arXiv 1906.04721, §4.1.
Differs: the paper replaces ReLU6 by ReLU first, which changes the network; large biases are not absorbed into the next layer
(its §4.1.3).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq.graph.ops import find_op, weighted_nodes
from ptq.graph.trace import rewrite

_SWEEPS = 20
_CONVERGED = 1e-3  # relative change of every factor in a sweep
_MARGIN = 1.25  # real pictures reach further than calibration images
_DEAD = 1e-6  # of the layer's largest magnitude
# Scaling a channel commutes with these; all keep channels apart.
_HOMOGENEOUS = ("relu", "relu6", "leaky_relu", "max_pool", "avg_pool", "upsample_nearest", "pad")


@dataclass(frozen=True, slots=True)
class _Pair:
    first: nn.Module
    second: nn.Module
    name: str  # of the first layer's node
    values: tuple[str, ...]  # between both, whose channels are scaled
    cut: bool  # a ReLU6 lies between


def equalize(
    gm: fx.GraphModule, batches: Iterable[Tensor], device: torch.device
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A copy of a folded network with neighbouring layers equalized; value name → what its channels were divided by, [C].

    Args:
        gm: the folded network, on `device`. batches: calibration images [B, C, H, W] each, which tell what reaches 6.
    """
    with rewrite(gm) as out:
        _untie(out)
        pairs = _pairs(out)
        reach = _reach(out, {p.name for p in pairs if p.cut}, batches, device)
        factors: dict[str, Tensor] = {}
        for _ in range(_SWEEPS):
            moved = 0.0
            for pair in pairs:
                s = _equalize(pair, reach.get(pair.name))
                moved = max(moved, float((s - 1).abs().max()))
                for name in pair.values:
                    factors[name] = factors.get(name, torch.ones_like(s)) * s
            if moved < _CONVERGED:
                break
    return out, factors


def _untie(gm: fx.GraphModule) -> None:
    """Gives every layer weights of its own: scaled in place, they would be scaled for all that share them."""
    for node in weighted_nodes(gm):
        layer = gm.get_submodule(str(node.target))
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(p.detach().clone(), requires_grad=False))


def _pairs(gm: fx.GraphModule) -> list[_Pair]:
    found = []
    for node in weighted_nodes(gm):
        at, cut, between = node, False, [node.meta["value"]]
        while len(at.users) == 1:
            at = next(iter(at.users))
            op = find_op(gm, at)
            if op is None or op.name not in _HOMOGENEOUS or _pads_channels(gm, at):
                break
            cut = cut or op.name == "relu6"
            between.append(at.meta["value"])
        op = find_op(gm, at)
        if at is not node and op is not None and op.role == "weighted":
            first, second = gm.get_submodule(str(node.target)), gm.get_submodule(str(at.target))
            if type(first) is type(second):  # a linear layer behind a flattened convolution mixes pixels and channels
                found.append(_Pair(first, second, node.name, tuple(between), cut))
    return found


def _pads_channels(gm: fx.GraphModule, node: fx.Node) -> bool:
    module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return any(getattr(module, "pads", ())[4:])


class _Highest(fx.Interpreter):
    """The largest value per channel of each wanted node."""

    def __init__(self, gm: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            top = result.movedim(1, 0).flatten(1).amax(1)
            held = self.found.get(n.name)
            self.found[n.name] = top if held is None else torch.maximum(top, held)
        return result


def _reach(gm: fx.GraphModule, wanted: set[str], batches: Iterable[Tensor], device: torch.device) -> dict[str, Tensor]:
    """Node name → the value [C] that each channel may reach."""
    seen = _Highest(gm, wanted)
    if wanted:
        with torch.no_grad():
            for batch in batches:
                seen.run(batch.to(device))
    return {name: _MARGIN * top.clamp_min(0) for name, top in seen.found.items()}


@torch.no_grad()
def _equalize(pair: _Pair, reach: Tensor | None) -> Tensor:
    """One step on one pair, in place; the factors s [C]. `reach` [C] moves with the channels."""
    w1: Tensor = pair.first.weight  # type: ignore[assignment]
    r1, r2 = _per_output(w1), _per_input(pair.second)
    alive = (r1 > _DEAD * r1.max()) & (r2 > _DEAD * r2.max())
    s = torch.where(alive, (r1 / r2.clamp_min(1e-30)).sqrt(), torch.ones_like(r1)).clamp(1e-4, 1e4)
    if reach is not None:
        s = torch.where(reach >= 6, torch.ones_like(s), torch.maximum(s, reach / 6))
        reach /= s
    w1 /= s.view(-1, *[1] * (w1.ndim - 1))  # type: ignore[operator]
    if pair.first.bias is not None:
        pair.first.bias.data /= s  # type: ignore[union-attr, operator]
    _scale_inputs(pair.second, s)
    return s


def _per_output(weight: Tensor) -> Tensor:
    return weight.abs().flatten(1).amax(1)


def _per_input(layer: nn.Module) -> Tensor:
    """Largest magnitude [C_in] of the weights that read each input channel; a grouped layer's in input order."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = getattr(layer, "groups", 1)
    parts = weight.abs().view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.amax(dim=(1, 3)).flatten()


def _scale_inputs(layer: nn.Module, s: Tensor) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = getattr(layer, "groups", 1)
    parts = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    parts *= s.view(groups, 1, -1, 1)
