"""Folds BatchNorm into the convolution, transposed convolution or linear layer before it.

    W' = W · γ/√(σ²+ε),   b' = (b - μ) · γ/√(σ²+ε) + β

So it does with products and sums of a layer's channels and constants, which is what a frozen BatchNorm, a layer scale and a factor
of a residual branch are, and with several in a row. A BatchNorm with no such layer before it, or whose input is used elsewhere too,
stays as a float operation; so does one behind a linear layer on tokens, `[B, L, C]`: it normalizes each of the L tokens, not what
the layer's rows yield. So does what reads a permuted result: the values between would no longer be the teacher's.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq.graph.channel_axis import channel_axis
from ptq.graph.layers import AddConstant, MulConstant
from ptq.graph.ops import BATCH_NORMS, find_op, weighted_nodes
from ptq.graph.trace import rewrite


def fold_batch_norm(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` with every BatchNorm folded that can be; the folded layer takes over the BatchNorm's value name.

    conv ──(a)──► bn ──(b)──►      →      conv' ──(b)──►
    """
    with rewrite(gm) as out:
        for node in [n for n in out.graph.nodes if (op := find_op(out, n)) is not None and op.name in _TAKES_IN]:
            while (found := _behind(out, node)) is not None:
                norm, (gain, shift) = found
                _fold(out.get_submodule(str(node.target)), gain, shift)
                node.meta["value"] = norm.meta["value"]
                norm.replace_all_uses_with(node)
                out.graph.erase_node(norm)
    return out


_TAKES_IN = ("conv", "linear", "conv_transpose")


def _behind(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, tuple[Tensor, Tensor]] | None:
    """What alone reads a layer and multiplies and shifts its channels, with gain and shift [C]; None where nothing does so."""
    users, axis = list(node.users), channel_axis(gm, node)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    shape = node.meta["shape"]
    found = _affine(gm.get_submodule(str(users[0].target)), 1 + len(shape), axis, shape[axis - 1])
    return None if found is None else (users[0], found)


def _affine(module: nn.Module, ndim: int, axis: int, channels: int) -> tuple[Tensor, Tensor] | None:
    """Gain and shift [C] of what a module does to values of `ndim` dimensions with channels along `axis`."""
    # In float64: a division by a small variance must not cost the digits that the comparison afterwards checks.
    if isinstance(module, BATCH_NORMS) and module.running_var is not None and module.running_mean is not None:
        std = (module.running_var.double() + module.eps).sqrt()
        gain = (module.weight.double() if module.weight is not None else torch.ones_like(std)) / std
        shift = module.bias.double() if module.bias is not None else torch.zeros_like(std)
        return (gain, shift - module.running_mean.double() * gain) if axis == 1 else None
    if (
        isinstance(module, AddConstant | MulConstant)
        and module.value.ndim <= ndim
        and bool(module.value.isfinite().all())
    ):
        value = module.value.detach().double()
        along = [1] * ndim
        along[axis] = value.numel()
        if value.numel() in (1, channels) and (1,) * (ndim - value.ndim) + tuple(value.shape) == tuple(along):
            flat = value.reshape(-1).expand(channels)
            return (flat, torch.zeros_like(flat)) if isinstance(module, MulConstant) else (torch.ones_like(flat), flat)
    return None


def _fold(layer: Any, gain: Tensor, shift: Tensor) -> None:
    weight, bias = layer.weight.double(), layer.bias
    if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, kH, kW], the groups one after another
        parts = weight.unflatten(0, (layer.groups, -1))
        weight = (parts * gain.view(layer.groups, 1, -1, 1, 1)).flatten(0, 1)
    else:
        weight = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight = _frozen(weight)
    layer.bias = _frozen(shift if bias is None else bias.double() * gain + shift)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.float(), requires_grad=False)


def give_biases(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` in which every convolution and linear layer has a bias, of zeros where it had none."""
    with rewrite(gm) as out:
        for node in weighted_nodes(out):
            layer = out.get_submodule(str(node.target))
            if layer.bias is None:
                layer.bias = _frozen(layer.weight.new_zeros(layer.weight.shape[0]))  # type: ignore[operator, union-attr]
    return out


def unfolded(gm: fx.GraphModule) -> list[str]:
    """Module paths of the BatchNorms that are left in a folded network."""
    return [
        str(n.target) for n in gm.graph.nodes if (op := find_op(gm, n)) is not None and op.name.startswith("batch_norm")
    ]


def fold_error(teacher: fx.GraphModule, folded: fx.GraphModule, x: Tensor) -> float:
    """Largest difference between both networks' outputs on `x`, relative to the largest output of the teacher."""
    with torch.no_grad():
        expected = teacher(x)
        return float((folded(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
