"""The networks that a set of images shall suit, as one."""

import copy

import torch
from ptq.calibrators._swing import with_swing
from torch import Tensor, nn

from ptq.contracts import CalibrationContext


class Teachers(nn.Module):
    """Shows images to every network: `[B, C, H, W]` → each one's output, in order."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [model(x) for model in self.models]


def teachers(ctx: CalibrationContext, swing: torch.Generator | None = None) -> Teachers:
    """Copies of the context's teachers, to look into; with swing convolutions where a generator for them is given."""
    models = (ctx.model, *ctx.others)
    copies = [copy.deepcopy(m) if swing is None else with_swing(m, swing) for m in models]
    return Teachers([m.to(memory_format=torch.channels_last) for m in copies])  # type: ignore[call-overload]
