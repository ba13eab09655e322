"""GENIE-M: rounding, weight scales and activation scales trained together, block by block, with dropped quantizers.

    min over s_w, V, s_a of   ‖z - z_q‖² + λ Σ (1 - |2h(V) - 1|^β)

z, z_q: the block's output in teacher and student.

Ref: Jeon et al., GENIE, CVPR 2023, §3.2, algorithms 2-3, eq. 15, appendices A-B; Wei et al., QDrop, ICLR 2022; Esser et al.,
LSQ, ICLR 2020.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ptq.contracts import Presets
from ptq.reconstruct._soft_round import attach_soft, dropped_input, soft_loss

__all__ = ["GenieM"]


@dataclass(frozen=True)
class GenieM:
    """AdaRound with trained step sizes, LSQ activations and QDrop.

    steps: optimizer steps a block. batch_size: images a step. lr_scale, lr_round, lr_act: Adam's rates for weight scales,
    soft bits and activation scales; lr_bias: for biases, relative to their mean size. All but the soft bits' fall to 0 along a
    cosine. penalty: λ. warmup: share of steps without
    penalty. beta_start, beta_end: annealing of β. drop: probability that an element skips quantization; 0 is
    GENIE-M without QDrop. unit: "block", or "layer".

    Differs: biases are trained too, which no paper does and rounding of activations calls for; `lr_bias=0` leaves them as they
    are. At fewer than `full_steps` steps the soft bits' rate is higher, see `_soft_round.sped_up`. The scales' is not: at
    1,000 steps those of activations move by a few per cent. A scale moves by at most `scale_step` of itself a step, see
    `_soft_round.attach_soft`. The scale of what a block yields is trained by that block, for all that read it, and starts from
    the float network's values; in algorithm 3 each layer trains that of its own input.
    """

    steps: int = 20000
    batch_size: int = 32
    lr_scale: float = 1e-4
    lr_round: float = 1e-3
    lr_act: float = 4e-5
    lr_bias: float = 1e-3
    penalty: float = 1.0
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    drop: float = 0.5
    scale_step: float = 2e-3
    full_steps: int = 20000
    unit: Literal["layer", "block"] = "block"

    needs_fisher: ClassVar[bool] = False
    presets: ClassVar[Presets] = {"quick": {"steps": 400}, "standard": {"steps": 1000}}

    def attach(self, block: nn.Module, rng: torch.Generator) -> list[dict[str, Any]]:
        """Soft bits, weight scales and biases of every layer, scales of every activation quantizer that is not frozen yet."""
        return attach_soft(self, block, rng, self.lr_scale, self.lr_bias)

    def mix(self, teacher_in: Tensor, student_in: Tensor, rng: torch.Generator) -> Tensor:
        """QDrop on the block's input: each element from the teacher with probability `drop`."""
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
        return soft_loss(self, block, outputs, targets, None, progress)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps a block."""
        return cls(steps=3, batch_size=4)
