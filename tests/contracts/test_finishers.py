"""What every joint pass keeps to, whoever wrote it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import ptq
from ptq import pipeline, plugins
from ptq.augment import beta
from ptq.contracts import Feedback, hold_back, make_rng
from ptq.errors import SpecError
from ptq.finish.logits import Logits, _Undecided
from ptq.quant.affine import QParams
from ptq.quant.fake_quant import ActFakeQuant, Dequantize, weight_grid
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct.nearest import Nearest
from ptq.spec import QuantSpec
from tests.stages import assert_unchanged, fingerprint, prepare
from tests.zoo import SHAPE, build, images

NAMES = plugins.names("finishers")
_CPU = torch.device("cpu")


def _hardened(name: str, bits: str = "w4a4"):
    made = prepare(name, bits)
    student, _ = reconstruct_blocks(
        made.teacher, made.student, images(64), Nearest(), seed=0, device=_CPU, feedback=Feedback()
    )
    return made.folded, student


@pytest.mark.parametrize("bits", ["w4a4", "w4"])
@pytest.mark.parametrize("net", ["residual", "depthwise", "concat", "squeeze_excite"])
@pytest.mark.parametrize("name", NAMES)
def test_result_is_hardened_and_inputs_stay(name: str, net: str, bits: str, tmp_path):
    teacher, student = _hardened(net, bits)
    before, finisher = fingerprint(student), plugins.load("finishers", name).smoke(tmp_path)
    seen, held = hold_back(images(64), finisher.held_out, 0)
    again = [finisher.finish(teacher, student, seen, held, seed=0, device=_CPU, feedback=Feedback()) for _ in range(2)]
    assert_unchanged(student, before)
    (out, figures), (twin, _) = again
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in out.state_dict().items())
    assert all(isinstance(v, float) for v in figures.values()) and figures
    for module in out.modules():
        assert not isinstance(module, ActFakeQuant) or float(module.scale) > 0
        if hasattr(module, "parametrizations"):
            assert isinstance(weight_grid(module), Dequantize)
    assert not any(p.requires_grad for p in out.parameters())


def test_it_helps_or_is_undone():
    """At 3 bits it helps on images that neither saw; at a rate that ruins everything, the network is as it was."""
    teacher, student = _hardened("residual", "w3a4")
    seen, held = hold_back(images(64), 0.25, 0)
    common = {"seed": 0, "device": _CPU}
    _, figures = Logits(steps=60).finish(teacher, student, seen, held, feedback=Feedback(), **common)
    assert figures["finish_after"] < 0.9 * figures["finish_before"]
    notes: list[str] = []
    wild = Logits(steps=5, lr_weight=3.0, lr_act=3.0, lr_bias=30.0)
    out, _ = wild.finish(teacher, student, seen, held, feedback=Feedback(note=notes.append), **common)
    assert out is student and "undone" in notes[0]


def test_a_free_code_is_one_of_the_two_around_its_weight():
    q = QParams(torch.tensor([0.5, 2.0]), torch.tensor([0, 1], dtype=torch.int32), QuantSpec(3, True, False, axis=0))
    weight = torch.tensor([[0.6, -0.7, 9.0], [1.0, 3.5, -0.2]])
    codes = torch.tensor([[1, -2, 3], [1, 3, 1]], dtype=torch.int8)  # 0.6 / 0.5 = 1.2: up from 1; 9 is beyond the grid
    grid = _Undecided(codes, q, weight)
    assert torch.equal(grid(codes), torch.tensor([[0.5, -1.0, 1.5], [0.0, 4.0, 0.0]]))
    grid.v.requires_grad_(True)
    grid.gain.requires_grad_(True)
    grid(codes).sum().backward()
    assert bool(((grid.v.grad != 0) == (grid.step != 0)).all()) and bool((grid.gain.grad != 0).any())
    with torch.no_grad():
        grid.v.fill_(1.0)
    assert torch.equal(grid.decided(codes), torch.tensor([[2.0, -1, 3], [2, 2, 0]]))
    assert torch.equal(grid(codes).detach(), torch.tensor([[1.0, -0.5, 1.5], [2.0, 2.0, -2.0]]))


def test_too_few_images_are_said():
    teacher, student = _hardened("residual")
    seen, held = hold_back(images(20), 0.5, 0)
    assert len(seen) == 20 and len(held) == 0
    notes: list[str] = []
    finisher = replace(Logits(), steps=2)
    out, _ = finisher.finish(teacher, student, seen, held, seed=0, device=_CPU, feedback=Feedback(note=notes.append))
    assert out is student and "too few" in notes[0]


def test_in_a_whole_run(tmp_path):
    qm = ptq.quantize(
        build("residual"), "w4a4", images(64), input_shape=SHAPE, rounding="genie_m:steps=5", finish="logits:steps=5"
    )
    assert qm.manifest.recipe["finish"].startswith("logits:steps=5,") and "finish_before" in qm.manifest.metrics
    assert ptq.export(qm, "onnx_qdq", tmp_path / "m.onnx")["differing_outputs"] == 0


def test_a_share_that_leaves_nothing_is_refused():
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(SpecError, match="held_out"):
            Logits(held_out=share)
    for weight in ("logits", "blocks"):
        with pytest.raises(SpecError, match="weights of the loss are 0 or more"):
            Logits(**{weight: -1.0})
    with pytest.raises(SpecError, match="every rate of the joint pass is 0"):
        Logits(lr_weight=0, lr_act=0, lr_bias=0)


def test_blending_is_by_a_beta_distribution():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)); each draw has its generator's word alone."""
    for a in (0.3, 1.0, 4.0):
        draws = beta(a, 20_000, make_rng(0, "blend"))
        assert torch.equal(draws, beta(a, 20_000, make_rng(0, "blend")))
        assert bool(((draws >= 0) & (draws <= 1)).all())
        # 5 standard deviations of mean and variance of so many draws of spread at most 1/2.
        assert float(draws.mean()) == pytest.approx(0.5, abs=0.018)
        assert float(draws.var()) == pytest.approx(1 / (4 * (2 * a + 1)), abs=0.01)
    with pytest.raises(SpecError, match="mix"):
        Logits(mix=-1.0)


def test_nothing_to_tune_is_said():
    """Scales that are powers of two stay, and a network without biases has nothing else."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5, bias=False)
    )
    qm = ptq.quantize(
        net, "w8a8", images(64), input_shape=SHAPE, rounding="nearest", scales="power_of_two", finish="logits:steps=2"
    )
    assert any("nothing to tune" in note for note in qm.manifest.notes)


def test_images_that_judge_are_seen_by_nothing_else(monkeypatch: pytest.MonkeyPatch):
    x, seen = images(64), []
    work, held = hold_back(x, 0.25, 0)
    assert len(work) == 48 and len(held) == 16
    rows = {tuple(v.flatten().tolist()) for v in x}
    assert {tuple(v.flatten().tolist()) for v in torch.cat([work, held])} == rows and len(rows) == 64
    rebuild = pipeline.reconstruct_blocks
    monkeypatch.setattr(
        pipeline, "reconstruct_blocks", lambda a, b, x, *r, **k: seen.append(x) or rebuild(a, b, x, *r, **k)
    )
    ptq.quantize(
        build("residual"),
        "w4a4",
        x,
        input_shape=SHAPE,
        rounding="genie_m:steps=2",
        finish="logits:steps=2,held_out=0.25",
    )
    work, held = hold_back(x, 0.25, 0)
    assert len(seen) == 1 and torch.equal(seen[0], work)
