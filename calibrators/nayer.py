"""NAYER: a generator fed by label embeddings through a noisy layer, which is drawn anew each round.

    x = G(Z(e_y)),   Z = Linear(BatchNorm(e_y)) drawn from N(0, 0.02²)
    min over G, Z of   α_cls CE(T(x), y) + α_bn Σ_l (‖m_l - μ_l‖ + ‖s_l² - σ_l²‖) - α_adv KL(T(x) ‖ S(x))

Ref: Tran et al., NAYER: Noisy Layer Data Generation, CVPR 2024, §3, algorithm 1, eq. 5, tables 6-8.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from ptq.calibrators._classifier import average, balanced_labels, classes, common_classes
from ptq.calibrators._generators import ConvGenerator, seeded
from ptq.calibrators._input_space import Space, pixel_space
from ptq.calibrators._label_embeddings import label_embeddings
from ptq.calibrators._losses import PastStatistics, variance_loss
from ptq.calibrators._progress import StepCount
from ptq.calibrators._teachers import Teachers, teachers
from torch import Tensor, nn

from ptq.augment import shift_and_flip
from ptq.contracts import CalibrationContext, Presets, make_rng
from ptq.errors import CalibrationError
from ptq.graph.taps import Taps, tap_batch_norms
from ptq.training import Training

__all__ = ["Nayer"]


@dataclass(frozen=True)
class Nayer:
    """One round a batch; the round's images of least loss are the batch.

    count: images. batch_size: images a round. steps: generator steps a round, g. lr: Adam's rate. latent: size of the noisy
    layer's output. a_cls, a_bn, a_adv: weights of the three terms; the last counts where a student is being trained, and
    only images on which it agrees with the teacher. momentum: share of earlier rounds in the statistics that the BN term
    compares with the training images', as in the authors' program; where a student is trained, it starts again with the first
    round that looks at the student. reset: rounds a generator lives. warmup: rounds of each
    generator that give no images. pad: border of the random crop before the networks, in pixels.
    input: "labels", or for comparison "one_hot" (the same through one-hot labels), "noise" (N(0, 1) straight into the
    generator, drawn in every step) and "latents" (the same, drawn once a round). noisy: "shared", one noisy layer for each set
    of all K classes (K-to-1), or "each", one per image (1-to-1).
    Defaults are the paper's for CIFAR-10 (table 8); for ImageNet it has batch_size=50, steps=100, a_cls=0.1, a_bn=0.1, a_adv=0.1.
    embeddings: .npz or .npy with label embeddings [classes, D]; names: text file of class names, encoded by `encoder`
    (extra `text`); default: the rows of the teacher's classifier.
    """

    count: int = 1024
    batch_size: int = 400
    steps: int = 30
    lr: float = 4e-3
    latent: int = 1000
    a_cls: float = 0.5
    a_bn: float = 10.0
    a_adv: float = 1.33
    momentum: float = 0.9
    reset: int = 10
    warmup: int = 0
    pad: int = 4
    input: Literal["labels", "one_hot", "noise", "latents"] = "labels"
    noisy: Literal["shared", "each"] = "shared"
    embeddings: Path | None = None
    names: Path | None = None
    encoder: str = "all-MiniLM-L6-v2"

    needs: ClassVar[tuple[str, ...]] = ("classes",)
    paper: ClassVar[str] = "Tran et al., NAYER, CVPR 2024"
    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        "quick": {"count": 256, "batch_size": 128, "warmup": 4},
        "standard": {"count": 512, "batch_size": 128, "steps": 60, "warmup": 6},
    }
    in_training: ClassVar[Mapping[str, Any]] = {"batch_size": 400, "steps": 30, "warmup": 0}
    # Before its 100 epochs, 20 only fill the memory pool, 10 rounds each. Temperature, rate and decay: the authors' program.
    training: ClassVar[Training] = Training(
        epochs=100, steps=400, batch_size=512, lr=0.2, decay=1e-4, warmup=0, clip=0.0, temperature=20.0, iq=0.0, mix=0.0, pad=4,
        feed="pool", first_rounds=200, rounds=2,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.pad < 0 or not 0 <= self.momentum < 1:
            raise CalibrationError(
                f"pad={self.pad}, momentum={self.momentum} given; pad is at least 0, momentum at least 0 and below 1"
            )
        if not 0 <= self.warmup < self.reset:
            raise CalibrationError(
                f"reset={self.reset}, warmup={self.warmup} given; warmup is at least 0 and below reset"
            )

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        run = _Run(self, ctx)
        for k, size in enumerate(ctx.sizes()):
            make = partial(run.rounds, k, max(size, 2))
            yield ctx.batch(k, make, {"generator": run.generator, "past": run.past})[:size]
            run.count.batch(k)

    @staticmethod
    def labels(ctx: CalibrationContext, index: int, size: int) -> Tensor:
        """The classes [size] that the images of batch `index` were made for, each once in every K of them."""
        return balanced_labels(size, classes(ctx.model), make_rng(ctx.rng.initial_seed(), f"labels {index}"))

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps on a few images."""
        return cls(count=6, batch_size=4, steps=2, latent=8)


