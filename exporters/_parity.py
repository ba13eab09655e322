"""The gate: runs an exported file in onnxruntime and compares it with the simulation, tensor by tensor and end to end.

Tensor by tensor, onnxruntime computes the file as it is written, without optimizations, and each operation of the
fake-quantized student is given its inputs, so that one difference is not counted again in every tensor behind it. End to end,
onnxruntime runs its integer kernels, as a user's session does, and the integer network runs on the same images alone.

Bounds, and where they come from. Per tensor: one step, and 1 in 10,000 elements, since float sums in another order than the
runtime's move a value across a rounding border now and then (measured: at most 6 in 100,000). The float result, given
equal inputs: 1e-4 of its largest value (measured: 1e-6). End to end, where every operation has an integer kernel: no difference
at all, on processors with VNNI. Networks with float operations inside differ by single steps that pass through every layer behind
them: 99.5 % equal classes, 15 dB and, below 30 dB, 10 dB between the power of what the outputs vary by from image to image and
that of the difference.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from ptq.exporters._onnx_builder import tensor_name
from ptq.exporters._onnx_ops import is_matrix_of_means
from ptq.exporters._onnx_region import MARK
from ptq.exporters._opinions import far_off, second_opinions
from torch import Tensor, fx, nn

from ptq.errors import ExportError
from ptq.graph.float_region import float_remainders, layers_in_regions
from ptq.graph.ops import output_node, weighted_nodes
from ptq.onnx_session import onnx_session
from ptq.quant.affine import dequantize, quantize
from ptq.quant.fake_quant import ActFakeQuant

_STEPS, _SHARE, _RESULT, _AGREEMENT, _SQNR, _VARIATION = 1, 1e-4, 1e-4, 0.995, 15.0, 10.0
_TIE = 1e-3  # steps
# What the order of float sums decides: of what an image's scores span, and of the largest.
_LAST_BITS, _FLOAT_BITS = 1e-5, 2e-7
# dB of the outputs as a whole, beyond which outputs that hardly vary from image to image need not agree in how they do.
_CLOSE = 30.0
_INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger"}
_TO_FLOAT = {"DequantizeLinear", "MatMulIntegerToFloat"}
_QGEMM_INPUTS = 9  # with a scale and a zero point of the result; without, it is float
_MOVES = {
    "Concat", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "ReorderInput", "ReorderOutput", "Reshape", "Slice", "Squeeze", "Sum",
    "Transpose", "Unsqueeze",
}  # fmt: skip
_FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@dataclass
class TensorParity:
    """One tensor's comparison. steps: largest difference in codes; differing: elements that differ, of `elements`, but for
    `ties`, which lie half-way between the two codes."""

    value: str
    steps: int = 0
    differing: int = 0
    ties: int = 0
    elements: int = 0

    @property
    def within(self) -> bool:
        """Inside the bounds; two elements may always differ, for tensors too small for a share to mean anything."""
        return self.steps <= _STEPS and self.differing <= max(2, _SHARE * self.elements)


def open_session(
    model: Path | bytes, optimized: Path | None = None, *, literal: bool = False
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU with all optimizations, as a user runs it; or `literal`, each node as it is written.

    Raises:
        ExportError: onnxruntime refuses the model.
    """
    try:
        return onnx_session(model, literal=literal, optimized=optimized)
    except Exception as e:  # onnxruntime raises classes of its own without a common base
        raise ExportError(f"onnxruntime does not load the exported model: {str(e).splitlines()[0]}") from e


def loads(path: Path) -> bool:
    """Whether onnxruntime opens a file with all optimizations: some of them break on signed codes that are only moved."""
    try:
        open_session(path)
    except ExportError:
        return False
    return True


def compare(
    student: fx.GraphModule,
    integer: fx.GraphModule,
    path: Path,
    images: Tensor,
    batch_size: int,
    *,
    literal: bool = False,
    opinions: bool = False,
) -> dict[str, Any]:
    """The comparison of a file with the student and its integer network on images [N, C, H, W], as plain data.

    literal: run the file end to end as it is written, too. opinions: ask other implementations, see `_opinions`.

    `passed` says how it ended and `failure` why; see the module's text for the bounds.
    """
    tensors, result_error = _per_tensor(student, path, images, batch_size)
    simulated = torch.cat([_run(integer, x) for x in images.split(batch_size)])
    session = open_session(path, literal=literal)
    real = torch.cat([torch.from_numpy(session.run(None, {"input": x.numpy()})[0]) for x in images.split(batch_size)])
    same = _same_class(simulated, real)
    found = {
        "runtime": f"onnxruntime {onnxruntime.__version__}", "images": len(images), "top1_agreement": float(same.mean()),
        "sqnr_db": _decibels(simulated, simulated, real), "variation_db": _decibels(simulated - simulated.mean(0), simulated, real),
        "differing_outputs": int((simulated != real).sum()), "outputs": real.numel(),
        "worst_steps": max((t.steps for t in tensors), default=0), "result_error": result_error,
        "tensors": [asdict(t) for t in tensors], "float_regions": float_remainders(student),
    } | _by_module(student, count_kernels(path, literal=literal))  # fmt: skip
    failure = _failure(tensors, found, same.numel(), bool(torch.isfinite(real).all()))
    found["opinions"] = second_opinions(path, images, simulated) if opinions else []
    failure = failure or far_off(found["opinions"])
    if failure is None and not literal and found["differing_outputs"] and _is_exact(found) and multiplies_exactly():
        failure = (
            f"{found['differing_outputs']} of {found['outputs']} outputs differ from the integer network's, though every operation "
            "runs in an integer kernel and every tensor agrees given equal inputs"
        )
    return {"passed": failure is None, "failure": failure, **found}


