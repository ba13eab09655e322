"""The way from a net of the zoo to its fake-quantized student, and the values along it."""

import copy
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ptq.contracts import make_rng
from ptq.graph.fold_bn import fold_batch_norm
from ptq.graph.insert import insert_fake_quant
from ptq.graph.observe import observe, weight_params
from ptq.graph.plan import QuantPlan, make_plan
from ptq.graph.trace import trace
from ptq.quant.affine import QParams
from ptq.quant.ranges import lp
from ptq.spec import BitConfig, PlanRules
from tests.zoo import SHAPE, build, images


class Prepared(NamedTuple):
    """A net at every stage before reconstruction."""

    teacher: fx.GraphModule
    folded: fx.GraphModule
    plan: QuantPlan
    acts: dict[str, QParams]
    weights: dict[str, QParams]
    student: fx.GraphModule


def prepared(net: nn.Module, bits: str = "w4a4", rules: PlanRules | None = None) -> Prepared:
    """Teacher and student of a net."""
    teacher = trace(net, SHAPE)
    folded = fold_batch_norm(teacher)
    plan = make_plan(folded, BitConfig.parse(bits), rules or PlanRules())
    acts = observe(teacher, plan, [images()], lp, rng=make_rng(0, "ranges")) if plan.values else {}
    weights = weight_params(folded, plan, lp, acts)
    return Prepared(teacher, folded, plan, acts, weights, insert_fake_quant(folded, plan, acts, weights))


@cache
def _from_zoo(name: str, bits: str) -> Prepared:
    return prepared(build(name), bits)


def prepare(name: str, bits: str = "w4a4") -> Prepared:
    """Teacher and student of a net of the zoo; a copy of its own for every caller."""
    return copy.deepcopy(_from_zoo(name, bits))


class _Keep(fx.Interpreter):
    """Keeps every named value of a run."""

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if n.op != "output" and n.meta.get("value") is not None:
            self.kept[n.meta["value"]] = result
        return result


def values(gm: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Value name → tensor, for every named value of a traced network."""
    run = _Keep(gm)
    run.kept = {}
    with torch.no_grad():
        run.run(x)
    return run.kept


def fingerprint(gm: fx.GraphModule) -> tuple[str, list[tuple], dict[str, Tensor]]:
    """All that a pass must leave as it was: the code, every node's name and metadata, every tensor."""
    kept = ("value", "shape", "owner")
    nodes = [(n.name, n.op, str(n.target), *(n.meta.get(key) for key in kept)) for n in gm.graph.nodes]
    return gm.code, nodes, {k: v.clone() for k, v in gm.state_dict().items()}


def assert_unchanged(gm: fx.GraphModule, before: tuple[str, list[tuple], dict[str, Tensor]]) -> None:
    """Raises unless `gm` is, bit for bit, what it was when `before` was taken."""
    code, nodes, tensors = fingerprint(gm)
    assert (code, nodes, list(tensors)) == (before[0], before[1], list(before[2]))
    assert all(torch.equal(v, before[2][k]) for k, v in tensors.items())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
