"""Losses that images are fitted to, against their equations written out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from ptq.calibrators._losses import (
    PastStatistics,
    image_std_loss,
    inception,
    input_kl,
    input_moments,
    kl_loss,
    moment_loss,
    smooth,
    smoothness,
    std_loss,
    variance_loss,
)
from torch import nn

from ptq.errors import CalibrationError
from ptq.graph.taps import gaussian_kl, tap_batch_norms
from tests.stages import prepare
from tests.zoo import images


def test_divergence_is_that_of_normal_distributions():
    mean, std, other_mean, other_std = 0.3, 0.7, -0.2, 1.3
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(other_mean, other_std)
    found = gaussian_kl(*(torch.tensor(v) for v in (mean, std**2, other_mean, other_std**2)))
    # 1e-8 is added to both variances
    assert float(found) == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=1e-5)


def test_divergence_of_a_dead_channel_is_finite():
    zero = torch.zeros(())
    assert float(gaussian_kl(zero, zero, zero, zero)) == 0
    assert math.isfinite(float(gaussian_kl(zero, zero, torch.tensor(1.0), zero)))


def test_statistics_losses_by_hand():
    teacher = prepare("residual").teacher
    with tap_batch_norms([teacher]) as taps:
        teacher(images())
    rows = []
    for tap in taps.seen:
        mu, sigma2, m, s2 = tap.running_mean, tap.running_var, tap.mean, tap.var
        std_part = (s2.sqrt() - sigma2.sqrt()).square().mean()
        kl = 0.5 * (torch.log(s2 / sigma2) - 1 + (sigma2 + (mu - m).square()) / s2)
        rows.append(((m - mu).square().mean() + std_part, kl.mean(), (m - mu).norm() + (s2 - sigma2).norm()))
    first, kl, third = (torch.stack(column) for column in zip(*rows))
    # 1e-8 stands inside square roots and logarithms: relative error of that order over the statistics' squares
    assert float(std_loss(taps)) == pytest.approx(float(first.sum()), rel=1e-3)
    assert float(moment_loss(taps)) == pytest.approx(float(first.mean()), rel=1e-3)
    assert float(kl_loss(taps)) == pytest.approx(float(kl.mean()), rel=1e-3)
    assert float(variance_loss(taps)) == pytest.approx(float(third.sum()), rel=1e-3)


def test_several_networks_count_alike():
    teacher = prepare("residual").teacher
    with tap_batch_norms([teacher]) as alone:
        teacher(images())
    two = [prepare("residual").teacher, prepare("residual").teacher]
    with tap_batch_norms(two) as both:
        for network in two:
            network(images())
    assert both.models == 2 and len(both.seen) == 2 * len(alone.seen)
    assert torch.allclose(std_loss(both), std_loss(alone)) and torch.allclose(kl_loss(both), kl_loss(alone))


def test_taps_leave_no_hook_and_name_a_way_out():
    teacher = prepare("residual").teacher
    with tap_batch_norms([teacher]):
        pass
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    with pytest.raises(CalibrationError, match="--data"), tap_batch_norms([prepare("plain").teacher]):
        pass
    with tap_batch_norms([prepare("plain").teacher], required=False) as taps:
        assert float(variance_loss(taps)) == 0


def test_input_divergence():
    x = torch.randn(512, 3, 16, 16)
    assert float(input_kl(x)) < 1e-3 < float(input_kl(x + 1)) and float(input_kl(3 * x)) > 0.1
    assert float(input_moments(x)) < 1e-3 and float(input_moments(x + 1)) == pytest.approx(1, abs=0.02)
    assert float(input_moments(3 * x)) == pytest.approx(4, abs=0.05)
    # Images that differ among themselves are no error: the batch is what is matched.
    spread = torch.randn(512, 3, 1, 1) * 0.8 + torch.randn(512, 3, 16, 16) * 0.6
    assert float(input_moments(spread)) < 0.02 < float(image_std_loss(spread))
    # N(0, 1) against N(1, 1): half a squared deviation
    assert float(input_kl(x + 1)) == pytest.approx(0.5, abs=0.02)


def test_smoothing_keeps_flat_pictures_and_weights_by_distance():
    flat = torch.full((2, 3, 7, 5), 1.7)
    assert torch.allclose(smooth(flat), flat) and float(smoothness(flat)) < 1e-12
    spot = torch.zeros(1, 1, 5, 5)
    spot[0, 0, 2, 2] = 1
    out = smooth(spot)[0, 0]
    assert float(out.sum()) == pytest.approx(1, abs=1e-6)
    assert float(out[2, 1] / out[2, 2]) == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert float(out[1, 1] / out[2, 2]) == pytest.approx(math.exp(-1), rel=1e-5)


def test_inception_falls_with_the_target_logit():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    assert float(inception(logits, torch.tensor([0]), 4.0)) == pytest.approx(math.exp(-0.5))
    assert float(inception(logits + 1, torch.tensor([0]), 4.0)) < float(inception(logits, torch.tensor([0]), 4.0))
    assert F.cross_entropy(logits, torch.tensor([0])) > 0


def test_past_statistics_are_blended_by_layer_and_restored():
    """Three batches by hand; a copy of the network, and a state read back, go on with the same past."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).eval()
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 6, 6, generator=rng) for _ in range(3)]
    past, expected = PastStatistics([net], 0.9), None
    for x in batches:
        other = copy.deepcopy(net)
        past.follow([other])
        with tap_batch_norms([other]) as taps, torch.no_grad():
            other(x)
            found = [past.blend(tap) for tap in reversed(taps.seen)][::-1]  # the order of looking does not matter
            now = [(tap.mean, tap.var) for tap in taps.seen]
            expected = now if expected is None else [
                (0.9 * pm + 0.1 * m, 0.9 * pv + 0.1 * v) for (pm, pv), (m, v) in zip(expected, now)
            ]  # fmt: skip
            for (m, v), (em, ev) in zip(found, expected):
                torch.testing.assert_close(m, em)
                torch.testing.assert_close(v, ev)
            past.add(taps.seen)
        again = PastStatistics([net], 0.9)
        again.load_state_dict(past.state_dict())
        past = again
