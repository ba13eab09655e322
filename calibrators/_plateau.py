"""Learning rates that fall when the loss no longer does."""

import torch
from torch import Tensor


class Plateau:
    """`ReduceLROnPlateau` (×0.1, at least 1e-4) that reads the losses `every` so many steps, so that a GPU need not wait
    in each."""

    def __init__(self, optimizer: torch.optim.Optimizer, patience: int, device: torch.device) -> None:
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=1e-4)
        self.every, self.waiting = 1 if device.type == "cpu" else 50, []

    def step(self, loss: Tensor) -> None:
        """Notes a step's loss (detached)."""
        self.waiting.append(loss)
        if len(self.waiting) == self.every:
            for value in torch.stack(self.waiting).tolist():
                self.scheduler.step(value)
            self.waiting.clear()
