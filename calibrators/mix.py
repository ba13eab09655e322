"""Several sources, split evenly: their faults differ.

Ref: Li et al., MixMix, CVPR 2021, whose images come from many models and objectives; GENIE, CVPR 2023, table 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from ptq.calibrators.gaussian import Gaussian
from torch import Tensor

from ptq.contracts import CalibrationContext, Calibrator, Feedback, Presets, make_rng
from ptq.errors import CalibrationError

__all__ = ["Mix"]


@dataclass(frozen=True)
class Mix:
    """Images of several sources, one after the other. sources: "genie+bn_stats", each with options in parentheses,
    "genie(steps=300)+gaussian". count: images in all, whatever a source says; batch_size: at most so many a batch."""

    sources: tuple[Calibrator, ...]
    count: int = 1024
    batch_size: int = 128

    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "Li et al., MixMix, CVPR 2021"
    synthetic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"quick": {"count": 256}, "standard": {"count": 512}}
    positional: ClassVar[str] = "sources"
    example: ClassVar[str] = "genie+gaussian"

    def __post_init__(self) -> None:
        if len({source.teacher_bn for source in self.sources}) != 1:
            raise CalibrationError("sources with teacher_bn=batch and with teacher_bn=running cannot be mixed")

    @property
    def teacher_bn(self) -> Literal["running", "batch"]:
        """Statistics that all sources want."""
        return self.sources[0].teacher_bn

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        number, made = len(self.sources), 0
        for index, source in enumerate(self.sources):
            count = ctx.count // number + (index < ctx.count % number)
            if not count:
                continue
            size = min(ctx.batch_size, source.batch_size)
            yield from source.batches(
                replace(
                    ctx, count=count, batch_size=size,
                    rng=make_rng(ctx.rng.initial_seed(), f"source {index}"),
                    cache=ctx.cache and ctx.cache.within(f"source {index}"),
                    feedback=_part(ctx, made, count),
                )
            )  # fmt: skip
            made += count

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Two kinds of noise."""
        return cls((Gaussian(), Gaussian()), count=6, batch_size=4)


def _part(ctx: CalibrationContext, made: int, count: int) -> Feedback:
    """Feedback of a source that makes `count` images after `made` others: its share of one bar, in images."""

    def progress(stage: str, done: int, total: int) -> None:
        ctx.feedback.progress("synthesis", made + count * done // total, ctx.count)

    return Feedback(progress, ctx.feedback.note, ctx.feedback.loss)
