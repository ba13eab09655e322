"""ONNX with QuantizeLinear/DequantizeLinear: plain operators that a stock runtime opens and runs in integer kernels.

    op ──► QuantizeLinear(u8) ──► [Clip to the codes] ──► DequantizeLinear ──► op

Every quantized tensor passes through one such pair; a ReLU or ReLU6 is part of the clipping, exactly, because rounding is
monotone: Q(min(max(x, 0), 6)) = min(max(Q(x), Q(0)), Q(6)). Weights are integer initializers, biases int32 on the
accumulator's grid, stored smaller where `Profile.compact` says so. Opset 21, or 25 where a target takes types of 2 bits; the
batch size is free.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import onnx
from onnx import TensorProto, helper
from ptq.exporters._onnx_builder import Builder, tensor_name
from ptq.exporters._onnx_codes import quantize_value
from ptq.exporters._onnx_ops import EMITTERS, absorbed_pad
from ptq.exporters._onnx_region import check_region
from ptq.exporters._parity import compare, loads
from ptq.exporters._profiles import PROFILES, Profile
from torch import Tensor, fx

from ptq.artifact import QuantizedModel
from ptq.contracts import Presets
from ptq.errors import ExportError, SpecError
from ptq.graph.float_region import FloatRegion
from ptq.graph.insert import quantizer_of
from ptq.graph.integer import code_bounds
from ptq.graph.ops import find_op, input_node, output_node, weighted_nodes
from ptq.graph.plan import QuantPlan, averaged, entering, merged_clamp
from ptq.quant.affine import QParams
from ptq.quant.fake_quant import ActFakeQuant

__all__ = ["OnnxQdq"]

_OPSET, _IR = 21, 10  # the first opset with types of 4 bits, and its file format
_OPSET_2, _IR_2 = 25, 13  # likewise of 2 bits


@dataclass(frozen=True)
class OnnxQdq:
    """QDQ ONNX. profile: the target that the file is rendered for. batch_size: images at a time when it is verified. opinions:
    whether other implementations are asked as well, see `_opinions`."""

    profile: str = "ort"
    batch_size: int = 64
    opinions: bool = True

    suffix: ClassVar[str] = ".onnx"
    presets: ClassVar[Presets] = {}
    positional: ClassVar[str] = "profile"
    aliases: ClassVar[dict[str, dict[str, str]]] = {name: {"profile": name} for name in PROFILES}  # --target tensorrt

    summaries: ClassVar[dict[str, str]] = {name: profile.summary for name, profile in PROFILES.items()}

    @property
    def rules(self) -> dict[str, str]:
        """What the target asks of a plan, see `PlanRules`."""
        return {"placement": PROFILES[self.profile].placement, "ties": PROFILES[self.profile].ties}

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise SpecError(f"unknown target profile {self.profile!r}; known: {', '.join(PROFILES)}")

    def check(self, graph: fx.GraphModule, plan: QuantPlan) -> None:
        """Raises ExportError, naming layer or value and the remedy, if the target cannot do what is planned."""
        first: dict[str, str] = {}  # remedy → the first layer or value that needs it
        for objection in (*PROFILES[self.profile].objections(plan), *self._misplaced(graph, plan)):
            first.setdefault(objection.rpartition("; ")[2], objection)
        if first:
            raise ExportError(f"{self.profile} cannot take this plan: {'. And '.join(first.values())}")
        for node in graph.graph.nodes:
            op = find_op(graph, node)
            if op is not None and op.role != "quant" and op.name not in EMITTERS:
                raise ExportError(f"{node.meta.get('value')}: operation {op.name} has no ONNX form in this exporter")
            if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), FloatRegion):
                check_region(graph, node, _OPSET)

    def _misplaced(self, graph: fx.GraphModule, plan: QuantPlan) -> Iterator[str]:
        """Values with codes that the target wants float, or on another grid."""
        profile = PROFILES[self.profile]
        if profile.placement == "inputs":
            wanted = entering(graph, {n for n in weighted_nodes(graph) if str(n.target) in plan.weights})
            names = {n.meta.get("value") for n in wanted}
            for value in (v for v in plan.values if v not in names):
                yield f"value {value}: it enters no convolution or linear layer and yet has codes; add --placement inputs"
        if profile.ties == "pools":
            for source, value in averaged(graph):
                if {source, value} <= set(plan.values) and plan.group(source) != plan.group(value):
                    yield f"value {value}: an average of {source}, on a grid of its own; add --ties pools"

    def export(self, qm: QuantizedModel, path: Path) -> Path:
        """Writes `path`. The file passes the ONNX checker's full check and strict shape inference.

        Raises:
            ExportError: the network cannot be written or the written model is not valid ONNX.
        """
        model = build_model(qm, PROFILES[self.profile])
        try:
            onnx.checker.check_model(model, full_check=True)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
            raise ExportError(f"the written model is not valid ONNX: {e}") from e
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path

    def verify(self, qm: QuantizedModel, path: Path, images: Tensor) -> dict[str, Any]:
        """Runs the file in onnxruntime and compares it with the simulation; see `_parity.compare`."""
        profile = PROFILES[self.profile]
        literal = profile.literal or (profile.container == "signed" and not loads(path))
        return compare(qm.student, qm.graph, path, images, self.batch_size, literal=literal, opinions=self.opinions)

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Nothing to shorten."""
        return cls()


