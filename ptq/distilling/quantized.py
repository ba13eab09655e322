"""A quantized student in training: the float weights behind its codes, trained through the rounding.

    w = g · u,   ŵ = s (clamp(round(w / s) + z) - z),   ∂ŵ/∂w = 1 inside the grid     b̂ = s_x s · round(b / (s_x s))

u, b, s are trained; s_x, the ranges of activations, stay as calibration left them. g, per output channel, is constant and gives
u the size of a fresh layer's weights: folding BatchNorm, and inputs of another scale, make channels of very different sizes, and
one rate would be none for some and too high for others.

Ref: Haroush et al., The Knowledge Within, CVPR 2020, algorithm 2; McKinstry et al., 2018 (frozen ranges); Esser et al., LSQ, ICLR
2020, §2.2 (s and its rate).
"""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq.errors import ReconstructionError
from ptq.graph.blocks import split
from ptq.graph.insert import fake_quantize_bias, round_bias
from ptq.graph.ops import output_node, values_of, weighted_nodes
from ptq.quant.affine import QParams, along_axis, fake_quantize, quantize, stored_scale
from ptq.quant.fake_quant import FloatBias, integer_codes, store_integer, swap, weight_grid
from ptq.training import Training

_EDGE = 0.49  # of a step: how far from its code a weight may start
_LEAST = 1e-3  # of a scale: what training drives to 0 would not come back


class _Trained(nn.Module):
    """Parametrization of a weight: the trained `u` → quantized weights. step: s / g, per channel."""

    def __init__(self, q: QParams, gain: Tensor) -> None:
        super().__init__()
        self.spec = q.spec
        self.register_buffer("gain", gain)
        self.register_buffer("zero_point", q.zero_point.clone())
        self.register_buffer("first_scale", q.scale.detach().clone())
        self.register_buffer("first_step", q.scale.detach() / gain)
        self.step = nn.Parameter(q.scale.detach() / gain, requires_grad=False)

    @property
    def scale(self) -> Tensor:
        """s, per channel, as it will be stored, the gradient straight through: exactly what it was until it is trained."""
        s: Tensor = self.first_scale * (self.step / self.first_step).clamp_min(_LEAST)  # type: ignore[operator, assignment]
        return s + (stored_scale(s, self.spec) - s).detach()

    @property
    def qparams(self) -> QParams:
        """The grid as it stands."""
        return QParams(self.scale, self.zero_point, self.spec)  # type: ignore[arg-type]

    def weight(self, u: Tensor) -> Tensor:
        """w, before rounding."""
        return u * along_axis(self.gain, u.ndim, 0)  # type: ignore[arg-type]

    def forward(self, u: Tensor) -> Tensor:
        return fake_quantize(self.weight(u), self.qparams)


def make_trainable(student: fx.GraphModule, folded: fx.GraphModule, training: Training) -> list[dict[str, Any]]:
    """Puts float weights behind the student's codes, in place; the optimizer's parameter groups.

    A weight starts where the float network has it or, where rounding chose another code, at the nearest value that has this
    code: at first the student computes what it did.

    Args:
        student: hardened. folded: the float network it was made from, BatchNorm folded.
    """
    groups: list[dict[str, Any]] = []
    for node in weighted_nodes(student):
        path = str(node.target)
        layer, float_weight = student.get_submodule(path), _weight(folded, path)
        held = integer_codes(layer, "weight")
        if held is None:  # left float by the plan
            groups.append({"params": [p.requires_grad_(True) for p in layer.parameters()]})
            continue
        codes, q = held
        grid = _Trained(q, _gain(float_weight))
        start = _start(float_weight, codes, q) / along_axis(grid.gain, float_weight.ndim, 0)  # type: ignore[arg-type]
        swap(layer, "weight", grid, start)
        trained = [layer.parametrizations["weight"].original]  # type: ignore[index, union-attr]
        if layer.bias is not None:
            swap(layer, "bias", FloatBias(), layer.bias.detach().clone())  # type: ignore[operator]
            fake_quantize_bias(student, node)
            trained.append(layer.parametrizations["bias"].original)  # type: ignore[index, union-attr]
        groups.append({"params": [p.requires_grad_(True) for p in trained]})
        if training.lr_scale and not q.spec.power_of_two:
            each = float_weight[0].numel() * max(abs(q.spec.qmin), q.spec.qmax)
            share = training.lr_scale / math.sqrt(each)
            groups.append({"params": [grid.step.requires_grad_(True)], "share": share, "weight_decay": 0.0})
    return groups


def _weight(gm: fx.GraphModule, path: str) -> Tensor:
    return gm.get_submodule(path).weight.detach()  # type: ignore[operator, union-attr]


def _gain(weight: Tensor) -> Tensor:
    """g [C]: the root mean square of each channel's weights, relative to that of a fresh layer, √(2 / fan-in); 1 where all are 0."""
    flat = weight.flatten(1).double()
    rms = flat.square().mean(1).sqrt() / math.sqrt(2 / flat.shape[1])
    return torch.where(rms > 0, rms, torch.ones_like(rms)).float()


def _start(weight: Tensor, codes: Tensor, q: QParams) -> Tensor:
    """The value nearest to the float weight that has the code; beyond the grid's ends, the float weight itself."""
    s, z = (along_axis(v, weight.ndim, q.spec.axis) for v in (q.scale.detach(), q.zero_point))
    at = weight / s + z
    low = torch.where(codes == q.spec.qmin, torch.minimum(at, codes - _EDGE), codes - _EDGE)
    high = torch.where(codes == q.spec.qmax, torch.maximum(at, codes + _EDGE), codes + _EDGE)
    return (torch.minimum(torch.maximum(at, low), high) - z) * s


@torch.no_grad()
def harden(student: fx.GraphModule) -> None:
    """Stores what was trained as integers, in place.

    Raises:
        ReconstructionError: a weight, bias or scale is not finite.
    """
    for node in weighted_nodes(student):
        path = str(node.target)
        layer = student.get_submodule(path)
        if not all(bool(torch.isfinite(p).all()) for p in layer.parameters() if p.is_floating_point()):
            raise ReconstructionError(f"distillation left weights of {path} that are not finite; lower lr")
        grid = weight_grid(layer)
        if isinstance(grid, _Trained):
            held = layer.parametrizations["weight"]  # type: ignore[index]
            q = QParams(grid.scale.detach().clone(), grid.zero_point, grid.spec)  # type: ignore[arg-type]
            u: Tensor = held.original  # pyright: ignore[reportAttributeAccessIssue]
            store_integer(layer, "weight", quantize(grid.weight(u.detach()), q), q)
            if layer.bias is not None:
                swap(layer, "bias", FloatBias())
            round_bias(student, node)
    student.requires_grad_(False)
    for parameter in student.parameters():
        parameter.grad = None


def borders(student: fx.GraphModule) -> tuple[str, ...]:
    """What blocks yield, but for the last, whose output is the network's: value names."""
    result = output_node(student).meta["value"]
    names = [name for block in split(student, "block")[:-1] for name in block.outputs]
    return tuple(name for name in dict.fromkeys(names) if name != result)


def with_values(gm: fx.GraphModule, names: tuple[str, ...]) -> fx.GraphModule:
    """`gm`, sharing its parameters, as a module that yields a tuple: its result, then the named values."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    result = graph.graph_copy(gm.graph, copied)
    by_name = values_of(gm)
    graph.output((result, *(copied[by_name[name]] for name in names)))
    return fx.GraphModule(gm, graph)
