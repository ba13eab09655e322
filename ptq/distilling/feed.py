"""How images come to a student: from a set, from a pool that grows, or each batch made for its step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptq.batch_cache import BatchCache
from ptq.contracts import Carry, make_rng
from ptq.errors import SpecError
from ptq.training import Training

# Opens a source: the student it may look at, how many batches there shall be, what it carries on → batches in host memory.
Source = Callable[[nn.Module | None, int, Carry | None], Iterator[Tensor]]


class Feed(Protocol):
    """Gives batches `[B, C, H, W]` in host memory."""

    def prepare(self, epoch: int) -> None:
        """Called before each epoch, in order, from the first that is trained on."""
        ...

    def batch(self, rng: torch.Generator) -> Tensor:
        """The next batch."""
        ...

    def state(self, epochs: int) -> dict[str, Any]:
        """What a later run needs to go on after so many epochs."""
        ...

    def restore(self, state: Mapping[str, Any]) -> bool:
        """The inverse of `state`, called before `prepare` if at all; false where what it needs is gone."""
        ...

    def sample(self, count: int, seed: int) -> Tensor:
        """Up to `count` of the images that the student was trained on, in host memory."""
        ...


@contextmanager
def looked_at(student: nn.Module) -> Iterator[None]:
    """The student as a source sees it: in eval mode, gradients passing through it but none kept."""
    modes = [(module, module.training) for module in student.modules()]
    trained = [p for p in student.parameters() if p.requires_grad]
    try:
        student.eval()
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


class FromSet:
    """Batches drawn with replacement from images made before."""

    def __init__(self, images: Tensor, size: int) -> None:
        self.images, self.size = images, size

    def prepare(self, epoch: int) -> None:
        """Nothing: the images are there."""

    def batch(self, rng: torch.Generator) -> Tensor:
        """See `Feed`."""
        return self.images[torch.randint(len(self.images), (self.size,), generator=rng)]

    def state(self, epochs: int) -> dict[str, Any]:
        """See `Feed`: nothing changes."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """See `Feed`."""
        return True

    def sample(self, count: int, seed: int) -> Tensor:
        """See `Feed`."""
        return picked(self.images, count, seed)


class FromPool:
    """Batches drawn from all that a source made so far; before each epoch it makes more, looking at the student.

    Ref: Fang et al., Up to 100× faster data-free knowledge distillation, AAAI 2022; Tran et al., NAYER, CVPR 2024, algorithm 1.
    """

    def __init__(
        self, source: Source, student: nn.Module, training: Training, size: int, cache: BatchCache | None
    ) -> None:
        if not training.first_rounds + training.rounds or 0 < training.pool < size:
            raise SpecError(
                f"first_rounds={training.first_rounds}, rounds={training.rounds}, pool={training.pool} given; a pool holds at "
                f"least one round of {size} images"
            )
        self.source, self.student, self.training, self.size, self.cache = source, student, training, size, cache
        self.made, self.carry = 0, Carry()
        self.more: Iterator[Tensor] | None = None
        self.images = torch.empty(0)

    def prepare(self, epoch: int) -> None:
        """See `Feed`."""
        t, more = self.training, self._opened()
        with looked_at(self.student):
            for k in range(epoch * t.rounds, (epoch + 1) * t.rounds):
                self._add(batch := next(more))
                if self.cache is not None:
                    self.cache.write(k, batch, {})

    def _opened(self) -> Iterator[Tensor]:
        """The rounds that are still to be made. Those of earlier epochs are read where they were kept, into the pool."""
        if self.more is None:
            t = self.training
            for batch in self.source(None, t.first_rounds, None) if t.first_rounds else ():
                self._add(batch)
            for k in range(self.carry.done):
                self._add(self._kept(k))
            self.more = self.source(self.student, t.rounds * t.epochs, self.carry) if t.rounds else iter(())
        return self.more

    def _kept(self, k: int) -> Tensor:
        found = None if self.cache is None else self.cache.read(k)
        assert found is not None  # `restore` looked
        return found[0]

    def _add(self, batch: Tensor) -> None:
        """Into the pool, in place of the oldest images once it is full."""
        if not len(self.images):
            whole = (self.training.first_rounds + self.training.rounds * self.training.epochs) * self.size
            self.images = torch.empty(min(self.training.pool or whole, whole), *batch.shape[1:])
        at = (self.made + torch.arange(len(batch))) % len(self.images)
        self.images[at] = batch
        self.made += len(batch)

    def batch(self, rng: torch.Generator) -> Tensor:
        """See `Feed`."""
        there = min(self.made, len(self.images))
        return self.images[torch.randint(there, (self.training.batch_size,), generator=rng)]

    def state(self, epochs: int) -> dict[str, Any]:
        """See `Feed`; the images themselves are in the cache."""
        return {"done": epochs * self.training.rounds, "kept": self.carry.state()}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """See `Feed`."""
        if self.cache is None or any(self.cache.read(k) is None for k in range(state["done"])):
            return False
        self.carry = Carry(state["done"], state["kept"])
        return True

    def sample(self, count: int, seed: int) -> Tensor:
        """See `Feed`."""
        self._opened()  # where no epoch was left to train
        return picked(self.images[: self.made], count, seed)


class FromStream:
    """Every batch made for its step, by a source that looks at the student."""

    def __init__(self, source: Source, student: nn.Module, training: Training) -> None:
        self.source, self.student, self.training = source, student, training
        self.carry = Carry()
        self.batches: Iterator[Tensor] | None = None
        self.last: list[Tensor] = []

    def prepare(self, epoch: int) -> None:
        """See `Feed`."""
        if self.batches is None:
            self.batches = self.source(self.student, self.training.epochs * self.training.steps, self.carry)

    def batch(self, rng: torch.Generator) -> Tensor:
        """See `Feed`."""
        assert self.batches is not None
        with looked_at(self.student):
            made = next(self.batches)
        self.last = [*self.last[-3:], made]
        return made

    def state(self, epochs: int) -> dict[str, Any]:
        """See `Feed`."""
        return {"done": epochs * self.training.steps, "kept": self.carry.state(), "last": self.last}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """See `Feed`."""
        self.carry, self.last = Carry(state["done"], state["kept"]), list(state["last"])
        return True

    def sample(self, count: int, seed: int) -> Tensor:
        """See `Feed`: of the latest batches."""
        return picked(torch.cat(self.last), count, seed)


def picked(images: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the images, at random, or all where there are fewer."""
    return images[torch.randperm(len(images), generator=make_rng(seed, "picked"))[:count]]
