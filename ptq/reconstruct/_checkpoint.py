"""Finished blocks on disk: a reconstruction that was stopped goes on from the block it was in.

What a block leaves are weight codes, scales and biases, which is little. The values at its borders are computed again: a pass over the
images costs a thousandth of what the block did.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ptq.batch_cache import BatchCache
from ptq.graph.blocks import Block, extract
from ptq.quant.affine import QParams
from ptq.quant.fake_quant import ActFakeQuant, FloatBias, integer_codes, store_integer, swap, weight_grid


def keep(
    cache: BatchCache | None, k: int, student: fx.GraphModule, block: Block,
    biases: Mapping[str, Tensor], report: Mapping[str, Any],
) -> None:  # fmt: skip
    """Writes what block `k` left: codes and scales of its hardened layers, biases, scales of its activations, and its report.

    biases: by layer, as trained: before they became integers.

    Raises:
        CalibrationError: the folder cannot be written.
    """
    if cache is None:
        return
    weights = {}
    for path in block.layers:
        held = integer_codes(student.get_submodule(path), "weight")
        if held is not None:
            codes, q = held
            weights[path] = [codes.to(torch.int8), q.scale.detach(), q.zero_point]
    scales = [quantizer.scale.detach() for quantizer in _quantizers(student, block)]
    state = {"block": block.name, "weights": weights, "biases": dict(biases), "scales": scales, "report": dict(report)}
    cache.write(k, torch.empty(0), state)


def restore(cache: BatchCache | None, k: int, student: fx.GraphModule, block: Block) -> dict[str, Any] | None:
    """Gives block `k` of a fake-quantized network, in place, what an earlier run left it; its report, or None."""
    found = None if cache is None else cache.read(k)
    if found is None or found[1].get("block") != block.name:
        return None
    state = found[1]
    for path, (codes, scale, zero_point) in state["weights"].items():
        layer = student.get_submodule(path)
        grid = weight_grid(layer)
        assert grid is not None
        device = grid.scale.device
        store_integer(layer, "weight", codes.to(device), QParams(scale, zero_point, grid.spec).to(device))
    for path, bias in state.get("biases", {}).items():
        layer = student.get_submodule(path)
        swap(layer, "bias", FloatBias(), bias.to(layer.weight.device))  # pyright: ignore[reportArgumentType]
    for quantizer, scale in zip(_quantizers(student, block), state["scales"], strict=True):
        quantizer.scale.data.copy_(scale)
    return state["report"]


def _quantizers(student: fx.GraphModule, block: Block) -> Iterator[ActFakeQuant]:
    """The block's activation quantizers, in a fixed order."""
    for module in extract(student, block.inputs, block.outputs).modules():
        if isinstance(module, ActFakeQuant):
            yield module
