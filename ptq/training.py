"""How a student is trained: loss, optimizer, schedule, and how images come to it.

The defaults are those of a quantized student (Haroush et al., The Knowledge Within, CVPR 2020, §4.2); what another paper does
differently stands beside it, as `training` of its data source.

Differs: the paper does not give the rate of its SGD. Gradients are clipped: the first ones, of a network that rounding to 2 bits
left near chance, are so large that any rate at which it learns later drives it to a constant.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ptq.errors import SpecError

Feed = Literal["set", "pool", "stream"]


@dataclass(frozen=True)
class Training:
    """One training of a student by its teacher.

    epochs, steps: epochs, and optimizer steps in each. batch_size: images a step. optimizer: "sgd", with `momentum`, or "adam".
    lr: its rate; decay: weight decay. warmup: steps in which the rate rises from 0; schedule: "cosine", a half cosine to 0 over
    the steps after them, or "constant". clip: greatest norm of all gradients together, 0 leaves them. lr_scale: rate of weight
    scales relative to LSQ's own, 0 freezes them (quantized students).
    loss: "kl", the divergence of class probabilities at `temperature`, or "l1", the distance of scores. iq: weight of the
    loss between block outputs, in sums over an image (quantized students). mix: a of the Beta(a, a) by which images are
    blended, 0 leaves them apart. pad: border in pixels of a random crop, after which half of the images are mirrored; -1: images
    are taken as they are.
    feed: "set", batches drawn with replacement from images made before; "pool", the source makes `first_rounds` batches, and
    `rounds` more before each epoch, and all that were ever made are drawn from (`pool`: the latest so many images, 0: all);
    "stream", every batch is made for its step and seen once. Sources that look at the student while it learns say which.
    precision: of arithmetic for students that stay float: "auto" is bfloat16 on GPUs that have it, float32 elsewhere.
    compile: whether torch.compile translates both networks; worth its time on GPUs and long runs.
    """

    epochs: int = 20
    steps: int = 800
    batch_size: int = 512
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    decay: float = 0.0
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float = 1.0
    lr_scale: float = 1.0
    loss: Literal["kl", "l1"] = "kl"
    temperature: float = 1.0
    iq: float = 0.001
    mix: float = 1.0
    pad: int = 4
    feed: Feed = "set"
    rounds: int = 2
    first_rounds: int = 0
    pool: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"epochs": 4, "steps": 50, "warmup": 10, "first_rounds": 10},
        "standard": {"epochs": 20, "steps": 100, "first_rounds": 40},
    }

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("steps", 1), ("batch_size", 2), ("warmup", 0), ("rounds", 0), ("pool", 0)):
            if getattr(self, name) < least:
                raise SpecError(f"{name}={getattr(self, name)} given for a training; at least {least} is needed")
        for name in ("momentum", "decay", "clip", "lr_scale", "iq", "mix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SpecError(f"{name}={getattr(self, name)} given for a training; it is 0 or more")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise SpecError(f"{name}={getattr(self, name)} given for a training; it is above 0")

    def rate(self, step: int) -> float:
        """Of `lr`, at a step counted from 0 over all epochs."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        left = max(1, self.epochs * self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / left))
