"""Lowering of what works on height and width, and of what only rearranges: pools, paddings, slices, resizing.

Each function takes a `Call` and returns the steps that replace it.
"""

import math
from collections.abc import Callable
from itertools import cycle
from typing import Any

from torch import nn

from ptq.graph.call import Call, Step, Unsupported, pair
from ptq.graph.layers import AdaptiveAverage, MulConstant, Pad, Permute, Reshape, ResizeBilinear, ResizeNearest, Slice


def reshape(call: Call) -> list[Step]:
    """A reshape to the recorded result's shape."""
    return [] if call.out == call.shape else [Reshape(call.out)]


def _average(call: Call, size: tuple[int, int]) -> nn.Module | None:
    """The pooling that brings `[C, H, W]` to `size`, or None where nothing is to do."""
    h, w = call.shape[-2:]
    if (h, w) == size:
        return None
    if h % size[0] or w % size[1]:
        return AdaptiveAverage(size)
    kernel = (h // size[0], w // size[1])
    return nn.AvgPool2d(kernel, kernel)


def _refuse_tokens(call: Call) -> None:
    if len(call.shape) != 3:
        raise Unsupported(f"pooling of a tensor of {len(call.shape) + 1} dimensions; [B, C, H, W] is supported")


def adaptive(call: Call) -> list[Step]:
    _refuse_tokens(call)
    pool = _average(call, call.out[-2:])  # type: ignore[arg-type]
    return [] if pool is None else [pool]


def mean(call: Call) -> list[Step]:
    dims = call.get(1, "dim")
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    over = {d % 4 for d in dims}
    if len(call.shape) != 3 or not over or not over <= {2, 3}:
        raise Unsupported(f"mean over dimensions {dims}; means over height, width or both are supported")
    _, h, w = call.shape
    left = (1 if 2 in over else h, 1 if 3 in over else w)
    pool = _average(call, left)
    return [*([] if pool is None else [pool]), *reshape(Call((), {}, (call.shape[0], *left), call.out))]


def avg_pool(call: Call) -> list[Step]:
    _refuse_tokens(call)
    kernel = pair(call.get(1, "kernel_size"))
    stride, pads = pair(call.get(2, "stride") or kernel), pair(call.get(3, "padding", 0))
    ceil = bool(call.get(4, "ceil_mode", False)) and _rounded_up(call, kernel, stride, pads)
    counts_pads, divisor = bool(call.get(5, "count_include_pad", True)) and any(pads), call.get(6, "divisor_override")
    if divisor is not None:
        if ceil:
            raise Unsupported("average pooling with divisor_override and ceil_mode")
        return [nn.AvgPool2d(kernel, stride, pads, False, any(pads)), MulConstant.of(kernel[0] * kernel[1] / divisor)]
    if ceil and counts_pads:  # torch counts padding but not what is beyond it, runtimes all or nothing: make it pixels
        (ph, pw) = pads
        return [Pad((pw, pw, ph, ph)), nn.AvgPool2d(kernel, stride, 0, True, False)]
    return [nn.AvgPool2d(kernel, stride, pads, ceil, counts_pads)]


def max_pool(call: Call) -> list[Step]:
    _refuse_tokens(call)
    kernel, dilation = pair(call.get(1, "kernel_size")), pair(call.get(4, "dilation", 1))
    stride, pads = pair(call.get(2, "stride") or kernel), pair(call.get(3, "padding", 0))
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation))
    ceil = bool(call.get(5, "ceil_mode", False)) and _rounded_up(call, reach, stride, pads)
    return [nn.MaxPool2d(kernel, stride, pads, dilation, ceil_mode=ceil)]