def build_model(qm: QuantizedModel, profile: Profile = PROFILES["ort"]) -> onnx.ModelProto:
    """The ONNX model of a quantized network."""
    model = _build(qm, profile, _OPSET, _IR)
    two_bits = any(t.data_type in (TensorProto.INT2, TensorProto.UINT2) for t in model.graph.initializer)
    return _build(qm, profile, _OPSET_2, _IR_2) if two_bits else model


def _build(qm: QuantizedModel, profile: Profile, opset: int, ir: int) -> onnx.ModelProto:
    gm = qm.student
    b = Builder(gm, profile, opset)
    source, result = input_node(gm), output_node(gm)
    b.names[source] = "input"
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_function"):
            _emit(b, qm.plan, node, "output" if node is result else tensor_name(node))
    if b.names[result] != "output":
        b.add("Identity", [b.names[result]], "output")
    graph = helper.make_graph(
        _read(b.nodes), "ptq",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *source.meta["shape"]])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", *result.meta["shape"]])],
        list(b.initializers.values()),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, producer_name="ptq", ir_version=ir)


def _read(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes without those DequantizeLinear that nobody reads: whoever would have has taken the codes themselves."""
    read = {"output", *(name for n in nodes for name in n.input)}
    return [n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in read]


def _emit(b: Builder, plan: QuantPlan, node: fx.Node, out: str) -> None:
    op = find_op(b.gm, node)
    if op is None:
        raise ExportError(f"{node.name}: unknown operation")
    if op.role == "quant":
        module, raw = b.module(node), node.all_input_nodes[0]
        b.names[node] = quantize_value(b, b.names[raw], out, module.qparams, code_bounds(b.gm, raw, module.qparams))
    elif absorbed_pad(b.gm, node):
        return
    elif op.role == "clamp" and _merges(b.gm, node):
        b.names[node] = b.names[node.all_input_nodes[0]]
    else:
        tied = quantizer_of(b.gm, node.meta["value"]) if node.meta["value"] in plan.values else None
        raw = EMITTERS[op.name](b, node, out if tied is None else f"{out}.raw")
        b.names[node] = raw if tied is None else _on_grid(b, raw, out, tied.qparams)


def _on_grid(b: Builder, raw: str, out: str, q: QParams) -> str:
    """A moved value, on its source's grid: the pair around it lets the runtime move the codes instead."""
    return quantize_value(b, raw, out, q, (q.spec.qmin, q.spec.qmax))


def _merges(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a ReLU or ReLU6 is done by the clipping of the quantizer behind it."""
    users = list(node.users)
    behind = len(users) == 1 and users[0].op == "call_module" and gm.get_submodule(str(users[0].target))
    return isinstance(behind, ActFakeQuant) and merged_clamp(gm, node.all_input_nodes[0]) is node
