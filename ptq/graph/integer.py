"""The network on integers: what onnxruntime's integer kernels compute, to the last bit.

A student multiplies and adds real numbers and rounds afterwards; an integer kernel accumulates codes exactly and rounds the
rescaled accumulator once. Both round the same values, but for ties and float noise: one element in 100,000 comes out a step
apart, and travels on. Here every layer, addition and global pool between quantizers is replaced by the kernel's arithmetic:

    layer   code = clamp(round(f32(Σ q_x q_w + b) · f32(s_x s_w / s_y)) + z_y)
    add     code = clamp(round(fma(A, s_a/s_y, fma(B, s_b/s_y, z_y - fma(s_a/s_y, z_a, s_b/s_y z_b)))))
    pool    code = clamp(round(Σ q_x · f32(s_x / (s_y H W))) + z_y)

Tensors between them stay real numbers on their grids, `s · (code - z)`. What has no integer kernel stays as it is.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ptq.graph.insert import quantizer_of
from ptq.graph.ops import find_op, output_node
from ptq.graph.plan import merged_clamp
from ptq.graph.trace import rewrite
from ptq.quant.affine import QParams, quantize
from ptq.quant.fake_quant import ActFakeQuant, integer_codes

_EXACT_IN_FLOAT32 = 2**24


def stored_shift(q: QParams) -> int:
    """What a file adds to the codes of an activation's grid, so that they are bytes; only sums feel it, by their rounding."""
    return 128 if q.spec.signed else 0


