"""How a training went, epoch by epoch: loss and, where labelled pictures were given to report on, accuracy.

    μ = mean over epochs of acc,   σ² = mean over epochs of (acc - μ)²,   best = max acc,   acc in per cent

Ref: Binici et al., PRE-DFKD, AAAI 2022, eq. 10, table 1: without labels nobody knows the best epoch, so that what counts is a
high mean and a low variance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class EpochRow:
    """epoch: from 1. loss: mean over its steps. top1: in per cent, None where nothing was given to report on."""

    epoch: int
    loss: float
    top1: float | None


@dataclass(frozen=True, slots=True)
class Course:
    """All epochs of a training. Figures of accuracy are None where there is none."""

    rows: tuple[EpochRow, ...] = ()

    @property
    def accuracies(self) -> list[float]:
        """Per cent, of the epochs that have one."""
        return [row.top1 for row in self.rows if row.top1 is not None]

    @property
    def mean(self) -> float | None:
        """μ, in per cent."""
        return sum(self.accuracies) / len(self.accuracies) if self.accuracies else None

    @property
    def variance(self) -> float | None:
        """σ², in per cent squared."""
        if (mean := self.mean) is None:
            return None
        return sum((a - mean) ** 2 for a in self.accuracies) / len(self.accuracies)

    @property
    def best(self) -> float | None:
        """The highest, in per cent; nothing is ever chosen by it."""
        return max(self.accuracies, default=None)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        rows = [{"epoch": row.epoch, "loss": row.loss, "top1": row.top1} for row in self.rows]
        return {"epochs": rows, "mean": self.mean, "variance": self.variance, "best": self.best}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(tuple(EpochRow(**row) for row in data["epochs"]))
