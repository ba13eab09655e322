"""What a student is told: values known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from ptq.distilling.losses import distance, iq, kl
from ptq.training import Training


def test_equal_networks_are_at_no_distance():
    z, y = torch.randn(4, 10), [torch.randn(4, 3, 2, 2)]
    for loss in ("kl", "l1"):
        assert float(distance([z, *y], [z, *y], Training(loss=loss))) == pytest.approx(0, abs=1e-6)


def test_divergence_of_two_classes():
    """p = 3/4, 1/4 against q = 1/2, 1/2: 3/4 log(3/2) + 1/4 log(1/2); at T, z / T and T² as a factor."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(kl(student, teacher, 1.0)) == pytest.approx(expected, rel=1e-5)
    assert float(kl(student, 7 * teacher, 7.0)) == pytest.approx(49 * expected, rel=1e-5)
    assert float(kl(student.repeat(5, 1), teacher.repeat(5, 1), 1.0)) == pytest.approx(expected, rel=1e-5)


def test_places_count_like_images():
    """Scores [B, K, H, W]: the mean over every place of every image."""
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    flat = [v.permute(0, 2, 3, 1).reshape(-1, 5) for v in (student, teacher)]
    assert torch.allclose(kl(student, teacher, 2.0), kl(*flat, 2.0))


def test_blocks_count_alike_and_per_image():
    a, b = [torch.zeros(2, 3), torch.zeros(2, 4)], [torch.full((2, 3), 0.1), torch.full((2, 4), 3.0)]
    # Smooth L1: 0.1² / 2 per element below 1, |3| - 1/2 above; three and four elements an image.
    assert float(iq(a, b)) == pytest.approx((3 * 0.005 + 4 * 2.5) / 2, rel=1e-5)
    z = torch.zeros(2, 10)
    assert float(distance([z, *a], [z, *b], Training(iq=0.01))) == pytest.approx(0.01 * (0.015 + 10) / 2, rel=1e-5)


def test_scores_by_their_distance():
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    assert torch.equal(distance([student], [teacher], Training(loss="l1")), F.l1_loss(student, teacher))


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 2, 2)])
def test_a_single_score_is_learned_by_its_distance(shape: tuple[int, ...]):
    student, teacher = torch.zeros(shape, requires_grad=True), torch.ones(shape)
    loss = distance([student], [teacher], Training())
    loss.backward()
    assert loss.item() == 1 and student.grad is not None and bool((student.grad < 0).all())
