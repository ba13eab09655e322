"""Splits a network into blocks for reconstruction, from structure alone.

Between two weighted layers, the network is cut at the last point where exactly one tensor is alive; neighbouring pieces
owned by the same module (that is no `Sequential`) are one block; a block of more than 16 weighted layers falls apart into
single layers. A ResNet yields stem, residual blocks and classifier this way; a MobileNetV2 its inverted residuals.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ptq.graph.ops import input_node, value, values_of, weighted_nodes

_LARGEST = 16


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a network: value names it reads (`inputs`) and yields (`outputs`), its weighted `layers` (paths)."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def split(gm: fx.GraphModule, unit: Literal["block", "layer"] = "block") -> list[Block]:
    """The blocks of a network in execution order; together they compute all of it."""
    stem = input_value_node(gm)  # the input and its quantizer belong to no block: blocks start from the quantized input
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and n is not stem]
    layers = set(weighted_nodes(gm))
    positions = [i for i, n in enumerate(nodes) if n in layers]
    alive = _alive([stem, *nodes])
    every = [_cut(alive, a, b, nodes) for a, b in itertools.pairwise(positions)]
    cuts = [cut for cut, _ in every] if unit == "layer" else _keep(every, positions, nodes)
    edges = [0, *(c + 1 for c in cuts), len(nodes)]
    return [_block(gm, nodes[a:b], layers) for a, b in itertools.pairwise(edges)]


def _alive(nodes: list[fx.Node]) -> list[int]:
    """How many tensors are alive after each node but the first: made there or before, and still read later."""
    order = {n: i for i, n in enumerate(nodes)}
    last = {n: max(order.get(u, len(nodes)) for u in n.users) for n in nodes if n.users}
    return [sum(order[n] <= i < last[n] for n in last) for i in range(1, len(nodes))]


def _cut(alive: list[int], a: int, b: int, nodes: list[fx.Node]) -> tuple[int, bool]:
    """Where to cut between the weighted nodes at `a` and `b`, and whether one tensor only is alive there.

    Only a named value can be cut at: before a quantizer the tensor has no name."""
    points = [i for i in range(a, b) if nodes[i].meta.get("value") is not None or i == b - 1]
    single = [i for i in points if alive[i] == 1 and nodes[i].meta.get("value") is not None]
    return (single[-1], True) if single else (points[-1], False)


def _keep(every: list[tuple[int, bool]], positions: list[int], nodes: list[fx.Node]) -> list[int]:
    """The cuts that remain once pieces of one owner are merged and oversized blocks have fallen apart."""
    pieces: list[list[int]] = [[0]]  # indices of weighted layers
    for k, (_, single) in enumerate(every, start=1):
        if single:
            pieces.append([k])
        else:
            pieces[-1].append(k)
    root = _common([nodes[i].meta["owner"] for i in positions])
    blocks: list[list[int]] = []
    for piece in pieces:
        merged = blocks[-1] + piece if blocks else []
        owners = {nodes[positions[k]].meta["owner"] for k in merged}
        if merged and len(owners) == 1 and owners != {root}:
            blocks[-1] = merged
        else:
            blocks.append(piece)
    blocks = [part for block in blocks for part in ([block] if len(block) <= _LARGEST else [[k] for k in block])]
    return [every[block[0] - 1][0] for block in blocks[1:]]


def _common(owners: list[str]) -> str:
    """The innermost module around all layers: the network itself, whatever it is wrapped in."""
    parts = [owner.split(".") for owner in owners]
    shared = [names[0] for names in zip(*parts) if len(set(names)) == 1]
    return ".".join(shared[: next((i for i, names in enumerate(zip(*parts)) if len(set(names)) > 1), len(shared))])


def _block(gm: fx.GraphModule, inside: list[fx.Node], layers: set[fx.Node]) -> Block:
    members = set(inside)
    inputs = dict.fromkeys(value(a) for n in inside for a in n.all_input_nodes if a not in members)
    outputs = [value(n) for n in inside if any(u not in members for u in n.users)]
    paths = tuple(str(n.target) for n in inside if n in layers)
    owners = {n.meta["owner"] for n in inside if n in layers}
    owner = owners.pop() if len(owners) == 1 else ""
    return Block(owner if owner and len(paths) > 1 else paths[0], tuple(inputs), tuple(outputs), paths)  # pyright: ignore[reportGeneralTypeIssues]


def input_value_node(gm: fx.GraphModule) -> fx.Node:
    """The node that carries the input's value name: the placeholder, or the quantizer behind it."""
    node = input_node(gm)
    return node if node.meta["value"] is not None else next(iter(node.users))


def extract(gm: fx.GraphModule, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> fx.GraphModule:
    """The part of `gm` between named values, as a module `(*inputs) -> tuple of outputs` that shares its parameters."""
    by_name = values_of(gm)
    graph = fx.Graph()
    copied = {by_name[name]: graph.placeholder(f"in_{i}") for i, name in enumerate(inputs)}
    needed, stack = set(), [by_name[name] for name in outputs]
    while stack:
        node = stack.pop()
        if node not in needed and node not in copied:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in gm.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(tuple(copied[by_name[name]] for name in outputs))
    return fx.GraphModule(gm, graph)
