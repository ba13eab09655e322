"""Mixed precision: the widths of all layers that together meet a budget at the least cost, by integer programming.

    min over x, y of   Σ_l Σ_b c_l(b) Σ_a x_lba + Σ_g Σ_a c_g(a) y_ga
    Σ_ba x_lba = 1,    Σ_b x_lba = y_g(l),a,    Σ x_lba · size_l(b)  or  Σ x_lba · MACs_l · b · a  ≤  budget

x_lba: layer l has weights of b bits and reads activations of a bits; y_ga: the values of group g, which share a grid, have a
bits. c: noise at the network's output (`ptq.sensitivity`). Solved by HiGHS (`scipy.optimize.milp`), to a gap of 1 in 10,000.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.contracts import Exporter, Feedback
from ptq.errors import SpecError
from ptq.graph.blocks import input_value_node
from ptq.graph.fold_bn import fold_batch_norm
from ptq.graph.ops import weighted_nodes
from ptq.graph.plan import QuantPlan, activated, edge_layers, make_plan, names_layer
from ptq.proof import check_target
from ptq.quant.ranges import Estimator, estimators
from ptq.run import outside_inference_mode, start_run
from ptq.sensitivity import WIDTHS, Cost, activation_costs, noise_of, weight_costs
from ptq.sources import Data, build_source, gather, settle_source, trace_all
from ptq.spec import BitConfig, Budget, Override, PlanRules, QuantSpec

Costs = Mapping[str, Mapping[int, float]]  # place → width → noise


def layer_macs(gm: fx.GraphModule) -> dict[str, int]:
    """Module path → multiplications and additions an image."""
    macs = {}
    for node in weighted_nodes(gm):
        layer = gm.get_submodule(str(node.target))
        places = (
            math.prod(node.meta["shape"][1:]) if isinstance(layer, nn.Conv2d) else math.prod(node.meta["shape"][:-1])
        )
        macs[str(node.target)] = layer.weight.numel() * places  # type: ignore[union-attr, operator]
    return macs


def weight_bytes(gm: fx.GraphModule, plan: QuantPlan) -> float:
    """Bytes of the planned weights' codes, packed without gaps; biases and scales, the same at every width, not counted."""
    return sum(_numel(gm, path) * spec.bits / 8 for path, spec in plan.weights.items())


def bit_operations(gm: fx.GraphModule, plan: QuantPlan) -> float:
    """Σ MACs · weight bits · activation bits, an image; a float input counts 8 bits."""
    macs, inputs = layer_macs(gm), _inputs(gm)
    return sum(macs[p] * s.bits * _act_bits(plan, inputs[p]) for p, s in plan.weights.items())


def _act_bits(plan: QuantPlan, value: str) -> int:
    return plan.values[value].bits if value in plan.values else 8


def _inputs(gm: fx.GraphModule) -> dict[str, str]:
    return {str(n.target): n.all_input_nodes[0].meta["value"] for n in weighted_nodes(gm)}


def _numel(gm: fx.GraphModule, path: str) -> int:
    return gm.get_submodule(path).weight.numel()  # type: ignore[union-attr, operator]


def _settled_weights(gm: fx.GraphModule, plan: QuantPlan, fixed: Sequence[str], activations: Costs) -> Costs:
    """The one width of each layer whose weights are settled, and what enters it is not."""
    inputs = _inputs(gm)
    enters = {p: plan.group(inputs[p]) for p in fixed if p in plan.weights and inputs[p] in plan.values}
    return {p: {plan.weights[p].bits: 0.0} for p, group in enters.items() if group in activations}