def _by_module(student: fx.GraphModule, kernels: dict[str, Any]) -> dict[str, Any]:
    """The float layers by their module paths, and apart from the other float operations."""
    layers = kernels["float_layers"]
    result = output_node(student)
    paths = {
        "output" if n is result else tensor_name(n).removesuffix(".raw"): str(n.target) for n in weighted_nodes(student)
    }
    named = [next((paths[t] for t in _tensors_of(name) if t in paths), name) for name in layers]
    named += layers_in_regions(student)
    others = [name for name in kernels["float_operations"] if name not in layers]
    return {**kernels, "float_layers": named, "float_operations": others}


def _tensors_of(node: str) -> list[str]:
    """The tensors that a node of the file may have been written for, the longest name first: conv1 of "conv1.raw/Conv"."""
    parts = node.partition("/")[0].split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _same_class(simulated: Tensor, real: Tensor) -> Tensor:
    """1 where the file has the simulation's class `[N, …]`, or where in both only the last bits tell the two scores apart."""
    ours, theirs = (scores.argmax(1, keepdim=True) for scores in (simulated, real))
    tied = torch.ones_like(ours, dtype=torch.bool)
    for scores, other in ((simulated, theirs), (real, ours)):
        top = scores.amax(1, keepdim=True)
        spread = _LAST_BITS * (top - scores.amin(1, keepdim=True)) + _FLOAT_BITS * scores.abs().amax(1, keepdim=True)
        tied &= top - scores.gather(1, other) <= spread
    return ((ours == theirs) | tied).squeeze(1).double()


def _decibels(signal: Tensor, simulated: Tensor, real: Tensor) -> float | None:
    """Power of a signal over that of the difference; None where there is no difference."""
    noise, power = (float(t.double().square().sum()) for t in (real - simulated, signal))
    return None if noise == 0 else round(10 * float(np.log10(max(power, 1e-300) / noise)), 2)


def multiplies_exactly() -> bool:
    """Whether onnxruntime's integer kernels were seen to be exact on such a processor: x86 with VNNI. Older ones add pairs of
    products in 16 bits, which may saturate."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_vnni") or able.get("avx_vnni"))


def _is_exact(found: dict[str, Any]) -> bool:
    """Whether all that a file computes, it computes on integers."""
    return not (found["float_layers"] or found["float_operations"] or found["float_regions"])


def _failure(tensors: list[TensorParity], found: dict[str, Any], count: int, finite: bool) -> str | None:
    first = next((t for t in tensors if not t.within), None)
    if first is not None:
        return (
            f"tensor {first.value} is the first to diverge: {first.differing} of {first.elements} elements differ, "
            f"by up to {first.steps} steps"
        )
    if not finite:
        return "the exported network's output is not finite"
    if not found["result_error"] <= _RESULT:
        return f"tensor output is the first to diverge: by {found['result_error']:.1e} of its largest value"
    differing = round((1 - found["top1_agreement"]) * count)
    if differing > max(1, (1 - _AGREEMENT) * count):
        return f"the class differs in {differing} of {count} places, though every tensor agrees given equal inputs"
    if found["sqnr_db"] is None:
        return None
    if found["sqnr_db"] < _SQNR:
        return f"the outputs are {found['sqnr_db']} dB apart, though every tensor agrees given equal inputs"
    if found["images"] > 1 and found["variation_db"] < _VARIATION and found["sqnr_db"] < _CLOSE:
        return (
            f"the outputs are {found['variation_db']} dB apart, measured by what they vary from image to image, though every "
            "tensor agrees given equal inputs"
        )
    return None


def _run(gm: fx.GraphModule, x: Tensor) -> Tensor:
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))
    with torch.no_grad():
        return gm(x.to(device)).cpu()


class _Forced(fx.Interpreter):
    """Runs the simulation, replacing each quantized value by the runtime's after comparing the two."""

    def __init__(self, gm: fx.GraphModule, values: dict[str, np.ndarray], found: dict[str, TensorParity]) -> None:
        super().__init__(gm)
        self.values, self.found = values, found

    def run_node(self, n: fx.Node) -> Any:
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if isinstance(
            module, nn.AvgPool2d
        ):  # thousands of pixels added one by one in float32 are off by more than a tie
            return module(self.env[n.all_input_nodes[0]].double()).float()
        if not isinstance(module, ActFakeQuant):
            return super().run_node(n)
        name = n.meta["value"]
        q, x = module.qparams, self.env[n.all_input_nodes[0]]
        theirs = quantize(torch.from_numpy(self.values[name]).to(x.device), q)  # real values on the grid: exact
        gap = (quantize(x, q) - theirs).abs()
        # Half-way between two codes, as means of equal scales often are, float noise decides: both are right.
        exact = (x.double() / q.scale.double() + q.zero_point).clamp(q.spec.qmin, q.spec.qmax)
        tie = ((exact - theirs).abs() - 0.5).abs() < _TIE
        entry = self.found.setdefault(name, TensorParity(name))
        entry.steps = max(entry.steps, int(gap.max()))
        entry.ties += int(((gap > 0) & tie).sum())
        entry.differing += int(((gap > 0) & ~tie).sum())
        entry.elements += gap.numel()
        return dequantize(theirs, q)


