"""Golden vectors: what every layer reads, accumulates and yields, as integers, for those who build the hardware.

    conv, linear   accumulator = Σ (input - z_x) (weight - z_w) + bias        output = clamp(round(accumulator · M) + z_y)
    linear, sum    accumulator = Σ (input - z_x) (weight - z_w)       output = clamp(round((accumulator s + bias s) / s_y) + z_y)
    add            output = clamp(round((input0 - z_0) · M_0 + (input1 - z_1) · M_1) + z_y)
    multiply       output = clamp(round((input0 - z_0) (input1 - z_1) · M) + z_y)
    mean           accumulator = Σ (input - z_x)                              output = clamp(round(accumulator · M) + z_y)
    average        output = clamp(round((Σ (input - z_x) / n) · M) + z_y), n pixels of a window
    table          output = table[input - least input code]
    move           output: the input's codes, rearranged as `geometry` says: a pad adds `fill`; what a max pool pads never wins;
                   cuts are (dimension, start, stop, step), dimensions counted with the batch
    float          computed in float, and quantized:                          output = clamp(round(x / s_y) + z_y)
    image          the same; x / s_y is a division, in float32, not a product with 1 / s_y

`round` is half to even. Each multiplier M stands there as float32 and as M ≈ m · 2^-shift, with an integer m of 31 bits. Float32
products are what onnxruntime computes, and what the outputs here are; the integer form comes to the same but for ties of rounding.
The layer that yields the network's result has no grid: output = accumulator · M, in float. "linear, sum" is a linear layer with a
bias on more than one row an image (`"bias_added": "float"`), s its float32 `accumulator_scale`; M stands for s / s_y there, and
(accumulator + bias) · M comes to the same but for ties.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from ptq.artifact import QuantizedModel, whole_folder
from ptq.errors import ArtifactError, ExportError
from ptq.graph.insert import quantizer_of
from ptq.graph.integer_kernels import (
    IntegerAdd,
    IntegerAverage,
    IntegerLayer,
    IntegerMean,
    IntegerMul,
    IntegerTable,
    Requantize,
    RequantizeSum,
    Rescale,
)
from ptq.graph.ops import find_op, moves
from ptq.graph.recorder import node_values
from ptq.quant.affine import QParams, quantize
from ptq.quant.fake_quant import integer_codes

_INDEX = "index.json"
_BITS = 31  # of an integer multiplier


def write_vectors(qm: QuantizedModel, images: Tensor, folder: str | Path) -> Path:
    """Writes `folder`, whole or not at all: index.json, and one NAME.npz per layer.

    Args:
        qm: the quantized network. images: `[N, C, H, W]` to run it on.

    Raises:
        ExportError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _INDEX).is_file():
        raise ExportError(f"{folder} is there and holds no vectors; move it away")
    try:
        with whole_folder(folder, overwrite=True, mark=_INDEX) as partial:
            index = _Writer(qm, partial).write(images)
            (partial / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
    except ArtifactError as e:
        raise ExportError(str(e)) from e
    return folder


def fixed_point(multiplier: Tensor) -> tuple[list[int], list[int]]:
    """Integers m, of 31 bits, and shifts with multiplier ≈ m · 2^-shift, one per channel."""
    mantissa, exponent = np.frexp(multiplier.double().reshape(-1).numpy())
    m = np.rint(mantissa * 2**_BITS).astype(np.int64)
    over = m == 2**_BITS  # rounded up to the next power of two
    return np.where(over, m // 2, m).tolist(), (_BITS - exponent - over).tolist()


class _Writer:
    """Writes the layers of one network."""

    def __init__(self, qm: QuantizedModel, folder: Path) -> None:
        self.qm, self.gm, self.folder = qm, qm.graph, folder

    def write(self, images: Tensor) -> dict[str, Any]:
        """The files; returns the index."""
        self.found = node_values(self.gm, images)
        layers = [row for node in self.gm.graph.nodes if (row := self._layer(node)) is not None]
        return {"images": len(images), "formulas": (__doc__ or "").partition("\n\n")[2].splitlines(), "layers": layers}

    def _layer(self, node: fx.Node) -> dict[str, Any] | None:
        """One layer's row, its arrays written; None for nodes that belong to another's row or have no codes."""
        name, module = node.meta.get("value"), self._module(node)
        if node.op in ("placeholder", "output") or name is None or isinstance(module, IntegerLayer):
            return None
        sources = self._sources(node)
        row: dict[str, Any] = {"name": name, "inputs": [_name(n) for n in sources], "file": f"{name}.npz"}
        arrays: dict[str, np.ndarray] = {}
        for label, source in zip(_labels(len(sources)), sources):
            arrays |= self._codes(label, source)
        arrays |= self._codes("output", node)
        if isinstance(module, Requantize | RequantizeSum | Rescale):
            row |= self._weighted(node, module, arrays)
        elif isinstance(module, IntegerAdd):
            row |= {"op": "add", "multipliers": [_multiplier(module.ratio_a), _multiplier(module.ratio_b)]}
        elif isinstance(module, IntegerMul):
            row |= {"op": "multiply", "multiplier": _multiplier(module.ratio)}
        elif isinstance(module, IntegerAverage):
            row |= _average(module)
        elif isinstance(module, IntegerTable):
            arrays["table"] = module.table.numpy().astype(arrays["output"].dtype)  # type: ignore[operator]
            row |= {"op": "table", "operation": node.meta["operation"]}
        elif isinstance(module, IntegerMean):
            row |= {"op": "mean", "multiplier": self._mean(sources[0], module, arrays)}
        else:
            row |= self._other(node)
        row["grids"] = {
            label: _describe(g) for label, n in (*zip(_labels(len(sources)), sources), ("output", node))
            if (g := self._grid(n)) is not None
        }  # fmt: skip
        if bounds := getattr(module, "bounds", None):
            row["clamp"] = list(bounds)
        row["arrays"] = {k: [str(v.dtype), list(v.shape)] for k, v in arrays.items()}
        np.savez_compressed(self.folder / row["file"], **arrays)  # pyright: ignore[reportArgumentType]
        return row

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The named values a layer reads, and the image; what has no name is inside the layer."""
        found: list[fx.Node] = []
        read: list[fx.Node] = []
        fx.map_arg(node.args, read.append)  # a tensor added to itself is read twice
        for n in read:
            found += [n] if n.meta.get("value") is not None or n.op == "placeholder" else self._sources(n)
        return found

    def _other(self, node: fx.Node) -> dict[str, Any]:
        """Operation of a layer without an integer kernel; of a quantizer, what it quantizes."""
        op = find_op(self.gm, node)
        if op is not None and op.role == "quant":
            raw = node.all_input_nodes[0]
            inside = find_op(self.gm, raw)
            named = raw.meta.get("operation", "quantize" if inside is None else inside.name)
            return {"op": "image" if raw.op == "placeholder" else "float", "operation": named}
        grid = self._grid(node)
        named = node.meta.get("operation", "" if op is None else op.name)
        if not moves(self.gm, node) or grid is None or op is None:
            return {"op": "float", "operation": named}
        geometry: dict[str, Any] = {k: getattr(self._module(node), k) for k in op.fields}
        if op.name == "concat":
            geometry = {"dim": 1}
        elif op.name == "pad":
            geometry |= {"fill": int(grid.zero_point), "order": "left, right, top, bottom, front, back"}
        return {"op": "move", "operation": named, "geometry": geometry}

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _grid(self, node: fx.Node) -> QParams | None:
        name = node.meta.get("value")
        found = quantizer_of(self.qm.student, name) if name is not None and name in self.qm.plan.values else None
        return None if found is None else found.qparams

    def _codes(self, label: str, node: fx.Node) -> dict[str, np.ndarray]:
        """A value's codes, or the value itself where it has no grid."""
        value, grid = self.found[node], self._grid(node)
        if grid is None or node.op == "placeholder":
            return {label: value.numpy()}
        return {label: quantize(value, grid).numpy().astype(np.int8 if grid.spec.signed else np.uint8)}

    def _weighted(
        self, node: fx.Node, module: Requantize | RequantizeSum | Rescale, arrays: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        """Weight, bias and accumulator of a convolution or linear layer."""
        inner = node.all_input_nodes[0]
        integer = self.gm.get_submodule(str(inner.target))
        assert isinstance(integer, IntegerLayer)
        layer = integer.layer
        held = integer_codes(layer, "weight")
        assert held is not None
        codes, q = held
        arrays["weight"] = codes.numpy().astype(np.int8)
        arrays["weight_scale"], arrays["weight_zero_point"] = q.scale.detach().numpy(), q.zero_point.numpy()
        if integer.bias is not None:
            arrays["bias"] = integer.bias.numpy().astype(np.int32)  # pyright: ignore[reportCallIssue]
        arrays["accumulator"] = self.found[inner].numpy().astype(np.int32)
        conv = isinstance(layer, nn.Conv2d)
        row: dict[str, Any] = {"op": "conv" if conv else "linear", "layer": integer.path}
        if isinstance(module, RequantizeSum):
            added = integer_codes(layer, "bias")
            assert added is not None
            arrays["bias"] = added[0].numpy()
            row |= {"bias_added": "float", "accumulator_scale": module.scale.reshape(-1).tolist()}  # type: ignore[operator]
            scale = module.scale / module.q.scale  # pyright: ignore[reportOperatorIssue]
        else:
            scale = module.multiplier if isinstance(module, Requantize) else module.scale
        if isinstance(layer, nn.Conv2d):
            row |= {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
        return row | {"weight_bits": q.spec.bits, "multiplier": _multiplier(scale)}  # type: ignore[arg-type]

    def _mean(self, source: fx.Node, module: IntegerMean, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        x = self.found[source]
        arrays["accumulator"] = module.total(x).numpy().astype(np.int32)
        return _multiplier(module.multiplier(x))


def _average(module: IntegerAverage) -> dict[str, Any]:
    geometry = {
        k: getattr(module.pool, k) for k in ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    }
    return {"op": "average", "multiplier": _multiplier(module.source.scale / module.q.scale)} | geometry


def _name(node: fx.Node) -> str:
    return node.meta.get("value") or "image"


def _labels(count: int) -> list[str]:
    return ["input"] if count == 1 else [f"input{k}" for k in range(count)]


def _multiplier(value: Tensor) -> dict[str, Any]:
    m, shift = fixed_point(value.detach())
    return {"float": value.detach().reshape(-1).tolist(), "int": m, "shift": shift}


def _describe(q: QParams) -> dict[str, Any]:
    return {
        "scale": float(q.scale), "zero_point": int(q.zero_point), "bits": q.spec.bits, "signed": q.spec.signed,
        "codes": [q.spec.qmin, q.spec.qmax],
    }  # fmt: skip