def choose_widths(
    gm: fx.GraphModule, plan: QuantPlan, fixed: Sequence[str], weights: Costs, activations: Costs, budget: Budget
) -> tuple[Override, ...]:
    """Overrides, one per layer whose widths are free, that meet the budget at the least summed cost.

    Args:
        gm: the folded network. plan: its plan, which says what the fixed layers have.
        fixed: module paths whose weights' widths stay as planned (first and last layers, and what the user set).
        weights: of every free layer. activations: of every group that may change; others stay as planned.

    Raises:
        SpecError: no choice of widths meets the budget.
    """
    macs, inputs = layer_macs(gm), _inputs(gm)
    bops = budget.kind == "bops"
    weights = {path: row for path, row in weights.items() if path in plan.weights and path not in fixed}
    weights |= _settled_weights(gm, plan, fixed, activations) if bops else {}
    free = [path for path in plan.weights if path in weights]
    groups = {p: plan.group(inputs[p]) if bops and inputs[p] in plan.values else "" for p in free}
    acts = {p: sorted(activations.get(groups[p], ())) for p in free}  # none: the activations of that layer stay
    options = [(p, b, a) for p in free for b in sorted(weights[p]) for a in (acts[p] or [None])]
    shared = [(g, a) for g in dict.fromkeys(groups.values()) if g in activations for a in sorted(activations[g])]
    column = {key: k for k, key in enumerate([*options, *shared])}

    def price(path: str, bits: int, act: int | None) -> float:
        if not bops:
            return _numel(gm, path) * bits / 8
        return macs[path] * bits * (_act_bits(plan, inputs[path]) if act is None else act)

    cost = np.array([*(weights[p][b] for p, b, _ in options), *(activations[g][a] for g, a in shared)])
    prices = np.array([*(price(*o) for o in options), *(0.0 for _ in shared)])
    spent = sum(price(p, s.bits, None) for p, s in plan.weights.items() if p not in free)
    least = spent + sum(min(price(*o) for o in options if o[0] == p) for p in free)
    if least > budget.amount:
        unit = "bit operations" if bops else "bytes"
        raise SpecError(f"a budget of {budget.amount:.0f} {unit} cannot be met; the narrowest widths need {least:.0f}")
    if not free:
        return ()
    rows: list[dict[int, float]] = [{column[o]: 1.0 for o in options if o[0] == p} for p in free]
    ends = [1.0] * len(rows)
    for p in free:
        for a in acts[p]:
            rows.append({**{column[o]: 1.0 for o in options if o[0] == p and o[2] == a}, column[groups[p], a]: -1.0})
            ends.append(0.0)
    entries = [(r, c, v) for r, row in enumerate(rows) for c, v in row.items()]
    from scipy.optimize import Bounds, LinearConstraint, milp  # seconds to import, and wanted for budgets alone
    from scipy.sparse import coo_array

    matrix = coo_array(
        ([v for *_, v in entries], ([r for r, *_ in entries], [c for _, c, _ in entries])), (len(rows), len(cost))
    )
    scale = max(budget.amount, 1.0)
    solved = milp(
        cost / max(sum(min(row.values()) for row in weights.values()), 1e-12), integrality=np.ones(len(cost)), bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(matrix.tocsc(), np.array(ends), np.array(ends)),  # pyright: ignore[reportArgumentType]
            LinearConstraint(prices[None] / scale, -np.inf, (budget.amount - spent) / scale),
        ],
        options={"mip_rel_gap": 1e-4},
    )  # fmt: skip
    if solved.x is None:
        raise SpecError(f"no choice of widths meets {budget}: {solved.message}")
    picked = [o for o in options if solved.x[column[o]] > 0.5]
    return tuple(Override(path, bits, act) for path, bits, act in picked)


def plan_within(
    folded: fx.GraphModule, budget: Budget, rules: PlanRules, images: Tensor, estimator: Estimator,
    *, seed: int, device: torch.device, feedback: Feedback,
) -> QuantPlan:  # fmt: skip
    """The plan that meets a budget at the least cost on calibration images [N, C, H, W].

    First and last layers keep their width where the rules say so, and so does what an override sets.

    Raises:
        SpecError: the budget cannot be met.
    """
    costs = measure(
        folded, make_plan(folded, BitConfig(8, 8), rules), images, estimator, widths=WIDTHS, seed=seed, device=device,
        feedback=feedback, rules=rules, acts=budget.kind == "bops", blocks=False,
    )  # fmt: skip
    return plan_by(folded, budget, rules, costs)


