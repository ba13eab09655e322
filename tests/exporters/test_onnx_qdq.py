"""The written file: valid, integer, packed, free in the batch, and equal to the simulation."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from ptq.exporters._onnx_builder import Builder
from ptq.exporters._parity import compare, count_kernels, open_session
from ptq.exporters.onnx_qdq import build_model
from torch import nn

import ptq
from ptq.graph.insert import quantizer_of
from ptq.graph.runtime_functions import resize_scale
from ptq.quant.affine import quantize
from tests.graph.test_serialize import Everything
from tests.graph.test_trace import Around
from tests.stages import values
from tests.zoo import SHAPE, ZOO, build, images

_WIDTHS = ("w8a8", "w4a4", "w2a4", "w4")


@pytest.fixture(scope="module")
def quantized():
    """A tiny network at some widths, quantized once, by nearest rounding on noise."""
    made: dict[tuple[str, str], ptq.QuantizedModel] = {}

    def get(name: str, bits: str) -> ptq.QuantizedModel:
        if (name, bits) not in made:
            made[name, bits] = ptq.quantize(build(name), bits, images(), input_shape=SHAPE, rounding="nearest")
        return made[name, bits]

    return get


@pytest.mark.parametrize("bits", _WIDTHS)
@pytest.mark.parametrize("name", sorted(ZOO))
def test_file_computes_what_was_simulated(name, bits, quantized, tmp_path):
    qm = quantized(name, bits)
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and proof["worst_steps"] <= 1
    if bits != "w4":  # float activations: sums in another order differ in their last bits
        assert proof["differing_outputs"] == 0
    assert proof["tensors"] or bits == "w4"


@pytest.mark.parametrize("bits", ("w8a8", "w4a4", "w4"))
def test_every_operation_is_written(bits, tmp_path):
    net = Everything().eval()
    net.norm.running_mean.fill_(0.1)
    qm = ptq.quantize(net, bits, images(), input_shape=SHAPE, rounding="nearest")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and proof["worst_steps"] <= 1


def test_resize_scale_gives_the_size():
    for length in range(1, 70):
        for size in range(1, 130):
            scale = resize_scale(length, size)
            assert scale.dtype == np.float32 and scale == pytest.approx(size / length, rel=1e-6)
            assert int(np.float32(length) * scale) == int(length * float(scale)) == size


@pytest.mark.parametrize("size", [(24, 9), (10, 6), (5, 30), (48, 32), (8, 4)])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_resizing_takes_torchs_pixels(mode, size, tmp_path):
    """Weights only: everything behind them is float, so that one wrong pixel shows."""
    net = Around(lambda s, y: F.interpolate(y, size=size, mode=mode)).eval()
    qm = ptq.quantize(net, "w8", images(), input_shape=SHAPE, rounding="nearest")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and (proof["sqnr_db"] is None or proof["sqnr_db"] > 100)


@pytest.mark.parametrize("bits", ("w8a8", "w4a4"))
@pytest.mark.parametrize("name", sorted(ZOO))
def test_weighted_layers_run_in_integer_kernels(name, bits, quantized, tmp_path):
    path = tmp_path / "m.onnx"
    ptq.export(quantized(name, bits), "onnx_qdq", path, images=images()[:8])
    found = count_kernels(path)
    assert found["float_layers"] == []
    assert found["integer_layers"] == len(quantized(name, bits).plan.weights)


def test_adds_and_pools_run_in_integer_kernels(quantized, tmp_path):
    path = tmp_path / "m.onnx"
    ptq.export(quantized("residual", "w4a4"), "onnx_qdq", path, images=images()[:8])
    kernels = count_kernels(path)["kernels"]
    assert kernels["QLinearAdd"] == 2 and kernels["QLinearGlobalAveragePool"] == 1
    assert not {"Add", "GlobalAveragePool", "ReduceMean"} & set(kernels)


def test_clamps_are_part_of_the_clipping(quantized, tmp_path):
    path = tmp_path / "m.onnx"
    for name in ("residual", "depthwise"):
        ptq.export(quantized(name, "w4a4"), "onnx_qdq", path, images=images()[:8])
        kinds = {(n.op_type, len(n.input)) for n in onnx.load(path).graph.node}
        assert "Relu" not in {kind for kind, _ in kinds}


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


def test_scales_are_scalars_and_the_batch_is_free(quantized, tmp_path):
    path = tmp_path / "m.onnx"
    qm = quantized("concat", "w4a4")
    ptq.export(qm, "onnx_qdq", path, images=images()[:8])
    model = onnx.load(path)
    held = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":  # a scale of shape [1] breaks onnxruntime's integer addition
            assert list(held[node.input[1]].dims) == [] and list(held[node.input[2]].dims) == []
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        assert session.run(None, {"input": images()[:count].numpy()})[0].shape == (count, 10)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)


def test_same_network_same_bytes(quantized, tmp_path):
    for name in ("a", "b"):
        ptq.export(quantized("plain", "w4a4"), "onnx_qdq", tmp_path / name, images=images()[:8])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def _tampered(path, change):
    model = onnx.load(path)
    change({t.name: t for t in model.graph.initializer}, model)
    onnx.save(model, path)


def test_gate_names_the_first_tensor_that_diverges(quantized, tmp_path):
    path = tmp_path / "m.onnx"
    qm = quantized("residual", "w8a8")
    ptq.export(qm, "onnx_qdq", path, images=images())

    def change(held, model):
        tensor = held["layers.1.conv1.bias.codes"]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 5000, tensor.name))

    _tampered(path, change)
    proof = compare(qm.student, qm.graph, path, images(), 64)
    assert not proof["passed"]
    bad = [t["value"] for t in proof["tensors"] if t["steps"] > 1]
    # Given the runtime's own inputs, only the operation that was tampered with is wrong, not what follows it.
    assert len(bad) == 1 and bad[0] in proof["failure"]


def test_failed_gate_raises_and_leaves_no_file(quantized, tmp_path):
    qm = quantized("plain", "w8a8")
    other = ptq.quantize(build("plain"), "w8a8", images() * 3, input_shape=SHAPE, rounding="nearest")

    class Wrong(type(ptq.pipeline.plugins.build("exporters", "onnx_qdq"))):
        def export(self, qm, path):
            return super().export(other, path)

    with pytest.raises(ptq.ExportError, match=r"does not compute what was simulated: tensor \w+"):
        ptq.export(qm, Wrong(), tmp_path / "m.onnx", images=images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(ZOO))
def test_signed_activations(name, tmp_path):
    qm = ptq.quantize(build(name), "w4a4", images(), input_shape=SHAPE, rounding="nearest", activations="signed")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and proof["differing_outputs"] == 0 and proof["float_layers"] == []


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_skipped_layer_runs_in_float(name, quantized, tmp_path):
    """Left to itself, onnxruntime would round such a layer's weight to 8 bits."""
    paths = list(quantized(name, "w8a8").plan.weights)
    qm = ptq.quantize(
        build(name),
        "w8a8",
        images(),
        input_shape=SHAPE,
        rounding="genie_m:steps=2",
        layers=[f"{p}=float" for p in paths[1:3]],
    )
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and sorted(proof["float_layers"]) == sorted(paths[1:3])
    assert proof["integer_layers"] == len(paths) - 2 and not set(paths) & set(proof["float_operations"])
    assert all(t["steps"] <= 1 and t["differing"] <= max(2, 1e-3 * t["elements"]) for t in proof["tensors"])


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 3, 0), (3, 2, 1), (2, 2, 0), (4, 3, 2), (3, 1, 1)])
def test_local_means_with_windows_beyond_the_edge(kernel, stride, padding, counted, tmp_path):
    """Torch counts padding, but not what is beyond it, of which runtimes count all or nothing."""
    pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode=True, count_include_pad=counted)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Conv2d(8, 10, 3), nn.ReLU(), nn.AvgPool2d(2))
    qm = ptq.quantize(net.eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["worst_steps"] <= 1
    assert count_kernels(tmp_path / "m.onnx")["kernels"]["QLinearAveragePool"] == 1


@pytest.mark.parametrize(("size", "stride"), [((7, 7), 8), ((3, 5), 2), ((5, 5), 2), ((4, 7), 1)])
def test_means_of_uneven_windows(size, stride, tmp_path):
    """Two products with matrices, whose weights onnxruntime would round to 8 bits but for the sum behind them."""
    torch.manual_seed(0)
    head = [nn.Conv2d(24, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 50)]
    net = nn.Sequential(nn.Conv2d(3, 24, 3, stride, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(size), *head).eval()
    qm = ptq.quantize(net, "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    path = tmp_path / "m.onnx"
    proof = ptq.export(qm, "onnx_qdq", path, images=images())
    assert proof["worst_steps"] <= 1 and proof["differing_outputs"] == 0
    assert proof["integer_layers"] == 3 and proof["float_layers"] == []
    assert sum(n.endswith("/MatMul") for n in proof["float_operations"]) == 2


def test_float_operations_are_named(tmp_path):
    """What onnxruntime computes in float, by the exporter's own names; moves and the grid's own operators are none."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(F.gelu(self.conv(x).relu() * 2).mean((2, 3)))

    qm = ptq.quantize(Net().eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert sorted(name.rpartition("/")[2] for name in proof["float_operations"]) == ["Gelu", "Mul"]
    plain = ptq.quantize(build("residual"), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    assert ptq.export(plain, "onnx_qdq", tmp_path / "p.onnx", images=images())["float_operations"] == []


def test_a_linear_layer_on_pixels_is_exact():
    """onnxruntime adds its bias in float, behind the accumulator's scale: of 8 million sums, some round otherwise."""

    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 128), nn.Linear(128, 10)

        def forward(self, x):
            x = self.mix(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(1)
    x = torch.randn(64, 3, 32, 32)
    qm = ptq.quantize(Pixels().eval(), "w8a8", x, input_shape=(3, 32, 32), rounding="nearest", ranges="minmax")
    model = build_model(qm)
    model.graph.output.append(onnx.helper.make_tensor_value_info("mix.codes", onnx.TensorProto.UINT8, None))
    codes = open_session(model.SerializeToString()).run(["mix.codes"], {"input": x.numpy()})[0]
    held = quantizer_of(qm.student, "mix")
    assert held is not None
    assert np.array_equal(quantize(values(qm.graph, x)["mix"], held.qparams).numpy(), codes)


@pytest.mark.parametrize("bits", ("w8a8", "w4a4"))
@pytest.mark.parametrize(
    "end", [lambda y: y.view(-1, 2, 5), lambda y: y[:, :4], lambda y: y.unsqueeze(1), lambda y: F.log_softmax(y, 1)]
)
def test_results_that_are_moved_or_called_output(end, bits: str, tmp_path):
    """The layer behind is in an integer kernel all the same, and is found under its name."""
    net = Ending(end).eval()
    qm = ptq.quantize(net, bits, images(), input_shape=SHAPE, rounding="nearest")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and proof["integer_layers"] == 2 and proof["float_layers"] == []
    index = json.loads((ptq.write_vectors(qm, images(2), tmp_path / "vectors") / "index.json").read_text())
    assert "output" in {row.get("layer") for row in index["layers"]}


class Ending(nn.Module):
    def __init__(self, end) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.output, self.end = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10), end

    def forward(self, x):
        return self.end(self.output(F.relu(self.conv(x)).mean((2, 3))))
