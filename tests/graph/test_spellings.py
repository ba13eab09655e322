"""Unusual spellings and unusual options: each is traced, and what it computes is quantized, not lost in a float region."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptq
from ptq.graph.channel_means import expected_means
from ptq.graph.fold_bn import fold_batch_norm, unfolded
from ptq.graph.ops import find_op
from ptq.graph.trace import trace
from tests.stages import relative_error
from tests.zoo import SHAPE, images


def _written(x: Tensor) -> Tensor:
    y = x[:, :3]
    y.clamp_(-1e4, 1e4)
    return x


class Spelled(nn.Module):
    """A convolution, one operation, a convolution."""

    def __init__(self, body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.last = body, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


KNOWN = {
    "permute, dims by name": lambda x: torch.permute(x, dims=(0, 1, 3, 2)),
    "x.permute, dims by name": lambda x: x.permute(dims=(0, 1, 3, 2)),
    "sub by name": lambda x: torch.sub(input=x, other=1.0),
    "sub with alpha": lambda x: torch.sub(x, 1.0, alpha=3),
    "rsub with alpha": lambda x: torch.rsub(x, 1.0, alpha=2),
    "div by name": lambda x: torch.div(input=x, other=2.0),
    "chunks backwards": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "all parts at once": lambda x: torch.cat(torch.tensor_split(x, 3, dim=1), 1),
    "another divisor": lambda x: F.avg_pool2d(x, 2, padding=1, divisor_override=3),
    "resizing by a whole factor": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest-exact, larger": lambda x: F.interpolate(x, scale_factor=(3, 2), mode="nearest-exact"),
    "nearest-exact, smaller": lambda x: F.interpolate(x, size=(8, 4), mode="nearest-exact"),
    "windows that all begin before the padding": lambda x: F.max_pool2d(
        x[:, :, :15, :15], 2, padding=1, ceil_mode=True
    ),
    "a concatenation, dims from behind": lambda x: torch.cat([x[:, :4], x[:, 4:]], dim=-3),
    "a clamp that is a ReLU": lambda x: x.clamp(min=0),
    "a clamp that is a ReLU6": lambda x: torch.clamp(x * 10, 0, 6),
    "a clamp in place that is a ReLU": lambda x: (x * 1).clamp_(0.0) + torch.clip(x, min=0),
    "chunk by name": lambda x: torch.cat([torch.chunk(input=x, chunks=2, dim=1)[k] for k in (1, 0)], 1),
    "an activation by name": lambda x: nn.ReLU(inplace=True)(input=x * 1),
    "nearest-exact as a module": nn.Upsample(scale_factor=2, mode="nearest-exact"),
}
UNKNOWN = {
    "a clamp in place": lambda x: (x * 1).clamp_(-0.1, 0.2),
    "a clamp in place that reaches nothing": lambda x: (x * 1).clamp_(-1e4, 1e4),
    "a threshold in place": lambda x: F.threshold(x * 1, -1e4, 0.0, inplace=True),
    "a clamp of a part in place": lambda x: _written(x * 1),
    "a vector as weight": lambda x: F.linear(x, torch.arange(16.0)).unsqueeze(3),
    "no padding": lambda x: F.pad(x, ()) + x.cumsum(1),
    "layer_norm without weight": lambda x: F.layer_norm(x, (16,), None, torch.arange(16.0)),
    "a last window in the padding, rounded down": lambda x: F.max_pool2d(
        x[:, :, :15], (2, 3), 2, padding=1, ceil_mode=True
    ),
    "a mean that ends in the padding": lambda x: F.avg_pool2d(x[:, :, :6, :5], 3, padding=1, ceil_mode=True),
    "resizing by a broken factor": lambda x: F.interpolate(x, scale_factor=1.3),
    "nearest-exact to any size": lambda x: F.interpolate(x, size=(9, 20), mode="nearest-exact"),
    "nearest-exact, larger and smaller": lambda x: F.interpolate(x, size=(32, 8), mode="nearest-exact"),
    "bilinear by a broken factor": lambda x: F.interpolate(x, scale_factor=0.7, mode="bilinear"),
    "softplus of its negative": lambda x: F.softplus(x, beta=-1),
    "softplus cut off early": lambda x: F.softplus(x, beta=3, threshold=2),
}


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_is_traced(name: str):
    net = Spelled((KNOWN | UNKNOWN)[name]).eval()
    gm = trace(net, SHAPE)
    with torch.no_grad():
        assert relative_error(gm(images(3)), net(images(3))) < 1e-5
    regions = [n for n in gm.graph.nodes if (op := find_op(gm, n)) is not None and op.name == "float_region"]
    assert bool(regions) == (name in UNKNOWN)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("functional", [False, True])
def test_a_convolution_padded_unevenly_keeps_its_name_and_its_batch_norm(functional: bool):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 4, padding="same")
    called = Wrapped(lambda x: F.conv2d(x, conv.weight, conv.bias, padding="same"))
    net = nn.Sequential(called if functional else conv, nn.BatchNorm2d(8)).eval()
    folded = fold_batch_norm(gm := trace(net, SHAPE))
    with torch.no_grad():
        assert relative_error(folded(images(3)), net(images(3))) < 1e-5
    assert unfolded(folded) == []
    assert functional or isinstance(gm.get_submodule("0"), nn.Conv2d)


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tokens(nn.Module):
    """A linear layer on tokens, normalized token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix, self.norm = nn.Conv2d(3, width, 4, 4), nn.Linear(width, width), nn.BatchNorm1d(16)
        self.head = nn.Linear(width, 5)
        for tensor in (self.norm.weight, self.norm.running_var):
            nn.init.uniform_(tensor, 0.3, 2)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(self.stem(x).flatten(2).transpose(1, 2)))
        return self.head(torch.relu(y).mean(1))


