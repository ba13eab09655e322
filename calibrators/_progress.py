"""How far a synthesis is, counted in optimizer steps over all batches."""

from torch import Tensor

from ptq.contracts import CalibrationContext


class StepCount:
    """Steps of a source that spends `steps` on each of `batches` batches."""

    def __init__(self, ctx: CalibrationContext, steps: int, batches: int | None = None) -> None:
        self.ctx, self.steps = ctx, steps
        self.total = steps * (len(ctx.sizes()) if batches is None else batches)

    def step(self, batch: int, step: int, loss: Tensor) -> None:
        """Step `step` (from 0) of batch `batch` is done, at this loss."""
        done = batch * self.steps + step + 1
        self.ctx.feedback.loss(done, loss.detach())
        self.ctx.feedback.progress("synthesis", done, self.total)

    def batch(self, batch: int) -> None:
        """Batch `batch` is there, made or found."""
        self.ctx.feedback.progress("synthesis", (batch + 1) * self.steps, self.total)
