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


class ResizeNearest(nn.Module):
    """Nearest neighbour to `size` (height, width), where that is no whole multiple."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="nearest")


class ResizeBilinear(nn.Module):
    """Bilinear interpolation to `size` (height, width)."""

    def __init__(self, size: tuple[int, int], align_corners: bool) -> None:
        super().__init__()
        self.size, self.align_corners = tuple(size), align_corners

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="bilinear", align_corners=self.align_corners)


class AdaptiveAverage(nn.Module):
    """Adaptive average pooling to `size` (height, width) whose windows differ in size."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.size)  # pyright: ignore[reportArgumentType]


class _Constant(nn.Module):
    """An operation with a tensor that does not depend on the input; `shape`: that tensor's, to be broadcast."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.value = nn.Parameter(torch.zeros(self.shape), requires_grad=False)

    @classmethod
    def of(cls, value: Tensor | float) -> "_Constant":
        """The operation with this tensor or number."""
        tensor = torch.as_tensor(value, dtype=torch.float32).detach().clone()
        made = cls(tuple(tensor.shape))
        made.value.data = tensor
        return made


class AddConstant(_Constant):
    """x + value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


class MulConstant(_Constant):
    """x · value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value
