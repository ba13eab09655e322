"""Nearest rounding: every weight goes to the closest code. The baseline; trains nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ptq.contracts import Presets
from ptq.reconstruct._capture import block_error

__all__ = ["Nearest"]


@dataclass(frozen=True)
class Nearest:
    """Nearest rounding; no options."""

    unit: ClassVar[Literal["layer", "block"]] = "block"
    needs_fisher: ClassVar[bool] = False
    presets: ClassVar[Presets] = {}
    steps: ClassVar[int] = 0
    batch_size: ClassVar[int] = 32

    def attach(self, block: nn.Module, rng: torch.Generator) -> list[dict[str, Any]]:
        """Nothing to train."""
        return []

    def mix(self, teacher_in: Tensor, student_in: Tensor, rng: torch.Generator) -> Tensor:
        """The student's own input."""
        return student_in

    def loss(
        self,
        block: nn.Module,
        outputs: list[Tensor],
        targets: list[Tensor],
        fisher: list[Tensor] | None,
        progress: float,
    ) -> Tensor:
        """Squared error, for reporting."""
        return block_error(outputs, targets)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Nothing to shorten."""
        return cls()
