"""What blocks see: the values of teacher and student at block borders, for all calibration images, in memory or on disk."""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from ptq.errors import ReconstructionError
from ptq.graph.blocks import Block
from ptq.quant.affine import sum_of_products

_BATCH = 64
_SHARE = 0.25  # of the memory that is free, where no limit is given


class Space:
    """Room for values `[N, …]`: host memory up to `limit` bytes (default: a quarter of what is free), then files.

    The files lie in a temporary folder and vanish with `close`; the system keeps of them in memory what fits.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = int(_SHARE * psutil.virtual_memory().available) if limit is None else limit
        self._held: dict[int, int] = {}  # address → bytes, of tensors in memory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, Path] = {}
        self._made = 0

    @property
    def used(self) -> int:
        """Bytes held in memory."""
        return sum(self._held.values())

    def empty(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized tensor; images with their channels last in memory, which convolutions on CPUs read fastest.

        Raises:
            ReconstructionError: there is no room on disk either.
        """
        shape = tuple(shape)
        if len(shape) == 4:
            n, c, h, w = shape
            return self._empty((n, h, w, c), dtype).permute(0, 3, 1, 2)
        return self._empty(shape, dtype)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.used + size <= self.limit:
            tensor = torch.empty(shape, dtype=dtype)
            self._held[tensor.data_ptr()] = size
            return tensor
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="ptq-")
            path = Path(self._folder.name) / str(self._made)
            self._made += 1
            with path.open("wb") as file:
                file.truncate(size)
                if hasattr(
                    os, "posix_fallocate"
                ):  # a full disk is found out here, not by a signal when the map is written
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))
            tensor = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
        except (OSError, RuntimeError) as e:
            raise ReconstructionError(
                f"{size / 1e9:.1f} GB for what a block sees fit neither memory nor disk: {e}"
            ) from e
        self._files[tensor.data_ptr()] = path
        return tensor

    def free(self, tensor: Tensor) -> None:
        """Gives a tensor's room back; one that is not from here is left alone."""
        self._held.pop(tensor.data_ptr(), None)
        if (path := self._files.pop(tensor.data_ptr(), None)) is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the files."""
        if self._folder is not None:
            self._folder.cleanup()


class Capture:
    """Named values `[N, …]` of one network, kept only as long as a later block reads them."""

    def __init__(self, values: dict[str, Tensor], space: Space) -> None:
        self.values, self.space = dict(values), space

    def inputs(self, block: Block) -> list[Tensor]:
        """The block's inputs, for all images."""
        return [self.values[name] for name in block.inputs]

    def store(self, block: Block, outputs: Iterable[Tensor]) -> None:
        """Adds the block's outputs."""
        self.values.update(zip(block.outputs, outputs))

    def forget(self, still_read: set[str]) -> None:
        """Drops every value that no later block reads."""
        for name in [name for name in self.values if name not in still_read]:
            self.space.free(self.values.pop(name))


@torch.no_grad()
def outputs_of(module: fx.GraphModule, inputs: list[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """A block's outputs for all images, batch by batch, on `device`."""
    for batch in zip(*(x.split(_BATCH) for x in inputs)):
        yield list(module(*(x.to(device) for x in batch)))


def run_all(module: fx.GraphModule, inputs: list[Tensor], device: torch.device, space: Space) -> list[Tensor]:
    """A block's outputs for all images, in `space`."""
    found: list[Tensor] = []
    at = 0
    for outputs in outputs_of(module, inputs, device):
        found = found or [space.empty((len(inputs[0]), *out.shape[1:]), out.dtype) for out in outputs]
        for whole, part in zip(found, outputs):
            whole[at : at + len(part)].copy_(part)
        at += len(outputs[0])
    return found


def quantized_input(
    student: fx.GraphModule, stem: fx.Node, images: Tensor, device: torch.device, space: Space
) -> Tensor:
    """All images as the network's first quantizer, `stem`, gives them; the images themselves where the input stays float."""
    if stem.op == "placeholder":
        return images
    quantizer = student.get_submodule(str(stem.target))
    found, at = space.empty(images.shape), 0
    with torch.no_grad():
        for x in images.split(256):
            found[at : at + len(x)].copy_(quantizer(x.to(device)))
            at += len(x)
    return found


def picked(values: Tensor, pick: Tensor) -> Tensor:
    """The images `pick` of `values`, in the layout of `Space`."""
    if values.ndim != 4:
        return values.index_select(0, pick)
    # Selecting along the first dimension copies whole images only where they lie in one piece.
    return values.permute(0, 2, 3, 1).index_select(0, pick).permute(0, 3, 1, 2)


def stored(values: list[Tensor]) -> Iterator[list[Tensor]]:
    """Values of all images, batch by batch, as `outputs_of` yields them."""
    return (list(batch) for batch in zip(*(v.split(_BATCH) for v in values)))


def channels_second(values: list[Tensor], axes: Sequence[int]) -> list[Tensor]:
    """Views `[B, C, …]` of values whose channels are in dimensions `axes`."""
    return [v.movedim(axis, 1) for v, axis in zip(values, axes)]


def compare_all(outputs: Iterable[list[Tensor]], targets: list[Tensor], axes: Sequence[int]) -> tuple[float, float]:
    """`block_error` over all images of outputs that come in batches, and SQNR in dB of the first output.

    axes: which dimension of each output holds its channels.

    SQNR: power of the teacher's value over power of the difference, 200 at most.
    """
    error = noise = signal = 0.0
    for batch, wanted in zip(outputs, stored(targets)):
        wanted = [y.to(out.device) for y, out in zip(wanted, batch)]
        compared = channels_second(batch, axes), channels_second(wanted, axes)
        error += float(block_error(*compared)) * len(wanted[0]) / len(targets[0])
        noise += float((batch[0] - wanted[0]).double().square().sum())
        signal += float(wanted[0].double().square().sum())
    if noise == 0 or signal == 0:
        return error, 200.0 if noise == 0 else -200.0
    return error, min(200.0, 10 * math.log10(signal / noise))


class _SquaredError(torch.autograd.Function):
    """Σ f (x - y)², f = 1 where there is none; the gradient, 2 f (x - y), takes one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, f: Tensor | None) -> Tensor:
        error = x - y
        slope = error if f is None else error * f
        ctx.save_for_backward(slope)
        return sum_of_products(error, slope, torch.Size())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (slope,) = ctx.saved_tensors
        return slope.mul_(2 * grads[0]), None, None


def block_error(outputs: list[Tensor], targets: list[Tensor], fisher: list[Tensor] | None = None) -> Tensor:
    """Squared error of a block's outputs `[B, C, …]`, summed over channels, averaged over images and pixels.

    fisher: weights of the elements, where there are any: squared gradients of the network's loss, of mean 1.

    Ref: Jeon et al., GENIE, CVPR 2023, eq. 14; Li et al., BRECQ, ICLR 2021, eq. 10.
    """
    weights = fisher or [None] * len(outputs)
    sums = [_SquaredError.apply(out, y, f) for out, y, f in zip(outputs, targets, weights)]
    return torch.stack([s / (y.numel() / y.shape[1]) for s, y in zip(sums, targets)]).sum()
