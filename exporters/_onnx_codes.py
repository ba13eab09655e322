"""Weights, biases and activations as integer codes in an ONNX graph: initializers, QuantizeLinear, Clip, DequantizeLinear."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from ptq.exporters._onnx_builder import Builder
from torch import fx

from ptq.quant.affine import QParams, along_axis
from ptq.quant.fake_quant import integer_codes


def weight_of(b: Builder, node: fx.Node, transpose: bool = False) -> str:
    """The layer's weight in float: integer codes and DequantizeLinear, or float where it is not quantized.

    Codes of up to four bits are stored as INT4 and widened by Cast: onnxruntime folds the Cast and runs its 8-bit kernels,
    which it does not do for INT4 behind DequantizeLinear itself. Of narrow weights with zero points the difference, which fits
    a byte, is taken before, and folded too: onnxruntime's kernels for weights with a zero point per channel are slower, that of
    depthwise convolutions by a factor of a hundred.
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
    width = b.profile.weight_width(q.spec)
    if width < 8:
        packed = b.packed(f"{path}.weight.int{width}", codes, width)
        if b.profile.weights == "packed":
            scale = b.constant(f"{path}.weight.scale", q.scale.detach().cpu().numpy())
            zero = b.packed(f"{path}.weight.zero_point", q.zero_point.cpu().numpy(), width)
            return b.add("DequantizeLinear", [packed, scale, zero], f"{path}.weight", axis=axis)
        if q.zero_point.any():
            packed = _difference(b, f"{path}.weight", packed, zero_points, width)
            q = _unshifted(q)
        stored = b.add("Cast", [packed], f"{path}.weight.codes", to=TensorProto.INT8)
    else:
        if q.spec.bits < 8:
            codes, q = codes - zero_points, _unshifted(q)
        stored = b.constant(f"{path}.weight.codes", codes.astype(np.int8))
    return _dequantize(b, stored, f"{path}.weight", q, np.int8, axis=axis)


def _difference(b: Builder, name: str, packed: str, zero: np.ndarray, width: int) -> str:
    """Codes less their zero points, both stored with `width` bits, as int32."""
    stored = (packed, b.packed(f"{name}.offset", zero, width))
    return b.add("Sub", [b.add("Cast", [s], f"{s}.wide", to=TensorProto.INT32) for s in stored], f"{name}.difference")


def _unshifted(q: QParams) -> QParams:
    """The grid of codes whose zero points have been taken away."""
    return replace(q, zero_point=torch.zeros_like(q.zero_point))


def bias_of(b: Builder, node: fx.Node) -> list[str]:
    """The layer's bias, as a list of no or one tensor; int32 codes where it is quantized."""
    path, layer = str(node.target), b.module(node)
    if layer.bias is None:
        return []
    held = integer_codes(layer, "bias")
    if held is None or b.profile.biases == "float":
        return [b.constant(f"{path}.bias", layer.bias.detach().cpu().numpy())]
    codes = b.constant(f"{path}.bias.codes", held[0].cpu().numpy().astype(np.int32))
    return [_dequantize(b, codes, f"{path}.bias", held[1], None, axis=0)]


def _dequantize(b: Builder, codes: str, output: str, q: QParams, zero_type: Any, axis: int) -> str:
    inputs = [codes, b.constant(f"{output}.scale", q.scale.detach().cpu().numpy())]
    if zero_type is not None:  # int32 codes have none by the standard; for weights onnxruntime's Gemm fusion wants it
        inputs.append(b.constant(f"{output}.zero_point", q.zero_point.cpu().numpy().astype(zero_type)))
    return b.add("DequantizeLinear", inputs, output, axis=axis)


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
