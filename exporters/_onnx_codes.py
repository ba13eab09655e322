"""Weights, biases and activations as integer codes in an ONNX graph: initializers, QuantizeLinear, Clip, DequantizeLinear."""

from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import TensorProto
from ptq.exporters._onnx_builder import Builder
from torch import fx

from ptq.quant.affine import QParams, along_axis
from ptq.quant.fake_quant import integer_codes


def weight_of(b: Builder, node: fx.Node, transpose: bool = False, filled: bool = False) -> str:
    """The layer's weight in float: integer codes and DequantizeLinear, or float where it is not quantized.

    Codes of up to four bits are stored as INT4 and widened by Cast: onnxruntime folds the Cast and runs its 8-bit kernels,
    which it does not do for INT4 behind DequantizeLinear itself. Of narrow weights with zero points the difference, which fits
    a byte, is taken before, and folded too: onnxruntime's kernels for weights with a zero point per channel are slower, that of
    depthwise convolutions by a factor of a hundred. filled: a convolution reads one channel more, see `add_channel`.
    """
    path, layer = str(node.target), b.module(node)
    held = integer_codes(layer, "weight")
    if held is None:
        weight = layer.weight.detach().cpu().numpy()
        return b.constant(f"{path}.weight", weight.T if transpose else weight)
    codes, q = held[0].cpu().numpy(), held[1]
    codes = codes.T if transpose else codes
    axis = 1 if transpose else 0
    zero_points = along_axis(q.zero_point, codes.ndim, axis).cpu().numpy()
    if filled:
        zeros = np.broadcast_to(zero_points, (len(codes), 1, *codes.shape[2:]))
        codes = np.concatenate([codes, zeros.astype(codes.dtype)], axis=1)
    width, compact = b.profile.weight_width(q.spec), _is_compact(b, q)
    if width < 8:
        packed = b.packed(f"{path}.weight.int{width}", codes, width)
        if b.profile.weights == "packed":
            scale = b.constant(f"{path}.weight.scale", q.scale.detach().cpu().numpy())
            zero = b.packed(f"{path}.weight.zero_point", q.zero_point.cpu().numpy(), width)
            return b.add("DequantizeLinear", [packed, scale, zero], f"{path}.weight", axis=axis)
        if q.zero_point.any():
            packed = _difference(b, f"{path}.weight", packed, zero_points, width, compact)
            q = _unshifted(q)
        stored = b.add("Cast", [packed], f"{path}.weight.codes", named=not compact, to=TensorProto.INT8)
    else:
        if q.spec.bits < 8:
            codes, q = codes - zero_points, _unshifted(q)
        stored = b.constant(f"{path}.weight.codes", codes.astype(np.int8))
    inputs = [stored, _scale(b, f"{path}.weight.scale", q, compact)]
    # onnxruntime's fusion of a Gemm wants zero points that are 0 as well; that of a Conv does without them.
    if not compact or codes.ndim == 2:
        inputs.append(b.constant(f"{path}.weight.zero_point", q.zero_point.cpu().numpy().astype(np.int8)))
    return b.add("DequantizeLinear", inputs, f"{path}.weight", named=not compact, axis=axis)


def _is_compact(b: Builder, q: QParams) -> bool:
    """Whether what belongs to a weight of such a grid is stored in as few bytes as can be."""
    return b.profile.compact and b.profile.weight_width(q.spec) < 8


def _scale(b: Builder, name: str, q: QParams, compact: bool) -> str:
    """A weight's scales; in a compact file in half precision, if its normal numbers hold them exactly."""
    scale = q.scale.detach().cpu().numpy()
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not compact or (half != scale).any() or (half < np.finfo(np.float16).tiny).any():
        return b.constant(name, scale)
    return b.add("Cast", [b.constant(name, half)], name, named=False, to=TensorProto.FLOAT)


def _difference(b: Builder, name: str, packed: str, zero: np.ndarray, width: int, compact: bool) -> str:
    """Codes less their zero points, both stored with `width` bits, as int32."""
    stored = (packed, b.packed(f"{name}.offset", zero, width))
    wide = [b.add("Cast", [s], f"{s}.wide", named=not compact, to=TensorProto.INT32) for s in stored]
    return b.add("Sub", wide, f"{name}.difference", named=not compact)


def _unshifted(q: QParams) -> QParams:
    """The grid of codes whose zero points have been taken away."""
    return replace(q, zero_point=torch.zeros_like(q.zero_point))