class NoisyLayer(nn.Module):
    """Label embeddings `[B, D]` → `[B, latent]`: BatchNorm, then linear layers drawn from N(0, 0.02²) with zero bias.

    share: how many rows, one after the other, pass through the same linear layer: as many as there are classes (K-to-1), so
    that no two images of one class have the same, or one (1-to-1). Ref: eq. 3.
    """

    def __init__(self, dim: int, latent: int, rng: torch.Generator, rows: int, share: int) -> None:
        super().__init__()
        self.share, layers = share, -(-rows // share)
        self.norm = nn.BatchNorm1d(dim)
        self.weight = nn.Parameter(0.02 * torch.randn(layers, dim, latent, generator=rng))
        self.bias = nn.Parameter(torch.zeros(layers, 1, latent))

    def forward(self, e: Tensor) -> Tensor:
        e = self.norm(e)
        count, layers = len(e), len(self.weight)
        padded = torch.cat([e, e.new_zeros(layers * self.share - count, e.shape[1])])
        out = torch.baddbmm(self.bias, padded.view(layers, self.share, -1), self.weight)
        return out.flatten(0, 1)[:count]


class _Run:
    """The rounds of one source."""

    def __init__(self, options: Nayer, ctx: CalibrationContext) -> None:
        self.options, self.ctx = options, ctx
        self.classes = common_classes((ctx.model, *ctx.others))
        self.space: Space = pixel_space(ctx)
        self.rows = self._rows().to(ctx.device)
        self.generator = seeded(lambda: ConvGenerator(ctx.input_shape, options.latent), ctx.rng).to(ctx.device)
        self.past = PastStatistics((ctx.model, *ctx.others), options.momentum).to(ctx.device)
        self.count = StepCount(ctx, options.steps)

    def _rows(self) -> Tensor:
        o = self.options
        if o.input != "labels":
            return torch.eye(self.classes)
        return label_embeddings(self.ctx.model, self.classes, embeddings=o.embeddings, names=o.names, encoder=o.encoder)

    def rounds(self, k: int, size: int, rng: torch.Generator) -> Tensor:
        """Batch `k`: a round of the generator, which is drawn anew every `reset` rounds and then warmed up."""
        o = self.options
        if k % (o.reset - o.warmup) == 0:
            fresh = seeded(lambda: ConvGenerator(self.ctx.input_shape, o.latent), rng)
            self.generator.load_state_dict(fresh.state_dict())
            for _ in range(o.warmup):
                self._round(balanced_labels(size, self.classes, rng), rng, lambda step, loss: None)
        return self._round(o.labels(self.ctx, k, size), rng, partial(self.count.step, k))

    @torch.enable_grad()
    def _round(self, labels: Tensor, rng: torch.Generator, done: Callable[[int, Tensor], None]) -> Tensor:
        o, device, g = self.options, self.ctx.device, self.generator
        labels, size = labels.to(device), len(labels)
        layer = NoisyLayer(self.rows.shape[1], o.latent, rng, size, 1 if o.noisy == "each" else self.classes).to(device)
        z = torch.randn(size, o.latent, generator=rng).to(device)
        adam = torch.optim.Adam([*g.parameters(), *layer.parameters()], lr=o.lr, betas=(0.5, 0.999))
        best, least = z, torch.tensor(torch.inf, device=device)
        model = teachers(self.ctx)
        self.past.follow(model.models)
        with tap_batch_norms(model.models, required=False) as taps:
            for step in range(o.steps):
                taps.seen.clear()
                if o.input == "noise" and step:
                    z = torch.randn(size, o.latent, generator=rng).to(device)
                u = g(layer(self.rows[labels]) if o.input in ("labels", "one_hot") else z)
                loss = self._loss(model, taps, shift_and_flip(u, rng, o.pad), labels)
                adam.zero_grad()
                loss.backward()
                adam.step()
                better = loss.detach() < least
                best = torch.where(better, u.detach(), best) if step else u.detach()
                least = torch.where(better, loss.detach(), least)
                done(step, loss)
            self.past.add(taps.seen)
        if not bool(torch.isfinite(best).all()):
            raise CalibrationError("synthesis diverged: the images are not finite; lower lr")
        return self.space.place(best)

    def _loss(self, model: Teachers, taps: Taps, u: Tensor, labels: Tensor) -> Tensor:
        o, x = self.options, self.space.place(u)
        outputs = model(x)
        loss = o.a_cls * average(lambda out: F.cross_entropy(out, labels), outputs)
        loss = loss + o.a_bn * variance_loss(taps, self.past).to(x.device)
        if self.ctx.student is None:
            return loss
        logits, theirs = outputs[0], self.ctx.student(x)
        # Only images on which both agree: where they do not, the student has something to learn already.
        agree = (theirs.argmax(1) == logits.argmax(1)).float()
        kl = F.kl_div(F.log_softmax(theirs, 1), F.log_softmax(logits, 1), reduction="none", log_target=True).sum(1)
        return loss - o.a_adv * (agree * kl).mean()
