"""One integer grid, rendered as each target wants it: every file computes what was simulated."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from ptq.exporters._parity import open_session
from ptq.exporters._profiles import PROFILES
from ptq.exporters.onnx_qdq import OnnxQdq
from torch import nn

import ptq
from ptq import plugins
from ptq.cli import main
from ptq.errors import ExportError, SpecError
from tests.zoo import SHAPE, ZOO, build, images

# What to quantize with, so that the target takes it.
SUITED = {
    "ort": ("w4a4", {}), "openvino": ("w4a4", {"weights": "symmetric"}),
    "tensorrt": ("w4a4", {"weights": "symmetric", "activations": "signed"}), "qnn": ("w4a8", {"weights": "symmetric"}),
    "tflite": ("w8a8", {}), "stm32": ("w4a8", {"weights": "symmetric"}),
    "pot": ("w8a8", {"activations": "signed", "scales": "power_of_two"}), "native": ("w4a4", {}),
}  # fmt: skip


def _quantized(name, target):
    bits, options = SUITED[target]
    return ptq.quantize(build(name), bits, images(), input_shape=SHAPE, rounding="nearest", target=target, **options)


def test_every_profile_is_tried():
    assert list(SUITED) == list(PROFILES)


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("target", SUITED)
def test_file_computes_what_was_simulated(target, name, tmp_path):
    proof = ptq.export(_quantized(name, target), target, tmp_path / "m.onnx", images=images())
    assert proof["passed"] and proof["worst_steps"] <= 1
    if target in ("ort", "openvino", "pot"):
        assert proof["differing_outputs"] == 0
    if target == "ort":
        assert proof["float_layers"] == []


def _types(path) -> dict[str, set[int]]:
    """Types of the zero points that Quantize- and DequantizeLinear carry, and of biases."""
    model = onnx.load(str(path))
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    found: dict[str, set[int]] = {"activation": set(), "weight": set(), "stored": set(), "bias": set()}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            found["activation"].add(kinds[node.input[2]])
        elif node.op_type == "DequantizeLinear" and node.output[0].endswith(".weight"):
            found["weight"].add(kinds[node.input[2]])
            found["stored"] |= {
                kinds[n] for n in kinds if (n.startswith(f"{node.output[0]}.") and "codes" in n) or "int4" in n
            }
        elif node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            found["bias"].add(kinds.get(node.input[2], TensorProto.INT32))
    return found


@pytest.mark.parametrize(
    ("target", "activation", "weight", "stored", "bias"),
    [
        ("ort", {"UINT8"}, {"INT8"}, {"INT4", "INT8"}, {"INT32"}),
        ("tensorrt", {"INT8"}, {"INT8"}, {"INT8"}, {"FLOAT"}),
        ("qnn", {"UINT8"}, {"INT4", "INT8"}, {"INT4", "INT8"}, {"INT32"}),
        ("tflite", {"INT8"}, {"INT8"}, {"INT8"}, {"INT32"}),
        ("stm32", {"INT8"}, {"INT8"}, {"INT4", "INT8"}, {"INT32"}),
        ("native", {"UINT4", "UINT8"}, {"INT4", "INT8"}, {"INT4", "INT8"}, {"INT32"}),
    ],
)
def test_types(target, activation, weight, stored, bias, tmp_path):
    ptq.export(_quantized("residual", target), target, tmp_path / "m.onnx", images=images()[:8])
    found = {what: {TensorProto.DataType.Name(k) for k in kinds} for what, kinds in _types(tmp_path / "m.onnx").items()}
    assert found == {"activation": activation, "weight": weight, "stored": stored, "bias": bias}


@pytest.mark.parametrize(
    ("target", "bits", "options", "says"),
    [
        ("tensorrt", "w8a8", {}, r"value \w+: .*add --activations signed"),
        (
            "tensorrt",
            "w4a8",
            {"activations": "signed"},
            r"layer [\w.]+: its weights have zero points; add --weights symmetric",
        ),
        ("openvino", "w4a4", {}, "add --weights symmetric"),
        ("tensorrt", "w4a8", {}, r"add --weights symmetric\. And value \w+: .*add --activations signed$"),
        (
            "tensorrt",
            "w8a8",
            {"activations": "signed", "placement": "everywhere"},
            r"value \w+: .*add --placement inputs",
        ),
        ("qnn", "w4a4", {"weights": "symmetric"}, r"value \w+: 4 bits; activations have 8 there"),
        ("tflite", "w8a4", {}, "4 bits; activations have 8 there"),
        ("pot", "w8a8", {"activations": "signed"}, "add --scales power_of_two"),
    ],
)
def test_what_a_target_cannot_do_is_said_before_any_work(target, bits, options, says):
    def no_images():
        raise AssertionError("work was begun")
        yield

    with pytest.raises(ExportError, match=rf"^{target} cannot take this plan: .*{says}"):
        ptq.quantize(build("residual"), bits, no_images(), input_shape=SHAPE, target=target, **options)


@pytest.mark.parametrize("name", ["residual", "shared_relu", "pre_activation"])
def test_tensorrt_fuses_additions_with_the_layer_before(name, tmp_path):
    """One addend of every addition is a layer's own float sum, the other comes from DequantizeLinear; of what a layer yields, only
    what a layer reads, or a shortcut, has codes."""
    ptq.export(_quantized(name, "tensorrt"), "tensorrt", tmp_path / "m.onnx", images=images())
    nodes = onnx.load(str(tmp_path / "m.onnx")).graph.node
    made = {n.output[0]: n for n in nodes}
    additions = [n for n in nodes if n.op_type == "Add"]
    assert len(additions) == 2 if name != "shared_relu" else 1
    for n in additions:
        fed = sorted(_source(made, v).op_type for v in n.input)
        assert fed == ["Conv", "DequantizeLinear"], fed
    for n in (n for n in nodes if n.op_type in ("Conv", "Gemm")):
        assert made[n.input[0]].op_type == "DequantizeLinear" and made[n.input[1]].op_type == "DequantizeLinear"


def _source(made: dict, value: str) -> onnx.NodeProto:
    """What yields a value, before mere moves of it."""
    while made[value].op_type in ("Pad", "Slice"):
        value = made[value].input[0]
    return made[value]


def test_a_network_with_codes_everywhere_is_not_exported_for_tensorrt(tmp_path):
    qm = ptq.quantize(build("residual"), "w8a8", images(), input_shape=SHAPE, rounding="nearest", activations="signed")
    with pytest.raises(ExportError, match=r"tensorrt cannot take this plan: value \w+: .* add --placement inputs"):
        ptq.export(qm, "tensorrt", tmp_path / "m.onnx", images=images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activations", ["unsigned", "signed"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_types_of_two_bits(name, activations, tmp_path):
    qm = ptq.quantize(
        build(name), "w2a2", images(), input_shape=SHAPE, rounding="nearest", target="native", activations=activations,
        edges="qdrop",
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    proof = ptq.export(qm, "native", path, images=images())
    assert proof["passed"] and proof["worst_steps"] <= 1
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 25 and model.ir_version == 13
    kinds = {TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert {"INT2", "INT2" if activations == "signed" else "UINT2"} <= kinds and not {"INT4", "UINT4"} & kinds
    x = images(2, seed=3).numpy()
    (expected,) = open_session(path, literal=True).run(None, {"input": x})
    (reference,) = ReferenceEvaluator(model).run(None, {"input": x})
    scale = np.abs(expected).max()
    assert (
        np.abs(reference - expected).max() <= 0.05 * scale
    )  # steps of 2 bits that fall to the other side are larger than this


def test_opset_25_only_where_two_bits_are(tmp_path):
    ptq.export(_quantized("plain", "native"), "native", tmp_path / "m.onnx", images=images()[:8])
    assert onnx.load(str(tmp_path / "m.onnx")).opset_import[0].version == 21


# What onnxruntime's optimizer does to a valid file; (target, widths, network).
BROKEN = {
    "types of 4 bits before a max pool": ("native", "w4a4", "plain"),
    "weights of 2 bits in a convolution": ("native", "w2a8", "residual"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_the_optimizer_breaks_are_run_as_they_are_written(what, tmp_path, monkeypatch):
    """The guard is the profile's `literal`; without it the very same export fails."""
    target, bits, name = BROKEN[what]
    qm = ptq.quantize(build(name), bits, images(), input_shape=SHAPE, rounding="nearest", target=target)
    assert ptq.export(qm, target, tmp_path / "m.onnx", images=images()[:8])["passed"]
    monkeypatch.setitem(PROFILES, target, replace(PROFILES[target], literal=False))
    with pytest.raises(ExportError, match="onnxruntime does not load the exported model"):
        ptq.export(qm, target, tmp_path / "n.onnx", images=images()[:8])


