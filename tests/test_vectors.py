"""Golden vectors: a second, plain integer implementation comes to the same numbers from the files alone."""

import json
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ptq
from ptq.cli import main
from ptq.errors import ExportError
from ptq.vectors import fixed_point
from tests.graph.test_serialize import Everything
from tests.zoo import SHAPE, ZOO, build, images


def _written(net, bits, tmp_path, **options):
    qm = ptq.quantize(net, bits, images(), input_shape=SHAPE, rounding="nearest", **options)
    ptq.write_vectors(qm, images(4, seed=1), tmp_path / "vectors")
    index = json.loads((tmp_path / "vectors" / "index.json").read_text())
    return qm, index, {row["name"]: dict(np.load(tmp_path / "vectors" / row["file"])) for row in index["layers"]}


def _accumulator(row: dict, a: dict[str, np.ndarray]) -> np.ndarray:
    """Of a convolution or linear layer, in 64-bit integers."""
    x = torch.from_numpy(a["input"].astype(np.int64) - row["grids"]["input"]["zero_point"]).double()
    shape = [-1] + [1] * (a["weight"].ndim - 1)
    w = torch.from_numpy(a["weight"].astype(np.int64) - a["weight_zero_point"].reshape(shape)).double()
    b = torch.from_numpy(a["bias"]).double() if "bias" in a and "bias_added" not in row else None
    if row["op"] == "linear":
        return F.linear(x, w, b).long().numpy()
    how = {k: row[k] for k in ("stride", "padding", "dilation", "groups")}
    return F.conv2d(x, w, b, **how).long().numpy()


def _requantized(row: dict, accumulator: np.ndarray, integer: bool) -> np.ndarray:
    """Rounded and clamped codes, by the float32 multiplier or by the integer one and its shift."""
    m, grid = row["multiplier"], row["grids"]["output"]
    shape = [1, -1] + [1] * (accumulator.ndim - 2) if row["op"] != "linear" else [-1]
    if integer:
        rounding = np.array([1 << (s - 1) for s in m["shift"]], dtype=object).reshape(shape)
        scaled = accumulator.astype(object) * np.array(m["int"], dtype=object).reshape(shape) + rounding
        codes = scaled // np.array([1 << s for s in m["shift"]], dtype=object).reshape(shape)
    else:
        codes = np.rint(accumulator.astype(np.float32) * np.array(m["float"], dtype=np.float32).reshape(shape))
    return np.clip(codes.astype(np.int64) + grid["zero_point"], *row["clamp"])


def _check_average(row: dict, a: dict[str, np.ndarray]) -> None:
    """Windows without padding, summed in 64-bit integers."""
    assert not any(np.atleast_1d(row["padding"])) and not row["ceil_mode"]
    x = torch.from_numpy(a["input"].astype(np.float64) - row["grids"]["input"]["zero_point"])
    means = F.avg_pool2d(x, row["kernel_size"], row["stride"]).numpy()
    exact = means * row["multiplier"]["float"][0] + row["grids"]["output"]["zero_point"]
    assert np.abs(np.clip(exact, *row["clamp"]) - a["output"]).max() <= 0.5 + 1e-4


class _Gated(nn.Module):
    """SiLU, local means, a hard sigmoid's gate, and a result that is a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pool(F.silu(self.first(x)))
        return F.relu(self.second(y * F.hardsigmoid(y.mean((2, 3), keepdim=True)))).mean((2, 3))


class _Rows(nn.Module):
    """A linear layer on every pixel, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 12), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(F.relu(self.conv(x)).permute(0, 2, 3, 1)).mean((1, 2)))


def _added_in_float(row: dict, a: dict[str, np.ndarray]) -> np.ndarray:
    s, grid = np.array(row["accumulator_scale"], dtype=np.float32), row["grids"]["output"]
    real = a["accumulator"].astype(np.float32) * s + a["bias"].astype(np.float32) * s
    codes = np.rint(real / np.float32(grid["scale"])).astype(np.int64) + grid["zero_point"]
    return np.clip(codes, *row["clamp"])


