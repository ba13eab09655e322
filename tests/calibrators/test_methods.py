"""What tells each method from its neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ptq.calibrators._classifier import balance, balanced_labels, class_rows, last_features
from ptq.calibrators._label_embeddings import label_embeddings
from ptq.calibrators._teachers import teachers
from ptq.calibrators.bn_stats import BnStats
from ptq.calibrators.dgh import Dgh
from ptq.calibrators.genie import Genie
from ptq.calibrators.inceptionism import Inceptionism
from ptq.calibrators.nayer import Nayer, NoisyLayer, _Run
from ptq.calibrators.vae_replay import VaeReplay
from ptq.calibrators.zeroq import ZeroQ
from torch import nn

import ptq
from ptq.contracts import Feedback, make_rng
from ptq.errors import CalibrationError
from ptq.graph.taps import tap_batch_norms
from tests.calibrators.running import COMMON, context_of, images_of
from tests.stages import prepare
from tests.zoo import SHAPE, build, images


def _curve(source, net: str = "residual") -> list[float]:
    losses: list[float] = []
    images_of(source, net, feedback=Feedback(loss=lambda step, value: losses.append(float(value))))
    return losses


@pytest.mark.parametrize(
    "source",
    [
        Genie(count=16, batch_size=16, steps=60), ZeroQ(count=16, steps=60), BnStats(count=16, steps=60, augment=1),
        BnStats(count=16, steps=60, augment=1, objective="mse"), Inceptionism(count=16, steps=60, augment=1),
        Dgh(count=16, batch_size=8, steps=60), Nayer(count=16, batch_size=16, steps=60),
    ],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_the_objective_falls(source):
    curve = _curve(source)
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


@pytest.mark.parametrize(
    "source",
    [Genie(count=32, steps=150), ZeroQ(count=32, steps=150), BnStats(count=32, steps=150, augment=1), Dgh(count=32, steps=150)],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_images_look_more_like_the_training_data_than_they_started(source):
    net = build("residual")
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.running_mean += 0.5 * norm.running_var.sqrt()  # data whose statistics are not those of noise
    noise = ptq.data_similarity(net, "gaussian:count=32", **COMMON).mean
    assert ptq.data_similarity(net, source, **COMMON).mean < 0.2 * noise


@pytest.mark.parametrize(
    "source",
    [
        Inceptionism(count=20, steps=80, augment=1, scale=1.0, smoothness=0.1),
        BnStats(count=20, steps=80, augment=1, scale=1.0, inception=1.0),
    ],
    ids=["I", "BNS+I"],
)
def test_images_are_of_their_classes(source):
    teacher = prepare("residual").teacher
    labels = balanced_labels(20, 10, make_rng(make_rng(0, "calibration").initial_seed(), "batch 0"))
    with torch.no_grad():
        found = teacher(images_of(source)).argmax(1)
    assert float((found == labels).float().mean()) >= 0.6  # of ten classes, of a net that was never trained


def test_combined_scheme_is_both():
    common = {"count": 16, "steps": 40, "augment": 1, "scale": 1.0}
    plain, both = BnStats(**common), BnStats(**common, inception=1.0)
    teacher = prepare("residual").teacher
    with torch.no_grad():
        confidence = [float(F.softmax(teacher(images_of(s)), 1).amax(1).mean()) for s in (plain, both)]
    assert confidence[1] > confidence[0]


@pytest.mark.parametrize("source", [Genie(count=4, steps=4), ZeroQ(count=4, steps=4)], ids=lambda s: type(s).__name__)
def test_swing_changes_images_of_strided_networks_only(source):
    other = replace(source, swing=not source.swing)
    assert not torch.equal(images_of(source), images_of(other))


def test_trimming_keeps_valid_pixels():
    for source in (Inceptionism(count=8, steps=5), BnStats(count=8, steps=5)):
        assert float(images_of(source).abs().max()) <= 2 + 1e-6


def test_whole_set_statistics_match_better_than_any_batch():
    """DGH asks nothing of a batch: the statistics of all together are right, those of one alone need not be."""
    images = images_of(Dgh(count=32, batch_size=4, steps=100, lr=0.3))
    whole = ptq.data_similarity(build("residual"), images, **COMMON).mean
    parts = [ptq.data_similarity(build("residual"), part, **COMMON).mean for part in images.split(4)]
    assert whole < 0.6 * sum(parts) / len(parts)


def test_output_stretching_widens_the_logits():
    teacher = prepare("residual").teacher
    spread = []
    for stretch in (0.0, 1.0):
        with torch.no_grad():
            logits = teacher(images_of(Dgh(count=16, batch_size=8, steps=60, stretch=stretch, lr=0.3)))
        spread.append(float((logits.amax(1) - logits.amin(1)).mean()))
    assert spread[1] > 1.3 * spread[0]


def test_noisy_layer():
    shared, each = (NoisyLayer(6, 50, make_rng(0, "z"), 8, share) for share in (5, 1))
    assert float(shared.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not bool(shared.bias.any())
    e = torch.randn(8, 6)
    normalized = F.batch_norm(e, None, None, training=True)
    assert torch.allclose(shared(e)[:5], normalized[:5] @ shared.weight[0], atol=1e-6)
    assert torch.allclose(shared(e)[5:], normalized[5:] @ shared.weight[1], atol=1e-6)
    assert torch.allclose(each(e)[3], normalized[3] @ each.weight[3], atol=1e-6)


def test_nayer_draws_a_new_layer_each_round_and_a_new_generator_every_few():
    source = Nayer(count=12, batch_size=4, steps=1, latent=8)
    a, b, c = images_of(source).split(4)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    fresh = images_of(replace(source, reset=1)).split(4)
    assert torch.equal(fresh[0], a) and not torch.equal(fresh[1], b)


@pytest.mark.parametrize("noisy", ["shared", "each"])
def test_no_two_images_of_a_batch_are_alike(noisy: str):
    images = images_of(Nayer(count=25, batch_size=25, steps=1, latent=8, noisy=noisy))
    assert len({tuple(x.flatten()[:50].tolist()) for x in images}) == 25


@pytest.mark.parametrize(("count", "number"), [(128, 1000), (25, 10), (3, 10), (20, 1)])
def test_labels_have_each_class_once_in_a_row(count: int, number: int):
    labels = balanced_labels(count, number, make_rng(0, "labels"))
    assert len(labels) == count and int(labels.max()) < number
    for part in labels.split(number):
        assert len(part.unique()) == len(part)
    assert number < 1000 or int(labels.max()) > 900


def test_nayer_labels_are_balanced_and_known():
    source = Nayer(count=40, batch_size=20, steps=60, latent=16, a_bn=0.0)
    ctx = context_of(source)
    labels = torch.cat([source.labels(ctx, k, 20) for k in range(2)])
    assert torch.equal(labels.bincount(), torch.full((10,), 4))
    with torch.no_grad():
        logits = prepare("residual").teacher(torch.cat(list(source.batches(ctx))))
    # Cross-entropy to the labels is trained for: below that of a guess, log 10 = 2.303, on a net that was never trained.
    assert float(F.cross_entropy(logits, labels)) < 2.2


def test_adversarial_term_is_the_divergence_of_the_student_from_the_teacher():
    """KL(T ‖ S), over images on which both agree: equation 5."""
    source = Nayer(count=8, batch_size=8, steps=1, latent=8, a_adv=3.0)
    student, x = build("residual"), images(8)
    run = _Run(source, context_of(source, student=student))
    with torch.no_grad():
        scores, bias = student(run.space.place(x)), list(student.parameters())[-1]
        top = int(scores[0].argmax())
        other = (top + 1) % len(bias)
        bias[other] += (
            scores[:, top] - scores[:, other]
        ).median() + 1e-6  # about half of the images change their class
    teacher = teachers(run.ctx)
    labels = torch.arange(8)
    run.past.follow(teacher.models)
    with torch.no_grad(), tap_batch_norms(teacher.models) as taps:
        with_term = run._loss(teacher, taps, x, labels)
        taps.seen.clear()
        run.ctx = replace(run.ctx, student=None)
        without = run._loss(teacher, taps, x, labels)
        t, s = run.ctx.model(run.space.place(x)), student(run.space.place(x))
    p, q = t.softmax(1), s.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1)
    agree = t.argmax(1) == s.argmax(1)
    assert 0 < int(agree.sum()) < len(agree)
    expected = -3.0 * (kl * agree).mean()
    assert float(with_term - without) == pytest.approx(float(expected), rel=1e-3) and float(expected) < 0


def test_adversarial_term_needs_a_student_and_changes_images():
    source = Nayer(count=8, batch_size=8, steps=12, latent=8, a_adv=20.0)
    student = prepare("residual", "w2a4").student  # the teacher at low bits: it agrees with it now and then
    assert not torch.equal(images_of(source), images_of(source, student=student))
    assert torch.equal(images_of(replace(source, a_adv=0.0)), images_of(replace(source, a_adv=0.0), student=student))
    replay = VaeReplay(count=8, batch_size=8, steps=3, latent=8, memory_latent=4)
    assert not torch.equal(images_of(replay), images_of(replay, student=student))


def test_label_embeddings(tmp_path):
    model = prepare("residual").teacher
    given = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    np.savez(tmp_path / "e.npz", given)
    common = {"names": None, "encoder": "none"}
    assert torch.equal(label_embeddings(model, 10, embeddings=None, **common), class_rows(model))
    assert class_rows(model).shape == (10, 16)
    assert np.array_equal(label_embeddings(model, 10, embeddings=tmp_path / "e.npz", **common).numpy(), given)
    with pytest.raises(CalibrationError, match="10 classes"):
        np.save(tmp_path / "few.npy", given[:3])
        label_embeddings(model, 10, embeddings=tmp_path / "few.npy", **common)
    with pytest.raises(CalibrationError, match="not a readable"):
        (tmp_path / "bad.npz").write_bytes(b"no array")
        label_embeddings(model, 10, embeddings=tmp_path / "bad.npz", **common)
    with pytest.raises(CalibrationError, match="both"):
        label_embeddings(model, 10, embeddings=tmp_path / "e.npz", names=tmp_path / "n.txt", encoder="none")


def test_names_need_an_encoder(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(CalibrationError, match=r"ptq\[text\]"):
            label_embeddings(
                prepare("residual").teacher, 10, embeddings=None, names=tmp_path / "names.txt", encoder="x"
            )
    else:
        with pytest.raises(CalibrationError, match="cannot be loaded"):
            label_embeddings(
                prepare("residual").teacher, 10, embeddings=None, names=tmp_path / "names.txt", encoder=str(tmp_path)
            )


def test_features_and_balance():
    teacher = prepare("residual").teacher
    with last_features(teacher) as features, torch.no_grad():
        logits = teacher(torch.randn(4, *SHAPE))
        layer = teacher.get_submodule("fc")
        assert torch.allclose(layer(features[0]), logits)
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    one = torch.full((5, 10), -20.0)
    one[:, 3] = 20
    all_alike = 40 * torch.eye(10)
    assert float(balance(one)) == pytest.approx(0, abs=1e-4)
    assert float(balance(all_alike)) == pytest.approx(-float(torch.log(torch.tensor(10.0))), abs=1e-4)


def test_options_that_leave_nothing_to_yield():
    for options in ({"warmup": 10}, {"reset": 0}, {"warmup": -1}):
        with pytest.raises(CalibrationError, match="warmup"):
            Nayer(**options)
    for options in ({"augment": 0}, {"scale": 0.0}):
        with pytest.raises(CalibrationError, match="augment is at least 1"):
            BnStats(**options)
        with pytest.raises(CalibrationError, match="augment is at least 1"):
            Inceptionism(**options)
