"""From a module to the teacher: what comes out, for every net of the zoo and for every way of writing an operation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.graph.ops import OPS, find_op, input_node, output_node
from ptq.graph.recorder import random_input
from ptq.graph.trace import trace
from tests.stages import relative_error, values
from tests.zoo import SHAPE, ZOO, build, images

# Lowering changes no more than the order of sums, as in a mean that becomes a pooling; float32 has 24 bits.
_RELATIVE = 1e-5


class Around(nn.Module):
    """A convolution, then whatever is to be traced: `body(self, y)`; `m` are modules for it to call."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.body, self.m = body, nn.ModuleList(modules)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.conv(x))


def _ops(gm) -> list[str]:
    return [op.name for n in gm.graph.nodes if (op := find_op(gm, n)) is not None]


def _parameters(net: nn.Module) -> list[tuple]:
    return [(name, p.requires_grad, p.grad, p.clone()) for name, p in net.named_parameters()]


@pytest.mark.parametrize("name", ZOO)
def test_computes_what_the_network_does(name: str, device: torch.device):
    net, x = build(name).to(device), images(5, seed=1).to(device)
    teacher = trace(net, SHAPE)
    with torch.no_grad():
        assert relative_error(teacher(x), net(x)) < _RELATIVE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_callers_network_is_unchanged(name: str, training: bool):
    net = build(name).train(training)
    before = str(net), [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    forward, x, rng = net.forward, images(2), torch.random.get_rng_state()
    trace(net, SHAPE)
    assert (str(net), [m.training for m in net.modules()]) == before[:2]  # str shows inplace, padding and the like
    assert list(net.state_dict()) == list(before[2])
    assert all(torch.equal(v, before[2][k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert net.forward == forward and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.isfinite(net(x)).all()


@pytest.mark.parametrize("name", ZOO)
def test_teacher_holds_only_known_operations_all_named(name: str):
    teacher = trace(build(name), SHAPE)
    nodes = [n for n in teacher.graph.nodes if n.op != "output"]
    assert all(find_op(teacher, n) is not None for n in nodes if n.op != "placeholder")
    names = [n.meta["value"] for n in nodes]
    assert len(set(names)) == len(names) and all(isinstance(n, str) and n for n in names)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert input_node(teacher).meta["shape"] == SHAPE and output_node(teacher).meta["shape"] == (10,)
    shapes = {value: tuple(x.shape[1:]) for value, x in values(teacher, images(3)).items()}
    assert shapes == {n.meta["value"]: n.meta["shape"] for n in nodes}


@pytest.mark.parametrize("name", ZOO)
def test_names_are_the_same_each_time(name: str):
    runs = [trace(build(name), SHAPE) for _ in range(2)]
    assert runs[0].code == runs[1].code
    assert [n.meta.get("value") for n in runs[0].graph.nodes] == [n.meta.get("value") for n in runs[1].graph.nodes]


def test_owner_is_the_innermost_module_that_is_no_sequential():
    teacher = trace(build("residual"), SHAPE)
    owners = {str(n.target): n.meta["owner"] for n in teacher.graph.nodes if n.op == "call_module"}
    assert owners["conv1"] == owners["fc"] == ""
    assert owners["layers.1.conv1"] == owners["layers.1.shortcut.0"] == "layers.1"


def test_shared_relu_has_a_place_per_call():
    teacher = trace(build("shared_relu"), SHAPE)
    paths = [str(n.target) for n in teacher.graph.nodes if find_op(teacher, n) is OPS[nn.ReLU]]
    assert len(paths) == len(set(paths)) == 3


# What is written → the operations behind the convolution.
WRITTEN = {
    "F.relu": (lambda s, y: F.relu(y, inplace=True), ["relu"]),
    "torch.relu": (lambda s, y: torch.relu(y), ["relu"]),
    "relu_": (lambda s, y: y.relu_(), ["relu"]),
    "clamp to 0…6": (lambda s, y: F.hardtanh(y, 0.0, 6.0), ["relu6"]),
    "F.relu6": (lambda s, y: F.relu6(y), ["relu6"]),
    "view": (lambda s, y: y.view(y.size(0), -1), ["reshape"]),
    "flatten": (lambda s, y: torch.flatten(y, start_dim=1), ["reshape"]),
    "squeeze": (lambda s, y: F.avg_pool2d(y, y.shape[-2:]).squeeze(), ["avg_pool", "reshape"]),
    "mean": (lambda s, y: y.mean(dim=(-1, -2)), ["avg_pool", "reshape"]),
    "mean of columns": (lambda s, y: y.mean(2), ["avg_pool", "reshape"]),
    "mean of rows, kept": (lambda s, y: y.mean(-1, keepdim=True), ["avg_pool"]),
    "mean, kept": (lambda s, y: torch.mean(y, (2, 3), keepdim=True), ["avg_pool"]),
    "adaptive": (lambda s, y: F.adaptive_avg_pool2d(y, (4, 2)), ["avg_pool"]),
    "adaptive to the same": (lambda s, y: F.adaptive_avg_pool2d(y, 16), []),
    "pool by size": (lambda s, y: F.avg_pool2d(y, y.size()[3]), ["avg_pool"]),
    "max pool": (lambda s, y: F.max_pool2d(y, 3, stride=2, padding=1, ceil_mode=True), ["max_pool"]),
    "silu": (lambda s, y: F.silu(y), ["sigmoid", "mul"]),
    "hardswish": (lambda s, y: F.hardswish(y), ["hard_sigmoid", "mul"]),
    "slice": (lambda s, y: y[:, 2:-2, ::2, 1::3], ["slice"]),
    "pad": (lambda s, y: F.pad(y, (1, 2, 3, 4, 5, 6)), ["pad"]),
    "upsample": (lambda s, y: F.interpolate(y, size=(32, 32)), ["upsample_nearest"]),
    "permute": (lambda s, y: y.permute(0, 2, 3, 1), ["permute"]),
    "transpose": (lambda s, y: y.transpose(1, -1), ["permute"]),
    "dropout": (lambda s, y: F.dropout(y, training=s.training), []),
    "x + x": (lambda s, y: y + y, ["add"]),
    "torch.add": (lambda s, y: torch.add(y, other=y), ["add"]),
    "multiply in place": (lambda s, y: y.mul_(torch.sigmoid(y)), ["sigmoid", "mul"]),
    "add a number": (lambda s, y: 3 + y, ["add_constant"]),
    "subtract a parameter": (lambda s, y: y - torch.arange(8.0).view(8, 1, 1), ["add_constant"]),
    "subtract from a number": (lambda s, y: 1 - y, ["mul_constant", "add_constant"]),
    "divide": (lambda s, y: torch.div(y, 6), ["mul_constant"]),
    "times a size": (lambda s, y: y.size(2) * y, ["mul_constant"]),
    "times what is computed of parameters": (lambda s, y: s.conv.bias.exp().view(-1, 1, 1) * y, ["mul_constant"]),
    "hand-written hard-swish": (
        lambda s, y: y * F.relu6(y + 3) / 6,
        ["add_constant", "relu6", "mul", "mul_constant"],
    ),
    "chunk": (
        lambda s, y: (lambda parts: torch.cat((parts[1], parts[0]), 1))(y.chunk(2, dim=1)),
        ["slice", "slice", "concat"],
    ),
    "split": (lambda s, y: torch.split(y, [3, 5], 1)[1], ["slice"]),
    "split along rows": (lambda s, y: y.split(6, -2)[2], ["slice"]),
    "conv2d": (lambda s, y: F.conv2d(y, s.conv.weight.transpose(0, 1), None, 2, "valid"), ["conv"]),
    "conv_transpose2d": (lambda s, y: F.conv_transpose2d(y, s.conv.weight, stride=2), ["conv_transpose"]),
    "linear": (lambda s, y: F.linear(y, s.conv.weight.flatten()[:32].view(2, 16)), ["linear"]),
    "batch_norm": (lambda s, y: F.batch_norm(y, s.conv.bias, s.conv.bias.exp()), ["batch_norm"]),
    "layer_norm": (lambda s, y: F.layer_norm(y, (16,), eps=1e-3), ["layer_norm"]),
    "group_norm": (lambda s, y: F.group_norm(y, 2, s.conv.bias, s.conv.bias, 1e-3), ["group_norm"]),
    "instance_norm": (lambda s, y: F.instance_norm(y, weight=s.conv.bias), ["group_norm"]),
    "softmax": (lambda s, y: y.softmax(-1) + F.log_softmax(y, dim=1), ["softmax", "log_softmax", "add"]),
    "softplus": (lambda s, y: F.softplus(y, 2.0), ["softplus"]),
    "mish": (lambda s, y: F.mish(y), ["softplus", "tanh", "mul"]),
    "prelu": (lambda s, y: F.prelu(y, s.conv.bias), ["prelu"]),
    "elu": (lambda s, y: F.elu(y, 0.5), ["elu"]),
    "bilinear": (lambda s, y: F.interpolate(y, size=(9, 20), mode="bilinear"), ["resize_bilinear"]),
    "bilinear, aligned": (
        lambda s, y: F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True),
        ["resize_bilinear"],
    ),
    "nearest, any size": (lambda s, y: F.interpolate(y, size=(24, 9)), ["resize_nearest"]),
    "adaptive, uneven": (lambda s, y: F.adaptive_avg_pool2d(y, (5, 3)), ["adaptive_average"]),
    "one tensor in a dictionary": (lambda s, y: {"out": [y.relu()], "aux": None}, ["relu"]),
    "concat": (lambda s, y: torch.cat(tensors=(y, y.relu()), dim=1), ["relu", "concat"]),
}


@pytest.mark.parametrize("spelling", WRITTEN)
def test_every_spelling_becomes_known_operations(spelling: str):
    body, expected = WRITTEN[spelling]
    net = Around(body).eval()
    teacher = trace(net, SHAPE)
    assert _ops(teacher) == ["conv", *expected]
    with torch.no_grad():
        expected = net(images(3))
        expected = expected["out"][0] if isinstance(expected, dict) else expected
        assert relative_error(teacher(images(3)), expected) < _RELATIVE


IN_PLACE = {
    "ReLU, then its input": (lambda s, y: s.m[0](y) + y, [nn.ReLU(inplace=True)]),
    "its input before and after": (lambda s, y: y.sigmoid() * s.m[0](y) + y, [nn.ReLU(inplace=True)]),
    "F.relu": (lambda s, y: F.relu(y, True) + y, []),
    "add_": (lambda s, y: y.add_(y.sigmoid()) * y, []),
    "two, one after another": (
        lambda s, y: s.m[1](s.m[0](y).add_(y.tanh())) + y,
        [nn.ReLU(inplace=True), nn.ReLU6(True)],
    ),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_what_is_read_after_an_in_place_operation_is_its_result(case: str):
    body, modules = IN_PLACE[case]
    net = Around(body, *modules).eval()
    with torch.no_grad():
        assert relative_error(trace(net, SHAPE)(images(3)), net(images(3))) < _RELATIVE


def test_an_in_place_operation_on_the_networks_input():
    class Net(Around):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.conv(x.relu_()), x], 1)

    net = Net(lambda s, y: y).eval()
    with torch.no_grad():
        assert relative_error(trace(net, SHAPE)(images(3)), net(images(3))) < _RELATIVE


SHARED = {
    "ReLU": (lambda s, y: s.m[0](s.conv(s.m[0](y)[:, :3])), lambda: nn.ReLU(inplace=True)),
    "SiLU": (lambda s, y: s.m[0](s.conv(s.m[0](y)[:, :3])), lambda: nn.SiLU()),
    "Hardswish": (lambda s, y: s.m[0](s.conv(s.m[0](y)[:, :3])), lambda: nn.Hardswish()),
    "pooling two sizes": (lambda s, y: s.m[0](y) * s.m[0](F.max_pool2d(y, 2)), lambda: nn.AdaptiveAvgPool2d(1)),
    "flattening two sizes": (lambda s, y: torch.cat([s.m[0](y), s.m[0](F.max_pool2d(y, 2))], 1), lambda: nn.Flatten()),
    "layer": (lambda s, y: s.m[0](s.m[0](y)), lambda: nn.Conv2d(8, 8, 1)),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_module_may_be_called_twice(case: str):
    body, module = SHARED[case]
    net = Around(body, module()).eval()
    with torch.no_grad():
        assert relative_error(trace(net, SHAPE)(images(3)), net(images(3))) < _RELATIVE


def test_data_parallel_is_unwrapped():
    net = build("residual")
    assert trace(nn.DataParallel(net), SHAPE).code == trace(net, SHAPE).code


def test_an_optional_second_input_that_is_not_read_is_dropped():
    class Net(Around):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            return super().forward(x)

    teacher = trace(Net(lambda s, y: y.relu()), SHAPE)
    assert len(teacher.graph.find_nodes(op="placeholder")) == 1


def test_within_inference_mode():
    """Tensors made there do not tell whether they were written into; a clamp that reaches nothing is kept all the same."""
    net = Around(lambda s, y: (y * 1).clamp_(-1e4, 1e4)).eval()
    with torch.inference_mode():
        gm = trace(net, SHAPE)
    assert torch.equal(gm(1e7 * images(2)), net(1e7 * images(2))) and float(gm(1e7 * images(2)).abs().max()) > 0


@pytest.mark.parametrize("start", [torch.log, torch.sqrt, lambda x: x**0.45], ids=["log", "sqrt", "gamma"])
def test_networks_for_positive_inputs(start):
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(start(x + 0.01)).relu().mean((2, 3)))

    net, x = Spectral().eval(), torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(trace(net, SHAPE)(x), net(x), atol=1e-6)
    assert random_input(net, 2, SHAPE).min() < 0  # for the next network, noise is normal again
