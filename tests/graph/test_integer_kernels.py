"""Integer kernels and float functions against onnxruntime's own, on every code or on many numbers, bit for bit."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ptq.graph import runtime_functions as runtime
from ptq.graph.integer_kernels import IntegerAverage, IntegerMean, IntegerMul, IntegerTable, Requantize
from ptq.graph.layers import ResizeBilinear
from ptq.quant.affine import QParams, dequantize
from ptq.spec import QuantSpec

_ALL = torch.arange(256, dtype=torch.int32)
_TYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.float32): TensorProto.FLOAT}


def _runtime(op: str, inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray], order: str, **attributes):
    """The result of one operator on the CPU; `order`: its inputs."""
    domain = "com.microsoft" if op.startswith("QLinear") and op != "QLinearConv" else ""
    node = helper.make_node(op, order.split(" "), ["y"], domain=domain, **attributes)
    values = [helper.make_tensor_value_info(k, _TYPES[v.dtype], v.shape) for k, v in inputs.items()]
    result = helper.make_tensor_value_info("y", _TYPES[next(iter(inputs.values())).dtype], None)
    held = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph([node], "one", values, [result], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def _grid(rng: np.random.Generator, low: float = 0.002, high: float = 0.3, even: bool = True) -> QParams:
    zero = int(rng.integers(0, 128)) * 2 + (0 if even else 1)
    return QParams(
        torch.tensor(np.float32(rng.uniform(low, high))),
        torch.tensor(zero, dtype=torch.int32),
        QuantSpec(8, False, False),
    )


def _constants(**grids: QParams) -> dict[str, np.ndarray]:
    found = {}
    for name, q in grids.items():
        found |= {f"{name}_s": q.scale.numpy(), f"{name}_z": np.array(int(q.zero_point), dtype=np.uint8)}
    return found


def _codes(real: Tensor, q: QParams) -> np.ndarray:
    return (torch.round(real / q.scale) + q.zero_point).numpy().astype(np.uint8)


@pytest.mark.parametrize("seed", range(20))
def test_product_of_every_pair_of_codes(seed):
    rng = np.random.default_rng(seed)
    a, b, y = (_grid(rng, even=seed % 2 == 0) for _ in range(3))
    x, w = _ALL.repeat_interleave(256), _ALL.repeat(256)
    inputs = {"a": x.numpy().astype(np.uint8), "b": w.numpy().astype(np.uint8)}
    theirs = _runtime("QLinearMul", inputs, _constants(a=a, b=b, y=y), "a a_s a_z b b_s b_z y_s y_z")
    ours = IntegerMul(a, b, y, (0, 255))(dequantize(x, a), dequantize(w, b))
    assert np.array_equal(_codes(ours, y), theirs)


@pytest.mark.parametrize("multiplier", [0.5, 0.25, 0.0123, 0.37, 1.0])
def test_accumulators_are_rescaled(multiplier: float):
    """Every code times every weight; at a half and a quarter, every second and fourth is a tie, which goes to the even code."""
    weight = torch.arange(-127, 128, dtype=torch.int32)
    y = QParams(torch.tensor(0.01), torch.tensor(128, dtype=torch.int32), QuantSpec(8, False, False))
    scale = torch.full((255,), np.float32(multiplier)) * y.scale
    layer = SimpleNamespace(scale=scale, by_channel=lambda v: v.view(-1, 1, 1))
    total = _ALL.view(256, 1, 1, 1) * weight.view(1, -1, 1, 1)
    ours = Requantize(layer, y, (0, 255))(total)  # type: ignore[arg-type]
    constants = {
        "x_s": np.array(1.0, np.float32), "x_z": np.array(0, np.uint8), "w": weight.numpy().astype(np.int8).reshape(255, 1, 1, 1),
        "w_s": scale.numpy(), "w_z": np.zeros(255, np.int8), **_constants(y=y),
    }  # fmt: skip
    inputs = {"x": _ALL.numpy().astype(np.uint8).reshape(256, 1, 1, 1)}
    theirs = _runtime("QLinearConv", inputs, constants, "x x_s x_z w w_s w_z y_s y_z")
    assert np.array_equal(_codes(ours, y), theirs) and len(np.unique(theirs)) > 50


@pytest.mark.parametrize("seed", range(20))
def test_means_of_whole_maps(seed):
    rng = np.random.default_rng(seed)
    x, y, side = _grid(rng, 0.01, 0.05), _grid(rng, 0.002, 0.02), int(rng.integers(1, 9))
    codes = torch.from_numpy(rng.integers(0, 256, (4, 64, side, side)).astype(np.int32))
    theirs = _runtime(
        "QLinearGlobalAveragePool",
        {"x": codes.numpy().astype(np.uint8)},
        _constants(x=x, y=y),
        "x x_s x_z y_s y_z",
        channels_last=0,
    )
    ours = IntegerMean(x, y, (0, 255))(dequantize(codes, x))
    assert np.array_equal(_codes(ours, y), theirs)


@pytest.mark.parametrize("seed", range(60))
def test_means_of_windows(seed):
    rng = np.random.default_rng(seed)
    kernel, stride, ceil = int(rng.integers(2, 5)), int(rng.integers(1, 4)), bool(rng.integers(0, 2))
    padding, side = int(rng.integers(0, kernel // 2 + 1)), int(rng.integers(6, 14))
    counted = bool(rng.integers(0, 2)) and not ceil  # both at once differ between torch and runtimes
    pool = nn.AvgPool2d(kernel, stride, padding, ceil, counted)
    q = _grid(rng)
    y = QParams(q.scale * float(rng.uniform(0.5, 1.2)), _grid(rng).zero_point, q.spec)
    codes = torch.from_numpy(rng.integers(0, 256, (2, 5, side, side)).astype(np.int32))
    theirs = _runtime(
        "QLinearAveragePool", {"x": codes.numpy().astype(np.uint8)}, _constants(x=q, y=y), "x x_s x_z y_s y_z",
        kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[padding] * 4, ceil_mode=int(ceil), count_include_pad=int(counted),
    )  # fmt: skip
    ours = IntegerAverage(pool, q, y, (0, 255))(dequantize(codes, q))
    assert np.array_equal(_codes(ours, y), theirs)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("ceil", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 3, 0), (3, 2, 1), (2, 2, 0), (4, 3, 2)])
def test_means_are_torchs(kernel, stride, padding, ceil, counted):
    """What is averaged, and by what it is divided, at every edge: to a step of a fine grid."""
    pool = nn.AvgPool2d(kernel, stride, padding, ceil, counted)
    q = QParams(torch.tensor(1 / 64), torch.tensor(128, dtype=torch.int32), QuantSpec(8, False, False))
    for side in (7, 8, 11):
        x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side)) - 0.5
        assert float((IntegerAverage(pool, q, q, (0, 255))(x) - pool(x)).abs().max()) <= 0.5 / 64 + 1e-6


@pytest.mark.parametrize("seed", range(40))
def test_table_of_the_sigmoid(seed):
    rng = np.random.default_rng(seed)
    q = _grid(rng)
    y = QParams(torch.tensor(1 / 256) if seed % 2 else _grid(rng, 0.001, 0.01).scale, _grid(rng).zero_point, q.spec)
    theirs = _runtime("QLinearSigmoid", {"x": _ALL.numpy().astype(np.uint8)}, _constants(x=q, y=y), "x x_s x_z y_s y_z")
    ours = IntegerTable(runtime.sigmoid, q, y, (0, 255))(dequantize(_ALL, q))
    assert np.array_equal(_codes(ours, y), theirs)


def test_table_keeps_to_its_bounds_and_signed_codes():
    q = QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), QuantSpec(8, True, True))
    x = dequantize(torch.arange(-127, 128, dtype=torch.int32), q)
    assert torch.equal(IntegerTable(lambda v: 2 * v, q, q, (0, 100))(x), (2 * x).clamp(0, 0.1 * 100))


@pytest.mark.parametrize(
    ("op", "function", "attributes"),
    [
        ("Sigmoid", runtime.sigmoid, {}),
        ("Tanh", runtime.tanh, {}),
        ("HardSigmoid", runtime.hard_sigmoid, {"alpha": 1 / 6, "beta": 0.5}),
    ],
)
def test_float_functions(op, function, attributes):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=20000) * s for s in (0.01, 0.3, 1, 4, 12)] + [[0, -18, 18, -50, 50]])
    x = x.astype(np.float32)
    assert np.array_equal(function(torch.from_numpy(x)).numpy(), _runtime(op, {"x": x}, {}, "x", **attributes))


@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (3, 33, 4, 4), (5, 12)])
def test_batch_norm(shape):
    rng = np.random.default_rng(0)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).eval()
    drawn = {
        k: torch.from_numpy(rng.normal(size=shape[1]).astype(np.float32)) for k in ("weight", "bias", "running_mean")
    }
    norm.load_state_dict(
        drawn | {"running_var": torch.from_numpy(rng.uniform(0.01, 1, shape[1]).astype(np.float32))}, strict=False
    )
    x = rng.normal(size=shape).astype(np.float32)
    held = {"w": norm.weight, "b": norm.bias, "m": norm.running_mean, "v": norm.running_var}
    constants = {k: v.detach().numpy() for k, v in held.items() if v is not None}
    theirs = _runtime("BatchNormalization", {"x": x}, constants, "x w b m v", epsilon=norm.eps)
    assert np.array_equal(runtime.ChannelAffine(norm)(torch.from_numpy(x)).detach().numpy(), theirs)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize(
    "sizes", [(2, 2, 64, 64), (4, 4, 7, 9), (1, 1, 4, 4), (5, 7, 3, 4), (6, 5, 6, 10), (3, 3, 1, 1)]
)
def test_bilinear_resizing(sizes, corners):
    height, width, *size = sizes
    x = np.random.default_rng(0).normal(size=(2, 8, height, width)).astype(np.float32)
    scales = [runtime.resize_scale(n, s) for n, s in zip((height, width), size)]
    mode = "align_corners" if corners else "half_pixel"
    theirs = _runtime(
        "Resize", {"x": x}, {"s": np.array([1, 1, *scales], dtype=np.float32)}, "x  s", mode="linear",
        coordinate_transformation_mode=mode,
    )  # fmt: skip
    ours = runtime.FourPixels(ResizeBilinear(tuple(size), corners))(torch.from_numpy(x))
    assert np.array_equal(ours.numpy(), theirs)
    torch.testing.assert_close(ours, F.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=corners))
