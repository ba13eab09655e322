"""Shape operations as modules, so that every operation of a traced network is a module or one of three functions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pad(nn.Module):
    """Zero padding. `pads` as in `F.pad`: (left, right, top, bottom[, channels before, channels after])."""

    def __init__(self, pads: tuple[int, ...]) -> None:
        super().__init__()
        self.pads = tuple(pads)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads)


class Slice(nn.Module):
    """`x[start:stop:step]` along each listed dimension; `cuts` are (dim, start, stop, step), concrete and positive."""

    def __init__(self, cuts: tuple[tuple[int, int, int, int], ...]) -> None:
        super().__init__()
        self.cuts = tuple(tuple(cut) for cut in cuts)

    def forward(self, x: Tensor) -> Tensor:
        index = [slice(None)] * x.ndim
        for dim, start, stop, step in self.cuts:
            index[dim] = slice(start, stop, step)
        return x[tuple(index)]


class Reshape(nn.Module):
    """`[B, …] → [B, *tail]`."""

    def __init__(self, tail: tuple[int, ...]) -> None:
        super().__init__()
        self.tail = tuple(tail)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.tail)


class Permute(nn.Module):
    """Reorders the dimensions; the batch stays first."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)
