"""The gate as a whole: what passes each tensor's comparison and is wrong all the same is found end to end."""

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from ptq.exporters import _onnx_ops, _parity, onnx_qdq
from torch import Tensor, nn

import ptq
from ptq.errors import ExportError
from ptq.evaluate import onnx_runner
from tests.zoo import SHAPE, build, images

_OVERFLOWS = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 32)


class Gated(nn.Module):
    """A softmax over the channels, by which they are multiplied: its values lie far below 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        y = y * F.softmax(self.gate(y.mean((2, 3))), 1)[:, :, None, None]
        return self.head(y.mean((2, 3)))


def _quantized(net: nn.Module, bits: str = "w8a8", **more) -> ptq.QuantizedModel:
    return ptq.quantize(net.eval(), bits, images(), input_shape=SHAPE, rounding="nearest", **more)


def test_a_softmax_on_a_fine_grid(tmp_path):
    """onnxruntime's kernel for codes, before 1.32, yields 0 there."""
    proof = ptq.export(_quantized(Gated()), "onnx_qdq", tmp_path / "m.onnx")
    assert proof["passed"] and proof["differing_outputs"] <= 2
    assert "QLinearSoftmax" not in proof["kernels"]


@pytest.mark.skipif(not (_OVERFLOWS or _parity.multiplies_exactly()), reason="without VNNI single steps may differ")
def test_a_softmax_in_the_kernel_for_codes_is_found(monkeypatch, tmp_path):
    """Until 1.32 it yields 0 for large values on a fine grid; since then it is off by single steps, as it was on coarse ones."""
    monkeypatch.setitem(_onnx_ops.EMITTERS, "softmax", _onnx_ops._plain("Softmax", lambda m: {"axis": m.dim}))
    with pytest.raises(ExportError, match=r"apart|class differs" if _OVERFLOWS else "outputs differ from"):
        ptq.export(_quantized(Gated()), "onnx_qdq", tmp_path / "m.onnx")


@pytest.mark.skipif(not _parity.multiplies_exactly(), reason="this processor has no VNNI: its kernels may saturate")
def test_a_file_of_integer_kernels_must_be_equal_in_every_bit(monkeypatch, tmp_path):
    """A difference too small for any tensor's bounds is a difference."""
    qm, real = _quantized(build("plain")), onnx_qdq.build_model

    def wrong(*args):
        model = real(*args)
        scales = [t for t in model.graph.initializer if t.name.endswith("weight.scale")]
        values = onnx.numpy_helper.to_array(scales[-1]) * (1 + 2e-5)
        scales[-1].CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), scales[-1].name))
        return model

    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")
    assert proof["differing_outputs"] == 0 and proof["float_operations"] == [] and proof["float_layers"] == []
    monkeypatch.setattr(onnx_qdq, "build_model", wrong)
    with pytest.raises(ExportError, match="outputs differ from the integer network's"):
        ptq.export(qm, "onnx_qdq", tmp_path / "w.onnx")
    monkeypatch.setattr(_parity, "multiplies_exactly", lambda: False)  # there, kernels that saturate may be the reason
    assert ptq.export(qm, "onnx_qdq", tmp_path / "w.onnx")["differing_outputs"] > 0


def test_scores_that_only_the_last_bits_tell_apart_are_no_other_class():
    simulated = torch.tensor([[1.0, 1.0 + 1e-7, 0.0], [3.0, 1.0, 2.0]])
    real = torch.tensor([[1.0 + 1e-7, 1.0, 0.0], [2.0, 1.0, 3.0]])
    assert _parity._same_class(simulated, real).tolist() == [1.0, 0.0]
    assert _parity._same_class(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item() == 0


def test_a_constant_result_is_no_tie():
    found = {"result_error": 0.0, "top1_agreement": 1.0, "images": 1, "sqnr_db": 0.0, "variation_db": -300.0}
    assert "0.0 dB apart" in (_parity._failure([], found, 1, True) or "")
    assert _parity._failure([], found | {"sqnr_db": 60.0}, 1, True) is None
    assert "from image to image" in (
        _parity._failure([], found | {"images": 8, "sqnr_db": 29.0, "variation_db": -1.0}, 8, True) or ""
    )
    assert _parity._failure([], found | {"images": 8, "sqnr_db": 60.0, "variation_db": -1.0}, 8, True) is None


class Pooled(nn.Module):
    """A max pool between convolutions: what is only moved, where optimizations break on signed codes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.max_pool2d(F.relu(self.first(x)), 2))).mean((2, 3)))


@pytest.mark.parametrize(
    ("target", "bits"), [("stm32", "w8a8"), ("tflite", "w8a8"), ("tensorrt", "w8a8"), ("native", "w4a4")]
)
def test_a_file_that_optimizations_break_on_is_verified_and_run_as_it_is_written(target: str, bits: str, tmp_path):
    signed = {} if target == "native" else {"weights": "symmetric", "activations": "signed"}
    qm = _quantized(Pooled(), bits, target=target, **signed)
    proof = ptq.export(qm, f"onnx_qdq:profile={target}", tmp_path / "m.onnx")
    assert proof["passed"]
    out = onnx_runner(tmp_path / "m.onnx")(images(8))
    with torch.no_grad():
        assert (out.argmax(1) == qm.graph(images(8)).argmax(1)).float().mean() > 0.8
