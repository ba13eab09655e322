"""Every source that makes images goes on where it was stopped, and makes what it would have made at once."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ptq
from ptq import plugins
from ptq.batch_cache import BatchCache, open_cache
from ptq.contracts import CalibrationContext, Feedback, make_rng
from ptq.errors import CalibrationError
from ptq.graph.trace import trace
from tests.stages import prepare
from tests.zoo import SHAPE, build

NAMES = [n for n in plugins.names("calibrators") if plugins.load("calibrators", n).synthetic]


def _context(
    name: str, cache: BatchCache | None, feedback: Feedback | None = None
) -> tuple[object, CalibrationContext]:
    source = replace(plugins.load("calibrators", name).smoke(Path()), count=10, batch_size=4)
    ctx = CalibrationContext(
        prepare("residual").teacher, SHAPE, None, None, 10, 4, torch.device("cpu"), make_rng(7, "calibration"),
        feedback or Feedback(), cache=cache,
    )  # fmt: skip
    return source, ctx


def _all(name: str, cache: BatchCache | None, feedback: Feedback | None = None) -> Tensor:
    source, ctx = _context(name, cache, feedback)
    return torch.cat(list(source.batches(ctx)))


class _Kill(Exception):
    """Stands for the end of the process."""


def _killed_after(steps: int) -> Feedback:
    heard = []

    def progress(stage: str, done: int, total: int) -> None:
        heard.append(done)
        if len(heard) > steps:
            raise _Kill

    return Feedback(progress)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_changes_no_image(name: str, tmp_path: Path):
    expected = _all(name, None)
    assert torch.equal(_all(name, BatchCache(tmp_path)), expected)
    assert torch.equal(_all(name, BatchCache(tmp_path)), expected)  # now read


ITERATIVE = [n for n in NAMES if "steps" in plugins.options(plugins.load("calibrators", n))]


@pytest.mark.parametrize(
    ("name", "steps"),
    [*((n, steps) for n in NAMES for steps in (1, 2)), *((n, steps) for n in ITERATIVE for steps in (4, 5))],
)
def test_killed_anywhere_it_goes_on(name: str, steps: int, tmp_path: Path):
    expected, cache = _all(name, None), BatchCache(tmp_path)
    with pytest.raises(_Kill):
        _all(name, cache, _killed_after(steps))
    assert torch.equal(_all(name, cache), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_there_is_not_made_again(name: str, tmp_path: Path):
    _all(name, BatchCache(tmp_path))
    losses: list[int] = []
    _all(name, BatchCache(tmp_path), Feedback(loss=lambda step, value: losses.append(step)))
    assert losses == []


def test_a_damaged_batch_is_made_again(tmp_path: Path):
    expected, cache = _all("genie", None), BatchCache(tmp_path)
    _all("genie", cache)
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-200])
    assert torch.equal(_all("genie", cache), expected)


@pytest.mark.parametrize("name", ["nayer", "vae_replay"])
def test_of_what_is_carried_on_the_latest_is_kept(name: str, tmp_path: Path):
    """Generators and optimizers are many megabytes, and there may be hundreds of batches."""
    expected, cache = _all(name, None), BatchCache(tmp_path)
    _all(name, cache)
    kept = sorted(f.name for f in (tmp_path / "state").iterdir())
    batches = sorted(tmp_path.glob("*.pt"))
    assert kept == [f.name for f in batches][-2:] and len(batches) > 2
    batches[-1].write_bytes(b"")  # made again, from what the one before left
    assert torch.equal(_all(name, cache), expected)
    for file in batches[-2:]:
        file.write_bytes(b"")
    (tmp_path / "state" / batches[-3].name).unlink(missing_ok=True)
    with pytest.raises(CalibrationError, match="damaged"):
        _all(name, cache)


def test_no_half_written_file_is_left(tmp_path: Path):
    _all("zeroq", BatchCache(tmp_path))
    assert [f.suffix for f in tmp_path.iterdir()] == [".pt"] * 3


def test_key_covers_networks_and_settings(tmp_path: Path):
    teacher = prepare("residual").teacher
    other = prepare("residual").teacher
    next(other.parameters()).data.view(-1)[0] += 1e-6
    settings = {"source": "genie", "seed": 0}
    folders = {
        open_cache(tmp_path, models, s).folder
        for models in ((teacher,), (other,), (teacher, other))
        for s in (settings, {**settings, "seed": 1}, {**settings, "source": "genie:steps=5"})
    }
    assert len(folders) == 9
    assert open_cache(tmp_path, (prepare("residual").teacher,), settings).folder in folders


def test_key_covers_what_is_no_tensor(tmp_path: Path):
    """Strides, slopes and the like: in neither the code of the graph nor its tensors."""
    nets = [
        torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, stride, 1), torch.nn.LeakyReLU(a))
        for stride, a in ((1, 0.1), (2, 0.1), (1, 0.2))
    ]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    assert len({open_cache(tmp_path, (trace(net, SHAPE),), {}).folder for net in nets}) == 3


def test_key_covers_files(tmp_path: Path):
    def made(folder: str):
        return ptq.synthesize(
            build("residual"), f"{folder}(embeddings={tmp_path / 'e.npy'},steps=1,batch_size=3)+gaussian,count=6"
            if folder.startswith("mix") else f"{folder}:embeddings={tmp_path / 'e.npy'},steps=1,count=3",
            input_shape=SHAPE, cache=tmp_path / "kept",
        ).images  # fmt: skip

    for name in ("nayer", "mix:nayer"):
        np.save(tmp_path / "e.npy", np.eye(10, dtype=np.float32))
        first = made(name)
        np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32))
        assert not torch.equal(made(name), first)


def test_dgh_keeps_one_state_only(tmp_path: Path):
    _all("dgh", BatchCache(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_from_python(tmp_path: Path):
    common = {"input_shape": SHAPE, "seed": 3}
    text = "genie:steps=2,count=6,batch_size=4"
    first = ptq.synthesize(build("residual"), text, cache=tmp_path, **common)
    again = ptq.synthesize(build("residual"), text, cache=tmp_path, **common)
    assert len(first.curve) == 4 and again.curve == () and torch.equal(first.images, again.images)
    qm = ptq.quantize(build("residual"), "w4a4", text, rounding="nearest", cache=tmp_path, **common)
    assert torch.equal(qm.images, first.images)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ptq.CalibrationError, match="cannot be written"):
        _all("gaussian", BatchCache(tmp_path / "below"))


def test_a_cache_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ptq.CalibrationError, match="cannot be written"):
        _all("gaussian", BatchCache(tmp_path / "file" / "below"))
