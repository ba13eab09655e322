"""What gets which grid."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from ptq.errors import ModelError, SpecError
from ptq.graph.fold_bn import fold_batch_norm
from ptq.graph.ops import find_op, input_node, output_node, weighted_nodes
from ptq.graph.plan import QuantPlan, make_plan, merged_clamp
from ptq.graph.trace import trace
from ptq.spec import BitConfig, Override, PlanRules, QuantSpec
from tests.stages import assert_unchanged, fingerprint, values
from tests.zoo import SHAPE, ZOO, build, images


def _folded(name: str) -> fx.GraphModule:
    return fold_batch_norm(trace(build(name), SHAPE))


def _plan(gm: fx.GraphModule, bits: str = "w4a4", **rules) -> QuantPlan:
    return make_plan(gm, BitConfig.parse(bits), PlanRules(**rules))


def _clamped(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that carries the quantizer of a node's result: a ReLU behind it, or itself."""
    return merged_clamp(gm, node) or node


@pytest.mark.parametrize("name", ZOO)
def test_covers_every_tensor_that_integer_kernels_touch(name: str):
    """Inputs of layers, and inputs and results of additions, products, concatenations and pools; not the logits."""
    gm = _folded(name)
    plan = _plan(gm)
    needed = {input_node(gm)}
    for node in gm.graph.nodes:
        op = find_op(gm, node)
        if op is not None and op.role in ("weighted", "join", "concat", "pool", "same"):
            needed |= {*node.all_input_nodes, _clamped(gm, node)}
    needed.discard(output_node(gm))
    assert {n.meta["value"] for n in needed} <= set(plan.values)
    assert output_node(gm).meta["value"] not in plan.values
    assert list(plan.weights) == [str(n.target) for n in weighted_nodes(gm)]


@pytest.mark.parametrize("name", ZOO)
def test_result_of_a_layer_is_not_quantized_before_its_relu(name: str):
    gm = _folded(name)
    before = {n.meta["value"] for n in gm.graph.nodes if n.op != "output" and merged_clamp(gm, n) is not None}
    assert before and not before & set(_plan(gm).values)


@pytest.mark.parametrize("name", ZOO)
def test_symmetric_where_no_value_can_be_negative(name: str):
    gm = _folded(name)
    plan = _plan(gm)
    tied = {v for tie in plan.ties for v in tie}
    for node in gm.graph.nodes:
        value, op = node.meta.get("value"), find_op(gm, node)
        if op is not None and op.nonneg == "always" and value in set(plan.values) - tied:
            assert plan.values[value].symmetric
    assert all(not spec.signed and spec.axis is None for spec in plan.values.values())
    lowest = {value: float(x.min()) for value, x in values(gm, images()).items()}
    assert all(lowest[value] >= 0 for value, spec in plan.values.items() if spec.symmetric)
    assert any(spec.symmetric for spec in plan.values.values())
    assert not plan.values[input_node(gm).meta["value"]].symmetric


@pytest.mark.parametrize("name", ZOO)
def test_ties_are_disjoint_and_of_one_spec(name: str):
    plan = _plan(_folded(name))
    members = [v for tie in plan.ties for v in tie]
    assert len(members) == len(set(members)) and all(len(tie) > 1 for tie in plan.ties)
    order = list(plan.values)
    for tie in plan.ties:
        assert len({plan.values[v] for v in tie}) == 1
        assert {plan.group(v) for v in tie} == {min(tie, key=order.index)}
    assert all(plan.group(v) == v for v in order if v not in members)


@pytest.mark.parametrize("name", ZOO)
def test_moves_and_concatenations_are_tied_to_their_sources(name: str):
    gm = _folded(name)
    plan = _plan(gm)
    for node in gm.graph.nodes:
        op = find_op(gm, node)
        if op is not None and op.role in ("same", "concat"):
            assert len({plan.group(n.meta["value"]) for n in (node, *node.all_input_nodes)}) == 1


def test_ties_of_known_nets():
    def ties(name: str) -> set[frozenset[str]]:
        return set(_plan(_folded(name)).ties)

    assert frozenset({"pool", "relu"}) in ties("plain")
    assert frozenset({"x", "stem_0"}) in ties("depthwise")  # zero padding of the input
    (join,) = [tie for tie in ties("concat") if "cat_1" in tie]
    assert len(join) == 4  # three branches and what joins them


@pytest.mark.parametrize("name", ZOO)
def test_adds_is_for_what_enters_no_layer(name: str):
    gm = _folded(name)
    plan = _plan(gm, "w4a3", adds=6, edges="all")
    entering = {plan.group(n.all_input_nodes[0].meta["value"]) for n in weighted_nodes(gm)}
    first = plan.group(input_node(gm).meta["value"])
    for value, spec in plan.values.items():
        group = plan.group(value)
        assert spec.bits == (8 if group == first else 3 if group in entering else 6), value


