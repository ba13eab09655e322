"""What every source of calibration images keeps to, whoever wrote it."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.contracts import CalibrationContext, Calibrator, Feedback, make_rng
from ptq.errors import CalibrationError
from ptq.graph.trace import trace
from tests.stages import assert_unchanged, fingerprint, prepare
from tests.zoo import SHAPE

NAMES = plugins.names("calibrators")
SYNTHETIC = [name for name in NAMES if plugins.load("calibrators", name).synthetic]
NEED_NOTHING = ("gaussian", "images")  # of the network: they serve one without BatchNorm
CPU = torch.device("cpu")


def _smoke(name: str, folder: Path) -> Calibrator:
    return plugins.load("calibrators", name).smoke(folder)


def _context(teacher: fx.GraphModule, source: Calibrator, seed: int = 0, **changes) -> CalibrationContext:
    """What the pipeline hands a source."""
    given = {"input_shape": SHAPE, "mean": None, "std": None, "device": CPU, "rng": make_rng(seed, "calibration")}
    return CalibrationContext(teacher, count=source.count, batch_size=source.batch_size, **(given | changes))


def _batches(teacher: fx.GraphModule, source: Calibrator, seed: int = 0, **changes) -> list[Tensor]:
    return list(source.batches(_context(teacher, source, seed, **changes)))


def _check(batches: list[Tensor], source: Calibrator, shape: tuple[int, int, int] = SHAPE) -> None:
    assert sum(len(b) for b in batches) == source.count
    assert all(0 < len(b) <= source.batch_size for b in batches)
    for batch in batches:
        assert batch.dtype == torch.float32 and tuple(batch.shape[1:]) == shape
        assert not batch.requires_grad and bool(torch.isfinite(batch).all())
        assert float(batch.std()) > 0.01  # pictures, not a constant


@pytest.mark.parametrize("net", ["residual", "depthwise", "pre_activation", "shared_relu"])
@pytest.mark.parametrize("name", NAMES)
def test_shape_type_and_count(name: str, net: str, tmp_path: Path):
    source = _smoke(name, tmp_path)
    _check(_batches(prepare(net).teacher, source), source)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_on_the_device(name: str, tmp_path: Path, device: torch.device):
    source = _smoke(name, tmp_path)
    batches = _batches(prepare("residual").teacher.to(device), source, device=device)
    _check(batches, source)
    assert {b.device.type for b in batches} == {device.type}


@pytest.mark.parametrize(("count", "batch_size"), [(5, 4), (3, 8), (1, 4), (4, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_last_batch_is_what_remains(name: str, count: int, batch_size: int, tmp_path: Path):
    """A lone image too, which has no batch statistics of its own."""
    source = replace(_smoke(name, tmp_path), count=count, batch_size=batch_size)
    _check(_batches(prepare("residual").teacher, source), source)


@pytest.mark.parametrize("shape", [(1, 10, 9), (3, 7, 16)])
@pytest.mark.parametrize("name", SYNTHETIC)
def test_inputs_of_any_shape(name: str, shape: tuple[int, int, int], tmp_path: Path):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    net = nn.Sequential(nn.Conv2d(shape[0], 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), *head)
    source = _smoke(name, tmp_path)
    _check(_batches(trace(net, shape), source, input_shape=shape), source, shape)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_images(name: str, tmp_path: Path):
    source, teacher = _smoke(name, tmp_path), prepare("residual").teacher
    first, second = (torch.cat(_batches(teacher, source, seed=3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_other_seeds_and_images_differ(name: str, tmp_path: Path):
    source, teacher = _smoke(name, tmp_path), prepare("residual").teacher
    first, second = (torch.cat(_batches(teacher, source, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert len(first.flatten(1).unique(dim=0)) == source.count


@pytest.mark.parametrize("name", NAMES)
def test_teacher_is_unchanged(name: str, tmp_path: Path):
    source, teacher = _smoke(name, tmp_path), prepare("pre_activation").teacher
    before, training = fingerprint(teacher), [m.training for m in teacher.modules()]
    _batches(teacher, source)
    next(iter(source.batches(_context(teacher, source))))  # and if the source is left half-way
    assert_unchanged(teacher, before)
    assert [m.training for m in teacher.modules()] == training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_untouched(name: str, tmp_path: Path, device: torch.device):
    source, teacher = _smoke(name, tmp_path), prepare("residual").teacher.to(device)

    def states() -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.random.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy()), *on_gpu]

    before = states()
    _batches(teacher, source, device=device)
    assert all(torch.equal(a, b) for a, b in zip(before, states()))


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_batch_norm(name: str, tmp_path: Path):
    """Served, or refused with the reason and a way out."""
    source, teacher = _smoke(name, tmp_path), prepare("plain").teacher
    if name in NEED_NOTHING:
        _check(_batches(teacher, source), source)
        return
    try:
        batches = _batches(teacher, source)
    except CalibrationError as e:
        assert "BatchNorm" in str(e) and "--data" in str(e) and "\n" not in str(e)
    else:
        _check(batches, source)


def test_genie_refuses_a_network_without_batch_norm(tmp_path: Path):
    with pytest.raises(CalibrationError, match="the network has none"):
        _batches(prepare("plain").teacher, _smoke("genie", tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_autograd_may_be_off(name: str, tmp_path: Path):
    source, teacher = _smoke(name, tmp_path), prepare("residual").teacher
    expected = torch.cat(_batches(teacher, source))
    with torch.no_grad():
        assert torch.equal(torch.cat(_batches(teacher, source)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_progress_runs_to_its_end(name: str, tmp_path: Path):
    source, heard = _smoke(name, tmp_path), []
    feedback = Feedback(lambda stage, done, total: heard.append((stage, done, total)))
    _batches(prepare("residual").teacher, source, feedback=feedback)
    done = [d for _, d, _ in heard]
    assert len({(stage, total) for stage, _, total in heard}) == 1
    assert done == sorted(done) and done[-1] == heard[-1][2]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_stated_normalization_is_used(name: str, tmp_path: Path):
    """Networks that take raw pixels, 0…255: a natural photograph has a mean near 114 and a deviation near 58 there."""
    source = _smoke(name, tmp_path)
    mean, std = torch.zeros(3), torch.full((3,), 1 / 255)
    images = torch.cat(_batches(prepare("residual").teacher, source, mean=mean, std=std))
    # A source may move its images in training, by a part of the inputs' deviation, and a prior that makes them smooth takes
    # from theirs. In the space of normalized inputs the mean would be near 0 and the deviation near 1.
    assert float(images.mean()) == pytest.approx(114, abs=20) and 0.3 * 58 < float(images.std()) < 1.3 * 58


@pytest.mark.parametrize("name", NAMES)
def test_options_object_is_unchanged_by_use(name: str, tmp_path: Path):
    source = _smoke(name, tmp_path)
    before = copy.deepcopy(source)
    _batches(prepare("residual").teacher, source)
    assert source == before
    assert source.teacher_bn in ("running", "batch") and isinstance(source.synthetic, bool)
