"""A student's graph as JSON and back: a saved network needs neither its source code nor pickle to run again.

Possible because a traced network holds only the operations of `ops.py`, each rebuilt from a few numbers.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx, nn

from ptq.errors import ModelError
from ptq.graph.ops import OPS, find_op
from ptq.graph.plan import QuantPlan
from ptq.quant.affine import QParams
from ptq.quant.fake_quant import ActFakeQuant, bias_params, set_weight_fake_quant, store_integer
from ptq.spec import QuantSpec

_BY_NAME = {op.name: (target, op) for target, op in OPS.items()}


def graph_to_json(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """One dictionary per node, in execution order."""
    return [_node_to_json(gm, n) for n in gm.graph.nodes]


def _node_to_json(gm: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    inputs: list[str] = []
    fx.map_arg(node.args, lambda n: inputs.append(n.name))
    row: dict[str, Any] = {"name": node.name, "op": node.op, "inputs": inputs}
    row |= {key: node.meta[key] for key in ("value", "shape", "owner") if key in node.meta}
    op = find_op(gm, node)
    if op is None:
        return row
    row["op"] = op.name
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        row["path"] = str(node.target)
        row["fields"] = {f: _field(module, f) for f in op.fields}
        if isinstance(module, ActFakeQuant):
            row["fields"] = asdict(module.spec)
    return row


def _field(module: nn.Module, name: str) -> Any:
    v = getattr(module, name)
    return v is not None if name == "bias" else v


def as_tuples(v: Any) -> Any:
    """What JSON gives back as lists, as the tuples it was, at any depth."""
    return tuple(as_tuples(x) for x in v) if isinstance(v, list) else v


def graph_from_json(rows: list[Mapping[str, Any]], plan: QuantPlan) -> fx.GraphModule:
    """The network, with empty tensors on the meta device; `load_state_dict(…, assign=True)` fills them."""
    for row in rows:
        _check_names(row)
    graph, root, nodes = fx.Graph(), nn.Module(), dict[str, fx.Node]()
    with torch.device("meta"):
        for row in rows:
            nodes[row["name"]] = _rebuild(row, graph, root, [nodes[name] for name in row["inputs"]], plan)
    for row in rows:
        nodes[row["name"]].meta.update({k: as_tuples(row[k]) for k in ("value", "shape", "owner") if k in row})
    graph.lint()
    gm = fx.GraphModule(root, graph)
    return gm.eval().requires_grad_(False)


def _check_names(row: Mapping[str, Any]) -> None:
    """Raises unless a row's names are names: fx writes them into the code that it generates, others into names of files.

    Raises:
        ModelError: one holds more.
    """
    name, value = str(row["name"]), str(row.get("value") or "x")
    if not name.isidentifier() or not re.fullmatch(r"\w+(\.\w+)*", value):
        raise ModelError(
            f"a node is called {name[:80]!r}, its value {value[:80]!r}: names are letters, digits and underscores"
        )
    path = row.get("path", "")
    if not isinstance(path, str) or re.search(r'["\\\x00-\x1f\x7f]', path):
        raise ModelError(f"a module is called {str(path)[:80]!r}, which is no name")


def _rebuild(
    row: Mapping[str, Any], graph: fx.Graph, root: nn.Module, inputs: list[fx.Node], plan: QuantPlan
) -> fx.Node:
    if row["op"] == "placeholder":
        return graph.placeholder(row["name"])
    if row["op"] == "output":
        return graph.output(inputs[0])
    target, op = _BY_NAME[row["op"]]
    if "path" not in row:
        return (
            graph.call_function(torch.cat, (inputs,), {"dim": 1})
            if op.role == "concat"
            else graph.call_function(target, tuple(inputs))
        )
    if not _has(root, row["path"]):
        _attach(root, row["path"], _module(target, row, plan))
    return graph.call_module(row["path"], tuple(inputs))


def _module(target: Any, row: Mapping[str, Any], plan: QuantPlan) -> nn.Module:
    if target is ActFakeQuant:
        module = ActFakeQuant(_empty(QuantSpec(**row["fields"]), None))
        module.frozen = True
        return module
    module = target(**{k: as_tuples(v) for k, v in row["fields"].items()})
    if row["path"] in plan.weights:
        size = module.weight.shape[0]
        q = _empty(plan.weights[row["path"]], size)
        set_weight_fake_quant(module, q)
        store_integer(module, "weight", torch.zeros(module.weight.shape, dtype=torch.int8), q)
        if module.bias is not None and plan.values:
            store_integer(module, "bias", torch.zeros(size, dtype=torch.int32), bias_params(q.scale, q.scale))
    return module


def _empty(spec: QuantSpec, size: int | None) -> QParams:
    shape = () if size is None else (size,)
    return QParams(torch.ones(shape), torch.zeros(shape, dtype=torch.int32), spec)


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _attach(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(name, module)
