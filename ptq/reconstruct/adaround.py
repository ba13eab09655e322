"""AdaRound: each layer's weights rounded up or down, decided together by the layer's own output.

    min over V of   ‖z - z_q‖² + λ Σ (1 - |2h(V) - 1|^β)

z, z_q: the layer's output after its activation function, in teacher and student; the student's input is the quantized one.

Ref: Nagel et al., AdaRound, ICML 2020, arXiv 2004.10568, eq. 21-25.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ptq.contracts import Presets
from ptq.reconstruct._soft_round import attach_soft, dropped_input, soft_loss

__all__ = ["AdaRound"]


@dataclass(frozen=True)
class AdaRound:
    """Soft bits alone are trained, layer by layer, on scales that stay as they were found.

    steps: optimizer steps a layer. batch_size: images a step. lr_round: Adam's rate for the soft bits. lr_act: for activation
    scales, above 0 to train them too (LSQ). penalty: λ. warmup: share of steps without penalty. beta_start, beta_end:
    annealing of β. drop: probability that an element skips quantization (QDrop). unit: "layer", or "block" of layers.

    Differs: at fewer than `full_steps` steps the soft bits' rate is higher, see `_soft_round.sped_up`; λ as in the runs of
    GENIE's authors, who report AdaRound for comparison. A scale moves by at most `scale_step` of itself a step.
    """

    steps: int = 20000
    batch_size: int = 32
    lr_round: float = 1e-3
    lr_act: float = 0.0
    penalty: float = 0.1
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    drop: float = 0.0
    unit: Literal["layer", "block"] = "layer"
    scale_step: float = 2e-3
    full_steps: int = 20000

    needs_fisher: ClassVar[bool] = False
    presets: ClassVar[Presets] = {"quick": {"steps": 400}, "standard": {"steps": 1000}}

    def attach(self, block: nn.Module, rng: torch.Generator) -> list[dict[str, Any]]:
        """Soft bits of every layer; weight scales stay."""
        return attach_soft(self, block, rng)

    def mix(self, teacher_in: Tensor, student_in: Tensor, rng: torch.Generator) -> Tensor:
        """The quantized input, or with `drop` a mixture."""
        return dropped_input(self, teacher_in, student_in, rng)

    def loss(
        self,
        block: nn.Module,
        outputs: list[Tensor],
        targets: list[Tensor],
        fisher: list[Tensor] | None,
        progress: float,
    ) -> Tensor:
        """Squared error, summed over channels and averaged over the rest, plus the rounding penalty."""
        return soft_loss(self, block, outputs, targets, fisher, progress)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps a block."""
        return cls(steps=3, batch_size=4)
