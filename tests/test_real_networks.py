"""Trained networks on real pictures: what the toolkit is for. Skipped where they are not there."""

import importlib.util

import numpy as np
import pytest
import torch
from ptq.exporters._parity import count_kernels

import ptq

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nets(shared):
    """The module that defines and loads the trained networks."""
    spec = importlib.util.spec_from_file_location("nets", shared / "zoo" / "nets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pictures(shared, nets, name, file, count):
    raw = np.load(shared / "data" / file)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in nets.ZOO[name][2])
    x = torch.from_numpy(raw["x"][:count]).permute(0, 3, 1, 2).float() / 255
    return (x - mean) / std, torch.from_numpy(raw["y"][:count])


def _top1(run, x, y):
    with torch.no_grad():
        return float((torch.cat([run(part) for part in x.split(250)]).argmax(1) == y).float().mean())


@pytest.mark.parametrize("name", ("resnet20", "resnet44", "resnet8"))
def test_w8a8_on_real_pictures_is_float_within_noise(name, shared, nets, tmp_path):
    model = nets.load(name)
    calib, _ = _pictures(shared, nets, name, "cifar10_calib.npz", 128)
    x, y = _pictures(shared, nets, name, "cifar10_calib.npz", 1000)
    mean, std = nets.ZOO[name][2]
    qm = ptq.quantize(model, "w8a8", calib, input_shape=(3, 32, 32), rounding="nearest", mean=mean, std=std)
    assert qm.manifest.metrics["fold_error"] < 1e-5
    # 0.5 points of 1,000 pictures are 5 pictures; 8 bits move those near a border only.
    assert _top1(qm.graph, x, y) > _top1(model, x, y) - 0.005
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=x[:250])
    assert proof["differing_outputs"] == 0  # the integer network is the runtime's, bit for bit


@pytest.mark.parametrize("bits", ("w8a8", "w4a8", "w4a4"))
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("resnet8", "cifar10_calib.npz", 1000), ("resnet20", "cifar10_calib.npz", 1000), ("resnet44", "cifar10_calib.npz", 1000),
        ("lenet5", "mnist_test.npz", 1000), ("mobilenet_v1_025", None, 32),
    ],
)  # fmt: skip
def test_no_output_of_the_file_differs(name, file, count, bits, shared, nets, tmp_path):
    """Simulation and file agree in every bit, hence in accuracy: on real pictures or, for one network, noise of their size."""
    if file is None:
        x = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    else:
        x, _ = _pictures(shared, nets, name, file, count)
    shape = tuple(x.shape[1:])
    qm = ptq.quantize(nets.load(name), bits, x[:64], input_shape=shape, rounding="nearest", ranges="minmax")
    proof = ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx", images=x)
    assert proof["differing_outputs"] == 0 and proof["top1_agreement"] == 1.0 and proof["float_layers"] == []


def test_every_convolution_of_resnet20_is_an_integer_kernel(shared, nets, tmp_path):
    calib, _ = _pictures(shared, nets, "resnet20", "cifar10_calib.npz", 64)
    for bits in ("w8a8", "w4a4"):
        qm = ptq.quantize(nets.load("resnet20"), bits, calib, input_shape=(3, 32, 32), rounding="nearest")
        ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")
        found = count_kernels(tmp_path / "m.onnx")
        assert found["kernels"]["QLinearConv"] == 19 and found["kernels"]["QLinearAdd"] == 9
        assert found["float_layers"] == [] and found["integer_layers"] == 20


def test_data_free_w4a4_beats_nearest_on_resnet20(shared, nets):
    """A minute's worth of synthesis and reconstruction; the figures themselves are the benchmark's."""
    mean, std = nets.ZOO["resnet20"][2]
    qm = ptq.quantize(
        nets.load("resnet20"), "w2a4", "genie:count=32,batch_size=32,steps=40", input_shape=(3, 32, 32),
        rounding="genie_m:steps=40", mean=mean, std=std,
    )  # fmt: skip
    x, y = _pictures(shared, nets, "resnet20", "cifar10_calib.npz", 500)
    nearest = ptq.quantize(
        nets.load("resnet20"), "w2a4", qm.images, input_shape=(3, 32, 32), rounding="nearest", mean=mean, std=std
    )
    assert _top1(qm.graph, x, y) > _top1(nearest.graph, x, y) + 0.1


def test_distillation_recovers_what_two_bits_cost(shared, nets, tmp_path):
    """Nearest rounding to 2 bits leaves ResNet-20 near chance; forty small steps on real pictures, without labels, mend much of it."""
    mean, std = nets.ZOO["resnet20"][2]
    model, (x, y) = nets.load("resnet20"), _pictures(shared, nets, "resnet20", "cifar10_calib.npz", 1000)
    given = {"input_shape": (3, 32, 32), "mean": mean, "std": std, "rounding": "nearest"}
    qm = ptq.quantize(model, "w2a4e4", x[:500], **given)
    how = "epochs=2,steps=20,batch_size=32,lr=0.03,warmup=5"
    out = ptq.distill_quantized(model, qm, training=how, report_on=(x[500:], y[500:]))
    assert _top1(out.graph, x[500:], y[500:]) > _top1(qm.graph, x[500:], y[500:]) + 0.15
    assert out.manifest.metrics["course"]["best"] > 35
    assert ptq.export(out, "onnx_qdq", tmp_path / "m.onnx", images=x[:250])["differing_outputs"] == 0


def test_raw_pixel_inputs_are_fitted(shared, nets):
    told: list[str] = []
    qm = ptq.quantize(
        nets.load("resnet8"), "w8a8", "genie:count=32,batch_size=32,steps=30", input_shape=(3, 32, 32), rounding="nearest",
        feedback=ptq.contracts.Feedback(note=told.append),
    )  # fmt: skip
    assert any("not normalized" in text for text in told)
    real, _ = _pictures(shared, nets, "resnet8", "cifar10_calib.npz", 500)
    # Means of real pictures are near 120 with deviations near 64, far from a normalized network's 0 and 1.
    assert float((qm.images.mean() - real.mean()).abs()) < 30


def test_network_without_batch_norm_says_what_works(shared, nets):
    with pytest.raises(ptq.CalibrationError, match="gaussian"):
        ptq.quantize(nets.load("lenet5"), "w8a8", "genie", input_shape=(1, 32, 32))
    qm = ptq.quantize(nets.load("lenet5"), "w8a8", "gaussian:count=64", input_shape=(1, 32, 32), rounding="nearest")
    x, y = _pictures(shared, nets, "lenet5", "mnist_test.npz", 500)
    assert _top1(qm.graph, x, y) > 0.97


def test_dead_channels_of_mobilenet(shared, nets):
    """Ten filters of 1e-15 get an ordinary scale and codes of zero; their outputs are their biases."""
    calib = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    qm = ptq.quantize(nets.load("mobilenet_v1_025"), "w8a8", calib, input_shape=(3, 224, 224), rounding="nearest")
    dead = 0
    for codes, q in qm.integer_weights().values():
        flat = (codes - q.zero_point.view(-1, *[1] * (codes.ndim - 1))).flatten(1)
        dead += int((flat == 0).all(1).sum())
        assert float(q.scale.min()) > 1e-6 * float(q.scale.max())
    assert dead >= 10
