"""The second front end: what torch.export yields becomes the same graph as what torch.fx traces."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.graph.aten import ATEN, aten_name, exported
from ptq.graph.blocks import split
from ptq.graph.ops import find_op
from ptq.graph.trace import trace
from tests.graph.test_serialize import Everything
from tests.graph.test_trace import WRITTEN, Around
from tests.stages import relative_error
from tests.zoo import SHAPE, ZOO, build, images

_RELATIVE = 1e-5


def _layers(gm) -> list[tuple[str, str, str]]:
    """Operation, path and owner of every module that holds weights."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_module" and list(gm.get_submodule(n.target).parameters())]
    return [(find_op(gm, n).name, n.target, n.meta["owner"]) for n in nodes]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ZOO)
def test_same_layers_blocks_and_scores_as_by_symbolic_tracing(name: str):
    net = build(name)
    traced, lifted = trace(net, SHAPE), trace(exported(net, images(2)), SHAPE)
    assert _layers(lifted) == _layers(traced)
    assert [b.layers for b in split(lifted)] == [b.layers for b in split(traced)]
    assert torch.equal(lifted(images(5)), traced(images(5)))


# A concatenation of a view with itself and such are folded away by export; what is left must still compute the same.
@pytest.mark.parametrize("spelling", WRITTEN)
def test_every_spelling(spelling: str):
    body, _ = WRITTEN[spelling]
    net = Around(body).eval().requires_grad_(False)
    expected = net(images(3))
    expected = expected["out"][0] if isinstance(expected, dict) else expected
    assert relative_error(trace(exported(net, images(2)), SHAPE)(images(3)), expected) < _RELATIVE


def test_every_operation():
    net = Everything().eval().requires_grad_(False)
    assert relative_error(trace(exported(net, images(2)), SHAPE)(images(3)), net(images(3))) < _RELATIVE


class Branches(nn.Module):
    """Its forward branches on a shape, which a symbolic trace cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        if y.shape[2] > 8:
            y = F.max_pool2d(y, 2)
        return {"out": self.fc(y.mean((2, 3)))}


def test_a_network_that_branches_on_shapes():
    net = Branches().eval().requires_grad_(False)
    teacher = trace(net, SHAPE)
    assert [(kind, path) for kind, path, _ in _layers(teacher)] == [
        ("conv", "body.0"), ("batch_norm", "body.1"), ("linear", "fc"),
    ]  # fmt: skip
    assert relative_error(teacher(images(3)), net(images(3))["out"]) < _RELATIVE
    assert torch.equal(teacher.get_submodule("body.1").running_var, net.body[1].running_var)


def test_table_names_operations_that_there_are():
    assert [name for name in ATEN if not hasattr(torch.ops.aten, name)] == []
    assert aten_name(torch.ops.aten.relu_.default) == "relu_" and aten_name(torch.relu) is None
