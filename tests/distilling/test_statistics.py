"""Running statistics after training under the batch's."""

import copy

import pytest
import torch
from torch import nn

from ptq.distilling.statistics import check_batch_norms, re_estimate, under_batch_statistics
from ptq.errors import ModelError
from tests.zoo import build, images

_CPU = torch.device("cpu")


def test_they_are_the_average_over_batches():
    norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        x = [norm[0](part) for part in images(32).split(8)]
    norm[1].running_mean.fill_(99)
    re_estimate(norm, images(32).split(8), _CPU)
    flat = [v.transpose(0, 1).flatten(1) for v in x]
    assert torch.allclose(norm[1].running_mean, torch.stack([v.mean(1) for v in flat]).mean(0), atol=1e-5)
    assert torch.allclose(norm[1].running_var, torch.stack([v.var(1) for v in flat]).mean(0), atol=1e-5)
    assert not norm.training and norm[1].momentum == 0.1


def test_a_single_image_then_meets_what_a_batch_met():
    """A student whose statistics are wrong fails one image at a time; afterwards it gives what it gives under the batch's."""
    student, x = build("residual"), images(512)
    wanted = under_batch_statistics(student)(x).detach()
    with torch.no_grad():
        for norm in (m for m in student.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.add_(2.0)
            norm.running_var.mul_(25.0)
    wrong = torch.cat([student(one) for one in x[:64].split(1)])
    re_estimate(student, images(320, seed=5).split(16), _CPU)
    right = torch.cat([student(one) for one in x[:64].split(1)])
    error = [float((v.detach() - wanted[:64]).square().mean() / wanted[:64].square().mean()) for v in (wrong, right)]
    assert error[1] < 0.05 < 0.5 < error[0]


def test_a_copy_under_batch_statistics_changes_nothing():
    student = build("residual").train()
    before = copy.deepcopy(student.state_dict())
    seen = under_batch_statistics(student)
    seen(images(8))
    assert student.training and all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert not torch.equal(seen(images(8)), student.eval()(images(8)))


def test_a_student_without_batch_norm_is_refused():
    with pytest.raises(ModelError, match="no BatchNorm"):
        check_batch_norms(build("plain"))
    check_batch_norms(build("residual"))