def _rounded_up(call: Call, reach: tuple[int, ...], stride: tuple[int, ...], pads: tuple[int, ...]) -> bool:
    """Whether a pool has more windows than its size rounded down.

    Raises:
        Unsupported: along one side only. Torch leaves out a last window that would begin in the padding, runtimes do not.
    """
    spans, out = [n + 2 * p - k for n, p, k in zip(call.shape[-2:], pads, reach)], tuple(call.out[-2:])
    if tuple(span // s + 1 for span, s in zip(spans, stride)) == out:
        return False
    if tuple(-(-span // s) + 1 for span, s in zip(spans, stride)) != out:
        raise Unsupported("pooling whose size is rounded up along one side and down along the other")
    return True


def pad(call: Call) -> list[Step]:
    pads, mode, fill = call.get(1, "pad"), call.get(2, "mode", "constant"), call.get(3, "value", None)
    if mode != "constant" or fill not in (None, 0, 0.0):
        raise Unsupported(f"padding with mode {mode!r} and value {fill}; zero padding is supported")
    if len(pads) > 6 or min(pads) < 0 or len(call.shape) != 3:
        raise Unsupported(f"padding {tuple(pads)}; non-negative padding of channels, height and width is supported")
    return [Pad(tuple(pads))]


def getitem(call: Call) -> list[Step]:
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if not all(isinstance(i, slice) for i in index) or index[0] != slice(None):
        raise Unsupported(f"index {index}; slices along channels, height and width are supported")
    cuts = []
    for dim, (cut, size) in enumerate(zip(index[1:], call.shape), start=1):
        start, stop, step = cut.indices(size)  # pyright: ignore[reportGeneralTypeIssues]
        if (start, stop, step) != (0, size, 1):
            cuts.append((dim, start, stop, step))
    return [Slice(tuple(cuts))] if cuts else []


def permute(call: Call) -> list[Step]:
    rank = len(call.shape) + 1
    given = call.get(1, "dims")
    dims = call.args[1:] if isinstance(given, int) else tuple(given)
    dims = tuple(d % rank for d in dims)
    if dims[0] != 0:
        raise Unsupported(f"permutation {dims} moves the batch dimension")
    return [Permute(dims)]


def transpose(call: Call) -> list[Step]:
    dims = list(range(len(call.shape) + 1))
    a, b = call.get(1, "dim0"), call.get(2, "dim1")
    dims[a], dims[b] = dims[b], dims[a]
    return permute(Call((None, tuple(dims)), {}, call.shape, call.out))


def resize(mode: str | None = None) -> Callable[[Call], list[Step]]:
    """Interpolation; `mode` where the function's name says it, else its argument."""

    def lower(call: Call) -> list[Step]:
        asked = mode or call.get(3, "mode", "nearest")
        align = bool(call.get(4, "align_corners", False)) if mode is None else bool(_align_corners(call, mode))
        size = (call.out[-2], call.out[-1])
        if size == tuple(call.shape[-2:]):
            return []
        if call.kwargs.get("antialias"):
            raise Unsupported("interpolation with antialias")
        if (
            not align
            and not call.get(5, "recompute_scale_factor")
            and not _is_ratio(_factors(call), call.shape, call.out)
        ):
            raise Unsupported("interpolation by a factor that is not the ratio of the sizes")
        if asked == "bilinear":
            return [ResizeBilinear(size, align)]
        if asked == "nearest-exact":
            return _nearest_exact((call.shape[-2], call.shape[-1]), size)
        if asked != "nearest":
            raise Unsupported(f"interpolation {asked!r}; nearest and bilinear are supported")
        factor, rest = divmod(size[1], call.shape[-1])
        if rest or size[0] != factor * call.shape[-2]:
            return [ResizeNearest(size)]
        return [nn.UpsamplingNearest2d(scale_factor=factor)]

    return lower


def _nearest_exact(shape: tuple[int, int], size: tuple[int, int]) -> list[Step]:
    """Pixel `i` is `floor((i + 0.5) · n / m)` of `n`: as "nearest" to a multiple, the middle of each group to a fraction."""
    if all(m % n == 0 for n, m in zip(shape, size)):
        return [ResizeNearest(size)]
    if all(n % m == 0 for n, m in zip(shape, size)):
        steps = [n // m for n, m in zip(shape, size)]
        return [Slice(tuple((dim, k // 2, n, k) for dim, n, k in zip((2, 3), shape, steps)))]
    raise Unsupported("interpolation 'nearest-exact' to a size that is neither a multiple nor a fraction")


def _factors(call: Call) -> list[float]:
    """Scale factors among the arguments, however they are passed: sizes are whole numbers."""
    given = (*call.args[1:], *call.kwargs.values())
    listed = [w for v in given for w in (v if isinstance(v, tuple | list) else [v])]
    return [w for w in listed if isinstance(w, float)]


def _is_ratio(factors: list[float], shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    return not factors or all(
        math.isclose(f * n, m, rel_tol=1e-9) for f, n, m in zip(cycle(factors), shape[-2:], out[-2:])
    )


def _align_corners(call: Call, mode: str) -> Any:
    return call.get(2, "align_corners", False) if mode == "bilinear" else False


def part(dim: int, start: int, stop: int) -> tuple[slice, ...]:
    """The index of one part of a split tensor."""
    return (*[slice(None)] * dim, slice(start, stop))


def select_slice(call: Call) -> list[Step]:
    """aten.slice(x, dim, start, end, step)."""
    dim, start, stop, step = (call.get(k, n, d) for k, (n, d) in enumerate(
        (("dim", 0), ("start", None), ("end", None), ("step", 1)), start=1
    ))  # fmt: skip
    if dim == 0 and (start or 0, step) == (0, 1):  # the whole batch, or the comparison with the original fails
        return []
    index = (*[slice(None)] * (dim % (len(call.shape) + 1)), slice(start, stop, step))
    return getitem(Call((None, index), {}, call.shape, call.out))


def select(call: Call) -> list[Step]:
    """aten.select(x, dim, index): one entry along a dimension, which falls away."""
    rank = len(call.shape) + 1
    dim, index = call.get(1, "dim") % rank, call.get(2, "index")
    if dim == 0:
        raise Unsupported("a single image of a batch")
    start = index % call.shape[dim - 1]
    return [Slice(((dim, start, start + 1, 1),)), Reshape(call.out)]