def _per_tensor(gm: fx.GraphModule, path: Path, images: Tensor, batch_size: int) -> tuple[list[TensorParity], float]:
    """Every quantized value's comparison, and the largest difference of the result relative to its largest value."""
    model = onnx.load(str(path))
    inside = {name for node in model.graph.node for name in node.output}
    result = output_node(gm)
    modules = [n for n in gm.graph.nodes if n.op == "call_module" and n.meta.get("value")]
    named = {n.meta["value"]: "output" if n is result else tensor_name(n) for n in modules}
    values = [value for value, name in named.items() if f"{name}.codes" in inside]
    model.graph.node.extend(
        onnx.helper.make_node(
            "DequantizeLinear", [f"{named[v]}.{part}" for part in ("codes", "scale", "zero_point")], [f"{v}.seen"]
        )
        for v in values
    )
    seen = [onnx.helper.make_tensor_value_info(f"{v}.seen", onnx.TensorProto.FLOAT, None) for v in values]
    model.graph.output.extend(seen)
    session = open_session(model.SerializeToString(), literal=True)
    found: dict[str, TensorParity] = {}
    worst = 0.0
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for x in images.split(batch_size):
            *reals, theirs = session.run([*(info.name for info in seen), "output"], {"input": x.numpy()})
            ours = _Forced(gm, dict(zip(values, reals)), found).run(x.to(device)).cpu()  # pyright: ignore[reportArgumentType]
            gap = float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp_min(1e-30))
            worst = max(worst, gap) if gap == gap else float("inf")
    return list(found.values()), worst


def count_kernels(path: Path, *, literal: bool = False) -> dict[str, Any]:
    """What onnxruntime runs in integer and in float, from the graph it optimized: weighted layers, the float ones by name; every
    operation that computes in float, by name, but for what is in float regions; nodes by kind."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized, literal=literal)
        nodes = onnx.load(str(optimized)).graph.node
    kinds = Counter(n.op_type for n in nodes)
    return {
        "integer_layers": sum(n.op_type in _INTEGER and MARK not in n.name for n in nodes),
        "float_layers": [n.name for n in nodes if n.op_type in _FLOAT and not _is_no_layer(n)],
        "float_operations": _float_operations(nodes),
        "kernels": dict(sorted(kinds.items())),
    }


def _is_no_layer(n: onnx.NodeProto) -> bool:
    return MARK in n.name or any(map(is_matrix_of_means, n.input))


def _float_operations(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Names of the operations on float tensors that compute something.

    Codes begin at QuantizeLinear and end at DequantizeLinear or in a kernel with a float result; other operations yield what
    they read.
    """
    codes: set[str] = set()
    found = []
    for n in nodes:
        reads = n.input[0] in codes
        ends = n.op_type in _TO_FLOAT or (n.op_type == "QGemm" and len(n.input) < _QGEMM_INPUTS)
        if (
            n.op_type == "QuantizeLinear"
            or n.op_type.startswith("QLinear")
            or (n.op_type == "QGemm" and not ends)
            or (reads and not ends)
        ):
            codes |= set(n.output)
        elif not reads and not ends and n.op_type not in _MOVES and MARK not in n.name:
            found.append(n.name)
    return found
