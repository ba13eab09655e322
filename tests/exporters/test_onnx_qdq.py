"""The written file: valid, integer, packed, free in the batch, and equal to the simulation."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
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