def bias_of(b: Builder, node: fx.Node, x: str, weight: str) -> list[str]:
    """The layer's bias, as a list of no or one tensor; int32 codes where it is quantized. x, weight: what else the layer reads."""
    path, layer = str(node.target), b.module(node)
    if layer.bias is None:
        return []
    held, grid = integer_codes(layer, "bias"), integer_codes(layer, "weight")
    if held is None or grid is None or b.profile.biases == "float":
        return [b.constant(f"{path}.bias", layer.bias.detach().cpu().numpy())]
    codes, compact = held[0].cpu().numpy(), _is_compact(b, grid[1])
    if compact and np.abs(codes).max() < 2**15:
        stored = b.constant(f"{path}.bias.codes", codes.astype(np.int16))
        stored = b.add("Cast", [stored], stored, named=False, to=TensorProto.INT32)
    else:
        stored = b.constant(f"{path}.bias.codes", codes.astype(np.int32))
    scale, steps = held[1].scale.detach().cpu().numpy(), None
    if compact:
        steps = _product(b, x, weight, grid[1].scale.detach().cpu().numpy(), scale)
    inputs = [stored, steps or b.constant(f"{path}.bias.scale", scale)]
    return [b.add("DequantizeLinear", inputs, f"{path}.bias", named=not compact, axis=0)]


def _product(b: Builder, x: str, weight: str, weight_scale: np.ndarray, wanted: np.ndarray) -> str | None:
    """The steps of the accumulator, computed in the file from the scales of what a layer reads; None if that is not `wanted`."""
    factors = [n.input[1] for n in (dequantized(b, x), dequantized(b, weight)) if n is not None]
    if len(factors) < 2 or (b.value(factors[0]) * weight_scale != wanted).any():
        return None
    return b.add("Mul", factors, "", named=False)


def quantize_value(b: Builder, x: str, name: str, q: QParams, bounds: tuple[int, int]) -> str:
    """QuantizeLinear, a Clip to `bounds` where the container reaches further, DequantizeLinear; see `_profiles`.

    For onnxruntime, signed codes are stored 128 higher, as bytes: it has no integer kernel for a Clip of int8.
    """
    shift, unsigned = b.profile.shift(q), b.profile.container == "unsigned"
    scale = b.constant(f"{name}.scale", q.scale.detach().cpu().numpy())
    low, high = bounds[0] + shift, bounds[1] + shift
    width = b.profile.native_width(q.spec)
    if width < 8:
        zero = b.packed(f"{name}.zero_point", q.zero_point.cpu().numpy(), width, q.spec.signed)
        least = -(2 ** (width - 1)) if q.spec.signed else 0
        (low, high), ends_of_type = bounds, (least, least + 2**width - 1)
    else:
        kind = np.uint8 if unsigned else np.int8
        zero = b.constant(f"{name}.zero_point", (q.zero_point.cpu().numpy() + shift).astype(kind))
        ends_of_type = (0, 255) if unsigned else (-128, 127)
    if (low, high) == ends_of_type:
        codes = b.add("QuantizeLinear", [x, scale, zero], f"{name}.codes")
    elif b.profile.narrow == "clip codes":
        ends = [b.constant(f"codes.{v}", np.array(v, dtype=np.uint8 if unsigned else np.int8)) for v in (low, high)]
        codes = b.add("Clip", [b.add("QuantizeLinear", [x, scale, zero], f"{name}.wide"), *ends], f"{name}.codes")
    else:  # the ends are on the grid, and rounding is monotone: clipping before or after it is the same
        real = [float(q.scale) * (v - int(q.zero_point)) for v in bounds]
        ends = [b.constant(f"{name}.{k}", np.array(v, dtype=np.float32)) for k, v in zip(("low", "high"), real)]
        codes = b.add("QuantizeLinear", [b.add("Clip", [x, *ends], f"{name}.clipped"), scale, zero], f"{name}.codes")
    return b.add("DequantizeLinear", [codes, scale, zero], name)


def dequantized(b: Builder, x: str) -> onnx.NodeProto | None:
    """The DequantizeLinear that a tensor comes from, if it comes from one."""
    return next((n for n in reversed(b.nodes) if n.output[0] == x and n.op_type == "DequantizeLinear"), None)


def add_channel(b: Builder, source: onnx.NodeProto) -> str:
    """What a DequantizeLinear yields `[N, C, H, W]`, with one channel more, all zero."""
    (codes, scale, zero), name = source.input, f"{source.output[0]}.filled"
    if dequantized(b, name) is not None:  # by another convolution
        return name
    ends = b.constant(f"{name}.pads", np.array([0, 0, 0, 0, 0, 1, 0, 0], dtype=np.int64))
    return b.add("DequantizeLinear", [b.add("Pad", [codes, ends, zero], f"{name}.codes"), scale, zero], name)


def multiplied_out(b: Builder, weight: str) -> str:
    """A weight in float that no runtime takes for codes: Cast and Mul in place of its DequantizeLinear, where it comes from one.

    onnxruntime 1.32 makes a MatMulNBits of a DequantizeLinear and a MatMul, and that rounds what it multiplies to 8 bits.
    """
    source = dequantized(b, weight)
    if source is None or b.profile.literal:
        return weight
    parts = [
        b.add("Cast", [name], f"{name}.float", to=TensorProto.FLOAT) for name in (source.input[0], *source.input[2:])
    ]
    whole = parts[0] if len(parts) == 1 else b.add("Sub", parts, f"{weight}.whole")
    return b.add("Mul", [whole, source.input[1]], f"{weight}.real")
