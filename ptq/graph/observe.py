"""Activation ranges: the teacher's values on calibration batches → one grid per group of values."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from ptq.graph.ops import input_node, moves, weighted_nodes
from ptq.graph.plan import QuantPlan
from ptq.quant.affine import QParams
from ptq.quant.ranges import Estimator, minmax, next_power_of_two

# Elements kept per value, whatever the number of images; every image's minimum and maximum are kept beside them, not among them:
# what occurs once in a million elements would count for one in thousands.
_SAMPLES = 2**18
_LARGEST_BIAS = 2.0**29  # codes; half of what is stored, so that trained scales may still shrink


class _Observer(fx.Interpreter):
    """Keeps a random sample of each wanted value."""

    def __init__(self, gm: fx.GraphModule, wanted: set[str], per_batch: int, rng: torch.Generator) -> None:
        super().__init__(gm)
        self.wanted, self.per_batch, self.rng = wanted, per_batch, rng
        self.samples: dict[str, list[Tensor]] = {name: [] for name in wanted}
        self.ends: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if (name := n.meta.get("value")) in self.wanted:
            self.samples[name].append(self._sample(result.detach()))
            self.ends[name].append(torch.stack(torch.aminmax(result.detach().flatten(1), dim=1), 1))
        return result

    def _sample(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if flat.numel() > self.per_batch:
            pick = torch.randint(flat.numel(), (self.per_batch,), generator=self.rng)
            flat = flat[pick.to(flat.device)]
        return flat


def observe(
    teacher: fx.GraphModule,
    plan: QuantPlan,
    batches: Iterable[Tensor],
    estimator: Estimator,
    *,
    rng: torch.Generator,
    device: torch.device | str = "cpu",
) -> dict[str, QParams]:
    """Group name → grid, from the teacher's values on the batches ([B, C, H, W] each); the teacher is on `device`.

    Values that only move others (pools, reshapes) are not looked at: their source is.
    """
    sources = {n.meta["value"] for n in teacher.graph.nodes if n.op != "output" and not moves(teacher, n)}
    wanted = sources & set(plan.values)
    batches = list(batches)
    observer = _Observer(teacher, wanted, -(-_SAMPLES // len(batches)), rng)
    with torch.no_grad():
        for batch in batches:
            observer.run(batch.to(device))
    members: dict[str, list[str]] = {}
    for name in plan.values:
        if name in wanted:
            members.setdefault(plan.group(name), []).append(name)
    found = {}
    for group, names in members.items():
        samples = torch.cat([s for name in names for s in observer.samples[name]])
        ends = torch.stack([torch.cat(observer.ends[name]) for name in names])  # [values, images, 2]
        ends = torch.stack([ends[..., 0].amin(0), ends[..., 1].amax(0)], 1)
        found[group] = estimator(samples, plan.values[names[0]], ends)
    return found


def weight_params(
    gm: fx.GraphModule, plan: QuantPlan, estimator: Estimator, acts: Mapping[str, QParams]
) -> dict[str, QParams]:
    """Module path → grid of its weight.

    A channel whose bias would not fit 32 bits on the accumulator's grid gets a coarser one: its weights are then negligible
    beside its bias.

    Args:
        acts: group name → grid, of the layers' inputs.
    """
    params = {}
    for node in weighted_nodes(gm):
        path = str(node.target)
        if path not in plan.weights:
            continue
        layer = gm.get_submodule(path)
        q = estimator(layer.weight.detach(), plan.weights[path], None)  # type: ignore[operator, union-attr]
        source = node.all_input_nodes[0].meta["value"]
        if layer.bias is not None and source in plan.values:
            least = layer.bias.detach().abs() / (_LARGEST_BIAS * acts[plan.group(source)].scale)  # type: ignore[operator]
            least = next_power_of_two(least) if q.spec.power_of_two else least
            q = replace(q, scale=torch.maximum(q.scale, least))
        params[path] = q
    return params


def input_params(
    low: float, high: float, teacher: fx.GraphModule, plan: QuantPlan, acts: Mapping[str, QParams]
) -> Mapping[str, QParams]:
    """The grid of the network's input where its valid range is known: all of low … high.

    acts: group name → grid, as observed. Where the input shares its grid with results of layers (a concatenation of both), it
    covers theirs too.
    """
    node = input_node(teacher)
    name = node.meta["value"]
    if name not in plan.values:
        return {}
    group = plan.group(name)
    others = [n for n in teacher.graph.nodes if n is not node and n.op != "output" and not moves(teacher, n)]
    if any(n.meta["value"] in plan.values and plan.group(n.meta["value"]) == group for n in others):
        q = acts[group]
        ends = [float((code - q.zero_point) * q.scale) for code in (q.spec.qmin, q.spec.qmax)]
        low, high = min(low, ends[0]), max(high, ends[1])
    return {group: minmax(torch.tensor([low, high]), plan.values[name])}
