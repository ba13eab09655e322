"""What tells each method from its neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ptq.calibrators import vae_replay
from ptq.calibrators._classifier import balance, balanced_labels, class_rows, last_features
from ptq.calibrators._generators import ConvGenerator, Encoder
from ptq.calibrators._label_embeddings import label_embeddings
from ptq.calibrators.bn_stats import BnStats
from ptq.calibrators.dgh import Dgh
from ptq.calibrators.genie import Genie
from ptq.calibrators.inceptionism import Inceptionism
from ptq.calibrators.nayer import Nayer, NoisyLayer
from ptq.calibrators.vae_replay import Memory, VaeReplay
from ptq.calibrators.zeroq import ZeroQ
from torch import Tensor, nn

import ptq
from ptq.batch_cache import BatchCache
from ptq.contracts import CalibrationContext, Feedback, make_rng
from ptq.errors import CalibrationError
from tests.stages import prepare
from tests.zoo import SHAPE, build

# A normalization whose deviation is a data set's own: inputs count as normalized, as those of the zoo's nets are.
STATED = {"mean": [0.5] * 3, "std": [0.25] * 3}
COMMON = {"input_shape": SHAPE, **STATED}


def _context(source, net: str = "residual", **changes) -> CalibrationContext:
    given = {"count": source.count, "batch_size": source.batch_size, "rng": make_rng(0, "calibration")}
    fixed = {"input_shape": SHAPE, "device": torch.device("cpu"), **{k: torch.tensor(v) for k, v in STATED.items()}}
    return CalibrationContext(prepare(net).teacher, **(fixed | given | changes))


def _images(source, net: str = "residual", **changes) -> Tensor:
    return torch.cat(list(source.batches(_context(source, net, **changes))))


def _curve(source, net: str = "residual") -> list[float]:
    losses: list[float] = []
    _images(source, net, feedback=Feedback(loss=lambda step, value: losses.append(float(value))))
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
        found = teacher(_images(source)).argmax(1)
    assert float((found == labels).float().mean()) >= 0.6  # of ten classes, of a net that was never trained


def test_combined_scheme_is_both():
    common = {"count": 16, "steps": 40, "augment": 1, "scale": 1.0}
    plain, both = BnStats(**common), BnStats(**common, inception=1.0)
    teacher = prepare("residual").teacher
    with torch.no_grad():
        confidence = [float(F.softmax(teacher(_images(s)), 1).amax(1).mean()) for s in (plain, both)]
    assert confidence[1] > confidence[0]


@pytest.mark.parametrize("source", [Genie(count=4, steps=4), ZeroQ(count=4, steps=4)], ids=lambda s: type(s).__name__)
def test_swing_changes_images_of_strided_networks_only(source):
    other = replace(source, swing=not source.swing)
    assert not torch.equal(_images(source), _images(other))


def test_trimming_keeps_valid_pixels():
    for source in (Inceptionism(count=8, steps=5), BnStats(count=8, steps=5)):
        assert float(_images(source).abs().max()) <= 2 + 1e-6


def test_whole_set_statistics_match_better_than_any_batch():
    """DGH asks nothing of a batch: the statistics of all together are right, those of one alone need not be."""
    images = _images(Dgh(count=32, batch_size=4, steps=100, lr=0.3))
    whole = ptq.data_similarity(build("residual"), images, **COMMON).mean
    parts = [ptq.data_similarity(build("residual"), part, **COMMON).mean for part in images.split(4)]
    assert whole < 0.6 * sum(parts) / len(parts)


def test_output_stretching_widens_the_logits():
    teacher = prepare("residual").teacher
    spread = []
    for stretch in (0.0, 1.0):
        with torch.no_grad():
            logits = teacher(_images(Dgh(count=16, batch_size=8, steps=60, stretch=stretch, lr=0.3)))
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
    a, b, c = _images(source).split(4)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    fresh = _images(replace(source, reset=1)).split(4)
    assert torch.equal(fresh[0], a) and not torch.equal(fresh[1], b)


@pytest.mark.parametrize("noisy", ["shared", "each"])
def test_no_two_images_of_a_batch_are_alike(noisy: str):
    images = _images(Nayer(count=25, batch_size=25, steps=1, latent=8, noisy=noisy))
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
    ctx = _context(source)
    labels = torch.cat([source.labels(ctx, k, 20) for k in range(2)])
    assert torch.equal(labels.bincount(), torch.full((10,), 4))
    with torch.no_grad():
        logits = prepare("residual").teacher(torch.cat(list(source.batches(ctx))))
    # Cross-entropy to the labels is trained for: below that of a guess, log 10 = 2.303, on a net that was never trained.
    assert float(F.cross_entropy(logits, labels)) < 2.2


def test_adversarial_term_needs_a_student_and_changes_images():
    source = Nayer(count=8, batch_size=8, steps=12, latent=8, a_adv=20.0)
    student = prepare("residual", "w2a4").student  # the teacher at low bits: it agrees with it now and then
    assert not torch.equal(_images(source), _images(source, student=student))
    assert torch.equal(_images(replace(source, a_adv=0.0)), _images(replace(source, a_adv=0.0), student=student))
    replay = VaeReplay(count=8, batch_size=8, steps=3, latent=8, memory_latent=4)
    assert not torch.equal(_images(replay), _images(replay, student=student))


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


@pytest.mark.parametrize("count", [8, 64])
def test_memory_does_not_grow_with_the_images(count: int, monkeypatch: pytest.MonkeyPatch):
    """What is carried from batch to batch, in bytes: the same for 8 images and for 64."""
    sizes = []
    original = CalibrationContext.batch

    def watched(self, index, make, state=None):
        images = original(self, index, make, state)
        sizes.append(sum(v.numel() * v.element_size() for v in state["memory"].state_dict().values()))
        return images

    monkeypatch.setattr(CalibrationContext, "batch", watched)
    _images(VaeReplay(count=count, batch_size=4, steps=1))
    assert len(sizes) == count // 4 and len(set(sizes)) == 1


@pytest.mark.parametrize(("shape", "most"), [((3, 32, 32), 2.4e6), ((1, 32, 32), 2.4e6), ((3, 224, 224), 6e6)])
def test_memory_is_about_two_megabytes(shape, most):
    """PRE-DFKD, table 1: 2.1 MB, whatever the data set; pictures of ImageNet's size are not in the paper."""
    size = sum(4 * p.numel() for p in Memory(shape, VaeReplay().memory_latent).parameters())
    assert 1.5e6 < size < most


