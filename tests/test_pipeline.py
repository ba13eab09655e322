"""`quantize` from Python: what it leaves alone, what it refuses, what it promises of its result."""

import pytest
import torch
from ptq.calibrators.gaussian import Gaussian
from ptq.calibrators.genie import Genie
from torch import nn

import ptq
from ptq.contracts import Feedback
from ptq.quant import ranges
from ptq.reconstruct.genie_m import GenieM
from tests.zoo import SHAPE, ZOO, build, images

SMALL = Genie(count=8, batch_size=4, steps=3)


def test_callers_model_is_not_changed():
    model = build("residual").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ptq.quantize(model, "w4a4", SMALL, input_shape=SHAPE, rounding=GenieM(steps=3))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bits", ("w2a2", "w3a5", "w8a8", "w4", "w6a3e4"))
@pytest.mark.parametrize("name", sorted(ZOO))
def test_any_width_on_any_network(name, bits):
    qm = ptq.quantize(build(name), bits, images()[:8], input_shape=SHAPE, rounding="nearest", target="onnx_qdq")
    assert bool(torch.isfinite(qm.graph(images()[:4])).all())
    assert {q.spec.bits for _, q in qm.integer_weights().values()} <= {
        int(bits[1]),
        (qm.manifest.bits.endswith("e4") and 4) or 8,
    }


def test_eight_bits_are_close_to_float():
    for name in sorted(ZOO):
        model = build(name)
        qm = ptq.quantize(model, "w8a8", images(), input_shape=SHAPE, rounding="nearest")
        # Eight bits give about 6 dB a bit less the headroom of the range: over 25 dB on networks this small.
        assert qm.manifest.metrics["sqnr_db"] > 25, name


def test_reconstruction_beats_nearest_at_low_width():
    model = build("residual")
    figures = ptq.quantize(
        model, "w2a4", images(), input_shape=SHAPE, rounding=GenieM(steps=150, batch_size=16)
    ).manifest.metrics
    assert figures["sqnr_db"] > figures["sqnr_db_nearest"] + 1


@pytest.mark.parametrize("data", [SMALL, Gaussian(count=8), "gaussian:count=8", "genie:steps=2,count=4,batch_size=4"])
def test_same_seed_same_bits(data):
    def run(seed):
        return ptq.quantize(
            build("shared_relu"), "w4a4", data, input_shape=SHAPE, rounding="genie_m:steps=4", seed=seed
        )

    a, b, c = run(1), run(1), run(2)
    assert torch.equal(a.images, b.images) and torch.equal(a.graph(images()), b.graph(images()))
    assert not torch.equal(a.images, c.images)


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    ptq.quantize(build("residual"), "w4a4", SMALL, input_shape=SHAPE, rounding=GenieM(steps=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_from_python():
    parts = list(images()[:10].split(4))
    qm = ptq.quantize(build("plain"), "w8a8", parts, input_shape=SHAPE, rounding="nearest")
    assert torch.equal(qm.images, images()[:10])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "no images"),
        (torch.zeros(4, 3, 8, 8), "batches are float32"),
        (images()[:4].double(), "float64"),
        (torch.full((4, *SHAPE), float("nan")), "not finite"),
        ([images()[:2].numpy()], "ndarray"),
    ],
)
def test_bad_images_are_refused(data, says):
    with pytest.raises(ptq.CalibrationError, match=says):
        ptq.quantize(build("plain"), "w8a8", data, input_shape=SHAPE)


def test_stated_normalization_gives_the_inputs_exact_range():
    qm = ptq.quantize(
        build("plain"),
        "w8a8",
        "gaussian:count=8",
        input_shape=SHAPE,
        rounding="nearest",
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,
    )
    grid = qm.manifest.ranges["x"]
    assert grid["zero_point"] == 0 and grid["scale"] == pytest.approx(1.0)  # raw pixels 0…255 lie on the grid
    assert float(qm.images.min()) >= 0 and float(qm.images.max()) <= 255


def test_raw_inputs_are_noticed_and_fitted():
    """A network trained on 0…255 inputs gets images there, and the user is told."""
    inner = build("residual")
    first = inner.conv1
    with torch.no_grad():
        first.weight /= 60.0  # inputs of deviation 60 …
        shift = first.weight.sum((1, 2, 3)) * 120.0  # … around 120
        inner.bn1.running_mean += shift
    told: list[str] = []
    qm = ptq.quantize(
        inner, "w8a8", Genie(count=16, batch_size=16, steps=20), input_shape=SHAPE, rounding="nearest",
        feedback=Feedback(note=told.append),
    )  # fmt: skip
    assert any("not normalized" in text for text in told) and any("not normalized" in n for n in qm.manifest.notes)
    assert 80 < float(qm.images.mean()) < 160 and 25 < float(qm.images.std()) < 110


def test_unknown_settings():
    for options, error in (
        ({"bits": "w1a4"}, ptq.SpecError), ({"effort": "some"}, ptq.SpecError), ({"ranges": "best"}, ptq.SpecError),
        ({"edges": "none"}, ptq.SpecError), ({"data": "magic"}, ptq.PluginError), ({"rounding": "up"}, ptq.PluginError),
        ({"input_shape": (3, 16)}, ptq.SpecError), ({"target": "paper"}, ptq.PluginError),
    ):  # fmt: skip
        with pytest.raises(error):
            ptq.quantize(build("plain"), **({"input_shape": SHAPE} | options))


def test_network_with_nothing_to_quantize():
    with pytest.raises(ptq.ModelError, match="no convolution"):
        ptq.quantize(nn.Sequential(nn.ReLU(), nn.Flatten()), "w8a8", images()[:4], input_shape=SHAPE)


def test_best_norm_is_the_one_that_changes_the_output_least(monkeypatch: pytest.MonkeyPatch):
    """Of the norms tried, the grids kept are those of the one whose activations alone give the highest SQNR."""
    common = {"input_shape": SHAPE, "rounding": "nearest"}
    x = images(32)
    monkeypatch.setattr(ranges, "NORMS", (0.5, 2.4))  # far apart, so that there is no doubt which is better
    best = ptq.quantize(build("residual"), "w8a3", x, ranges="lp_best", **common)
    tried = {}
    for p in ranges.NORMS:
        monkeypatch.setitem(ranges.ESTIMATORS, "lp", ranges.lp_norm(p))
        qm = ptq.quantize(build("residual"), "w8a3", x, ranges="lp", **common)
        tried[qm.manifest.metrics["sqnr_db"]] = qm.manifest.ranges
    kept = next(sqnr for sqnr, found in tried.items() if found == best.manifest.ranges)
    # Chosen with float weights; the 8-bit ones add noise far below that of 3-bit activations.
    assert kept > max(tried) - 0.3 > min(tried)
