"""Which layers are the first and the last, which are one module's, and what they are called."""

import torch
from torch import Tensor, nn

from ptq.graph.ops import weighted_nodes
from ptq.graph.plan import make_plan
from ptq.graph.trace import trace
from ptq.mixed_precision import fixed_layers
from ptq.spec import BitConfig, Override, PlanRules
from tests.zoo import SHAPE


class _Heads(nn.Module):
    """Two scales, a head of its own for each, and one that both share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
        self.heads = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu()).relu()
        scales = (x, nn.functional.max_pool2d(x, 2))
        return torch.cat([self.shared(head(s).relu()).mean((2, 3)) for head, s in zip(self.heads, scales)], 1)


def test_first_and_last_are_so_by_structure():
    """Of parallel heads, each is the last layer."""
    gm = trace(_Heads().eval(), SHAPE)
    plan = make_plan(gm, BitConfig.parse("w4a4"), PlanRules())
    wide = {path for path, spec in plan.weights.items() if spec.bits == 8}
    again = next(path for path in plan.weights if path.startswith("shared_again"))
    assert wide == {"stem", "shared", again} and set(plan.weights) - wide == {"body", "heads.0", "heads.1"}
    entering = {n.target: plan.values[n.all_input_nodes[0].meta["value"]].bits for n in weighted_nodes(gm)}
    assert {entering["shared"], entering[again]} == {8} and entering["heads.0"] == 4
    assert set(fixed_layers(gm, plan, PlanRules())) == wide


def test_what_is_said_of_a_shared_layer_is_for_all_of_its_calls():
    gm = trace(_Heads().eval(), SHAPE)
    plan = make_plan(gm, BitConfig.parse("w4a4"), PlanRules(overrides=(Override.parse("shared=float"),)))
    assert set(plan.weights) == {"stem", "body", "heads.0", "heads.1"}
    plan = make_plan(gm, BitConfig.parse("w4a4"), PlanRules(overrides=(Override.parse("shared=w2"),)))
    assert sorted(spec.bits for path, spec in plan.weights.items() if path.startswith("shared")) == [2, 2]


class _OwnConv(nn.Conv2d):
    """As libraries have them, with something of their own."""


def test_layers_of_own_classes_have_their_names():
    gm = trace(nn.Sequential(nn.Sequential(_OwnConv(3, 4, 3), nn.ReLU()), _OwnConv(4, 2, 1)).eval(), SHAPE)
    assert [str(n.target) for n in weighted_nodes(gm)] == ["0.0", "1"]
    assert [n.meta["shape"][0] for n in weighted_nodes(gm)] == [4, 2]


def test_a_tensor_is_as_wide_as_any_of_its_readers_needs():
    """What is asked of one layer narrows no other."""
    gm = trace(_Heads().eval(), SHAPE)
    entering = {n.target: n.all_input_nodes[0].meta["value"] for n in weighted_nodes(gm)}

    def bits(*asked: str) -> int:
        plan = make_plan(gm, BitConfig.parse("w6a6"), PlanRules(overrides=tuple(map(Override.parse, asked))))
        assert entering["heads.0"] in plan.values
        return plan.values[entering["heads.0"]].bits

    # Both heads read the same values, one of them through a pool, which shares its grid.
    assert bits() == 6 and bits("heads.0=a4") == 6 and bits("heads.0=a8") == 8
    assert bits("heads.0=a4", "heads.1=a4") == 4
