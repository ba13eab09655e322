"""Float regions in exported files: they compute what was simulated, are named, and a wrong one is found."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from ptq.exporters import _onnx_region
from torch import Tensor, nn

import ptq
from ptq.contracts import Feedback
from ptq.errors import ExportError
from tests.graph.test_regions import UNKNOWN, Transformer
from tests.zoo import SHAPE, images


class Between(nn.Module):
    """Unknown operations between a convolution and a linear layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 8, 3, padding=1), UNKNOWN[name][0]
        with torch.no_grad():
            features = self.body(self, self.conv(torch.rand(1, *SHAPE))).numel()
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, F.relu(self.conv(x))).flatten(1))


class Clips(nn.Module):
    """Some pictures a sample, as networks for video have them: the batch of the convolution is none of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        y = self.stem(x.view(b * 2, 3, 16, 16)).relu().mean((2, 3))
        return self.head(y).view(b, 2, -1).mean(1)


def test_layers_in_regions_are_counted_as_float(tmp_path):
    pairs = images(16).repeat(1, 2, 1, 1)
    qm = ptq.quantize(Clips(), "w8a8", pairs, rounding="nearest", input_shape=(6, 16, 16))
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")
    assert any("conv2d" in name for name in proof["float_layers"])


class SliceWriter(nn.Module):
    """Writes into parts of a tensor, as temporal shifts do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out = torch.zeros_like(x)
        out[:, :2], out[:, 2:] = x[:, 1:3], x[:, 2:]
        return self.last(out)


def test_rounding_is_trained_around_writes_into_slices():
    qm = ptq.quantize(SliceWriter(), "w4a4", images(16), rounding="genie_m:steps=3,batch_size=4", input_shape=SHAPE)
    assert {block["kept"] for block in qm.manifest.blocks} <= {"fitted", "nearest"}


class Reader(nn.Module):
    """Columns of a picture, read in order by a recurrent network, as text is."""

    def __init__(self, recurrent: type[nn.RNNBase], **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.read = nn.Conv2d(3, 8, 3, padding=1), recurrent(8, 6, bidirectional=True, **options)
        self.head, self.columns_first = nn.Linear(12, 10), self.read.batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).mean(2).permute(*((0, 2, 1) if self.columns_first else (2, 0, 1)))
        y, _ = self.read(x)
        return self.head(y if self.columns_first else y.transpose(0, 1))


@pytest.mark.parametrize(
    "net",
    [
        Reader(nn.LSTM, num_layers=2, batch_first=True, dropout=0.5),
        Reader(nn.LSTM),
        Reader(nn.GRU, batch_first=True),
        Reader(nn.RNN, nonlinearity="relu"),
    ],
    ids=["LSTM", "LSTM, columns first", "GRU", "RNN"],
)
def test_recurrent_layers_stay_float(net: Reader, tmp_path):
    qm, proof = _proof(net, "w8a8", tmp_path / "m.onnx")
    assert proof["passed"] and proof["integer_layers"] == len(qm.plan.weights) == 2
    (named,) = proof["float_regions"]
    assert "at read" in named and "mean" not in named
    with torch.no_grad():
        torch.testing.assert_close(qm.graph(images(3)), net(images(3)), atol=0.05, rtol=0)


EXPORTED = [
    "cumsum", "einsum", "a token", "sum", "product of tensors", "attention", "largest values", "by index", "integers",
    "pixel_shuffle", "roll", "stack", "grid_sample", "exp, sqrt", "a norm", "a mask", "a difference", "reflection", "bicubic",
    "concatenation of rows", "writes into a tensor", "conv1d",
]  # fmt: skip
MOVES = {"pixel_shuffle", "roll"}


def _proof(net: nn.Module, bits: str, path) -> tuple[ptq.QuantizedModel, dict]:
    torch.manual_seed(0)
    qm = ptq.quantize(net.eval(), bits, images(), input_shape=SHAPE, rounding="nearest")
    return qm, ptq.export(qm, "onnx_qdq", path, images=images())


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", EXPORTED)
def test_computes_what_was_simulated(name: str, bits: str, tmp_path):
    torch.manual_seed(0)
    qm, proof = _proof(Between(name), bits, tmp_path / "m.onnx")
    assert proof["passed"] and proof["worst_steps"] <= 1
    assert proof["integer_layers"] == len(qm.plan.weights)
    assert [layer.partition(".")[0] for layer in proof["float_layers"]] == (["conv1d"] if name == "conv1d" else [])
    assert bool(proof["float_regions"]) == (name not in MOVES)
    assert not any(_onnx_region.MARK in operation for operation in proof["float_operations"])
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    every = session.run(None, {"input": images(5).numpy()})[0]
    for k in range(5):  # whatever the batch size is
        alone = session.run(None, {"input": images(5)[k : k + 1].numpy()})[0]
        assert np.abs(alone - every[k : k + 1]).max() <= 0.1 * np.abs(every).max()


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w4", "w2a8"])
def test_transformer(bits: str, tmp_path):
    torch.manual_seed(0)
    qm, proof = _proof(Transformer(), bits, tmp_path / "m.onnx")
    assert proof["passed"] and proof["worst_steps"] <= 1 and len(proof["float_regions"]) == 3
    assert len(qm.plan.weights) == 6
    if "a" in bits:
        assert proof["integer_layers"] == 6 and proof["float_layers"] == []
    assert any(
        "aten.scaled_dot_product_attention" in note and "3 operations run in float" in note
        for note in qm.manifest.notes
    )


