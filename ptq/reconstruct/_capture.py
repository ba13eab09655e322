"""What blocks see: the values of teacher and student at block borders, for all calibration images, in host memory."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from ptq.graph.blocks import Block

_BATCH = 64


class Capture:
    """Named values `[N, …]` of one network, kept only as long as a later block reads them."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = dict(values)

    def inputs(self, block: Block) -> list[Tensor]:
        """The block's inputs, for all images."""
        return [self.values[name] for name in block.inputs]

    def store(self, block: Block, outputs: Iterable[Tensor]) -> None:
        """Adds the block's outputs."""
        self.values.update(zip(block.outputs, outputs))

    def forget(self, still_read: set[str]) -> None:
        """Drops every value that no later block reads."""
        self.values = {name: v for name, v in self.values.items() if name in still_read}


@torch.no_grad()
def run_all(module: fx.GraphModule, inputs: list[Tensor], device: torch.device) -> list[Tensor]:
    """A block's outputs for all images, batch by batch, in host memory."""
    batches = zip(*(x.split(_BATCH) for x in inputs))
    parts = [[out.cpu() for out in module(*(x.to(device) for x in batch))] for batch in batches]
    return [torch.cat(out) for out in zip(*parts)]


def block_error(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Squared error of a block's outputs, summed over channels, averaged over images and pixels.

    Ref: Jeon et al., GENIE, CVPR 2023, eq. 14.
    """
    return torch.stack([(out - y).square().sum(1).mean() for out, y in zip(outputs, targets)]).sum()


def decibels(targets: list[Tensor], outputs: list[Tensor]) -> float:
    """SQNR of a block's first output in dB: power of the teacher's value over power of the difference; 200 at most."""
    y, out = targets[0].double(), outputs[0].double()
    noise = float((out - y).square().sum())
    return 200.0 if noise == 0 else min(200.0, 10 * float(torch.log10(y.square().sum() / noise)))