class _Quantizer(nn.Module):
    """The end of an integer kernel: a rescaled accumulator → a real number on the output's grid."""

    def __init__(self, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.q, self.bounds = QParams(q.scale.detach().clone(), q.zero_point.clone(), q.spec), bounds

    def finish(self, rounded: Tensor) -> Tensor:
        """Clamps codes (as float) and gives them their real values."""
        return (rounded.clamp(*self.bounds) - self.q.zero_point) * self.q.scale


class IntegerLayer(nn.Module):
    """A convolution or linear layer on codes: `[B, …]` on the input's grid → the int32 accumulator, as float.

    path: where the layer stands in the network.
    """

    def __init__(self, layer: nn.Module, source: QParams, path: str) -> None:
        super().__init__()
        self.path = path
        held, bias = integer_codes(layer, "weight"), integer_codes(layer, "bias") if layer.bias is not None else None
        assert held is not None
        codes, q = held
        self.layer = layer
        weight = (codes - q.zero_point.reshape(-1, *[1] * (codes.ndim - 1))).double()
        reach = float(weight.abs().flatten(1).sum(1).max()) * (source.spec.qmax - source.spec.qmin)
        # Sums of integers are exact in float32 up to 2^24, whatever their order; in float64 always.
        self.dtype = torch.float32 if reach < _EXACT_IN_FLOAT32 else torch.float64
        self.register_buffer("codes", weight.to(self.dtype))
        self.register_buffer("bias", None if bias is None else bias[0].double())
        self.register_buffer("source_scale", source.scale.detach().clone())
        self.register_buffer("scale", source.scale.detach() * q.scale.detach())

    def by_channel(self, v: Tensor) -> Tensor:
        """`v` [C], shaped to be multiplied with the accumulator: a convolution's channels are second, a linear layer's last."""
        return v.reshape(-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else v

    def forward(self, x: Tensor) -> Tensor:
        q = torch.round(x / self.source_scale).to(self.dtype)  # pyright: ignore[reportOperatorIssue]
        m = self.layer
        if isinstance(m, nn.Conv2d):
            total = F.conv2d(q, self.codes, None, m.stride, m.padding, m.dilation, m.groups).double()  # type: ignore[arg-type]
            total = total if self.bias is None else total + self.bias.view(1, -1, 1, 1)  # pyright: ignore[reportCallIssue]
        else:
            total = F.linear(q, self.codes).double()  # type: ignore[arg-type]
            total = total if self.bias is None else total + self.bias  # pyright: ignore[reportOperatorIssue]
        return total.float()


class Requantize(_Quantizer):
    """Accumulator → the output's grid: round(acc · M) + z, M = f32(s_x s_w / s_y) per output channel."""

    def __init__(self, layer: "IntegerLayer", q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.register_buffer("multiplier", layer.by_channel(layer.scale / q.scale.detach()))  # type: ignore[operator]

    def forward(self, total: Tensor) -> Tensor:
        return self.finish(torch.round(total * self.multiplier) + self.q.zero_point)  # pyright: ignore[reportOperatorIssue]


class Rescale(nn.Module):
    """Accumulator → float result: acc · s_x s_w."""

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.register_buffer("scale", layer.by_channel(layer.scale))  # type: ignore[arg-type]

    def forward(self, total: Tensor) -> Tensor:
        return total * self.scale  # pyright: ignore[reportOperatorIssue]


class IntegerAdd(_Quantizer):
    """The sum of two tensors on grids of their own, as onnxruntime's QLinearAdd forms it, with fused multiply-adds."""

    def __init__(self, a: QParams, b: QParams, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.a, self.b = a, b
        self.ratio_a, self.ratio_b = (p.scale.detach() / q.scale.detach() for p in (a, b))
        # Rounded as the kernel does it, a product first, then a fused multiply-add: near a tie, the last bit decides.
        zero_a, zero_b, zero = (p.zero_point + stored_shift(p) for p in (a, b, q))
        shift = self.ratio_a.double() * zero_a + (self.ratio_b * zero_b).double()
        self.offset = zero - shift.float()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # A product of a byte and a float32 is exact in float64; one rounding to float32 makes it a fused multiply-add.
        codes_x, codes_y = (quantize(v, p) + stored_shift(p) for v, p in ((x, self.a), (y, self.b)))
        inner = (codes_y.double() * self.ratio_b.double() + self.offset.double()).float()
        outer = (codes_x.double() * self.ratio_a.double() + inner.double()).float()
        return self.finish(torch.round(outer) - stored_shift(self.q))


class IntegerMean(_Quantizer):
    """The mean over height and width, as onnxruntime's QLinearGlobalAveragePool forms it."""

    def __init__(self, source: QParams, q: QParams, bounds: tuple[int, int]) -> None:
        super().__init__(q, bounds)
        self.source = source

    def total(self, x: Tensor) -> Tensor:
        """The accumulator, [B, C, 1, 1]."""
        return quantize(x, self.source).sum((2, 3), keepdim=True) - self.source.zero_point * x.shape[2] * x.shape[3]

    def multiplier(self, x: Tensor) -> Tensor:
        """What rescales the accumulator of so many pixels."""
        return self.source.scale / (self.q.scale * float(x.shape[2] * x.shape[3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.round(self.total(x).float() * self.multiplier(x)) + self.q.zero_point)


def code_bounds(gm: fx.GraphModule, raw: fx.Node, q: QParams) -> tuple[int, int]:
    """The codes that the quantizer reading `raw` may yield: its grid's, narrowed by a ReLU or ReLU6 that it does itself."""
    op = find_op(gm, raw)
    low, high = q.spec.qmin, q.spec.qmax
    if op is not None and op.role == "clamp":
        zero, six = quantize(torch.tensor([0.0, 6.0], device=q.scale.device), q).tolist()
        low = max(low, zero)
        high = min(high, six) if op.name == "relu6" else high
    return low, high


def to_integer(student: fx.GraphModule) -> fx.GraphModule:
    """The integer network of a hardened student, on the CPU.

    conv ──► relu ──► quant ──►      →      integer layer ──► requantize ──►
    """
    with rewrite(student) as out:
        out.to("cpu")
        for node in list(out.graph.nodes):
            if node.op == "call_module" and isinstance(out.get_submodule(str(node.target)), ActFakeQuant):
                _replace_quantizer(out, node, student)
        result = output_node(out)
        op, source = find_op(out, result), None
        if op is not None and op.role == "weighted":
            source = quantizer_of(student, result.all_input_nodes[0].meta["value"])
        if source is not None and integer_codes(out.get_submodule(str(result.target)), "weight") is not None:
            _replace_result(out, result, source.qparams)
    return out.eval().requires_grad_(False)


def _replace_quantizer(gm: fx.GraphModule, node: fx.Node, student: fx.GraphModule) -> None:
    """Puts the kernel that ends in quantizer `node` in its place; grids are looked up in `student`, which still has them all."""
    q, raw = gm.get_submodule(str(node.target)).qparams, node.all_input_nodes[0]  # type: ignore[operator, union-attr]
    bounds = code_bounds(gm, raw, q)  # pyright: ignore[reportArgumentType]
    merged = (
        raw.op == "call_module" and len(raw.all_input_nodes) == 1 and merged_clamp(gm, raw.all_input_nodes[0]) is raw
    )
    producer = raw.all_input_nodes[0] if merged else raw
    op = find_op(gm, producer)
    grids = [quantizer_of(student, n.meta["value"]) if n.meta.get("value") else None for n in producer.all_input_nodes]
    if op is None or not grids or any(g is None for g in grids):
        return
    sources = [QParams(g.scale.detach(), g.qparams.zero_point, g.spec) for g in grids if g is not None]
    if op.role == "weighted" and integer_codes(gm.get_submodule(str(producer.target)), "weight") is not None:
        layer = IntegerLayer(gm.get_submodule(str(producer.target)), sources[0], str(producer.target))
        total = _insert(gm, node, layer, (producer.all_input_nodes[0],), "layer")
        _become(gm, node, Requantize(layer, q, bounds), (total,))  # type: ignore[operator]
    elif producer.target is operator.add:
        operands = tuple(a for a in producer.args if isinstance(a, fx.Node))
        pair = sources if len(sources) == 2 else sources * 2
        _become(gm, node, IntegerAdd(pair[0], pair[1], q, bounds), operands)  # pyright: ignore[reportArgumentType]
    elif (
        op.name == "avg_pool"
        and list(gm.get_submodule(str(producer.target)).kernel_size)  # pyright: ignore[reportArgumentType]
        == list(  # type: ignore[arg-type]
            producer.all_input_nodes[0].meta["shape"][-2:]
        )
    ):
        _become(gm, node, IntegerMean(sources[0], q, bounds), (producer.all_input_nodes[0],))  # pyright: ignore[reportArgumentType]


def _replace_result(gm: fx.GraphModule, node: fx.Node, source: QParams) -> None:
    layer = IntegerLayer(gm.get_submodule(str(node.target)), source, str(node.target))
    total = _insert(gm, node, layer, (node.all_input_nodes[0],), "layer")
    _become(gm, node, Rescale(layer), (total,))  # type: ignore[arg-type]


def _insert(gm: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple[fx.Node, ...], name: str) -> fx.Node:
    path = f"integer_{name}_{node.name}"
    gm.add_submodule(path, module)
    with gm.graph.inserting_before(node):
        return gm.graph.call_module(path, args)


def _become(gm: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple[fx.Node, ...]) -> None:
    """Makes `node` call another module; its name, value and readers stay."""
    path = f"integer_{node.name}"
    gm.add_submodule(path, module)
    node.target, node.args, node.kwargs, node.op = path, args, {}, "call_module"
