"""Operations that the table does not know: they stay, in float regions, and the network computes what it did."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.graph.aten import exported
from ptq.graph.blocks import split
from ptq.graph.float_region import FloatRegion, float_remainders
from ptq.graph.ops import find_op, weighted_nodes
from ptq.graph.plan import make_plan
from ptq.graph.trace import trace
from ptq.spec import BitConfig, PlanRules
from tests.graph.test_trace import Around
from tests.stages import relative_error, values
from tests.zoo import SHAPE, ZOO, build, images

_RELATIVE = 1e-5


def _kinds(gm) -> list[str]:
    """The operations behind the first convolution: those of regions, in brackets where they only move."""
    found = []
    for node in gm.graph.nodes:
        op = find_op(gm, node)
        if op is not None and op.name.endswith("region"):
            names = " ".join(gm.get_submodule(node.target).names)
            found.append(f"[{names}]" if op.role == "same" else names)
        elif op is not None:
            found.append(op.name)
    return found[1:]


# What is written → the operations behind the convolution.
UNKNOWN: dict[str, tuple[Callable, list[str]]] = {
    "cumsum": (lambda s, y: y.cumsum(1), ["cumsum"]),
    "einsum": (lambda s, y: torch.einsum("bchw,bdhw->bcd", y, y), ["einsum"]),
    "expand": (lambda s, y: y.mean((2, 3), keepdim=True).expand(-1, -1, 3, 5), ["avg_pool", "[expand]"]),
    "a token": (lambda s, y: torch.cat((s.conv.bias.expand(y.shape[0], 1, -1), y.flatten(2).mT), 1), ["expand cat"]),
    "sum": (lambda s, y: y.sum((1, 2)), ["sum"]),
    "product of tensors": (lambda s, y: F.relu(y @ y.transpose(-1, -2)), ["matmul", "relu"]),
    "attention": (lambda s, y: F.scaled_dot_product_attention(y, y, y), ["scaled_dot_product_attention"]),
    "largest values": (lambda s, y: y.flatten(1).topk(5, 1).values, ["topk"]),
    "by index": (lambda s, y: y.flatten(1).gather(1, y.flatten(1).topk(5, 1).indices), ["topk gather"]),
    "largest of channels": (lambda s, y: y.max(1).values, ["max"]),
    "integers": (lambda s, y: y.flatten(2).argmax(2).float(), ["argmax _to_copy"]),
    "pixel_shuffle": (lambda s, y: F.pixel_shuffle(y, 2), ["[pixel_shuffle]"]),
    "roll": (lambda s, y: torch.roll(y, (1, 2), (2, 3)), ["[roll]"]),
    "stack": (lambda s, y: torch.stack([y, y.relu()], 1), ["relu", "stack"]),
    "unbind": (lambda s, y: (lambda a, b, *c: a * b)(*y.unbind(1)), ["slice", "reshape", "slice", "reshape", "mul"]),
    "one channel": (lambda s, y: y[:, -1], ["slice", "reshape"]),
    "grid_sample": (
        lambda s, y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
        ["slice", "permute", "tanh", "grid_sampler"],
    ),
    "exp, sqrt": (lambda s, y: y.exp() / y.exp().sum(1, keepdim=True).sqrt(), ["exp sum sqrt div"]),
    "a norm": (lambda s, y: y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1), ["square mean add rsqrt", "mul"]),
    "a mask": (lambda s, y: y.masked_fill(y > 0.5, float("-inf")).softmax(-1), ["gt masked_fill softmax"]),
    "a difference": (lambda s, y: y - y.relu(), ["relu", "sub"]),
    "a division": (lambda s, y: 1 / y, ["reciprocal mul"]),
    "alpha": (lambda s, y: torch.add(y, 1, alpha=2), ["add"]),
    "reflection": (lambda s, y: F.pad(y, (1, 1, 1, 1), mode="reflect"), ["pad"]),
    "padding with a number": (lambda s, y: F.pad(y, (1, 1), value=1), ["pad"]),
    "cutting off": (lambda s, y: F.pad(y, (-1, 0)), ["pad"]),
    "concatenation of rows": (lambda s, y: torch.cat([y, y.relu()], 2), ["relu", "cat"]),
    "a constant that is larger": (lambda s, y: F.avg_pool2d(y, 16) * torch.ones(16, 16), ["avg_pool", "mul"]),
    "bicubic": (lambda s, y: F.interpolate(y, scale_factor=2, mode="bicubic"), ["upsample_bicubic2d"]),
    "mean of channels": (lambda s, y: y.mean(1), ["mean"]),
    "divisor": (lambda s, y: F.avg_pool2d(y, 2, divisor_override=3), ["avg_pool", "mul_constant"]),
    "a clamp": (lambda s, y: F.hardtanh(y), ["hardtanh"]),
    "unfold": (lambda s, y: F.unfold(y, 3), ["im2col"]),
    "conv1d": (lambda s, y: F.conv1d(y.flatten(2), s.conv.weight[:, :1, 0].expand(8, 8, 3)), ["conv1d"]),
    "writes into a tensor": (lambda s, y: _first_channel_zero(y.clone()), ["fill select_scatter slice_scatter"]),
    "writes through a view": (
        lambda s, y: torch.cat([y[:, :3].relu_(), y], 1),
        ["slice", "relu", "slice_scatter", "slice", "concat"],
    ),
    "a constant of new_zeros": (lambda s, y: y.cumsum(1) + _first_row_one(y.new_zeros(8, 1, 1)), ["cumsum add"]),
    "a table of sizes": (lambda s, y: y + torch.arange(y.size(3)), ["add_constant"]),
}


def _first_channel_zero(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


def _first_row_one(y: Tensor) -> Tensor:
    y[0] = 1
    return y


@pytest.mark.parametrize("name", UNKNOWN)
def test_computes_what_the_network_does(name: str):
    body, expected = UNKNOWN[name]
    net = Around(body).eval().requires_grad_(False)
    teacher = trace(net, SHAPE)
    assert _kinds(teacher) == expected
    for count in (1, 3, 5):
        x = images(count, seed=count)
        assert relative_error(teacher(x), net(x)) < _RELATIVE
    shapes = {value: tuple(x.shape[1:]) for value, x in values(teacher, images(3)).items()}
    assert shapes == {n.meta["value"]: n.meta["shape"] for n in teacher.graph.nodes if n.op != "output"}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own word on that very layer
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Softsign(), ["abs add div"]),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), ["pad", "conv"]),
        (nn.Conv2d(8, 8, 2, padding="same"), ["pad", "conv"]),
        (nn.PixelUnshuffle(2), ["[pixel_unshuffle]"]),
    ],
)
def test_modules(module: nn.Module, expected: list[str]):
    net = Around(lambda s, y: s.m[0](y), module).eval().requires_grad_(False)
    teacher = trace(net, SHAPE)
    assert _kinds(teacher) == expected and relative_error(teacher(images(3)), net(images(3))) < _RELATIVE


class Transformer(nn.Module):
    """Patches, a token, torch's own attention with the batch second, windows folded into the batch, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2)
        self.qkv, self.mlp, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        x = x + self._windows(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm(x).transpose(0, 1)
        x = x + self.attention(y, y, y, need_weights=False)[0].transpose(0, 1)
        return self.head((x + F.gelu(self.mlp(self.norm(x))))[:, 0])

    def _windows(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 4, 16)  # [4·B, 4, 16]
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return ((q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v).reshape(-1, 16, 16)


def test_linear_layers_around_attention_are_layers():
    torch.manual_seed(0)
    net = Transformer().eval().requires_grad_(False)
    teacher = trace(net, SHAPE)
    assert [str(n.target) for n in weighted_nodes(teacher)] == [
        "patches", "qkv", "attention.in_proj", "attention.out_proj", "mlp", "head",
    ]  # fmt: skip
    assert all(n.meta["shape"][-1] == teacher.get_submodule(n.target).out_features for n in weighted_nodes(teacher)[1:])
    for count in (1, 3, 5):
        assert relative_error(teacher(images(count)), net(images(count))) < _RELATIVE
    assert [text.partition(" at ")[0] for text in float_remainders(teacher)] == [
        "aten.matmul, aten.mul, aten.softmax", "aten.expand, aten.cat", "aten.scaled_dot_product_attention",
    ]  # fmt: skip
    blocks = split(teacher)
    assert [path for block in blocks for path in block.layers] == [str(n.target) for n in weighted_nodes(teacher)]


@pytest.mark.parametrize("inner", [True, False])
def test_each_image_keeps_its_rows(inner: bool):
    """The batch folded into a dimension from without, as [16·B], or from within, as [B·16]: a layer's rows are the images'."""

    def body(s: nn.Module, y: Tensor) -> Tensor:
        x = y.permute(2, 0, 1, 3) if inner else y.permute(0, 2, 1, 3)  # [16, B, 8, 16] or [B, 16, 8, 16]
        x = s.m[0](x.reshape(-1, 8 * 16))
        return x.reshape(16, -1, 10).transpose(0, 1) if inner else x.reshape(-1, 16, 10)

    net = Around(body, nn.Linear(128, 10)).eval().requires_grad_(False)
    teacher = trace(net, SHAPE)
    (layer,) = weighted_nodes(teacher)[1:]
    x = images(4)
    found, alone = values(teacher, x), [values(teacher, x[k : k + 1]) for k in range(4)]
    for name in {layer.meta["value"], layer.all_input_nodes[0].meta["value"]}:
        assert relative_error(torch.cat([a[name] for a in alone]), found[name]) < _RELATIVE


@pytest.mark.parametrize("name", ZOO)
def test_the_functional_graph_is_the_same(name: str):
    """What unknown operations stand between is lowered as ever: BatchNorm and all."""
    net = build(name)

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).cumsum(1)

    plain, behind = trace(net, SHAPE), trace(Behind().eval(), SHAPE)

    def layers(gm, prefix: str) -> list[tuple[str, str]]:
        called = [n for n in gm.graph.nodes if n.op == "call_module" and list(gm.get_submodule(n.target).parameters())]
        return [(find_op(gm, n).name, prefix + n.target) for n in called]  # type: ignore[union-attr]

    assert layers(behind, "") == layers(plain, "net.")
    assert _kinds(behind)[-1] == "cumsum"


def test_networks_of_known_operations_have_no_regions():
    for name in ZOO:
        assert not any(isinstance(m, FloatRegion) for m in trace(build(name), SHAPE).modules())


def test_an_exported_network():
    net = Around(UNKNOWN["cumsum"][0]).eval().requires_grad_(False)
    teacher = trace(exported(net, images(2)), SHAPE)
    assert _kinds(teacher) == ["cumsum"] and relative_error(teacher(images(3)), net(images(3))) < _RELATIVE


def test_options_of_forward_keep_their_defaults():
    class Optional(Around):
        def forward(self, x: Tensor, mask: Tensor | None = None, power: float = 2.0) -> Tensor:
            y = self.conv(x) ** power
            return y if mask is None else y * mask

    net = Optional(lambda s, y: y).eval().requires_grad_(False)
    teacher = trace(net, SHAPE)
    assert _kinds(teacher) == ["pow"] and relative_error(teacher(images(3)), net(images(3))) < _RELATIVE


def test_callers_network_is_unchanged():
    net = Transformer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trace(net, SHAPE)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert list(net.state_dict()) == list(before)


def test_no_integer_has_a_grid():
    """An index is computed where it is used, even where that is behind a layer."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.value, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(14, 10)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            order = y.argsort(2)
            return self.head(self.value(y.cumsum(1)).gather(2, order)).mean((2, 3))

    gm = trace(Sorted(), SHAPE)
    plan = make_plan(gm, BitConfig.parse("w4a4"), PlanRules())
    seen = values(gm, images(2))
    assert all(x.dtype == torch.float32 for x in seen.values()) and set(plan.values) <= set(seen)
    # The quantized values around the regions: what the layers read and yield.
    assert all(n.all_input_nodes[0].meta["value"] in plan.values for n in weighted_nodes(gm))
