"""PRE-DFKD: what is trained when, what is replayed, and how much is carried along."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ptq.calibrators import vae_replay
from ptq.calibrators.vae_replay import Memory, VaeReplay

from ptq.batch_cache import BatchCache
from ptq.contracts import CalibrationContext, make_rng
from ptq.errors import CalibrationError
from tests.calibrators.running import context_of, images_of
from tests.zoo import SHAPE


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
    images_of(VaeReplay(count=count, batch_size=4, steps=1))
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
    for batch in source.batches(context_of(source)):
        batches.append(batch)
    assert novel == [0, 10] and memory == [0, 1, 2, 3, 10, 11, 12, 13]


def test_training_goes_on_between_two_turns_of_the_generator(tmp_path):
    source = VaeReplay(count=16, batch_size=2, steps=1, every=4, latent=4, memory_latent=2)
    whole = list(source.batches(context_of(source)))
    first = source.batches(context_of(source, cache=BatchCache(tmp_path)))
    for _ in range(6):  # stopped in the middle of the second turn
        next(first)
    again = list(source.batches(context_of(source, cache=BatchCache(tmp_path))))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize(("share", "replayed"), [(0.125, 2), (1.0, 9), (0.0, 0)])
def test_share_is_of_replayed_samples_to_novel_ones(share: float, replayed: int, monkeypatch: pytest.MonkeyPatch):
    asked, original = [], vae_replay._Run._replay

    def watched(self, size, rng):
        asked.append(size)
        return original(self, size, rng)

    monkeypatch.setattr(vae_replay._Run, "_replay", watched)
    source = VaeReplay(count=18, batch_size=18, steps=1, latent=4, memory_latent=2, memory_share=share)
    assert len(images_of(source)) == 18 and asked == ([replayed] if replayed else [])


def test_nonsense_is_refused():
    for options in ({"every": 0}, {"memory_share": -0.1}):
        with pytest.raises(CalibrationError, match="at least"):
            VaeReplay(**options)


def test_replayed_samples_are_part_of_a_batch():
    with_memory = VaeReplay(count=16, batch_size=16, steps=2, latent=8, memory_latent=4)
    without = replace(with_memory, memory=False)
    shared = replace(with_memory, memory_share=1.0)
    assert all(len(images_of(s)) == 16 for s in (with_memory, without, shared))
    assert not torch.equal(images_of(with_memory), images_of(without))


def test_replayed_samples_do_not_depend_on_their_neighbours():
    """The decoder normalizes a replay by what it has learnt; the next training step normalizes by the batch again."""
    source = VaeReplay(count=8, batch_size=4, steps=1, latent=4, memory_latent=2)
    run = vae_replay._Run(source, context_of(source))
    modes = []
    run.memory.decoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    run._replay(2, make_rng(0, "replay"))
    assert modes == [False, False] and run.memory.training and run.memory.decoder.training
