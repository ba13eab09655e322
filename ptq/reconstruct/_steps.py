"""Adam on what a method made learnable, in few calls.

A block has several scales and biases per layer, each tiny and each with a rate of its own. A call of the optimizer for each of them
would take as long as the block's convolutions on small images; laid side by side in one tensor they take one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


class Steps:
    """torch's Adam on the groups that `Reconstructor.attach` returns.

    What falls along a cosine is one tensor to Adam: Adam moves every element by its rate times a quotient in which the
    gradient's size does not appear, so that the move can be found at a common rate and scaled afterwards.

    Ref: Kingma, Ba, ICLR 2015, algorithm 1.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        falling = [(p, group["lr"]) for group in groups if group["cosine"] for p in group["params"]]
        even: dict[float, list[nn.Parameter]] = {}
        for group in groups:
            if not group["cosine"]:
                even.setdefault(group["lr"], []).extend(group["params"])
        self.even = [p for params in even.values() for p in params]
        self.small = [p for p, _ in falling]
        arranged: list[dict[str, Any]] = [{"params": params, "lr": lr} for lr, params in even.items()]
        if falling:
            like = self.small[0]
            self.rates = torch.cat([torch.full((p.numel(),), rate) for p, rate in falling]).to(like.device)
            self.move = nn.Parameter(torch.zeros_like(self.rates))
            pieces = self.move.detach().split([p.numel() for p in self.small])
            self.pieces = [piece.view(p.shape) for piece, p in zip(pieces, self.small)]
            arranged.append({"params": [self.move], "lr": 1.0})
        self.adam = torch.optim.Adam(arranged, fused=True)

    def clear(self) -> None:
        """Forgets all gradients."""
        for p in (*self.even, *self.small):
            p.grad = None

    def step(self, progress: float) -> None:
        """One step of Adam. progress: the share of training that is done, in [0, 1)."""
        if self.small:
            self.adam.param_groups[-1]["lr"] = 0.5 * (1 + math.cos(math.pi * progress))
            self.move.grad = torch.cat([_gradient(p) for p in self.small])
            self.move.detach().zero_()
        self.adam.step()
        if self.small:
            with torch.no_grad():
                self.move.mul_(self.rates)
                for p, piece in zip(self.small, self.pieces):
                    p.add_(piece)


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.reshape(-1)