@pytest.mark.parametrize("width", [16, 24])
def test_a_norm_of_tokens_is_not_folded_into_a_layer_of_channels(width: int, tmp_path):
    net = Tokens(width).eval()
    folded = fold_batch_norm(trace(net, (3, 16, 16)))
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(folded(x), net(x)) < 1e-5
    assert unfolded(folded) == ["norm"]
    qm = ptq.quantize(net, "w8a8", x, input_shape=(3, 16, 16), rounding="nearest", repair="analytic_bias")
    assert qm.manifest.metrics["sqnr_db"] > 30
    assert ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")["passed"]


def test_pools_of_tokens_take_the_batch_for_channels_and_are_not_taken_for_pools_of_pictures(tmp_path):
    pools = nn.ModuleList([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((3, 5))])
    for pool, left in zip(pools, (32, 32, 15)):
        body = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Wrapped(lambda x: x.transpose(1, 2)), pool, nn.Flatten(1)
        )
        net = nn.Sequential(body, nn.Linear(left, 5)).eval()
        qm = ptq.quantize(net, "w8a8", torch.randn(8, 3, 16, 16), input_shape=(3, 16, 16), rounding="nearest")
        assert ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")["passed"]


def test_layers_of_layers_are_not_replaced_by_what_they_call():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Wrapped(lambda x: x.transpose(1, 2)))
    net = nn.Sequential(tokens, layer, nn.Flatten(1), nn.Linear(8 * 16, 5)).eval()
    qm = ptq.quantize(net, "w8a8", torch.randn(8, 3, 16, 16), input_shape=(3, 16, 16), rounding="nearest")
    assert {"1.linear1", "1.linear2"} <= set(qm.plan.weights)


def test_a_tensor_concatenated_with_itself_has_the_means_of_both():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Wrapped(lambda y: torch.cat([y, y], 1)), nn.Conv2d(16, 4, 1)
    ).eval()
    assert 16 in [len(mean) for mean in expected_means(trace(net, SHAPE)).values()]


def test_a_module_named_as_a_constant_of_the_file(tmp_path):
    net = nn.Sequential()
    net.add_module("one", nn.Conv2d(3, 8, 3))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    qm = ptq.quantize(net.eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    assert ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")["passed"]


class Masked(nn.Module):
    """Attention over channels behind an infinite mask, kept as a buffer or as a parameter."""

    def __init__(self, parameter: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.score, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)
        mask = torch.zeros(8).index_fill(0, torch.tensor([1, 4]), float("-inf"))
        if parameter:
            self.mask = nn.Parameter(mask, requires_grad=False)
        else:
            self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).mean((2, 3))
        return self.head(y * F.softmax(self.score(y) + self.mask, 1))


@pytest.mark.parametrize("parameter", [False, True])
def test_an_infinite_mask_is_quantized_around(parameter: bool):
    qm = ptq.quantize(Masked(parameter).eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    assert qm.manifest.metrics["sqnr_db"] > 15


class Frequencies(nn.Module):
    """A layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 14, 8, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.irfft2(torch.fft.rfft2(self.conv(x)) * self.weight, s=(14, 14))
        return y.mean((2, 3))


def test_complex_weights_of_a_network_are_no_broken_weights():
    net = Frequencies().eval()
    with torch.no_grad():
        assert relative_error(trace(net, SHAPE)(images(3)), net(images(3))) < 1e-5
