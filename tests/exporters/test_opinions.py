"""Other implementations of ONNX, asked about the exported file."""

import importlib.util

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from ptq.exporters import _opinions
from ptq.exporters._opinions import far_off, second_opinions
from ptq.exporters.onnx_qdq import OnnxQdq

import ptq
from ptq.report import run_sections
from tests.zoo import SHAPE, ZOO, build, images

installed = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not installed, reason="OpenVINO is not installed; it comes with the extra openvino")


def _exported(name, tmp_path, bits="w8a8", target="ort", **options):
    qm = ptq.quantize(build(name), bits, images(), input_shape=SHAPE, rounding="nearest", target=target, **options)
    return qm, ptq.export(qm, target, tmp_path / "m.onnx", images=images())


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_reference_agrees(name, bits, tmp_path):
    _, proof = _exported(name, tmp_path, bits)
    reference = proof["opinions"][0]
    assert reference["by"].startswith("onnx reference") and reference["images"] == 2
    # Steps that float noise moves: seen up to 1 in 10,000 of a tensor's elements, of which such small networks have few.
    assert reference["sqnr_db"] is None or reference["sqnr_db"] > 15


@needs_openvino
@pytest.mark.parametrize("name", sorted(ZOO))
def test_openvino_agrees(name, tmp_path):
    _, proof = _exported(name, tmp_path, "w8a8", "openvino", weights="symmetric")
    opinion = proof["opinions"][1]
    assert "skipped" not in opinion and opinion["images"] == 16
    assert opinion["sqnr_db"] is None or opinion["sqnr_db"] > 15


def _scaled(path, factor):
    """The file with the scale of its last weight multiplied."""
    model = onnx.load(path)
    scale = next(t for t in model.graph.initializer if t.name == "fc.weight.scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(factor), scale.name))
    onnx.save(model, path)


def test_another_network_is_found_out(tmp_path):
    qm, _ = _exported("residual", tmp_path)
    x = images()
    simulated = qm.graph(x)
    assert far_off(second_opinions(tmp_path / "m.onnx", x, simulated)) is None
    _scaled(tmp_path / "m.onnx", -1)
    said = far_off(second_opinions(tmp_path / "m.onnx", x, simulated))
    assert said is not None and "computes something else from the file" in said


def test_what_does_not_run_says_why(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    rows = second_opinions(tmp_path / "m.onnx", images(2), images(2))
    assert all("skipped" in row and row["skipped"] for row in rows) and far_off(rows) is None


def test_large_images_and_missing_packages_are_skipped(tmp_path, monkeypatch):
    _exported("plain", tmp_path)
    monkeypatch.setattr(_opinions, "_REFERENCE_LARGEST", 100)
    monkeypatch.setattr(_opinions.importlib.util, "find_spec", lambda name: None)
    reference, openvino = second_opinions(tmp_path / "m.onnx", images(2), images(2))
    assert "more than 100 pixels" in reference["skipped"] and "not installed" in openvino["skipped"]


def test_they_stand_in_the_report(tmp_path):
    qm, proof = _exported("plain", tmp_path)
    proof |= {"float_operations": ["gelu/Gelu"]}
    rows = {row[0]: row[1] for section in run_sections(qm, {"float weights": 1}, proof, {}) for row in section.rows}
    assert "same class on" in rows[f"second opinion: onnx reference {onnx.__version__}"]
    assert rows["further operations in float"] == "gelu/Gelu"


def test_they_can_be_left_out(tmp_path):
    qm, _ = _exported("plain", tmp_path)
    assert ptq.export(qm, "onnx_qdq", tmp_path / "n.onnx", images=images())["opinions"] != []
    proof = ptq.export(qm, OnnxQdq(opinions=False), tmp_path / "n.onnx", images=images())
    assert proof["passed"] and proof["opinions"] == []
