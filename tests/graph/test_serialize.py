"""A student's graph as JSON and back."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ptq.contracts import Feedback
from ptq.errors import ModelError
from ptq.graph.ops import OPS, find_op
from ptq.graph.plan import QuantPlan
from ptq.graph.serialize import graph_from_json, graph_to_json
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct.nearest import Nearest
from tests.stages import Prepared, assert_unchanged, fingerprint, prepare, prepared
from tests.zoo import ZOO, images


def _hardened(made: Prepared) -> tuple[fx.GraphModule, QuantPlan]:
    """A network with nearest rounding, its weights stored as integers."""
    gm, _ = reconstruct_blocks(
        made.teacher, made.student, images(), Nearest(), seed=0, device=torch.device("cpu"), feedback=Feedback()
    )
    return gm, made.plan


def _round_trip(gm: fx.GraphModule, plan: QuantPlan) -> fx.GraphModule:
    """Through text, as on disk; the plan too."""
    text = json.dumps({"graph": graph_to_json(gm), "plan": plan.to_json()}, allow_nan=False)
    data = json.loads(text)
    again = graph_from_json(data["graph"], QuantPlan.from_json(data["plan"]))
    again.load_state_dict({k: v.clone() for k, v in gm.state_dict().items()}, assign=True)
    return again


def _without_node_names(gm: fx.GraphModule) -> list[dict]:
    """The rows with nodes by position: FX names nodes anew when it builds them; values, paths and fields are kept."""
    rows = graph_to_json(gm)
    position = {row["name"]: k for k, row in enumerate(rows)}
    return [row | {"name": position[row["name"]], "inputs": [position[i] for i in row["inputs"]]} for row in rows]


@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "w2"])
@pytest.mark.parametrize("name", ZOO)
def test_round_trip_is_bit_equal(name: str, bits: str):
    gm, plan = _hardened(prepare(name, bits))
    again = _round_trip(gm, plan)
    with torch.no_grad():
        assert torch.equal(again(images(8, seed=1)), gm(images(8, seed=1)))
    assert _without_node_names(again) == _without_node_names(gm)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert not any(t.is_meta for t in again.state_dict().values())


@pytest.mark.parametrize("name", ZOO)
def test_no_float_weight_is_stored(name: str):
    """Integer codes are the truth: int8 weights, int32 biases; in float only scales and what stays float."""
    gm, plan = _hardened(prepare(name))
    state = gm.state_dict()
    for path in plan.weights:
        assert state[f"{path}.parametrizations.weight.original"].dtype == torch.int8
        bias = state.get(f"{path}.parametrizations.bias.original")
        assert (bias is None) == (gm.get_submodule(path).bias is None) and (bias is None or bias.dtype == torch.int32)
        assert f"{path}.weight" not in state and f"{path}.bias" not in state


@pytest.mark.parametrize("name", ZOO)
def test_network_is_unchanged(name: str):
    gm, plan = _hardened(prepare(name))
    before = fingerprint(gm)
    again = _round_trip(gm, plan)
    for tensor in again.state_dict().values():
        tensor.zero_()
    assert_unchanged(gm, before)


class Everything(nn.Module):
    """Every operation of the table that the zoo does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, (3, 5), stride=(1, 2), padding=(2, 2), dilation=(2, 1))
        self.act, self.head, self.norm = nn.LeakyReLU(0.2), nn.Linear(8, 10), nn.BatchNorm1d(10)
        self.up, self.layer_norm, self.prelu = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, 4), nn.LayerNorm(7), nn.PReLU(8)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 8).view(8, 1, 1))
        self.groups, self.instances = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        nn.init.uniform_(self.groups.weight, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = F.avg_pool2d(x, (3, 2), stride=(1, 2), padding=(1, 0), ceil_mode=True, count_include_pad=False)
        x = F.gelu(F.interpolate(x, scale_factor=2), approximate="tanh") * torch.tanh(F.interpolate(x, scale_factor=2))
        x = F.elu(self.prelu(self.up(x)), 0.5) * self.scale + 1
        x = F.interpolate(F.interpolate(x, (9, 7)), (11, 7), mode="bilinear") + F.adaptive_avg_pool2d(x, (11, 7))
        x = F.mish(self.groups(self.layer_norm(x))) + F.softplus(self.instances(x), 2.0)
        x = F.hardswish(F.max_pool2d(x, 3, 2, 1, ceil_mode=True))
        x = self.head(x.permute(0, 2, 3, 1))
        x = self.norm(F.relu(x.transpose(1, -1).mean((2, 3))))
        return torch.cat((x.softmax(1), F.log_softmax(x, 1)), 1)


class Unknown(nn.Module):
    """Operations that the table does not have: moves, and with constants, integers and numbers that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.roll(self.stem(x), (1, -2), (2, 3)))
        z = torch.where(y > 0, y, y / (1 + y.abs())).masked_fill(torch.arange(16) == 3, float("-inf")).softmax(-1)
        return self.head(torch.gather(z, 2, y.argsort(2))[:, :, 1]).cumsum(1).mean(1)


@pytest.mark.parametrize("bits", ["w8a8", "w4"])
@pytest.mark.parametrize("kind", [Everything, Unknown])
def test_every_operation_round_trips(kind: type[nn.Module], bits: str):
    torch.manual_seed(0)
    net = kind().eval()
    if isinstance(net, Everything):
        net.norm.running_mean.fill_(0.1)
    gm, plan = _hardened(prepared(net, bits))
    again = _round_trip(gm, plan)
    with torch.no_grad():
        assert torch.equal(again(images(8, seed=1)), gm(images(8, seed=1)))
    assert _without_node_names(again) == _without_node_names(gm)


def test_every_operation_is_tried():
    found = set()
    for made in (prepared(Everything()), prepared(Unknown()), *(prepare(name) for name in ZOO)):
        gm, _ = _hardened(made)
        found |= {op.name for n in gm.graph.nodes if (op := find_op(gm, n)) is not None}
    assert found == {op.name for op in OPS.values()}


class LeadingNorm(nn.Module):
    """A BatchNorm that cannot fold."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.conv = norm, nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"affine": False}], ids=str)
def test_kinds_of_batch_norm_that_stay(options: dict):
    gm, plan = _hardened(prepared(LeadingNorm(nn.BatchNorm2d(3, **options)), "w8a8"))
    again = _round_trip(gm, plan)
    with torch.no_grad():
        assert torch.equal(again(images(8, seed=1)), gm(images(8, seed=1)))


NAMES = {
    "a node": ("name", "x=__import__('os').system('exit')"),
    "a node that is no identifier": ("name", "x y"),
    "a value outside the folder": ("value", "/outside"),
    "a value above the folder": ("value", "../outside"),
    "a module": ("path", '__doc__") or print(1) or getattr(self, "conv1'),
    "a module over two lines": ("path", "conv1\nimport os"),
}


@pytest.mark.parametrize("what", NAMES)
def test_names_that_are_more_than_names(what: str):
    """fx writes names into code; golden vectors, into names of files."""
    gm, plan = _hardened(prepare("plain", "w8a8"))
    rows = json.loads(json.dumps(graph_to_json(gm)))
    key, name = NAMES[what]
    row = next(r for r in rows if key in r)
    for other in rows:
        other["inputs"] = [name if key == "name" and i == row["name"] else i for i in other["inputs"]]
    row[key] = name
    with pytest.raises(ModelError, match="called") as caught:
        graph_from_json(rows, plan)
    assert "\n" not in str(caught.value)
