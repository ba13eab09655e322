"""How much the network's loss cares for each element of a block's output: squared gradients at the teacher.

    F = (∂L/∂z)²,   L = -log p(y | x),   y drawn from the teacher's own prediction p(· | x)

The expectation over y of this product is the diagonal of the Fisher information; it takes no labels.

Ref: Li et al., BRECQ, ICLR 2021, arXiv 2102.05426, §3.2, eq. 8-10.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ptq.errors import ReconstructionError
from ptq.graph.blocks import Block
from ptq.reconstruct._capture import Space

_BATCH = 64


class _Probed(fx.Interpreter):
    """Adds a zero to each wanted value, whose gradient is the loss's by that value."""

    def __init__(self, gm: fx.GraphModule, wanted: tuple[str, ...]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.probes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.meta.get("value") not in self.wanted or n.op == "output":
            return result
        probe = self.probes[n.meta["value"]] = torch.zeros_like(result, requires_grad=True)
        return result + probe


def fisher_weights(
    teacher: fx.GraphModule, block: Block, images: Tensor, rng: torch.Generator, device: torch.device, space: Space
) -> list[Tensor]:
    """Per output of `block`, squared gradients `[N, …]` in `space`, of mean 1 over all of them.

    Raises:
        ReconstructionError: the network's result is no set of class scores `[N, K, …]`, K > 1.
    """
    found: list[Tensor] = []
    at = 0
    with torch.enable_grad():
        for x in images.split(_BATCH):
            probed = _Probed(teacher, block.outputs)
            scores = probed.run(x.to(device))
            if scores.ndim < 2 or scores.shape[1] < 2:
                raise ReconstructionError(
                    f"Fisher weights need class scores [N, classes, …]; the network returns {list(scores.shape)}; "
                    "use fisher=false"
                )
            by_class = scores.movedim(1, -1).flatten(0, -2)
            labels = torch.multinomial(by_class.detach().softmax(1).cpu(), 1, generator=rng).flatten().to(device)
            loss = F.cross_entropy(by_class, labels, reduction="sum")
            grads = torch.autograd.grad(loss, [probed.probes[v] for v in block.outputs])
            found = found or [space.empty((len(images), *grad.shape[1:])) for grad in grads]
            for whole, grad in zip(found, grads):
                whole[at : at + len(x)].copy_(grad.square())
            at += len(x)
    # One mean for all outputs of the block: they keep their balance.
    mean = sum(float(w.sum(dtype=torch.float64)) for w in found) / sum(w.numel() for w in found)
    for weights in found:
        # A teacher that is certain of everything has no gradients: all elements then count alike.
        _ = weights.div_(mean) if mean > 0 else weights.fill_(1.0)
    return found
