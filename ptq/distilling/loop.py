"""The training of a student, epoch after epoch, resumable after each.

    for each step:  x ~ feed;  x ← augmented, blended;  θ ← θ - rate · ∇ distance( S_θ(x), T(x) )

Every random choice of an epoch is drawn from generators of that epoch, so that a run that goes on from the epoch it was stopped
in does what it would have done at once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq.augment import mix_up, shift_and_flip
from ptq.batch_cache import BatchCache
from ptq.contracts import Feedback, make_rng
from ptq.distilling.course import Course, EpochRow
from ptq.distilling.feed import Feed
from ptq.distilling.losses import distance
from ptq.errors import ReconstructionError
from ptq.training import Training

Forward = Callable[[Tensor], tuple[Tensor, ...]]
_LOOK = 50  # steps between looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class Job:
    """One training.

    teacher, student: images `[B, C, H, W]` → scores, then what blocks yield where that is compared. module: what `student`
    runs, with the state to be kept. groups: its optimizer parameter groups, rates relative to the training's under "share".
    report: accuracy of the student as it stands, in per cent, or None. cache: keeps the state after every epoch.
    learns_statistics: whether the student is in training mode, its BatchNorms normalizing by the batch, or in eval mode.
    """

    teacher: Forward
    student: Forward
    module: nn.Module
    groups: list[dict[str, Any]]
    feed: Feed
    training: Training
    seed: int
    device: torch.device
    feedback: Feedback
    report: Callable[[], float] | None = None
    cache: BatchCache | None = None
    learns_statistics: bool = False


def train(job: Job) -> Course:
    """Trains the student in place and tells how it went.

    Raises:
        ReconstructionError: the loss is no longer finite.
    """
    optimizer = _optimizer(job)
    rows, first = _resumed(job, optimizer)
    for epoch in range(first, job.training.epochs):
        job.feed.prepare(epoch)
        with torch.enable_grad(), _own_randomness(job, epoch):  # the caller may have switched gradients off
            loss = _epoch(job, optimizer, epoch)
        top1 = None if job.report is None else job.report()
        rows.append(EpochRow(epoch + 1, loss, top1))
        _keep(job, optimizer, rows)
    return Course(tuple(rows))


def _optimizer(job: Job) -> torch.optim.Optimizer:
    t = job.training
    groups = [{**group, "lr": t.lr} for group in job.groups]
    if t.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=t.decay, fused=True)
    return torch.optim.SGD(groups, lr=t.lr, momentum=t.momentum, weight_decay=t.decay)


@contextmanager
def _own_randomness(job: Job, epoch: int) -> Iterator[None]:
    """Dropout and the like draw from torch's global generator: for an epoch it has a seed of its own, afterwards its old state."""
    gpu = None
    if job.device.type == "cuda":
        gpu = torch.cuda.current_device() if job.device.index is None else job.device.index
    seed = make_rng(job.seed, f"distillation/dropout {epoch}").initial_seed()
    with torch.random.fork_rng(devices=[] if gpu is None else [gpu]):
        # torch.manual_seed would seed devices that the fork does not put back.
        torch.default_generator.manual_seed(seed)
        if gpu is not None:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def _epoch(job: Job, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    t, losses = job.training, []
    job.module.train(job.learns_statistics)
    rng = make_rng(job.seed, f"distillation/epoch {epoch}")
    for k in range(t.steps):
        step = epoch * t.steps + k
        for group in optimizer.param_groups:
            group["lr"] = t.lr * t.rate(step) * group.get("share", 1.0)
        x = _views(job.feed.batch(rng).to(job.device), t, rng)
        loss = _loss(job, x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if t.clip:
            _clip(job.groups, t.clip)
        optimizer.step()
        losses.append(loss.detach())
        job.feedback.loss(step + 1, losses[-1])
        job.feedback.progress("distillation", step + 1, t.epochs * t.steps)
        if (k % _LOOK == 0 or k == t.steps - 1) and not math.isfinite(float(losses[-1])):
            raise ReconstructionError(
                f"distillation diverged in epoch {epoch + 1}: the loss is no longer finite; lower lr={t.lr:g}"
            )
    return float(torch.stack(losses).mean())


def _clip(groups: list[dict[str, Any]], most: float) -> None:
    """Scales all gradients so that their joint norm is at most `most`; those of step sizes count as LSQ scales them."""
    found = [(p, group.get("share", 1.0)) for group in groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad * share for p, share in found])
    torch.nn.utils.clip_grads_with_norm_([p for p, _ in found], most, norm)


def _views(x: Tensor, training: Training, rng: torch.Generator) -> Tensor:
    """Images as the networks see them."""
    if training.pad >= 0:
        x = shift_and_flip(x, rng, training.pad)
    if training.mix > 0:
        x = mix_up(x, training.mix, rng)
    return x.contiguous(memory_format=torch.channels_last)


def _loss(job: Job, x: Tensor) -> Tensor:
    with _arithmetic(job):
        with torch.no_grad():
            wanted = job.teacher(x)
        found = job.student(x)
    return distance([v.float() for v in found], [v.float() for v in wanted], job.training)


def _arithmetic(job: Job) -> torch.autocast:
    """bfloat16 where asked for, or where the device gains from it: it has float32's range, so that no loss needs scaling."""
    wanted = job.training.precision
    enabled = wanted == "bfloat16" or (wanted == "auto" and _multiplies_bfloat16(job.device))
    return torch.autocast(job.device.type, torch.bfloat16, enabled=enabled)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that does so itself: emulated, bfloat16 is slower than float32."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _keep(job: Job, optimizer: torch.optim.Optimizer, rows: list[EpochRow]) -> None:
    if job.cache is None:
        return
    state = {
        "student": job.module.state_dict(), "optimizer": optimizer.state_dict(), "feed": job.feed.state(len(rows)),
        "rows": [[row.epoch, row.loss, row.top1] for row in rows],
    }  # fmt: skip
    job.cache.write(0, torch.tensor(len(rows)), state)


def _resumed(job: Job, optimizer: torch.optim.Optimizer) -> tuple[list[EpochRow], int]:
    """What earlier epochs left, and how many there were: none where nothing was kept, or not all of it."""
    found = None if job.cache is None else job.cache.read(0)
    if found is None or not job.feed.restore(found[1]["feed"]):
        return [], 0
    state = found[1]
    job.module.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    rows = [EpochRow(*row) for row in state["rows"]]
    job.feedback.progress("distillation", len(rows) * job.training.steps, job.training.epochs * job.training.steps)
    return rows, len(rows)
