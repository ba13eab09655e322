"""PRE-DFKD: a generator of novel samples, and a variational autoencoder that replays what it made before.

    novel    min over G of   CE(T(x), argmax T(x)) - 5 H(mean softmax T(x)) - 0.1 mean |f_T(x)| + (1 - JS(T(x) ‖ S(x)) / K)
    memory   min over E, D of   |x - x̂| + |T(x) - T(x̂)| + 1e-5 KL( E(x) ‖ N(0, 1) ),   x half novel, half D's own
    replay   x = D(z*),   z* one step from N(0, 1) towards balanced, confident classes

A student sees ten batches, each drawn anew, between two steps of the generator; the autoencoder learns from the first four.

Ref: Binici et al., Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay, AAAI 2022,
eq. 1-8, algorithms 1 and 2; how often each network is trained, the rates, the entropy in decimal digits and the divergence as a
mean over the K classes: the authors' program. Differs: novel samples come from NAYER's generator.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from ptq.calibrators._classifier import average, balance, common_classes, confident, last_features
from ptq.calibrators._generators import ConvGenerator, Encoder, GenieGenerator, narrow, seeded
from ptq.calibrators._input_space import Space, pixel_space
from ptq.calibrators._progress import StepCount
from ptq.calibrators._teachers import teachers
from torch import Tensor, nn

from ptq.contracts import CalibrationContext, Presets
from ptq.errors import CalibrationError
from ptq.training import Training

__all__ = ["VaeReplay"]

_REHEARSED = 0.4  # of the batches between two trainings of the generator, those that the autoencoder learns from


@dataclass(frozen=True)
class VaeReplay:
    """Novel samples and memory samples; the memory's size does not depend on how many there were.

    count: images. batch_size: images a batch. steps: training steps of both generators before each batch. lr: Adam's rate
    of the generator; lr_memory: of the autoencoder; lr_tune: of the latent vectors' one step. latent, memory_latent: sizes
    of the latent vectors. one_hot, entropy, activation, novelty: weights of the generator's four terms, the last where a
    student is being trained. kld: weight of the prior. temperature: of the divergence between student and teacher.
    every: batches between two trainings of the generator. memory_share: replayed samples for each novel one. memory: false leaves
    the autoencoder out.
    """

    count: int = 1024
    batch_size: int = 256
    steps: int = 100
    lr: float = 0.02
    lr_memory: float = 5e-4
    lr_tune: float = 0.02
    latent: int = 1000
    memory_latent: int = 10
    one_hot: float = 1.0
    entropy: float = 5.0
    activation: float = 0.1
    novelty: float = 1.0
    kld: float = 1e-5
    temperature: float = 3.0
    every: int = 1
    memory_share: float = 0.125
    memory: bool = True

    needs: ClassVar[tuple[str, ...]] = ("classes",)
    paper: ClassVar[str] = "Binici et al., PRE-DFKD, AAAI 2022"
    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        "quick": {"count": 256, "batch_size": 128}, "standard": {"count": 512, "batch_size": 128},
    }  # fmt: skip
    in_training: ClassVar[Mapping[str, Any]] = {"batch_size": 256, "steps": 1, "every": 10}
    # Steps an epoch and weight decay: the paper is silent; those of the authors' program, which takes batches of 1024.
    training: ClassVar[Training] = Training(
        epochs=200, steps=360, batch_size=256, lr=0.1, decay=5e-4, warmup=0, clip=0.0, loss="l1",
        iq=0.0, mix=0.0, pad=-1, feed="stream",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.every < 1 or self.memory_share < 0:
            raise CalibrationError(
                f"every={self.every}, memory_share={self.memory_share} given; every is at least 1, memory_share at least 0"
            )

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        common_classes((ctx.model, *ctx.others))
        run = _Run(self, ctx)
        for k, size in enumerate(ctx.sizes()):
            yield ctx.batch(k, partial(run.make, k, max(size, 2)), run.parts)[:size]
            run.count.batch(k)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(count=6, batch_size=4, steps=2, latent=8, memory_latent=4)


class Memory(nn.Module):
    """The autoencoder: images ⇄ latent vectors. About 2 MB, whatever it has seen."""

    def __init__(self, shape: tuple[int, int, int], latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = Encoder(shape, latent)
        self.decoder = (GenieGenerator if max(shape[1:]) < 128 else ConvGenerator)(shape, latent)

    def rebuild(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x̂, and the mean and log-variance of its latent vectors."""
        mean, log_var = self.encoder(x)
        noise = torch.randn(mean.shape, generator=rng).to(x.device)
        return self.recall(mean + (0.5 * log_var).exp() * noise), mean, log_var

    def recall(self, z: Tensor) -> Tensor:
        """The images `[B, C, H, W]` of latent vectors `[B, latent]`."""
        with narrow(z.device):
            return self.decoder(z).float()


