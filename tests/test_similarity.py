"""The data similarity measure."""

import pytest
import torch

import ptq
from ptq.contracts import Feedback
from ptq.graph.taps import gaussian_kl
from ptq.graph.trace import trace
from ptq.similarity import similarity
from tests.stages import prepare
from tests.zoo import SHAPE, build, images

CPU = torch.device("cpu")


def test_by_hand_over_the_whole_set():
    """One BatchNorm, straight on the input."""
    norm = torch.nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    x = images(40)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    wanted = float(gaussian_kl(norm.running_mean, norm.running_var, mean, var).mean())
    found = similarity(
        trace(torch.nn.Sequential(norm, torch.nn.Conv2d(3, 2, 1)), SHAPE), x.split(7), device=CPU, normalized=False
    )
    # float32 statistics of batches against those of the whole
    assert found.mean == pytest.approx(wanted, rel=1e-4) and found.images == 40 and len(found.layers) == 1


def test_batches_do_not_matter_and_training_like_images_are_nearest():
    teacher = prepare("residual").teacher
    whole = similarity(teacher, [images(64, 5)], device=CPU, normalized=True)
    parts = similarity(teacher, images(64, 5).split(9), device=CPU, normalized=True)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-4)
    assert "input" in whole.layers and len(whole.layers) == 7
    # The net's statistics are those of N(0, 1).
    assert whole.mean < 0.1 * similarity(teacher, [3 * images(64, 5) + 1], device=CPU, normalized=True).mean


def test_a_dead_layer_is_named_and_left_out():
    teacher = prepare("residual").teacher
    norm = next(m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.running_var[0], norm.running_mean[0] = 0.0, 100.0
    conv = next(m for m in teacher.modules() if isinstance(m, torch.nn.Conv2d))
    conv.weight.data[0] = 0.0
    found = similarity(teacher, [images()], device=CPU, normalized=False)
    norm.running_var[0] = 1.0
    with_it = similarity(teacher, [images()], device=CPU, normalized=False)
    assert len(found.odd) == 1 and found.odd[0] in found.layers and not with_it.odd
    assert found.mean < 1e-2 * with_it.mean  # the others' divergence alone


def test_progress_and_public_function():
    heard = []
    common = {"input_shape": SHAPE, "feedback": Feedback(lambda *row: heard.append(row))}
    by_tensor = ptq.data_similarity(build("residual"), images(20), **common)
    assert heard[-1] == ("statistics", 20, 20)
    assert by_tensor.images == 20
    by_source = ptq.data_similarity(build("residual"), "gaussian:count=10", **common)
    assert by_source.images == 10


@pytest.mark.parametrize("data", [[], torch.zeros(0, *SHAPE)])
def test_no_images(data):
    with pytest.raises(ptq.CalibrationError, match="no images"):
        ptq.data_similarity(build("residual"), data, input_shape=SHAPE)


def test_a_network_without_batch_norm():
    with pytest.raises(ptq.CalibrationError, match="BatchNorm"):
        ptq.data_similarity(build("plain"), images(), input_shape=SHAPE)