def test_names():
    assert plugins.build("exporters", "tensorrt") == OnnxQdq(profile="tensorrt")
    assert plugins.build("exporters", "onnx_qdq") == plugins.build("exporters", "ort") == OnnxQdq()
    with pytest.raises(SpecError, match="unknown target profile 'mine'; known: ort, openvino"):
        OnnxQdq(profile="mine")


def test_from_the_command_line(tmp_path, capsys):
    _quantized("plain", "tflite").save(tmp_path / "out")
    assert main(["export", str(tmp_path / "out"), "--target", "tflite", "-o", str(tmp_path / "m.onnx")]) == 0
    assert main(["export", str(tmp_path / "out"), "--target", "pot", "-o", str(tmp_path / "p.onnx")]) == 1
    assert "pot cannot take this plan" in capsys.readouterr().err
    assert (tmp_path / "m.onnx").is_file() and not (tmp_path / "p.onnx").exists()


class _Pools(nn.Module):
    """Every operation across which LiteRT wants one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(16, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(F.relu(self.first(x)), 2)
        y = torch.cat([F.avg_pool2d(y, 2), F.interpolate(self.second(y), size=(4, 4), mode="bilinear")], 1)
        return self.head(y.mean((2, 3)))


def test_tflite_shares_grids_across_pools_and_has_narrow_weights(tmp_path):
    """Everything between the two convolutions and the classifier is on one grid, and the mean at its end too."""
    qm = ptq.quantize(_Pools().eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest", target="tflite")
    proof = ptq.export(qm, "tflite", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and proof["worst_steps"] <= 1
    model = onnx.load(str(tmp_path / "m.onnx"))
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inner = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "input"]
    assert len(inner) >= 7 and len({(float(held[n.input[1]]), int(held[n.input[2]])) for n in inner}) == 1
    codes = [v for name, v in held.items() if name.endswith(".weight.codes")]
    assert len(codes) == 3 and all(v.dtype == np.int8 and v.min() >= -127 for v in codes)


def test_pools_on_grids_of_their_own_are_not_for_tflite(tmp_path):
    qm = ptq.quantize(_Pools().eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    with pytest.raises(
        ExportError, match=r"tflite cannot take this plan: value \w+: an average of \w+, .*add --ties pools"
    ):
        ptq.export(qm, "tflite", tmp_path / "m.onnx", images=images())