class _Run:
    """Both generators, their optimizers and the teacher."""

    def __init__(self, options: VaeReplay, ctx: CalibrationContext) -> None:
        o = self.options = options
        self.ctx, self.count = ctx, StepCount(ctx, o.steps)
        self.space: Space = pixel_space(ctx)
        self.generator = seeded(lambda: ConvGenerator(ctx.input_shape, o.latent), ctx.rng).to(ctx.device)
        self.memory = seeded(lambda: Memory(ctx.input_shape, o.memory_latent), ctx.rng).to(ctx.device)
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=o.lr, fused=True)
        self.adam_memory = torch.optim.Adam(self.memory.parameters(), lr=o.lr_memory, fused=True)
        self.teacher = teachers(ctx)
        self.parts: dict[str, Any] = {
            "generator": self.generator, "memory": self.memory, "adam": self.adam, "adam_memory": self.adam_memory,
        }  # fmt: skip

    def make(self, k: int, size: int, rng: torch.Generator) -> Tensor:
        """Batch `k`: some steps of training where it is due, then novel and memory samples."""
        o, turn = self.options, k % self.options.every
        with torch.enable_grad(), last_features(self.teacher.models[0]) as features:  # type: ignore[arg-type]
            for step in range(o.steps):
                if turn == 0:
                    self.count.step(k, step, self._novel_step(size, features, rng))
                if o.memory and turn < _REHEARSED * o.every:
                    self._memory_step(self._novel(size, rng), features, rng)
            replayed = round(size * o.memory_share / (1 + o.memory_share)) if o.memory else 0
            parts = [self._novel(size - replayed, rng)]
            if replayed:
                parts.append(self._replay(max(replayed, 2), rng)[:replayed])
        images = self.space.place(torch.cat(parts).detach())
        if not bool(torch.isfinite(images).all()):
            raise CalibrationError("synthesis diverged: the images are not finite; lower lr")
        return images

    def _novel(self, size: int, rng: torch.Generator) -> Tensor:
        """Novel samples `[size, C, H, W]`, as they are; a lone one has no batch to be normalized by."""
        with torch.no_grad():
            return self.generator(self._noise(max(size, 2), self.options.latent, rng))[:size]

    def _noise(self, size: int, latent: int, rng: torch.Generator) -> Tensor:
        return torch.randn(size, latent, generator=rng).to(self.ctx.device)

    def _novel_step(self, size: int, features: list[Tensor], rng: torch.Generator) -> Tensor:
        """Equations 1-3. Returns the loss."""
        o = self.options
        x = self.space.place(self.generator(self._noise(size, o.latent, rng)))
        outputs = self.teacher(x)
        loss = o.one_hot * average(confident, outputs) + o.entropy / math.log(10) * average(balance, outputs)
        loss = loss - o.activation * features[0].abs().mean()
        if self.ctx.student is not None:
            loss = loss + o.novelty * (1 - _js(outputs[0].detach(), self.ctx.student(x), o.temperature))
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.detach()

    def _memory_step(self, novel: Tensor, features: list[Tensor], rng: torch.Generator) -> None:
        """Algorithm 1: half of the batch novel, half what the memory itself recalls."""
        o, half = self.options, max(1, len(novel) // 2)
        with torch.no_grad():
            old = self.memory.recall(self._noise(max(half, 2), o.memory_latent, rng))
        u = torch.cat([novel[:half], old[:half]])
        rebuilt, mean, log_var = self.memory.rebuild(u, rng)
        with torch.no_grad():
            wanted = [*self.teacher(self.space.place(u)), features[0]]
        found = [*self.teacher(self.space.place(rebuilt)), features[0]]
        loss = F.l1_loss(rebuilt, u) + torch.stack([F.l1_loss(a, b) for a, b in zip(found, wanted)]).sum()  # eq. 6
        loss = loss + o.kld * 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()  # eq. 7
        self.adam_memory.zero_grad()
        loss.backward()
        self.adam_memory.step()

    def _replay(self, size: int, rng: torch.Generator) -> Tensor:
        """Algorithm 2: memory samples `[size, C, H, W]`, their latent vectors one step towards balance and confidence.

        The memory is in eval mode meanwhile: a replay is a small batch, whose samples are not to be normalized by each other.
        """
        o = self.options
        z = self._noise(size, o.memory_latent, rng).requires_grad_()
        adam = torch.optim.Adam([z], lr=o.lr_tune)
        self.memory.eval()
        outputs = self.teacher(self.space.place(self.memory.recall(z)))
        var, mean = torch.var_mean(z, dim=0, correction=0)
        prior = 0.5 * (mean.square() + var - 1 - (var + 1e-8).log()).sum()
        loss = o.one_hot * average(confident, outputs) + o.entropy / math.log(10) * average(balance, outputs) + prior
        loss.backward()
        adam.step()
        images = self.memory.recall(z.detach())
        self.memory.train()
        return images


def _js(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Jensen-Shannon divergence of two batches of logits `[B, K]` in nats, averaged over batch and classes."""
    p, q = F.softmax(a / temperature, 1), F.softmax(b / temperature, 1)
    log_m = (0.5 * (p + q) + 1e-8).log()
    return 0.5 * (p * ((p + 1e-8).log() - log_m) + q * ((q + 1e-8).log() - log_m)).mean()
