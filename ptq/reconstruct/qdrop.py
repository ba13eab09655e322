"""QDrop: soft bits and activation scales trained while activation quantization is dropped at random, element by element.

    x̂ = x with probability p, else fq(x)        for the block's input and every activation quantizer inside it
    min over V, s_a of   ‖z - z_q‖² + λ Σ (1 - |2h(V) - 1|^β)

z, z_q: the block's output in teacher and student.

Ref: Wei et al., QDrop, ICLR 2022, arXiv 2203.05740, eq. 8, algorithm 1; Esser et al., LSQ, ICLR 2020.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ptq.contracts import Presets
from ptq.reconstruct._soft_round import attach_soft, dropped_input, soft_loss

__all__ = ["QDrop"]


@dataclass(frozen=True)
class QDrop:
    """BRECQ's blocks (`unit=layer`: AdaRound's layers) with dropped activation quantizers.

    steps: optimizer steps a block. batch_size: images a step. drop: probability p that an element stays float. fisher: whether
    errors are weighted by the squared gradient of the network's loss. lr_round, lr_act: Adam's rates for soft bits and
    activation scales. penalty: λ. warmup: share of steps without penalty. beta_start, beta_end: annealing of β.

    Differs: at fewer than `full_steps` steps the soft bits' rate is higher, see `_soft_round.sped_up`; λ as in the runs of
    GENIE's authors. A scale moves by at most `scale_step` of itself a step; that of what a block yields is trained by
    that block, for all that read it.
    """

    steps: int = 20000
    batch_size: int = 32
    drop: float = 0.5
    fisher: bool = False
    lr_round: float = 1e-3
    lr_act: float = 4e-5
    penalty: float = 0.1
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    unit: Literal["layer", "block"] = "block"
    scale_step: float = 2e-3
    full_steps: int = 20000

    @property
    def needs_fisher(self) -> bool:
        """Whether `loss` is to be handed Fisher weights."""
        return self.fisher

    presets: ClassVar[Presets] = {"quick": {"steps": 400}, "standard": {"steps": 1000}}

    def attach(self, block: nn.Module, rng: torch.Generator) -> list[dict[str, Any]]:
        """Soft bits of every layer and scales of every activation quantizer that is not settled yet."""
        return attach_soft(self, block, rng)

    def mix(self, teacher_in: Tensor, student_in: Tensor, rng: torch.Generator) -> Tensor:
        """Each element of the input from the teacher with probability `drop`."""
        return dropped_input(self, teacher_in, student_in, rng)

    def loss(
        self,
        block: nn.Module,
        outputs: list[Tensor],
        targets: list[Tensor],
        fisher: list[Tensor] | None,
        progress: float,
    ) -> Tensor:
        """Squared error, weighted by `fisher`, summed over channels and averaged over the rest, plus the rounding penalty."""
        return soft_loss(self, block, outputs, targets, fisher, progress)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps a block."""
        return cls(steps=3, batch_size=4)