def measure(
    folded: fx.GraphModule, plan: QuantPlan, images: Tensor, estimator: Estimator,
    *, widths: Sequence[int], seed: int, device: torch.device, feedback: Feedback, rules: PlanRules,
    acts: bool, blocks: bool,
) -> list[Cost]:  # fmt: skip
    """What each width costs, of weights and, with `acts`, of activations; with `blocks`, of the weights of whole blocks too."""
    on_device = copy.deepcopy(folded).to(device)
    costs = weight_costs(
        on_device, plan, images, estimator,
        widths=widths, rules=rules, device=device, feedback=feedback, blocks=blocks,
    )  # fmt: skip
    if acts:
        costs += activation_costs(
            on_device, plan, images, estimator, widths=widths, seed=seed, device=device, feedback=feedback
        )
    return costs


def plan_by(folded: fx.GraphModule, budget: Budget, rules: PlanRules, costs: Sequence[Cost]) -> QuantPlan:
    """The plan that meets a budget at the least sum of measured costs; see `plan_within`."""
    wide = BitConfig(8, budget.act)
    plan = make_plan(folded, wide, rules)
    weights, acts = noise_of(costs, "weight"), {}
    if budget.kind == "bops":
        kept = _settled_groups(folded, plan, rules)
        acts = {group: row for group, row in noise_of(costs, "activation").items() if group not in kept}
    chosen = choose_widths(folded, plan, fixed_layers(folded, plan, rules), weights, acts, budget)
    plan = make_plan(folded, wide, replace(rules, overrides=(*chosen, *rules.overrides)))
    spent = bit_operations(folded, plan) if budget.kind == "bops" else weight_bytes(folded, plan)
    if spent > budget.amount * (1 + 1e-6):
        raise SpecError(
            f"{budget} cannot be met beside the widths that were set: these need {spent:.0f}; raise the one or the other"
        )
    return plan


def fixed_layers(folded: fx.GraphModule, plan: QuantPlan, rules: PlanRules) -> list[str]:
    """Layers whose weights' width is not free: first and last where the rules say so, and what overrides set."""
    edges = set[fx.Node]() if rules.edges == "all" else set[fx.Node]().union(*edge_layers(folded))
    fixed = {
        str(n.target)
        for n in weighted_nodes(folded)
        if n in edges or any(names_layer(o, n) and o.weight for o in rules.overrides)
    }
    return [path for path in plan.weights if path in fixed]


def _settled_groups(folded: fx.GraphModule, plan: QuantPlan, rules: PlanRules) -> set[str]:
    """Groups of values whose width is not free: those that an override sets, and the edges'."""
    layers, (first, last) = weighted_nodes(folded), edge_layers(folded)
    named = {n for n in layers if any(names_layer(o, n) and o.act for o in rules.overrides)}
    settled = named | (last if rules.edges != "all" else set())
    values = {n.all_input_nodes[0].meta["value"] for n in settled}
    if rules.edges == "brecq":
        values |= {node.meta["value"] for n in first for node in activated(folded, n)}
    return {plan.group(v) for v in values if v in plan.values}


def check_budget(folded: fx.GraphModule, budget: Budget, rules: PlanRules) -> None:
    """Raises SpecError if not even the narrowest widths meet the budget; takes no images."""
    plan = make_plan(folded, BitConfig(8, budget.act), rules)
    fixed = fixed_layers(folded, plan, rules)
    settled = _settled_groups(folded, plan, rules)
    groups = {plan.group(v) for v in _inputs(folded).values() if v in plan.values} - settled
    groups.discard(plan.group(input_value_node(folded).meta["value"]) if plan.values else "")
    any_width: dict[int, float] = dict.fromkeys(WIDTHS, 1.0)
    acts: Costs = dict.fromkeys(groups, any_width) if budget.kind == "bops" else {}
    choose_widths(folded, plan, fixed, dict.fromkeys(plan.weights, any_width), acts, budget)