@pytest.mark.parametrize("profile", ["tensorrt", "openvino", "qnn"])
def test_other_targets(profile: str, tmp_path):
    torch.manual_seed(0)
    options = {"activations": "signed", "weights": "symmetric"} if profile == "tensorrt" else {}
    qm = ptq.quantize(
        Transformer().eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest", target=f"onnx_qdq:{profile}", **options
    )  # fmt: skip
    assert ptq.export(qm, f"onnx_qdq:{profile}", tmp_path / "m.onnx", images=images())["worst_steps"] <= 1


def test_types_of_two_bits(tmp_path):
    """The file is of a later opset then, and so is what is in regions."""
    torch.manual_seed(0)
    qm = ptq.quantize(Transformer().eval(), "w2a8", images(), input_shape=SHAPE, rounding="nearest")
    proof = ptq.export(qm, "onnx_qdq:native", tmp_path / "m.onnx", images=images())
    assert proof["passed"] and onnx.load(tmp_path / "m.onnx").opset_import[0].version == 25


def test_gradients_reach_the_layers_before(tmp_path):
    """Rounding of a block with attention in it is trained, and the network is not worse for it."""
    torch.manual_seed(0)
    qm = ptq.quantize(
        Transformer().eval(), "w4a4", images(), input_shape=SHAPE, rounding="genie_m:steps=20", repair="equalize+bias"
    )
    assert all(b["error"] <= b["nearest_error"] * 1.0001 for b in qm.manifest.blocks)
    assert ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())["passed"]


def test_equal_regions_are_converted_once(monkeypatch, tmp_path):
    calls = []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: calls.append(1) or export(*args, **options))
    _onnx_region._converted.cache_clear()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.scales = nn.Parameter(torch.rand(3, 1, 1, 16))

        def forward(self, x: Tensor) -> Tensor:
            for layer, scale in zip(self.layers, self.scales):
                x = (layer(x).cumsum(3) * scale).square().sqrt()
            return x.amax((2, 3))

    _, proof = _proof(Twice(), "w8a8", tmp_path / "m.onnx")
    assert proof["passed"] and len(proof["float_regions"]) == 3 and len(calls) == 2  # the last also takes the maximum


def _reverse(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "reverse").i = 1


def _relu(node: onnx.NodeProto) -> None:
    node.op_type = "Relu"
    del node.input[1], node.attribute[:]


WRONG = {"another direction": _reverse, "another operation": _relu}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_form_is_found(change: str, monkeypatch, tmp_path):
    """The gate compares what is computed: a form of an operation that computes something else does not pass."""
    torch.manual_seed(0)
    qm = ptq.quantize(Between("cumsum").eval(), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    converted = _onnx_region._converted

    def wrong(*key) -> onnx.GraphProto:
        graph = onnx.GraphProto()
        graph.CopyFrom(converted(*key))
        for node in graph.node:
            if node.op_type == "CumSum":
                WRONG[change](node)
        return graph

    monkeypatch.setattr(_onnx_region, "_converted", wrong)
    with pytest.raises(ExportError, match=r"does not compute what was simulated: tensor .*is the first to diverge"):
        ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=images())
    assert not (tmp_path / "m.onnx").exists()


class NoForm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.conv(x)).mean((2, 3))


def test_an_operation_without_a_form_is_named_before_any_work():
    told = []
    with pytest.raises(ExportError, match=r"aten\.special_bessel_j0.* no ONNX form") as caught:
        ptq.quantize(
            NoForm(), "w8a8", "gaussian:count=8", input_shape=SHAPE, target="onnx_qdq",
            feedback=Feedback(progress=lambda *stage: told.append(stage)),
        )  # fmt: skip
    assert "\n" not in str(caught.value) and told == []


def test_other_networks_do_not_load_the_converter():
    code = (
        "import sys, ptq; from tests.zoo import *; from ptq.exporters.onnx_qdq import build_model;"
        "build_model(ptq.quantize(build('plain'), 'w8a8', images(), input_shape=SHAPE, rounding='nearest'));"
        "print('onnxscript' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stdout
