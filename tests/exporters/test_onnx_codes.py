"""How weights, biases and channels are stored in a file: packed, in few bytes, as onnxruntime's kernels like them."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from ptq.exporters._onnx_builder import Builder
from torch import nn

import ptq
from tests.zoo import SHAPE, build, images


def _initializers(path):
    return {t.name: t for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    ("target", "bits", "scale", "bias"),
    [
        ("ort", "w4a4", TensorProto.FLOAT16, TensorProto.INT16),
        ("ort", "w8a8", TensorProto.FLOAT, TensorProto.INT32),
        ("native", "w4a4", TensorProto.FLOAT, TensorProto.INT32),
    ],
)
def test_weights_are_packed_and_narrow_layers_are_compact(target, bits, scale, bias, quantized, tmp_path):
    path = tmp_path / "m.onnx"
    qm = quantized("residual", bits)
    proof = ptq.export(qm, f"onnx_qdq:profile={target}", path, images=images()[:8])
    assert proof["passed"]
    held, layer = _initializers(path), "layers.0.conv1"
    codes, q = qm.integer_weights()[layer]
    if bits == "w4a4":
        packed = held[f"{layer}.weight.int4"]
        assert packed.data_type == TensorProto.INT4 and len(packed.raw_data) == codes.numel() // 2
        assert np.array_equal(numpy_helper.to_array(packed).astype(np.int32), codes.numpy())
    assert held[f"{layer}.weight.scale"].data_type == scale and held[f"{layer}.bias.codes"].data_type == bias
    assert np.array_equal(numpy_helper.to_array(held[f"{layer}.weight.scale"]).astype(np.float32), q.scale.numpy())
    assert (f"{layer}.bias.scale" in held) == (scale == TensorProto.FLOAT)
    assert not [t.name for t in held.values() if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]


def test_what_16_bits_do_not_hold_stays_wide(tmp_path):
    """A channel with a tiny scale, and a bias of more than 32,767 steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))
    with torch.no_grad():
        net[0].weight[0].mul_(1e-3)
        net[2].bias[0] = 3e3
    qm = ptq.quantize(net.eval(), "w4a4e4", images(), input_shape=SHAPE, rounding="nearest")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images()[:8])
    assert proof["passed"] and proof["float_layers"] == []
    held = _initializers(tmp_path / "m.onnx")
    scales, biases = (
        {n: t.data_type for n, t in held.items() if n.endswith(end)} for end in ("weight.scale", "bias.codes")
    )
    assert TensorProto.FLOAT in scales.values() and TensorProto.FLOAT16 in scales.values()
    assert TensorProto.INT32 in biases.values() and TensorProto.INT16 in biases.values()


@pytest.mark.parametrize("bits", ["w8", "w4e4"])
def test_float_products_with_integer_weights_stay_float(bits, tmp_path):
    """onnxruntime 1.32 makes kernels of them that round what they multiply to 8 bits."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.embed, self.a, self.b = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.b(F.relu(self.a(self.embed(x).flatten(2).transpose(1, 2)))).mean(1)

    qm = ptq.quantize(Tokens().eval(), bits, images(), input_shape=SHAPE, rounding="nearest", weights="asymmetric")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")
    assert proof["passed"] and proof["sqnr_db"] > 100 and len(proof["float_layers"]) == 3
    held = _initializers(tmp_path / "m.onnx")
    assert held["a.weight.codes" if bits == "w8" else "a.weight.int4"].data_type in (TensorProto.INT8, TensorProto.INT4)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4e4"])
def test_convolutions_of_three_channels_read_a_fourth(bits, tmp_path):
    """onnxruntime's kernels take twice as long for three. One Pad serves both convolutions; its zeros are zero points."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3, bias=False)
            self.c, self.fc = nn.Conv2d(8, 6, 1, groups=2), nn.Linear(6, 10)

        def forward(self, x):
            return self.fc(self.c(F.relu(self.a(x)) + F.relu(self.b(x))).mean((2, 3)))

    asymmetric = {"weights": "asymmetric"} if bits == "w4a4e4" else {}
    qm = ptq.quantize(Twice().eval(), bits, images(), input_shape=SHAPE, rounding="nearest", **asymmetric)
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")
    assert proof["passed"] and proof["differing_outputs"] == 0 and proof["float_operations"] == []
    graph = onnx.load(tmp_path / "m.onnx").graph
    (pad,) = (n for n in graph.node if n.op_type == "Pad")
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    part = "codes" if bits == "w8a8" else "int4"
    assert [shapes[f"{layer}.weight.{part}"][1] for layer in "abc"] == [4, 4, 4]  # c has two groups of 4
    read = {name for n in graph.node for name in n.input}
    assert pad.input[0] in read and all(set(n.output) <= read | {"output"} for n in graph.node)  # nothing for nobody
    ptq.export(qm, "onnx_qdq:profile=native", tmp_path / "n.onnx")
    assert "Pad" not in {n.op_type for n in onnx.load(tmp_path / "n.onnx").graph.node}


@pytest.mark.parametrize("bits", ("w4a4e4", "w6a8e6"))
@pytest.mark.parametrize("name", ("depthwise", "plain"))
def test_kernels_see_no_zero_points_of_narrow_weights(name, bits, tmp_path):
    """Weights with a zero point per channel would make a depthwise convolution a hundred times slower."""
    qm = ptq.quantize(build(name), bits, images(), input_shape=SHAPE, rounding="nearest", weights="asymmetric")
    assert any(q.zero_point.any() for _, q in qm.integer_weights().values())
    ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    zeros = [values[node.input[5]] for node in graph.node if node.op_type == "QLinearConv"]
    assert zeros and not any(zero.any() for zero in zeros)
    assert "Sub" not in {node.op_type for node in graph.node}  # it was folded


def test_packing_of_an_odd_number_of_codes():
    codes = np.array([-8, 7, -1, 3, 0], dtype=np.int8)
    b = Builder(torch.fx.symbolic_trace(torch.nn.Identity()))
    b.packed("t", codes)
    assert np.array_equal(numpy_helper.to_array(b.initializers["t"]).astype(np.int8), codes)


def test_packing_of_two_bits():
    codes = np.array([[-2, 1, -1], [0, 1, -2]], dtype=np.int8)
    b = Builder(torch.fx.symbolic_trace(torch.nn.Identity()))
    b.packed("s", codes, 2)
    b.packed("u", codes & 3, 2, signed=False)
    assert len(b.initializers["s"].raw_data) == 2 and b.initializers["u"].data_type == TensorProto.UINT2
    assert np.array_equal(numpy_helper.to_array(b.initializers["s"]).astype(np.int8), codes)
    assert np.array_equal(numpy_helper.to_array(b.initializers["u"]).astype(np.int8), codes & 3)