def test_memory_learns_what_it_is_shown():
    torch.manual_seed(0)
    memory, rng = Memory(SHAPE, 10), make_rng(0, "memory")
    x = torch.randn(4, *SHAPE).repeat(8, 1, 1, 1)
    adam = torch.optim.Adam(memory.parameters(), lr=2e-3)
    errors = []
    for _ in range(60):
        loss = F.l1_loss(memory.rebuild(x, rng)[0], x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.8 * errors[0]


def test_generator_is_trained_every_few_batches(monkeypatch: pytest.MonkeyPatch):
    """PRE-DFKD's authors: ten batches between two steps of the generator, the autoencoder in the first four."""
    novel, memory, batches = [], [], []
    source = VaeReplay(count=40, batch_size=2, steps=1, every=10, latent=4, memory_latent=2)
    for name, calls in (("_novel_step", novel), ("_memory_step", memory)):
        original = getattr(vae_replay._Run, name)

        def watched(self, *args, original=original, calls=calls):
            calls.append(len(batches))
            return original(self, *args)

        monkeypatch.setattr(vae_replay._Run, name, watched)
    for batch in source.batches(_context(source)):
        batches.append(batch)
    assert novel == [0, 10] and memory == [0, 1, 2, 3, 10, 11, 12, 13]


def test_training_goes_on_between_two_turns_of_the_generator(tmp_path):
    source = VaeReplay(count=16, batch_size=2, steps=1, every=4, latent=4, memory_latent=2)
    whole = list(source.batches(_context(source)))
    first = source.batches(_context(source, cache=BatchCache(tmp_path)))
    for _ in range(6):  # stopped in the middle of the second turn
        next(first)
    again = list(source.batches(_context(source, cache=BatchCache(tmp_path))))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize(("share", "replayed"), [(0.125, 2), (1.0, 9), (0.0, 0)])
def test_share_is_of_replayed_samples_to_novel_ones(share: float, replayed: int, monkeypatch: pytest.MonkeyPatch):
    asked, original = [], vae_replay._Run._replay

    def watched(self, size, rng):
        asked.append(size)
        return original(self, size, rng)

    monkeypatch.setattr(vae_replay._Run, "_replay", watched)
    source = VaeReplay(count=18, batch_size=18, steps=1, latent=4, memory_latent=2, memory_share=share)
    assert len(_images(source)) == 18 and asked == ([replayed] if replayed else [])


def test_nonsense_is_refused():
    for options in ({"every": 0}, {"memory_share": -0.1}):
        with pytest.raises(CalibrationError, match="at least"):
            VaeReplay(**options)


def test_replayed_samples_are_part_of_a_batch():
    with_memory = VaeReplay(count=16, batch_size=16, steps=2, latent=8, memory_latent=4)
    without = replace(with_memory, memory=False)
    shared = replace(with_memory, memory_share=1.0)
    assert all(len(_images(s)) == 16 for s in (with_memory, without, shared))
    assert not torch.equal(_images(with_memory), _images(without))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 130, 129), (2, 5, 9)])
def test_generators_of_any_size(shape):
    x = ConvGenerator(shape, 6)(torch.randn(4, 6)).detach()
    assert x.shape == (4, *shape)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    assert float(mean.abs().max()) < 1e-4 and float((var - 1).abs().max()) < 0.05
    assert all(v.shape == (4, 7) for v in Encoder(shape, 7)(x))


@pytest.mark.parametrize(
    ("shape", "maps"),
    [
        ((3, 32, 32), [(128, 8, 8), (64, 16, 16), (3, 32, 32)]),
        ((3, 224, 224), [(128, 14, 14), (128, 28, 28), (64, 56, 56), (64, 112, 112), (3, 224, 224)]),
    ],
)
def test_generator_has_the_papers_maps(shape, maps):
    # NAYER, tables 6 and 7: what every convolution yields.
    generator, seen = ConvGenerator(shape, 6), []
    for norm in (*generator.norms, generator.last):
        norm.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[1:])))
    generator(torch.randn(2, 6))
    assert seen == maps
    assert len(generator.convs) == len(maps)


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


def test_generators_yield_float32_whatever_they_multiply_in(monkeypatch: pytest.MonkeyPatch):
    images = {}
    for able in (False, True):
        monkeypatch.setattr("ptq.calibrators._generators.pays", lambda *_, able=able: able)
        torch.manual_seed(0)
        generator, encoder, memory = ConvGenerator((3, 8, 8), 6), Encoder((3, 8, 8), 5), Memory((3, 8, 8), 5)
        x = generator(torch.randn(16, 6))
        found = [x, *encoder(x), *memory.rebuild(x, make_rng(0, "here"))]
        assert all(v.dtype == torch.float32 for v in found)
        images[able] = x.detach()
    # Eight significant bits: another sum of products, the same images to about a hundredth of their deviation.
    apart = (images[True] - images[False]).abs().mean()
    assert 0 < float(apart) < 0.05
