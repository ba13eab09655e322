"""Decides every grid of a network before any work is spent: which tensor, how many bits, which tensors share one.

The width of the activations (the 4 of "a4") is for tensors that enter a convolution or a linear layer, as in the papers;
tensors that only feed additions and pools get `PlanRules.adds` bits, which hardware with 8-bit containers has for free.
The result of the network stays float: the integer accumulator times its scale.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from ptq.errors import ModelError, SpecError
from ptq.graph.ops import find_op, input_node, output_node, weighted_nodes
from ptq.spec import BitConfig, Override, PlanRules, QuantSpec

_ACTIVATIONS = {
    "add_constant", "elu", "gelu", "hard_sigmoid", "leaky_relu", "mul", "mul_constant", "prelu", "relu", "relu6", "sigmoid",
    "softplus", "tanh",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """Every decision about bits: `weights` (module path → spec), `values` (value name → spec) and `ties`, the sets of
    values that share one scale."""

    weights: Mapping[str, QuantSpec]
    values: Mapping[str, QuantSpec]
    ties: tuple[frozenset[str], ...] = ()

    def group(self, name: str) -> str:
        """The name under which a value's grid is kept: the first, in execution order, of the values tied to it."""
        tie = next((tie for tie in self.ties if name in tie), None)
        return name if tie is None else next(v for v in self.values if v in tie)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {
            "weights": {k: asdict(s) for k, s in self.weights.items()},
            "values": {k: asdict(s) for k, s in self.values.items()},
            "ties": [sorted(t) for t in self.ties],
        }

    def check(self, gm: fx.GraphModule) -> None:
        """Raises SpecError, naming what it misses, unless it is a plan of this folded network."""
        paths = {str(n.target) for n in weighted_nodes(gm)}
        names = {n.meta["value"] for n in gm.graph.nodes if n.meta.get("value") is not None}
        for what, planned, there in (("layer", self.weights, paths), ("value", self.values, names)):
            missing = [name for name in planned if name not in there]
            if missing:
                raise SpecError(f"the plan is for another network: {what} {missing[0]!r} is not in this one")
        for tie in self.ties:
            specs = {self.values[name]: name for name in sorted(tie) if name in self.values}
            if len(specs) > 1:
                raise SpecError(
                    f"the plan gives {' and '.join(map(repr, list(specs.values())[:2]))} unlike grids; they share one"
                )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "QuantPlan":
        """The inverse of `to_json`."""
        return cls(
            {k: QuantSpec(**s) for k, s in data["weights"].items()},
            {k: QuantSpec(**s) for k, s in data["values"].items()},
            tuple(frozenset(t) for t in data["ties"]),
        )


def make_plan(gm: fx.GraphModule, bits: BitConfig, rules: PlanRules) -> QuantPlan:
    """The plan of a folded network.

    Raises:
        ModelError: the network has no convolution or linear layer, or none that is not skipped.
        SpecError: an override matches no layer.
    """
    layers = weighted_nodes(gm)
    if not layers:
        raise ModelError("the network has no convolution and no linear layer: nothing to quantize")
    chosen = {n: _override(n, rules) for n in layers}
    _check_overrides(rules, [str(n.target) for n in layers])
    kept = [n for n in layers if not chosen[n].skip]
    if not kept:
        raise ModelError("every convolution and linear layer is skipped: nothing to quantize")
    first, last = edge_layers(gm)
    weights = {str(n.target): _weight_spec(n, first | last, chosen[n], bits, rules) for n in kept}
    if bits.act is None:
        wide = [str(o) for o in rules.overrides if o.act is not None]
        if wide:
            raise SpecError(
                f"{wide[0]} asked for, but {bits} leaves activations float; write w{bits.weight}a8, or leave out the a"
            )
        return QuantPlan(weights, {})
    quantized = _without_skipped(gm, quantized_nodes(gm), set(kept), set(layers) - set(kept))
    if rules.placement == "inputs":
        needed = entering(gm, set(kept))
        quantized = [n for n in quantized if n in needed]
    groups = _tie(gm, quantized, rules.ties)
    positive = _nonnegative(gm)
    values: dict[str, QuantSpec] = {}
    shifts = rules.scales == "power_of_two"
    wide = {input_node(gm)}.union(*(activated(gm, n) for n in first if rules.edges == "brecq"))
    for members in groups:
        width = _width(members, layers, last, wide, chosen, bits, rules)
        if rules.activations == "signed":
            spec = QuantSpec(width, signed=True, symmetric=True, power_of_two=shifts)
        else:  # both kinds of grid have unsigned codes; a tensor with negative values has a zero point instead
            spec = QuantSpec(width, signed=False, symmetric=all(positive[n] for n in members), power_of_two=shifts)
        values |= {n.meta["value"]: spec for n in members}
    order = {n.meta["value"]: values[n.meta["value"]] for n in quantized}
    ties = tuple(frozenset(n.meta["value"] for n in members) for members in groups if len(members) > 1)
    return QuantPlan(weights, order, ties)