def test_adds_of_a_residual_net():
    plan = _plan(_folded("residual"), "w4a3", adds=6, edges="all")
    feeding_adds_and_pools = {"layers_0_bn2", "layers_1_bn2", "layers_1_shortcut_1", "relu_4"}
    assert {v for v, spec in plan.values.items() if spec.bits == 6} == feeding_adds_and_pools


class _HardSwish(nn.Module):
    """Written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.relu6(x + 3) / 6


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(), nn.GELU(), _HardSwish()]
)
def test_first_output_is_what_its_activation_yields(activation: nn.Module):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        activation,
        nn.Conv2d(4, 4, 3),
        activation,
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    gm = trace(net, (3, 8, 8))
    enters = [n.all_input_nodes[0].meta["value"] for n in weighted_nodes(gm)]
    for edges, wanted in (("brecq", [8, 8, 8]), ("qdrop", [8, 4, 8])):
        plan = _plan(gm, "w4a4", edges=edges)
        assert [plan.values[name].bits for name in enters] == wanted


@pytest.mark.parametrize("name", ZOO)
def test_edges(name: str):
    """brecq: first and last layer, first output and last input wide; qdrop: not the first output; all: none of them."""
    gm = _folded(name)
    layers = weighted_nodes(gm)
    first, last = str(layers[0].target), str(layers[-1].target)
    first_out = _clamped(gm, layers[0]).meta["value"]
    last_in = layers[-1].all_input_nodes[0].meta["value"]
    plans = {edges: _plan(gm, "w2a3e7", edges=edges, adds=3) for edges in ("brecq", "qdrop", "all")}
    widths = {
        edges: (p.weights[first].bits, p.weights[last].bits, p.values[first_out].bits, p.values[last_in].bits)
        for edges, p in plans.items()
    }
    assert widths == {"brecq": (7, 7, 7, 7), "qdrop": (7, 7, 3, 7), "all": (2, 2, 3, 3)}
    for plan in plans.values():
        assert {spec.bits for path, spec in plan.weights.items() if path not in (first, last)} == {2}
        assert plan.values[input_node(gm).meta["value"]].bits == 7
        wide = {plan.group(v) for v in (first_out, last_in, input_node(gm).meta["value"])}
        assert {spec.bits for v, spec in plan.values.items() if plan.group(v) not in wide} <= {3}


@pytest.mark.parametrize(("bits", "asymmetric"), [("w2", True), ("w4a4", True), ("w5a8", False), ("w8a8", False)])
def test_narrow_weights_have_zero_points(bits: str, asymmetric: bool):
    plan = _plan(_folded("residual"), bits, edges="all")
    width = BitConfig.parse(bits).weight
    assert set(plan.weights.values()) == {QuantSpec(width, signed=True, symmetric=not asymmetric, axis=0)}
    kept = _plan(_folded("residual"), bits, edges="all", asymmetric_below=0)
    assert all(spec.symmetric for spec in kept.weights.values())


@pytest.mark.parametrize("name", ZOO)
def test_weights_only(name: str):
    plan = _plan(_folded(name), "w4")
    assert not plan.values and not plan.ties and len(plan.weights) > 1


@pytest.mark.parametrize("name", ZOO)
def test_is_plain_data(name: str):
    plan = _plan(_folded(name))
    again = QuantPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert (dict(again.weights), dict(again.values), set(again.ties)) == (plan.weights, plan.values, set(plan.ties))
    assert list(again.values) == list(plan.values)  # groups are named by order
    assert {v: again.group(v) for v in again.values} == {v: plan.group(v) for v in plan.values}


@pytest.mark.parametrize("name", ZOO)
def test_argument_is_unchanged(name: str):
    gm = _folded(name)
    before = fingerprint(gm)
    _plan(gm)
    assert_unchanged(gm, before)


def test_one_layer_is_first_and_last():
    plan = _plan(trace(nn.Sequential(nn.Conv2d(3, 4, 3)), SHAPE), "w2a2e8")
    assert [spec.bits for spec in plan.weights.values()] == [8]
    assert [spec.bits for spec in plan.values.values()] == [8]


def test_a_clamp_behind_the_last_layer_stays_float_with_it():
    plan = _plan(trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), SHAPE))
    assert list(plan.values) == ["input_1"]


def test_nothing_to_quantize():
    with pytest.raises(ModelError, match="nothing to quantize"):
        _plan(trace(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), SHAPE))


def test_a_tensor_that_is_joined_with_a_negative_one_is_not_unsigned():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x).relu(), self.b(x)], 1))

    plan = _plan(trace(Net(), SHAPE))
    assert {plan.values[v].symmetric for v in ("relu", "b", "cat")} == {False}


def _set(*texts: str) -> tuple[Override, ...]:
    return tuple(map(Override.parse, texts))


def test_overrides_reach_their_layers_and_what_enters_them():
    gm = _folded("residual")
    plain = _plan(gm)
    plan = _plan(gm, overrides=_set("layers.1.*=w8a8", "layers.1.conv2=w6", "fc=w5"))
    assert {p: s.bits for p, s in plan.weights.items() if s != plain.weights[p]} == {
        "layers.1.conv1": 8, "layers.1.conv2": 6, "layers.1.shortcut.0": 8, "fc": 5,
    }  # fmt: skip
    inputs = {str(n.target): n.all_input_nodes[0].meta["value"] for n in weighted_nodes(gm)}
    changed = {v for v, s in plan.values.items() if s != plain.values[v]}
    assert changed == {inputs["layers.1.conv1"], inputs["layers.1.conv2"]} and all(
        plan.values[v].bits == 8 for v in changed
    )


def test_a_skipped_layer_stays_float_and_wants_no_codes():
    gm = _folded("residual")
    plan = _plan(gm, overrides=_set("fc=float"))
    assert "fc" not in plan.weights and len(plan.weights) == len(_plan(gm).weights) - 1
    inputs = {str(n.target): n.all_input_nodes[0].meta["value"] for n in weighted_nodes(gm)}
    assert inputs["fc"] in _plan(gm).values and inputs["fc"] not in plan.values
    with pytest.raises(ModelError, match="every"):
        _plan(gm, overrides=_set("*=float"))


def test_a_pattern_that_matches_nothing_names_the_layers():
    with pytest.raises(SpecError, match=r"layers\.0\.conv1, layers\.0\.conv2"):
        _plan(_folded("residual"), overrides=_set("layer.*=w8"))
    with pytest.raises(SpecError, match=r"did you mean 'layers\.0\.conv1'"):
        _plan(_folded("residual"), overrides=_set("layer.0.conv1=w8"))


def test_kinds_of_grids():
    gm = _folded("residual")
    for kind, symmetric in (("symmetric", {True}), ("asymmetric", {False}), ("auto", {True, False})):
        assert {s.symmetric for s in _plan(gm, weights=kind).weights.values()} == symmetric
    signed = _plan(gm, activations="signed")
    assert all(s.signed and s.symmetric for s in signed.values.values())
    assert {v: s.bits for v, s in signed.values.items()} == {v: s.bits for v, s in _plan(gm).values.items()}


def test_a_plan_of_another_network_is_refused():
    with pytest.raises(SpecError, match="another network"):
        _plan(_folded("plain")).check(_folded("residual"))
    _plan(_folded("plain")).check(_folded("plain"))


def test_codes_before_weighted_layers_only():
    """Beside what layers read, one addend of two: the shortcut, even where a layer yields it."""
    folded = _folded("residual")
    everywhere, plan = _plan(folded, "w8a8"), _plan(folded, "w8a8", placement="inputs")
    read = {plan.group(n.all_input_nodes[0].meta["value"]) for n in weighted_nodes(folded)}
    (shortcut,) = {plan.group(v) for v in plan.values} - read
    made = next(n for n in folded.graph.nodes if n.meta.get("value") == shortcut)
    assert made.target == "layers.1.shortcut.0" and len(everywhere.values) > len(plan.values)
    assert plan.weights == everywhere.weights and all(everywhere.values[v] == s for v, s in plan.values.items())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_layers_read_has_codes_in_every_placement(name):
    folded = _folded(name)
    plan = _plan(folded, "w8a8", placement="inputs")
    assert {n.all_input_nodes[0].meta["value"] for n in weighted_nodes(folded)} <= set(plan.values)
    assert all(tie <= set(plan.values) for tie in plan.ties)


def test_values_on_one_grid_have_one_width():
    gm = fold_batch_norm(trace(build("residual"), SHAPE))
    plan = make_plan(gm, BitConfig(4, 4), PlanRules())
    plan.check(gm)
    tie = next(sorted(t) for t in plan.ties if len(t & set(plan.values)) > 1)
    name = next(v for v in tie if v in plan.values)
    other = replace(plan, values={**plan.values, name: replace(plan.values[name], bits=7)})
    with pytest.raises(SpecError, match=name):
        other.check(gm)
