"""Real pictures: a folder of image files, or an `.npz`/`.npy` array."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from ptq.contracts import CalibrationContext, Presets
from ptq.errors import CalibrationError
from ptq.pictures import Fit, open_pictures

__all__ = ["Images"]


@dataclass(frozen=True)
class Images:
    """Real pictures, `count` of them picked at random. path: folder, .npz (under "x") or .npy; labels are not used.

    count: images wanted; all there are where that is fewer. batch_size: images per batch. resize: length of the shorter
    side, in pixels, to which pictures are brought; crop: side of the square then cut from their middle.
    """

    path: Path
    count: int = 1024
    batch_size: int = 128
    resize: int | None = None
    crop: int | None = None

    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "real data"
    teacher_bn: ClassVar[Literal["running", "batch"]] = "running"
    synthetic: ClassVar[bool] = False
    presets: ClassVar[Presets] = {"quick": {"count": 256}, "standard": {"count": 512}}
    positional: ClassVar[str] = "path"

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W]; see `ptq.contracts.Calibrator`."""
        pictures = open_pictures(Path(self.path), ctx.input_shape, ctx.mean, ctx.std, Fit(self.resize, self.crop))
        order = torch.randperm(len(pictures), generator=ctx.rng)[: ctx.count].sort().values
        if len(order) < ctx.count:
            ctx.feedback.note(
                f"{self.path} holds {len(order)} pictures, fewer than the {ctx.count} asked for; all are used"
            )
        done = 0
        for part in order.split(ctx.batch_size):
            batch = pictures.read(part)
            if not bool(torch.isfinite(batch).all()):
                raise CalibrationError(f"{self.path} holds values that are not finite")
            done += len(part)
            ctx.feedback.progress("reading images", done, len(order))
            yield batch.to(ctx.device)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Random pictures written into `folder`, as float arrays of 3 × 16 × 16."""
        x = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
        np.save(folder / "pictures.npy", x)
        return cls(folder / "pictures.npy", count=6, batch_size=4)
