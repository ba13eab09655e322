"""What each bit width costs, layer by layer: one thing is quantized at a time, all else stays float.

    cost = ‖z - z_q‖² / ‖z‖²        z, z_q: the network's outputs on the calibration images

Small errors of independent roundings add up, so the costs of layers do too, nearly.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ptq.contracts import Feedback, make_rng
from ptq.evaluate import agreement, sqnr_db
from ptq.graph.blocks import extract, input_value_node, split
from ptq.graph.insert import insert_fake_quant
from ptq.graph.observe import observe
from ptq.graph.ops import input_node, output_node, value, weighted_nodes
from ptq.graph.plan import QuantPlan
from ptq.quant.affine import fake_quantize
from ptq.quant.ranges import Estimator
from ptq.spec import PlanRules

WIDTHS = (2, 3, 4, 5, 6, 8)
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """What one width costs in one place. place: module path of a layer, name of a block, or of a value; kind: "weight",
    "block" (all weights of it) or "activation". sqnr_db: of the network's output. agreement: share of images of equal class."""

    place: str
    kind: str
    bits: int
    sqnr_db: float
    agreement: float

    @property
    def noise(self) -> float:
        """‖z - z_q‖² / ‖z‖²."""
        return 10 ** (-self.sqnr_db / 10)


def weight_costs(
    folded: fx.GraphModule, plan: QuantPlan, images: Tensor, estimator: Estimator,
    *, widths: Sequence[int], rules: PlanRules, device: torch.device, feedback: Feedback, blocks: bool = True,
) -> list[Cost]:  # fmt: skip
    """The cost of each width for every planned layer's weights, and for all weights of each block.

    Args:
        folded: the float network on `device`. images: calibration images [N, C, H, W], in host memory.
        rules: which widths have a zero point per channel.
    """
    gm = copy.deepcopy(folded)
    result, found = output_node(gm).meta["value"], []
    order = {str(n.target): k for k, n in enumerate(weighted_nodes(gm))}
    units = [("block", b) for b in split(gm) if len(b.layers) > 1] if blocks else []
    units = sorted([*units, *(("weight", b) for b in split(gm, "layer"))], key=lambda unit: order[unit[1].layers[0]])
    total, done = len(units) * len(widths), 0
    wanted = _run(gm, [images], device)
    values = {input_node(gm).meta["value"]: images}
    for kind, block in units:
        border = _border(gm, order[block.layers[0]])
        inputs = _values(gm, values, border, images, device)
        rest = extract(gm, border, (result,))
        layers = [path for path in block.layers if path in plan.weights]
        for bits in widths:
            done += 1
            feedback.progress("sensitivity", done, total)
            if layers:
                with _rounded(gm, layers, plan, bits, rules, estimator):
                    out = _run(rest, inputs, device)
                place = layers[0] if kind == "weight" else block.name
                found.append(Cost(place, kind, bits, sqnr_db(wanted, out), agreement(wanted, out)))
    return found


def _border(gm: fx.GraphModule, index: int) -> tuple[str, ...]:
    """Names of the values that exist before weighted layer `index` and are read by it or behind it."""
    nodes = list(gm.graph.nodes)
    place = {node: k for k, node in enumerate(nodes)}
    start = place[weighted_nodes(gm)[index]]
    return tuple(value(n) for n in nodes[:start] if any(place[u] >= start for u in n.users))


def _values(
    gm: fx.GraphModule, values: dict[str, Tensor], names: Sequence[str], images: Tensor, device: torch.device
) -> list[Tensor]:
    """Values of the float network for all images; those of the last blocks are kept."""
    missing = tuple(name for name in names if name not in values)
    if missing:
        source = input_node(gm).meta["value"]
        with torch.no_grad():
            parts = [[v.cpu() for v in extract(gm, (source,), missing)(x.to(device))] for x in images.split(_BATCH)]
        for name in [name for name in values if name != source and name not in names][:-4]:
            del values[name]
        values |= {name: torch.cat(part) for name, part in zip(missing, zip(*parts))}
    return [values[name] for name in names]


def _run(part: fx.GraphModule, inputs: list[Tensor], device: torch.device) -> Tensor:
    with torch.no_grad():
        batches = zip(*(x.split(_BATCH) for x in inputs))
        outputs = [part(*(x.to(device) for x in batch)) for batch in batches]
    return torch.cat([(out[0] if isinstance(out, tuple) else out).cpu() for out in outputs])


@contextmanager
def _rounded(
    gm: fx.GraphModule, paths: Sequence[str], plan: QuantPlan, bits: int, rules: PlanRules, estimator: Estimator
) -> Iterator[None]:
    """Weights of some layers at nearest rounding, while the context is open."""
    weights: list[nn.Parameter] = [gm.get_submodule(path).weight for path in paths]  # type: ignore[misc]
    kept = [weight.data for weight in weights]
    try:
        for path, weight in zip(paths, weights):
            spec = replace(plan.weights[path], bits=bits, symmetric=rules.symmetric(bits))
            with torch.no_grad():
                weight.data = fake_quantize(weight.data, estimator(weight.data, spec, None))
        yield
    finally:
        for weight, data in zip(weights, kept):
            weight.data = data


def activation_costs(
    folded: fx.GraphModule, plan: QuantPlan, images: Tensor, estimator: Estimator,
    *, widths: Sequence[int], seed: int, device: torch.device, feedback: Feedback,
) -> list[Cost]:  # fmt: skip
    """The cost of each width for every group of values that enters a weighted layer, by the group's name."""
    stem = input_value_node(folded).meta["value"]
    entering = {
        plan.group(v) for n in weighted_nodes(folded) if (v := n.all_input_nodes[0].meta["value"]) in plan.values
    }
    groups = [g for g in dict.fromkeys(plan.group(v) for v in plan.values) if g in entering and g != plan.group(stem)]
    wanted, found, done = _run(folded, [images], device), [], 0
    for bits in widths:
        wide = replace(plan, weights={}, values={v: replace(s, bits=bits) for v, s in plan.values.items()})
        acts = observe(folded, wide, images.split(_BATCH), estimator, rng=make_rng(seed, "ranges"), device=device)
        for group in groups:
            alone = replace(wide, values={v: s for v, s in wide.values.items() if plan.group(v) == group})
            out = _run(insert_fake_quant(folded, alone, acts, {}).to(device), [images], device)
            found.append(Cost(group, "activation", bits, sqnr_db(wanted, out), agreement(wanted, out)))
            done += 1
            feedback.progress("sensitivity of activations", done, len(widths) * len(groups))
    return found


def noise_of(costs: Sequence[Cost], kind: str) -> dict[str, dict[int, float]]:
    """Place → width → noise, of one kind; a wider grid never costs more than a narrower one, whatever was measured."""
    table: dict[str, dict[int, float]] = {}
    for cost in costs:
        if cost.kind == kind:
            table.setdefault(cost.place, {})[cost.bits] = cost.noise
    return {place: dict(_falling(row)) for place, row in table.items()}


def _falling(row: dict[int, float]) -> Iterator[tuple[int, float]]:
    worst = 0.0
    for bits in sorted(row, reverse=True):
        worst = max(worst, row[bits])
        yield bits, worst
