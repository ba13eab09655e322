"""Room for what blocks see: in memory up to a limit, then in files, with the same result."""

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from ptq.contracts import Feedback
from ptq.reconstruct import _capture
from ptq.reconstruct._capture import Space, block_error, compare_all, picked, stored
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct.genie_m import GenieM
from ptq.reconstruct.nearest import Nearest
from tests.stages import prepare, prepared
from tests.zoo import images


def test_beyond_the_limit_tensors_lie_in_files():
    space = Space(limit=1000)
    small, large = space.empty((10, 20)), space.empty((100, 20))
    assert space.used == 800 and space._folder is not None
    files = list(Path(space._folder.name).iterdir())
    assert [f.stat().st_size for f in files] == [8000]
    large.copy_(torch.arange(2000.0).view(100, 20))
    assert torch.equal(large[torch.tensor([99, 3])], torch.arange(2000.0).view(100, 20)[[99, 3]])
    space.free(large)
    space.free(small)
    space.free(torch.zeros(3))  # not its own
    assert space.used == 0 and not any(f.exists() for f in files)
    folder = Path(space._folder.name)
    space.close()
    assert not folder.exists()


def test_default_is_a_quarter_of_what_is_free():
    assert Space().limit == pytest.approx(0.25 * _capture.psutil.virtual_memory().available, rel=0.05)


def _fitted(memory: int | None) -> fx.GraphModule:
    made = prepare("residual")
    method = GenieM(steps=5, batch_size=8)
    student, _ = reconstruct_blocks(
        made.teacher,
        made.student,
        images(),
        method,
        seed=0,
        device=torch.device("cpu"),
        feedback=Feedback(),
        memory=memory,
    )
    return student


def test_where_it_lies_changes_nothing():
    here, there = _fitted(None).state_dict(), _fitted(0).state_dict()
    assert list(here) == list(there) and all(torch.equal(v, there[k]) for k, v in here.items())


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch):
    """Twelve equal layers: no more is held than the values around one of them, whatever the depth."""
    spaces: list[Space] = []
    peaks: list[int] = []

    class Watched(Space):
        def __init__(self, limit: int | None = None) -> None:
            super().__init__(limit)
            spaces.append(self)

        def empty(self, *args, **kwargs):
            out = super().empty(*args, **kwargs)
            peaks.append(self.used)
            return out

    monkeypatch.setattr("ptq.reconstruct._loop.Space", Watched)
    layers = [layer for _ in range(12) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    made = prepared(nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 256, 10)))
    reconstruct_blocks(
        made.teacher, made.student, images(), Nearest(), seed=0, device=torch.device("cpu"), feedback=Feedback()
    )
    one = images().numel() * 4
    assert max(peaks) <= 4 * one  # teacher and student, before and behind
    assert spaces[0].used <= one


def test_errors_in_batches_are_those_of_the_whole():
    rng = torch.Generator().manual_seed(0)
    y, out = torch.randn(130, 4, 5, 5, generator=rng), torch.randn(130, 4, 5, 5, generator=rng)
    error, decibels = compare_all(stored([out]), [y], [1])
    assert error == pytest.approx(float(block_error([out], [y])), rel=1e-5)
    assert decibels == pytest.approx(10 * float(torch.log10(y.square().sum() / (out - y).square().sum())), abs=1e-4)
    assert compare_all(stored([y]), [y], [1]) == (0.0, 200.0)


def test_images_lie_channels_last_and_are_picked_whole():
    space, x = Space(), torch.randn(6, 3, 4, 5)
    held = space.empty(x.shape)
    held.copy_(x)
    assert held.is_contiguous(memory_format=torch.channels_last)
    pick = torch.tensor([4, 0, 4])
    found = picked(held, pick)
    assert torch.equal(found, x[pick]) and found.is_contiguous(memory_format=torch.channels_last)
    flat = torch.randn(6, 7)
    assert torch.equal(picked(flat, pick), flat[pick])
    space.free(held)
    assert space.used == 0


def test_error_sums_over_channels_wherever_they_are():
    y = torch.zeros(2, 7, 5, 96)  # [B, H, W, C]
    error, _ = compare_all(stored([y + 1]), [y], [3])
    assert error == pytest.approx(96)
    assert compare_all(stored([y.movedim(3, 1) + 1]), [y.movedim(3, 1)], [1])[0] == pytest.approx(96)
