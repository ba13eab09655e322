"""Turns a folded network into the student: fake-quant on every weight and value that the plan names."""

from collections.abc import Mapping

from torch import fx

from ptq.graph.ops import moves, weighted_nodes
from ptq.graph.plan import QuantPlan
from ptq.graph.trace import rewrite
from ptq.quant.affine import QParams
from ptq.quant.fake_quant import (
    ActFakeQuant,
    BiasFakeQuant,
    integer_codes,
    set_weight_fake_quant,
    store_integer_bias,
    swap,
    weight_grid,
)


def insert_fake_quant(
    gm: fx.GraphModule, plan: QuantPlan, acts: Mapping[str, QParams], weights: Mapping[str, QParams]
) -> fx.GraphModule:
    """The student: a copy of `gm` with nearest-rounding fake-quant as the plan has it.

    op ──(y)──► user      →      op ──► quant_y ──(y)──► user

    A group of tied values shares one module; values that only move others are on their source's grid already.

    Args:
        gm: the folded network.
        plan: what to quantize.
        acts: group name → grid (`observe`).
        weights: module path → grid.
    """
    with rewrite(gm) as out:
        for node in weighted_nodes(out):
            if (path := str(node.target)) in plan.weights:
                set_weight_fake_quant(out.get_submodule(path), weights[path])
        for node in list(out.graph.nodes):
            if node.op != "output" and node.meta.get("value") in plan.values and not moves(out, node):
                _quantize_value(out, node, plan.group(node.meta["value"]), acts)
    return out


def quantizer_path(group: str) -> str:
    """Module path of a group's fake-quant module; no attribute of a user's network ends like it."""
    return f"quant_{group}".replace(".", "_") + "__"


def _quantize_value(gm: fx.GraphModule, node: fx.Node, group: str, acts: Mapping[str, QParams]) -> None:
    path = quantizer_path(group)
    if not hasattr(gm, path):
        gm.add_submodule(path, ActFakeQuant(acts[group]))
    with gm.graph.inserting_after(node):
        quant = gm.graph.call_module(path, ())
    quant.meta = dict(node.meta)
    node.replace_all_uses_with(quant)
    quant.args = (node,)
    node.meta["value"] = None


def quantizer_of(gm: fx.GraphModule, value: str) -> ActFakeQuant | None:
    """The fake-quant module whose grid a value of the student lies on, or None where it is float."""
    node = next(n for n in gm.graph.nodes if n.meta.get("value") == value)
    while node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, ActFakeQuant):
            return module
        if not moves(gm, node):
            return None
        node = node.all_input_nodes[0]
    if node.op == "call_function" and moves(gm, node):
        found = [quantizer_of(gm, n.meta["value"]) for n in node.all_input_nodes]
        return found[0] if all(q is found[0] for q in found) else None
    return None


def fake_quantize_bias(gm: fx.GraphModule, node: fx.Node) -> None:
    """Rounds a layer's float bias wherever it is read, to the grid that weights and input have then; nothing where either is float."""
    layer, source = gm.get_submodule(str(node.target)), quantizer_of(gm, node.all_input_nodes[0].meta["value"])
    if layer.bias is not None and source is not None and weight_grid(layer) is not None:
        swap(layer, "bias", BiasFakeQuant(source, layer))


def round_bias(gm: fx.GraphModule, node: fx.Node) -> None:
    """Stores a layer's bias as integers, on the grid of its weights and input as they are; nothing where either is float."""
    layer, source = gm.get_submodule(str(node.target)), quantizer_of(gm, node.all_input_nodes[0].meta["value"])
    held = integer_codes(layer, "weight")
    if held is not None and source is not None:
        store_integer_bias(layer, source.scale.detach(), held[1].scale.detach())