def first_plan(folded: fx.GraphModule, wanted: BitConfig | Budget, rules: PlanRules) -> QuantPlan:
    """The plan by the rules; of a budget, with all widths at 8 bits until there are images to choose by.

    Raises:
        SpecError: not even the narrowest widths meet the budget, or an override matches no layer.
    """
    if not isinstance(wanted, Budget):
        return make_plan(folded, wanted, rules)
    check_budget(folded, wanted, rules)
    return make_plan(folded, BitConfig(8, wanted.act), rules)


@dataclass(frozen=True, slots=True)
class BitSensitivity:
    """costs: what each width costs in each place. plan: the one that meets the budget, where one was given; bytes: of its
    weights, packed; bops: its bit operations an image."""

    costs: tuple[Cost, ...]
    plan: QuantPlan | None = None
    bytes: float = 0.0
    bops: float = 0.0


@outside_inference_mode
def bit_sensitivity(
    model: nn.Module,
    data: Data = "auto",
    *,
    input_shape: tuple[int, int, int],
    teachers: Sequence[nn.Module] = (),
    widths: Sequence[int] = (2, 3, 4, 6, 8),
    count: int = 256,
    budget: str | Budget | None = None,
    ranges: str = "lp",
    edges: str = "brecq",
    weights: str = "auto",
    activations: str = "unsigned",
    scales: str = "free",
    target: str | Exporter | None = None,
    effort: str = "standard",
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    feedback: Feedback | None = None,
) -> BitSensitivity:
    """What each bit width costs a trained network, layer by layer; the arguments are those of `ptq.quantize`.

    Args:
        widths: bits to try, of weights and of the tensors that enter a weighted layer. count: images to judge by, at most.
        budget: "auto:size=1.2MB,a4" or "auto:bops=2.5G": also the plan that meets it, of 2, 3, 4, 5, 6 and 8 bits.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError, ExportError: a bad argument, a network that cannot be served, a
            budget that cannot be met, or a plan that the target cannot take.
    """
    for bits in widths:
        QuantSpec(bits, True, True)  # says which widths there are
    exporter = plugins.chosen("exporters", target)
    placed: dict[str, Any] = {} if exporter is None else dict(exporter.rules)
    rules = PlanRules(edges, weights=weights, activations=activations, scales=scales, **placed)
    estimate = estimators(ranges)[0]
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    source, run = build_source(data, effort), start_run(input_shape, device, seed, mean, std, feedback, cache)
    networks = trace_all(model, teachers, run)
    folded = fold_batch_norm(networks[0])
    plan = make_plan(folded, BitConfig(8, 8), rules)
    first = plan if wanted is None else first_plan(folded, wanted, rules)
    check_target(exporter, folded, first)
    source = settle_source(source, networks, run, effort)
    if getattr(source, "count", 0) > count:
        source = replace(source, count=count)
    images = gather(source, networks, run)[:count]
    tried = sorted({*widths, *(WIDTHS if wanted else ())})
    costs = measure(
        folded, plan, images, estimate, widths=tried, seed=seed, device=run.device, feedback=run.feedback,
        rules=rules, acts=True, blocks=True,
    )  # fmt: skip
    shown = tuple(cost for cost in costs if cost.bits in widths)
    if wanted is None:
        return BitSensitivity(shown)
    plan = plan_by(folded, wanted, rules, costs)
    check_target(exporter, folded, plan)
    return BitSensitivity(shown, plan, weight_bytes(folded, plan), bit_operations(folded, plan))
