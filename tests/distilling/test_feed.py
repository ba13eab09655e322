"""How images come to a student."""

from pathlib import Path

import pytest
import torch

from ptq.batch_cache import BatchCache
from ptq.contracts import Carry, make_rng
from ptq.distilling.feed import FromPool, FromSet, FromStream, looked_at
from ptq.errors import SpecError
from ptq.training import Training
from tests.zoo import build


class _Numbered:
    """A source whose k-th batch for a student holds k, and those before there is one -1, -2, …; it tells what it was asked."""

    def __init__(self, size: int = 4) -> None:
        self.size, self.asked, self.modes = size, [], []

    def __call__(self, student, count, carry):
        self.asked.append((student is not None, count, None if carry is None else carry.done))
        for k in range(carry.done if carry else 0, count):
            if student is not None:
                self.modes.append((student.training, any(p.requires_grad for p in student.parameters())))
            yield torch.full((self.size, 1, 1, 1), float(k if student is not None else -1 - k))


def _kinds(images) -> list[float]:
    return sorted(set(images.flatten().tolist()))


def test_a_set_is_drawn_from_with_replacement():
    feed = FromSet(torch.arange(10.0).view(10, 1, 1, 1), 40)
    batch = feed.batch(make_rng(0, "a"))
    assert batch.shape == (40, 1, 1, 1) and set(_kinds(batch)) <= set(range(10)) and len(_kinds(batch)) > 5
    assert torch.equal(batch, feed.batch(make_rng(0, "a"))) and not torch.equal(batch, feed.batch(make_rng(1, "a")))


def test_a_pool_grows_before_each_epoch():
    source, student = _Numbered(), build("residual")
    feed = FromPool(source, student, Training(epochs=3, batch_size=200, first_rounds=2, rounds=2), 4, None)
    for epoch, newest in enumerate((1.0, 3.0, 5.0)):
        feed.prepare(epoch)
        assert _kinds(feed.batch(make_rng(0, "a"))) == [-2.0, -1.0, *torch.arange(newest + 1).tolist()]
    assert source.asked == [(False, 2, None), (True, 6, 0)]
    assert set(source.modes) == {(False, False)}  # the student: eval mode, no gradients of its own


def test_a_pool_may_forget_the_oldest():
    feed = FromPool(_Numbered(), build("residual"), Training(epochs=3, batch_size=200, rounds=2, pool=8), 4, None)
    for epoch in range(3):
        feed.prepare(epoch)
    assert _kinds(feed.batch(make_rng(0, "a"))) == [4.0, 5.0] and feed.images.shape[0] == 8
    for options in ({"pool": 3}, {"rounds": 0}):
        with pytest.raises(SpecError, match="at least one round"):
            FromPool(_Numbered(), build("residual"), Training(**options), 4, None)


def test_a_pool_goes_on(tmp_path: Path):
    how, student = Training(epochs=3, batch_size=50, rounds=2, first_rounds=1), build("residual")
    whole = FromPool(_Numbered(), student, how, 4, None)
    feed = FromPool(_Numbered(), student, how, 4, BatchCache(tmp_path))
    for epoch in range(2):
        feed.prepare(epoch)
    source = _Numbered()
    again = FromPool(source, student, how, 4, BatchCache(tmp_path))
    assert again.restore(feed.state(2))
    again.prepare(2)
    for epoch in range(3):
        whole.prepare(epoch)
    assert torch.equal(again.images, whole.images) and source.asked[-1] == (True, 6, 4)
    assert not FromPool(source, student, how, 4, BatchCache(tmp_path / "gone")).restore(feed.state(2))
    assert not FromPool(source, student, how, 4, None).restore(feed.state(2))


def test_a_stream_gives_every_batch_once():
    source, student = _Numbered(), build("residual").train()
    feed = FromStream(source, student, Training(epochs=2, steps=3))
    seen = []
    for epoch in range(2):
        feed.prepare(epoch)
        seen += [float(feed.batch(make_rng(0, "a"))[0]) for _ in range(3)]
    assert seen == [0, 1, 2, 3, 4, 5] and source.asked == [(True, 6, 0)]
    assert set(source.modes) == {(False, False)}
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert _kinds(feed.sample(100, 0)) == [2, 3, 4, 5]
    again = FromStream(_Numbered(), student, Training(epochs=2, steps=3))
    assert again.restore(feed.state(1))
    again.prepare(1)
    assert float(again.batch(make_rng(0, "a"))[0]) == 3


def test_a_student_is_as_it_was_after_it_was_looked_at():
    student = build("residual").train()
    student.bn1.eval()
    student.fc.requires_grad_(False)
    with pytest.raises(KeyError), looked_at(student):
        assert not any(m.training for m in student.modules())
        raise KeyError
    assert student.training and not student.bn1.training
    assert not student.fc.weight.requires_grad and student.conv1.weight.requires_grad


def test_what_passes_between_batches():
    """`Carry`: batches that were made before come out empty, the next starts from the state that was kept."""
    first, then = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    carry = Carry()
    assert all(carry.reach(k, {"part": first}) for k in range(3))
    later = Carry(3, carry.state())
    assert [later.reach(k, {"part": then}) for k in range(5)] == [False, False, False, True, True]
    assert torch.equal(then.weight, first.weight)
    with torch.no_grad():
        then.weight.fill_(1.0)
    assert later.reach(5, {"part": then}) and float(then.weight.detach().mean()) == 1.0  # once, not before every batch
    assert torch.equal(later.state()["part"]["weight"], then.weight)
