"""Repairs after rounding, layer by layer from the input on: what the mean of each channel lost is given back to its bias.

    bias, from images      b' = b + E[z] - E[z_q]                    z, z_q: the layer's result in the float network and here
    bias, analytic         b' = b - Σ (W_q - W) E[x]                 E[x]: from BatchNorm parameters, no image is needed
    statistics             s_w' = s_w · σ(z) / σ(z_q), then the bias: BatchNorm re-estimated, in terms of the folded layer

Ref: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, §4.2, appendix B-D.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from ptq.contracts import Feedback
from ptq.graph.blocks import Block, extract, input_value_node, split
from ptq.graph.channel_axis import channel_axis
from ptq.graph.insert import round_bias
from ptq.graph.ops import input_node, weighted_nodes
from ptq.quant.affine import QParams, dequantize
from ptq.quant.fake_quant import (
    FloatBias,
    integer_codes,
    store_integer,
    swap,
)  # fmt: skip
from ptq.reconstruct._capture import Capture, Space, outputs_of, quantized_input, run_all
from ptq.spec import Repair

_LARGEST_GAIN = 2.0  # of a channel's scale; a larger one means that the channel's statistics say nothing


class _Moments:
    """Running mean and variance per channel of what a layer yields, before any quantizer."""

    def __init__(self, layer: nn.Module) -> None:
        self.count, self.total, self.square = 0, torch.zeros(()), torch.zeros(())
        self.handle = layer.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        flat = out.detach().movedim(1 if isinstance(module, nn.Conv2d) else -1, 0).flatten(1).double()
        self.count += flat.shape[1]
        self.total = self.total.to(flat.device) + flat.sum(1)
        self.square = self.square.to(flat.device) + flat.square().sum(1)

    def close(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C]; looks no further."""
        self.handle.remove()
        mean = self.total / self.count
        return mean, (self.square / self.count - mean.square()).clamp_min(0)


def mend(
    reference: fx.GraphModule, student: fx.GraphModule, images: Tensor, how: Repair, expected: Mapping[str, Tensor],
    *, device: torch.device, feedback: Feedback, memory: int | None = None,
) -> fx.GraphModule:  # fmt: skip
    """A copy of a hardened student with its layers' biases, and scales where asked for, set right.

    Args:
        reference: the folded float network. student: its hardened copy. images: calibration images [N, C, H, W].
        expected: value name → mean per channel, for the analytic correction (`ptq.graph.channel_means`).
        memory: bytes of host memory for what layers see; see `reconstruct_blocks`.
    """
    student, space = copy.deepcopy(student), Space(memory)
    nodes = {str(n.target): n for n in weighted_nodes(student)}
    unknown = []
    try:
        blocks, stem = split(student, "layer"), input_value_node(student)
        real = Capture({input_node(reference).meta["value"]: images}, space)
        ours = Capture({stem.meta["value"]: quantized_input(student, stem, images, device, space)}, space)
        for k, block in enumerate(blocks):
            float_part = extract(reference, block.inputs, block.outputs)
            for path in block.layers:
                layer, source = student.get_submodule(path), nodes[path].all_input_nodes[0].meta["value"]
                if layer.bias is None or integer_codes(layer, "weight") is None:
                    continue
                if how.bias == "analytic":
                    if (
                        source in expected and channel_axis(student, nodes[path]) == 1
                    ):  # of tokens, BatchNorm tells of L
                        _analytic(layer, reference.get_submodule(path), expected[source])
                    else:
                        unknown.append(path)
                else:
                    both = _both(reference, student, path, block, real, ours, float_part, device)
                    _match(layer, *both, scales=how.statistics)
                round_bias(student, nodes[path])
            targets = run_all(float_part, real.inputs(block), device, space)
            outputs = run_all(extract(student, block.inputs, block.outputs), ours.inputs(block), device, space)
            still_read = {name for later in blocks[k + 1 :] for name in later.inputs}
            for values, found in ((real, targets), (ours, outputs)):
                values.store(block, found)
                values.forget(still_read)
            feedback.progress("repair", k + 1, len(blocks))
    finally:
        space.close()
    if unknown:
        feedback.note(f"BatchNorm does not tell what enters {', '.join(unknown)}: their biases stay")
    return student


def _both(
    reference: fx.GraphModule, student: fx.GraphModule, path: str, block: Block, real: Capture, ours: Capture,
    float_part: fx.GraphModule, device: torch.device,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """Mean and variance per channel of a layer's result in the float network and in the student."""
    theirs, mine = _Moments(reference.get_submodule(path)), _Moments(student.get_submodule(path))
    for part, values in (
        (float_part, real), (extract(student, block.inputs, block.outputs), ours),
    ):  # fmt: skip
        for _ in outputs_of(part, values.inputs(block), device):
            pass
    return theirs.close(), mine.close()


@torch.no_grad()
def _match(layer: nn.Module, wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], *, scales: bool) -> None:
    (mean, var), (mean_q, var_q) = wanted, found
    bias: Tensor = layer.bias.detach().double()  # type: ignore[union-attr, operator]
    gain = torch.ones_like(mean)
    if scales:
        ratio = (var / var_q.clamp_min(1e-30)).sqrt()
        sound = (ratio < _LARGEST_GAIN) & (ratio > 1 / _LARGEST_GAIN)
        gain = torch.where(sound, ratio, gain)
        held = integer_codes(layer, "weight")
        assert held is not None
        codes, q = held
        if q.spec.power_of_two:
            gain = torch.ones_like(gain)
        store_integer(layer, "weight", codes, QParams((q.scale.detach() * gain).float(), q.zero_point, q.spec))
    # z_q is scaled without its bias; the rest of the mean is the bias's.
    swap(layer, "bias", FloatBias(), (mean - gain * (mean_q - bias)).float())


@torch.no_grad()
def _analytic(layer: nn.Module, original: nn.Module, expected: Tensor) -> None:
    held = integer_codes(layer, "weight")
    assert held is not None
    weight: Tensor = original.weight  # type: ignore[assignment]
    error = (
        (dequantize(*held) - weight).double().flatten(2).sum(2)
        if weight.ndim > 2
        else (dequantize(*held) - weight).double()
    )
    groups = getattr(layer, "groups", 1)
    # Each output reads the input channels of its group. Padding is left out, as in the paper.
    means = expected.double().to(error.device).view(groups, 1, -1).expand(groups, error.shape[0] // groups, -1)
    shift = (error * means.reshape(error.shape)).sum(1)
    bias: Tensor = layer.bias.detach().double()  # type: ignore[union-attr, operator]
    swap(layer, "bias", FloatBias(), (bias - shift).float())