def _override(node: fx.Node, rules: PlanRules) -> Override:
    """What the overrides say of a layer, later ones over earlier ones."""
    found = Override(str(node.target))
    for o in rules.overrides:
        if names_layer(o, node):
            found = Override(found.pattern, o.weight or found.weight, o.act or found.act, o.skip)
    return found


def names_layer(override: Override, node: fx.Node) -> bool:
    """Whether an override is for a layer: by its path, or, of a module that is called again, by the module's."""
    return override.matches(str(node.target)) or override.matches(str(node.meta.get("module", node.target)))


def edge_layers(gm: fx.GraphModule) -> tuple[set[fx.Node], set[fx.Node]]:
    """The first layers, before which there is no other, and the last, behind which there is none; of parallel heads, each."""
    layers = set(weighted_nodes(gm))
    before, behind = set[fx.Node](), set[fx.Node]()  # nodes with a layer before, or behind them
    for node in gm.graph.nodes:
        if any(n in layers or n in before for n in node.all_input_nodes):
            before.add(node)
    for node in reversed(gm.graph.nodes):
        if any(n in layers or n in behind for n in node.users):
            behind.add(node)
    return layers - before, layers - behind


def _check_overrides(rules: PlanRules, paths: list[str]) -> None:
    for o in rules.overrides:
        if not any(o.matches(path) for path in paths):
            close = difflib.get_close_matches(o.pattern, paths, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise SpecError(f"no layer matches {o.pattern!r}; {hint}the layers are {', '.join(paths)}")


def _weight_spec(
    node: fx.Node, edges: set[fx.Node], override: Override, bits: BitConfig, rules: PlanRules
) -> QuantSpec:
    edge = rules.edges != "all" and node in edges
    width = override.weight or (bits.edge if edge else bits.weight)
    shifts = rules.scales == "power_of_two"
    return QuantSpec(width, signed=True, symmetric=rules.symmetric(width), axis=0, power_of_two=shifts)


def _without_skipped(
    gm: fx.GraphModule, nodes: list[fx.Node], kept: set[fx.Node], skipped: set[fx.Node]
) -> list[fx.Node]:
    """The nodes but for those that skipped layers alone read: such a layer wants no codes.

    What an integer layer yields has codes nevertheless: its kernel ends in them.
    """
    if not skipped:
        return nodes
    wanted = {merged_clamp(gm, layer) or layer for layer in kept}
    for node in reversed(gm.graph.nodes):
        for reader in node.users:
            op = find_op(gm, reader)
            passes = op is not None and (op.role in ("same", "concat") or merged_clamp(gm, node) is reader)
            if op is not None and reader not in skipped and (not passes or reader in wanted):
                wanted.add(node)
    return [n for n in nodes if n in wanted]


def entering(gm: fx.GraphModule, layers: set[fx.Node]) -> set[fx.Node]:
    """The nodes that have codes where Q/DQ pairs stand before weighted layers only, of a folded network or of a student.

    A layer's float sum and the addition behind it become one kernel, if the other addend has codes:

        conv ──────────► add ──► relu ──► Q/DQ ──► conv
        shortcut ─► Q/DQ ─┘

    So of two addends without codes the shortcut gets them: the one with fewer weighted layers before it.
    """
    found = _carried(gm, layers, set())
    depth: dict[fx.Node, int] = {}
    shortcuts = set()
    for node in gm.graph.nodes:
        sources, op = node.all_input_nodes, find_op(gm, node)
        depth[node] = max((depth[n] for n in sources), default=0) + (op is not None and op.role == "weighted")
        if op is not None and op.name == "add" and len(sources) == 2 and not found & set(sources):
            shortcuts.add(
                min(reversed(sources), key=lambda n: depth[n])
            )  # of equals the second, as most networks write it
    return _carried(gm, layers, shortcuts)


def _carried(gm: fx.GraphModule, layers: set[fx.Node], also: set[fx.Node]) -> set[fx.Node]:
    """What reaches one of the layers, or is among `also`, by mere moves and merged clamps."""
    found = set(also)
    for node in reversed(gm.graph.nodes):
        for reader in node.users:
            op = find_op(gm, reader)
            passes = op is not None and (op.role in ("same", "concat", "quant") or merged_clamp(gm, node) is reader)
            if reader in layers or (passes and reader in found):
                found.add(node)
    return found


def merged_clamp(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The ReLU or ReLU6 that alone reads `node` and merges with the quantizer behind it, so that `node` itself needs none."""
    op, users = find_op(gm, node), list(node.users)
    if op is None or op.role not in ("weighted", "join", "float") or len(users) != 1:
        return None
    behind = find_op(gm, users[0])
    return users[0] if behind is not None and behind.role == "clamp" else None


def activated(gm: fx.GraphModule, layer: fx.Node) -> set[fx.Node]:
    """A layer's node and what activation functions alone make of it, gated ones (x · sigmoid(x), x · relu6(x + 3) / 6) too."""
    found = {layer}
    for node in gm.graph.nodes:
        op, sources = find_op(gm, node), node.all_input_nodes
        if op is not None and op.name in _ACTIVATIONS and sources and found.issuperset(sources):
            found.add(node)
    return found


def quantized_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose result lies on an integer grid: all but those merged into a clamp, and the float result."""
    result = float_tail(gm)
    return [n for n in gm.graph.nodes if n.op != "output" and n not in result and merged_clamp(gm, n) is None]


def float_tail(gm: fx.GraphModule) -> set[fx.Node]:
    """The result and what it is a mere rearrangement or clamp of: left in float."""
    node, tail = output_node(gm), set()
    while node.op != "placeholder" and (op := find_op(gm, node)) is not None:
        tail.add(node)
        merged = op.role == "clamp" and merged_clamp(gm, node.all_input_nodes[0]) is node
        if not (op.role == "same" or merged) or len(node.all_input_nodes[0].users) > 1:
            break
        node = node.all_input_nodes[0]
    return tail


def averages(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's values lie between those of its one input."""
    op = find_op(gm, node)
    return op is not None and op.name in ("avg_pool", "adaptive_average", "resize_bilinear")


def averaged(gm: fx.GraphModule) -> list[tuple[str, str]]:
    """Value names of what is averaged, and of the averages, of a folded network or of a student."""
    found = []
    for node in (n for n in gm.graph.nodes if averages(gm, n)):
        named = (
            node if node.meta.get("value") is not None else next(iter(node.users))
        )  # a student's quantizer has the name
        found.append((node.all_input_nodes[0].meta["value"], named.meta["value"]))
    return found


def _tie(gm: fx.GraphModule, nodes: list[fx.Node], ties: str) -> list[list[fx.Node]]:
    """Groups of nodes that share one grid: across moves of values, and all parts of a concatenation; see `PlanRules.ties`."""
    group = {n: [n] for n in nodes}
    for node in nodes:
        op = find_op(gm, node)
        shared = op is not None and (op.role in ("same", "concat") or (ties == "pools" and averages(gm, node)))
        if not shared:
            continue
        for source in node.all_input_nodes:
            if source in group and group[source] is not group[node]:
                merged = group[source] + group[node]
                for member in merged:
                    group[member] = merged
    return list({id(members): members for members in group.values()}.values())


def _nonnegative(gm: fx.GraphModule) -> dict[fx.Node, bool]:
    known: dict[fx.Node, bool] = {}
    for node in gm.graph.nodes:
        op = find_op(gm, node)
        if op is None:
            known[node] = False
        else:
            known[node] = op.nonneg == "always" or (op.nonneg == "keep" and all(known[n] for n in node.all_input_nodes))
    return known


def _width(
    members: Iterable[fx.Node], layers: list[fx.Node], last: set[fx.Node], wide: set[fx.Node],
    chosen: Mapping[fx.Node, Override], bits: BitConfig, rules: PlanRules,
) -> int:  # fmt: skip
    members = set(members)
    enters = [layer for layer in layers if layer.all_input_nodes[0] in members and not chosen[layer].skip]
    on_edge = members & wide or (rules.edges != "all" and not last.isdisjoint(enters))
    usual = bits.edge if on_edge else bits.act
    asked = [usual if (override := chosen[layer]).act is None else override.act for layer in enters]
    if any(chosen[layer].act is not None for layer in enters):  # of layers that share a tensor, the one that needs most
        return max(width for width in asked if width is not None)
    if on_edge:
        return bits.edge
    return bits.act if enters and bits.act is not None else rules.adds
