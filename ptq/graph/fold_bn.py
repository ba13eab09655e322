"""Folds BatchNorm into the convolution or linear layer before it.

    W' = W · γ/√(σ²+ε),   b' = (b - μ) · γ/√(σ²+ε) + β

A BatchNorm with no such layer before it, or whose input is used elsewhere too, stays as a float operation; so does one behind
a linear layer on tokens, `[B, L, C]`: it normalizes each of the L tokens, not what the layer's rows yield.
"""

import torch
from torch import Tensor, fx, nn

from ptq.graph.channel_axis import channel_axis
from ptq.graph.ops import BATCH_NORMS, find_op, weighted_nodes
from ptq.graph.trace import rewrite


def fold_batch_norm(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` with every BatchNorm folded that can be; the folded layer takes over the BatchNorm's value name.

    conv ──(a)──► bn ──(b)──►      →      conv' ──(b)──►
    """
    with rewrite(gm) as out:
        for node in weighted_nodes(out):
            users = list(node.users)
            if len(users) != 1 or users[0].op != "call_module":
                continue
            norm = out.get_submodule(str(users[0].target))
            layer = out.get_submodule(str(node.target))
            if not isinstance(norm, BATCH_NORMS) or norm.running_var is None:
                continue
            if channel_axis(out, node) != 1:
                continue
            _fold(layer, norm)
            node.meta["value"] = users[0].meta["value"]
            users[0].replace_all_uses_with(node)
            out.graph.erase_node(users[0])
    return out


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    # In float64: a division by a small variance must not cost the digits that the comparison afterwards checks.
    std = (norm.running_var.double() + norm.eps).sqrt()  # pyright: ignore[reportOperatorIssue]
    gain = (norm.weight.double() if norm.weight is not None else torch.ones_like(std)) / std  # pyright: ignore[reportOperatorIssue]
    shift = norm.bias.double() if norm.bias is not None else torch.zeros_like(std)
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(std)
    weight = layer.weight.double() * gain.reshape(-1, *[1] * (layer.weight.ndim - 1))  # pyright: ignore[reportOperatorIssue]
    layer.weight = _frozen(weight)
    layer.bias = _frozen((bias - norm.running_mean.double()) * gain + shift)  # pyright: ignore[reportOperatorIssue]


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
