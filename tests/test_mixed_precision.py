"""Sensitivity, and plans that meet a budget."""

import itertools
import json

import pytest
import torch
from torch import nn

import ptq
from ptq import mixed_precision, plugins
from ptq.cli import main
from ptq.contracts import Feedback
from ptq.errors import SpecError
from ptq.graph.plan import make_plan
from ptq.mixed_precision import bit_operations, choose_widths, layer_macs, plan_within, weight_bytes
from ptq.quant.ranges import lp
from ptq.spec import BitConfig, Budget, Override, PlanRules
from tests.stages import prepare
from tests.zoo import SHAPE, build, images

_CPU = torch.device("cpu")


def _random_costs(places, widths, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {p: {b: float(torch.rand((), generator=rng)) * 4.0**-b for b in widths} for p in places}


@pytest.mark.parametrize("seed", range(5))
def test_size_is_met_at_the_least_cost(seed: int):
    """Against every combination there is."""
    gm = prepare("residual").folded
    plan = make_plan(gm, BitConfig(8, 4), PlanRules())
    free = list(plan.weights)[1:-1]
    costs = _random_costs(free, (2, 4, 8), seed)
    sizes = {p: gm.get_submodule(p).weight.numel() / 8 for p in plan.weights}
    spent = 8 * (sizes["conv1"] + sizes["fc"])
    budget = spent + 4.3 * sum(sizes[p] for p in free)
    best = min(
        (sum(costs[p][b] for p, b in zip(free, bits)), bits)
        for bits in itertools.product((2, 4, 8), repeat=len(free))
        if spent + sum(sizes[p] * b for p, b in zip(free, bits)) <= budget
    )
    found = choose_widths(gm, plan, ["conv1", "fc"], costs, {}, Budget("size", budget))
    assert tuple(o.weight for o in found) == best[1] and [o.pattern for o in found] == free


def test_bit_operations_are_met_at_the_least_cost():
    """Weights and activations together; two layers that read one tensor agree on its width."""
    gm = prepare("residual").folded
    plan = make_plan(gm, BitConfig(8, 8), PlanRules())
    free, macs = list(plan.weights)[1:-1], layer_macs(gm)
    inputs = {
        str(n.target): n.all_input_nodes[0].meta["value"] for n in gm.graph.nodes if str(n.target) in plan.weights
    }
    groups = list(dict.fromkeys(plan.group(inputs[p]) for p in free))
    weights, acts = _random_costs(free, (2, 4)), _random_costs(groups, (4, 8), 1)
    fixed = sum(macs[p] * 64 for p in ("conv1", "fc"))
    budget = fixed + 0.4 * sum(macs[p] * 32 for p in free)
    best = min(
        (sum(weights[p][b] for p, b in zip(free, wb)) + sum(acts[g][a] for g, a in zip(groups, ab)), wb, ab)
        for wb in itertools.product((2, 4), repeat=len(free))
        for ab in itertools.product((4, 8), repeat=len(groups))
        if fixed + sum(macs[p] * b * ab[groups.index(plan.group(inputs[p]))] for p, b in zip(free, wb)) <= budget
    )
    found = choose_widths(gm, plan, ["conv1", "fc"], weights, acts, Budget("bops", budget))
    assert tuple(o.weight for o in found) == best[1]
    assert [o.act for o in found] == [best[2][groups.index(plan.group(inputs[p]))] for p in free]


def test_measured_plan_meets_its_budget_and_keeps_what_was_set():
    gm = prepare("residual").folded
    free = PlanRules()
    uniform = weight_bytes(gm, make_plan(gm, BitConfig(3, 4), free))
    common = {"seed": 0, "device": _CPU, "feedback": Feedback()}
    plan = plan_within(gm, Budget("size", uniform, 4), free, images(), lp, **common)
    assert weight_bytes(gm, plan) <= uniform
    assert plan.weights["conv1"].bits == plan.weights["fc"].bits == 8
    kept = PlanRules(overrides=(Override("layers.0.conv1", weight=8),))
    plan = plan_within(gm, Budget("size", uniform, 4), kept, images(), lp, **common)
    assert plan.weights["layers.0.conv1"].bits == 8 and weight_bytes(gm, plan) <= uniform
    half = 0.4 * bit_operations(gm, make_plan(gm, BitConfig(8, 8), free))
    assert bit_operations(gm, plan_within(gm, Budget("bops", half), free, images(), lp, **common)) <= half
    with pytest.raises(SpecError, match="cannot be met"):
        plan_within(gm, Budget("size", 100.0, 4), free, images(), lp, **common)


def test_wider_costs_less():
    found = ptq.bit_sensitivity(build("residual"), images(), input_shape=SHAPE, widths=(2, 8))
    kinds = {kind: [c for c in found.costs if c.kind == kind] for kind in ("weight", "block", "activation")}
    assert len(kinds["weight"]) == 2 * 7 and all(kinds.values()) and found.plan is None
    table = {(c.place, c.kind, c.bits): c.sqnr_db for c in found.costs}
    assert all(table[p, k, 8] > table[p, k, 2] + 10 for p, k, _ in table)


def test_command_writes_a_plan_that_quantize_takes(tmp_path, capsys):
    torch.save(build("residual").state_dict(), tmp_path / "m.pt")
    network = [str(tmp_path / "m.pt"), "--arch", "tests.zoo:Residual", "--input-shape", "3,16,16", "--data", "gaussian"]
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    args = [
        "sensitivity",
        *network,
        "-n",
        "8",
        "--widths",
        "2,8",
        "--json",
        "--bits",
        "auto:size=4KB,a4",
        "-o",
        str(plan),
    ]
    assert main(args) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"]["bytes"] <= 4000 and {c["bits"] for c in shown["costs"]} == {2, 8}
    assert main(args) == 2 and "exists" in capsys.readouterr().err
    assert main([*args[:-1], str(tmp_path), "--force"]) == 2 and "is a folder" in capsys.readouterr().err
    assert main([*args[:-1], str(plan / "p.json")]) == 2 and "cannot be written" in capsys.readouterr().err
    quick = ["--rounding", "nearest", "--effort", "quick", "--quiet", "-o", str(out)]
    assert main(["quantize", *network, "--plan", str(plan), *quick]) == 0
    assert json.loads((out / "plan.json").read_text()) == json.loads(plan.read_text())
    assert ptq.load(out).plan.to_json() == json.loads(plan.read_text())
    again = tmp_path / "again"  # a recipe repeats a plan too
    recipe = ["--recipe", str(out / "manifest.json"), "--effort", "quick", "--quiet", "-o", str(again)]
    assert main(["quantize", *network[:-2], *recipe]) == 0
    assert (again / "tensors.safetensors").read_bytes() == (out / "tensors.safetensors").read_bytes()
    assert main(["quantize", *network, "--plan", str(plan), "--set", "fc=w4", *quick[:-1], str(tmp_path / "none")]) == 2
    assert "a plan says every width" in capsys.readouterr().err
    skipped = tmp_path / "skipped"
    given = ["--skip", "layers.*", "--set", "layers.0.conv2=w8", *quick[:-1], str(skipped)]
    assert main(["quantize", *network, *given]) == 0
    assert set(ptq.load(skipped).plan.weights) == {"conv1", "layers.0.conv2", "fc"}
    assert "float" in (skipped / "report.md").read_text()
    assert main(["inspect", *network[:5], "--bits", "auto:size=4KB"]) == 2
    assert "ptq sensitivity" in capsys.readouterr().err
    other = [str(tmp_path / "m.pt"), "--arch", "tests.zoo:Residual", "--input-shape", "3,16,16", "--skip", "nothing.*"]
    assert main(["inspect", *other]) == 2 and "layers.0.conv1" in capsys.readouterr().err


class _Excited(nn.Module):
    """A squeeze-excite inside a residual block: five values live across one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depth = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        )
        self.reduce, self.gate, self.project = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        e = self.expand(x).relu()
        d = self.depth(e).relu()
        g = torch.sigmoid(self.gate(self.reduce(d.mean(dim=(2, 3), keepdim=True)).relu()))
        return self.fc((x + self.project(d * g)).mean(dim=(2, 3)))


def test_values_that_live_long_are_kept():
    net = _Excited()
    found = ptq.bit_sensitivity(net, images(), input_shape=SHAPE, widths=(4,), budget="auto:size=200B,a8")
    assert {c.place for c in found.costs if c.kind == "weight"} == {
        n for n, m in net.named_modules() if hasattr(m, "weight")
    }
    assert found.plan is not None and found.bytes <= 200


def test_what_was_set_counts_against_the_budget():
    gm = prepare("residual").folded
    common = {"seed": 0, "device": _CPU, "feedback": Feedback()}
    least = bit_operations(gm, make_plan(gm, BitConfig(2, 2), PlanRules()))
    rules = PlanRules(overrides=(Override("layers.*", act=8),))
    plan = plan_within(gm, Budget("bops", 3.2 * least), rules, images(), lp, **common)
    assert bit_operations(gm, plan) <= 3.2 * least
    first_output = next(v for v in plan.values if v != "x")
    assert plan.values[first_output].bits == 8  # the edges' rule holds
    with pytest.raises(SpecError, match="cannot be met"):
        plan_within(gm, Budget("bops", 1.01 * least), rules, images(), lp, **common)
    every = PlanRules(overrides=(Override("*", weight=4),))
    assert {
        s.bits for s in plan_within(gm, Budget("size", 1e6, 4), every, images(), lp, **common).weights.values()
    } == {4}


def test_activations_stay_free_where_only_the_weights_were_set():
    """A layer at w8 reads 2 bits like any other, if the budget needs it."""
    gm, rules = prepare("plain").folded, PlanRules("all")
    narrow = make_plan(gm, BitConfig(2, 2), rules)
    middle = list(narrow.weights)[1]
    set_by_hand = PlanRules("all", overrides=(Override(middle, 8, None),))
    least = bit_operations(gm, make_plan(gm, BitConfig(2, 2), set_by_hand))
    common = {"seed": 0, "device": _CPU, "feedback": Feedback()}
    plan = plan_within(gm, Budget("bops", 1.05 * least), set_by_hand, images(), lp, **common)
    assert plan.weights[middle].bits == 8 and bit_operations(gm, plan) <= 1.05 * least


def test_no_more_images_are_made_than_judge():
    with pytest.MonkeyPatch.context() as patched:
        made = []
        gather = mixed_precision.gather
        patched.setattr(
            mixed_precision, "gather", lambda source, *args: made.append(source.count) or gather(source, *args)
        )
        ptq.bit_sensitivity(build("residual"), "gaussian:count=64", input_shape=SHAPE, widths=(4,), count=8)
    assert made == [8]


def test_a_plan_for_a_target(tmp_path):
    """What a target cannot take is said before images are made; with what it asks for, the plan is one that it takes."""

    def plan(**more):
        return ptq.bit_sensitivity(
            build("residual"), "gaussian:count=8", input_shape=SHAPE, widths=(4,), count=8, budget="auto:size=2KB,a8",
            target="tensorrt", **more,
        ).plan  # fmt: skip

    with pytest.raises(ptq.ExportError, match="add --activations signed"):
        plan()
    found = plan(weights="symmetric", activations="signed")
    target = plugins.build("exporters", "tensorrt")
    target.check(prepare("residual").folded, found)
    unsuited = make_plan(prepare("residual").folded, BitConfig(4, 8), PlanRules())
    with pytest.raises(ptq.ExportError, match="have it made again"):
        ptq.quantize(build("residual"), data="gaussian:count=8", input_shape=SHAPE, plan=unsuited, target="tensorrt")