def _flattened() -> nn.Module:
    """A convolution whose result is moved before it is the network's."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=4), nn.Flatten())


NETS = {name: partial(build, name) for name in sorted(ZOO)} | {"gated": _Gated, "rows": _Rows, "flattened": _flattened}


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a4"])
@pytest.mark.parametrize("name", NETS)
def test_every_layer_follows_from_its_inputs(name, bits, tmp_path):
    qm, index, arrays = _written(NETS[name]().eval(), bits, tmp_path)
    if name == "gated":
        assert {row["op"] for row in index["layers"]} >= {"multiply", "average", "table", "mean"}
    assert any("bias_added" in row for row in index["layers"]) == (name == "rows")
    weighted = [row for row in index["layers"] if row["op"] in ("conv", "linear")]
    assert [row["layer"] for row in weighted] == list(qm.plan.weights)
    near = total = 0
    for row in index["layers"]:
        a = arrays[row["name"]]
        for label, source in zip((k for k in a if k.startswith("input")), row["inputs"]):
            if source in arrays:  # what a layer reads is what another yielded
                assert np.array_equal(a[label], arrays[source]["output"]), (row["name"], label)
        if row in weighted:
            assert a["weight"].dtype == np.int8 and a["accumulator"].dtype == np.int32
            assert np.array_equal(_accumulator(row, a), a["accumulator"])
        if row["op"] == "mean":
            x = a["input"].astype(np.int64) - row["grids"]["input"]["zero_point"]
            assert np.array_equal(x.sum((2, 3), keepdims=True), a["accumulator"])
        if "bias_added" in row:
            assert np.array_equal(_added_in_float(row, a), a["output"])
            gap = np.abs(_requantized(row, a["accumulator"] + a["bias"], True) - a["output"])
            assert gap.max() <= 1 and (gap > 0).mean() < 1e-3
        elif row["op"] in ("conv", "linear", "mean") and "output" in row["grids"]:
            assert np.array_equal(_requantized(row, a["accumulator"], False), a["output"])
            gap = np.abs(_requantized(row, a["accumulator"], True) - a["output"])
            assert gap.max() <= 1
            near, total = near + int((gap > 0).sum()), total + gap.size
        elif row in weighted:  # the network's result
            scale = np.array(row["multiplier"]["float"], dtype=np.float32)
            scale = scale.reshape(-1, 1, 1) if a["output"].ndim == 4 else scale
            assert np.array_equal(a["accumulator"].astype(np.float32) * scale, a["output"])
        if row["op"] == "add":
            parts = [
                (a[f"input{k}"].astype(np.float64) - row["grids"][f"input{k}"]["zero_point"]) * m["float"][0]
                for k, m in enumerate(row["multipliers"])
            ]
            exact = np.clip(sum(parts) + row["grids"]["output"]["zero_point"], *row["clamp"])
            assert np.abs(exact - a["output"]).max() <= 0.5 + 1e-4
        if row["op"] == "multiply":
            product = np.ones((), dtype=np.int64)
            for k in range(2):
                product = product * (a[f"input{k}"].astype(np.int64) - row["grids"][f"input{k}"]["zero_point"])
            exact = product * row["multiplier"]["float"][0] + row["grids"]["output"]["zero_point"]
            assert np.abs(np.clip(exact, *row["clamp"]) - a["output"]).max() <= 0.5 + 1e-4
        if row["op"] == "average":
            _check_average(row, a)
        if row["op"] == "table":
            assert np.array_equal(
                a["table"][a["input"].astype(np.int64) - row["grids"]["input"]["codes"][0]], a["output"]
            )
    assert near <= 2e-3 * total  # ties of rounding, half to even against half up
    assert index["layers"][-1]["name"] == qm.graph.graph.output_node().args[0].meta["value"]


def test_they_are_what_the_runtime_computes(tmp_path):
    qm, index, arrays = _written(build("residual"), "w4a4", tmp_path)
    ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"input": images(4, seed=1).numpy()})
    assert np.array_equal(out, arrays[index["layers"][-1]["name"]]["output"])


@pytest.mark.parametrize("bits", ["w8a8", "w4"])
def test_operations_without_integer_kernels(bits, tmp_path):
    _, index, arrays = _written(Everything().eval(), bits, tmp_path)
    kinds = {row["op"] for row in index["layers"]}
    assert "float" in kinds and all(np.isfinite(a["output"]).all() for a in arrays.values())
    if bits == "w8a8":
        assert kinds >= {"conv", "move", "float"}
        named = {op: {row["operation"] for row in index["layers"] if row["op"] == op} for op in ("float", "table")}
        assert named["float"] >= {"layer_norm", "resize_bilinear"} and "" not in named["float"]
        assert named["table"] >= {"leaky_relu", "gelu"}


def test_signed_codes(tmp_path):
    _, index, arrays = _written(build("residual"), "w8a8", tmp_path, activations="signed")
    assert all(arrays[r["name"]]["output"].dtype == np.int8 for r in index["layers"] if "output" in r["grids"])


def test_integer_multipliers():
    values = torch.tensor([1e-6, 0.3, 0.5, 0.99999999, 1.0, 1.7, 300.0])
    m, shift = fixed_point(values)
    assert all(2**30 <= v < 2**31 for v in m)
    assert [v * 2.0**-s for v, s in zip(m, shift)] == pytest.approx(values.double().tolist(), rel=2**-31)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    qm = ptq.quantize(build("plain"), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds no vectors; move it away"):
        ptq.write_vectors(qm, images(2), tmp_path / "vectors")
    assert [p.name for p in tmp_path.iterdir()] == ["vectors"]
    assert (tmp_path / "vectors" / "mine.txt").read_text() == "mine"


def test_from_the_command_line(tmp_path, capsys):
    ptq.quantize(build("plain"), "w8a8", images(), input_shape=SHAPE, rounding="nearest").save(tmp_path / "out")
    for _ in range(2):  # the second time replaces the first
        assert main(["export", str(tmp_path / "out"), "--vectors", "3"]) == 0
    assert "golden vectors" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "vectors" / "index.json").read_text())["images"] == 3


class Twice(nn.Module):
    """Accumulators beyond 2^24, and a tensor added to itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.wide = nn.Conv2d(3, 512, 3, padding=1), nn.Conv2d(512, 4, 3)
        with torch.no_grad():
            self.wide.weight.abs_()

    def forward(self, x):
        x = F.relu(self.conv(x) + 5)
        y = F.relu(self.wide(x))
        return (y + y).mean((2, 3))


def test_large_accumulators_are_whole_numbers(tmp_path):
    _, index, found = _written(Twice(), "w8a8", tmp_path)
    rows = {row["name"]: row for row in index["layers"]}
    (wide,) = [name for name, row in rows.items() if row.get("layer") == "wide"]
    assert np.abs(found[wide]["accumulator"]).max() > 2**24
    assert np.array_equal(found[wide]["accumulator"], _accumulator(rows[wide], found[wide]))
    (added,) = [name for name, row in rows.items() if row["op"] == "add"]
    assert {"input0", "input1", "output"} <= set(found[added]) and len(rows[added]["multipliers"]) == 2
    assert np.array_equal(found[added]["input0"], found[added]["input1"])
