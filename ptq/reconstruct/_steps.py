"""Adam on what a method made learnable, in few calls.

A block has several scales and biases per layer, each tiny and each with a rate of its own. A call of the optimizer for each of them
would take as long as the block's convolutions on small images; laid side by side in one tensor they take one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = {"params", "lr", "cosine"}


class Steps:
    """torch's Adam on the groups that `Reconstructor.attach` returns.

    Groups that say nothing else to Adam and hold float32 are joined: those of a fixed rate with others of that rate, those that fall
    along a cosine in one tensor. Adam moves an element by its rate times a quotient in which the rate does not appear, so
    that the move can be found at a common rate and scaled afterwards. There, a missing gradient counts as 0.

    Ref: Kingma, Ba, ICLR 2015, algorithm 1.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        small: list[tuple[Tensor, float]] = []
        even: dict[float, list[Tensor]] = {}  # rate → parameters
        rest: list[dict[str, Any]] = []
        for group in groups:
            given = group["params"]
            params: list[Tensor] = [given] if isinstance(given, Tensor) else list(given)
            plain = set(group) == _PLAIN and all(p.dtype == torch.float32 for p in params)
            if plain and group["cosine"]:
                small += [(p, group["lr"]) for p in params]
            elif plain:
                even.setdefault(group["lr"], []).extend(params)
            else:
                rest.append({**group, "params": params})
        rest += [{"params": params, "lr": rate, "cosine": False} for rate, params in even.items()]
        self.small = [p for p, _ in small]
        if small:
            like = self.small[0]
            self.rates = torch.cat([torch.full((p.numel(),), rate) for p, rate in small]).to(like.device)
            self.move = nn.Parameter(torch.zeros_like(self.rates))
            pieces = self.move.detach().split([p.numel() for p in self.small])
            self.pieces = [piece.view(p.shape) for piece, p in zip(pieces, self.small)]
            rest.append({"params": [self.move], "lr": 1.0, "cosine": True})
        seen = [id(p) for p in (*self.small, *(p for group in rest for p in group["params"]))]
        if len(set(seen)) < len(seen):
            raise ValueError("a parameter is in more than one place of the method's parameter groups")
        self.adam = torch.optim.Adam(rest, fused=True)
        self.first_rates = [group["lr"] for group in self.adam.param_groups]

    def clear(self) -> None:
        """Forgets all gradients."""
        self.adam.zero_grad(set_to_none=True)
        for p in self.small:
            p.grad = None

    def step(self, progress: float) -> None:
        """One step of Adam. progress: the share of training that is done, in [0, 1)."""
        for group, rate in zip(self.adam.param_groups, self.first_rates):
            group["lr"] = rate * (0.5 * (1 + math.cos(math.pi * progress)) if group["cosine"] else 1.0)
        if self.small:
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
