"""What a network expects of its own values, from BatchNorm parameters alone: no image is needed.

After a BatchNorm a channel is taken to be normal, N(β, γ²); behind a ReLU, its mean is that of the clipped normal:

    E[max(x, 0)] = β Φ(β/γ) + γ φ(β/γ)

Ref: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, §4.2.1, eq. 17-19.
"""

import math

import torch
from torch import Tensor, fx

from ptq.graph.ops import BATCH_NORMS, find_op

_SAME_MEAN = ("avg_pool", "upsample_nearest", "reshape")  # a reshape of [C, 1, 1]; max pools raise the mean


def expected_means(teacher: fx.GraphModule) -> dict[str, Tensor]:
    """Value name → expected mean per channel [C], of the values that a BatchNorm tells.

    Known are results of BatchNorm, behind ReLU, ReLU6, average pools and concatenations; sums behind a ReLU are not.

    Args:
        teacher: the traced network, BatchNorm intact.
    """
    means: dict[fx.Node, Tensor] = {}
    normals: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    for node in teacher.graph.nodes:
        module = teacher.get_submodule(str(node.target)) if node.op == "call_module" else None
        op, inputs = find_op(teacher, node), _operands(node)
        if isinstance(module, BATCH_NORMS):
            beta = module.bias if module.bias is not None else torch.zeros(module.num_features)
            gamma = module.weight if module.weight is not None else torch.ones(module.num_features)
            normals[node] = (beta.detach().double().cpu(), gamma.detach().double().abs().cpu().clamp_min(1e-12))
            means[node] = normals[node][0]
        elif op is None or not inputs:
            continue
        elif op.role == "clamp" and inputs[0] in normals:
            means[node] = clipped_mean(*normals[inputs[0]], 6.0 if op.name == "relu6" else math.inf)
        elif op.name == "concat" and all(n in means for n in inputs):
            means[node] = torch.cat([means[n] for n in inputs])
        elif op.name == "add" and len(inputs) == 2 and all(n in means for n in inputs):
            means[node] = means[inputs[0]] + means[inputs[1]]
        elif op.name in _SAME_MEAN and inputs[0] in means and _keeps_channels(inputs[0], node):
            means[node] = means[inputs[0]]
    return {n.meta["value"]: m.float() for n, m in means.items() if n.meta.get("value") is not None}


def _operands(node: fx.Node) -> list[fx.Node]:
    """What a node reads, in order; a tensor that it reads twice stands twice."""
    given = node.args[0] if node.args and isinstance(node.args[0], list | tuple) else node.args
    return [n for n in given if isinstance(n, fx.Node)]  # type: ignore[union-attr]


def _keeps_channels(source: fx.Node, node: fx.Node) -> bool:
    before, after = source.meta["shape"], node.meta["shape"]
    return before[0] == after[0] and (len(before) == len(after) or math.prod(before[1:]) == 1)


def clipped_mean(beta: Tensor, gamma: Tensor, top: float) -> Tensor:
    """Mean [C] of N(β, γ²) clipped to [0, top]."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=beta.dtype), torch.ones((), dtype=beta.dtype))

    def above(edge: float) -> Tensor:
        """E[max(x - edge, 0)]."""
        z = (beta - edge) / gamma
        return (beta - edge) * normal.cdf(z) + gamma * normal.log_prob(z).exp()

    return above(0.0) if math.isinf(top) else above(0.0) - above(top)
