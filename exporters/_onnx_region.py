"""Float regions in ONNX: converted by torch's own exporter, one by one, and written into the file's graph.

    ──► region ──►      →      ──► x::node_1 ──► x::node_2 ──► Sum ──►         x: the region's value name

Regions with the same steps, as the layers of a transformer have, are converted once: their constants are inputs of what is
converted. The sum of one tensor behind each keeps onnxruntime from making integer kernels of its last operation, or from
rounding its weights: what was simulated is float.
"""

import json
import warnings
from functools import lru_cache
from typing import Any

import onnx
import onnx.inliner
import torch
from onnx import numpy_helper
from ptq.exporters._onnx_builder import Builder
from torch import Tensor, fx, nn

from ptq.errors import ExportError
from ptq.graph.float_region import FloatRegion
from ptq.graph.serialize import as_tuples
from ptq.graph.source_line import first_line

MARK = "::"  # in the names of what is inside a region


def float_region(b: Builder, node: fx.Node, out: str) -> str:
    """The nodes of a region, and a sum of one tensor."""
    return b.add("Sum", [region(b, node, f"{out}{MARK}result")], f"{out}{MARK}")


def region(b: Builder, node: fx.Node, out: str) -> str:
    """The nodes of a region; the name of its result."""
    m, prefix = b.module(node), out.partition(MARK)[0]
    graph = _converted(*_key(b.gm, node), b.opset)
    held = [b.constant(f"{node.target}.constant_{k}", t.detach().cpu().numpy()) for k, t in enumerate(m.constants)]
    names = dict(zip((i.name for i in graph.input), [*b.inputs(node), *held])) | {graph.output[0].name: out, "": ""}

    def named(name: str) -> str:
        return names.setdefault(name, f"{prefix}{MARK}{name}")

    for tensor in graph.initializer:
        b.constant(named(tensor.name), numpy_helper.to_array(tensor))
    for inner in graph.node:
        b.nodes.append(_renamed(inner, named))
    return out


def check_region(gm: fx.GraphModule, node: fx.Node, opset: int) -> None:
    """Raises ExportError, naming the operations, if a region has no ONNX form."""
    _converted(*_key(gm, node), opset)


def _renamed(node: onnx.NodeProto, named: Any) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.ClearField("metadata_props")
    made.ClearField("doc_string")
    made.name = named(node.name or f"{node.op_type}_{node.output[0]}")
    for names in (made.input, made.output):
        for k, name in enumerate(names):
            names[k] = named(name)
    return made


def _key(gm: fx.GraphModule, node: fx.Node) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """What decides the form of a region: its steps and the types of its constants, as text, and its inputs' shapes."""
    m: Any = gm.get_submodule(str(node.target))
    return json.dumps([m.steps, m.tensors]), tuple(tuple(n.meta["shape"]) for n in node.all_input_nodes)


class _Open(nn.Module):
    """A region whose constants are inputs too."""

    def __init__(self, region: FloatRegion, inputs: int) -> None:
        super().__init__()
        self.region, self.inputs = region, inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.region.compute(tensors[: self.inputs], tensors[self.inputs :])


@lru_cache(maxsize=256)
def _converted(text: str, shapes: tuple[tuple[int, ...], ...], opset: int) -> onnx.GraphProto:
    """The graph of a region: its inputs, then its constants, to its result.

    Raises:
        ExportError: torch's exporter knows no form of one of its operations.
    """
    steps, tensors = as_tuples(json.loads(text))
    closed = FloatRegion(steps, tensors)
    example = (*(torch.rand(2, *shape) for shape in shapes), *closed.constants)
    batch = torch.export.Dim("batch")
    free = tuple({0: batch} if k < len(shapes) else {} for k in range(len(example)))
    what = f"operations in float, {', '.join(f'aten.{name}' for name in closed.names)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Open(closed, len(shapes)), example, dynamo=True, opset_version=opset, dynamic_shapes=(free,),
                optimize=True, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as e:  # the exporter raises classes of its own, the reason among what caused them
        reason = first_line(e.__cause__ or e)
        raise ExportError(f"{what}, have no ONNX form: {reason}") from e
    assert program is not None
    model = onnx.inliner.inline_local_functions(program.model_proto)
    version = next(o.version for o in model.opset_import if o.domain == "")
    foreign = sorted({f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")})
    nested = any(a.g.node or a.graphs for n in model.graph.node for a in n.attribute)
    if version != opset or foreign or nested:
        found = "branches or loops" if nested else ", ".join(foreign) or f"opset {version}"
        raise ExportError(f"{what}, have no form in plain ONNX of opset {opset}: {found}")
    return model.graph
