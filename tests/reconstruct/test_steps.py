"""Adam on many small parameters at once: as torch's own Adam moves them one by one."""

import math

import pytest
import torch
from torch import nn

from ptq.reconstruct._steps import Steps


def _parameters() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((3, 4), (), (5,), (2, 1, 1), (7,))]


def _loss(parameters: list[nn.Parameter], step: int) -> torch.Tensor:
    return torch.stack([((p - 0.3 * k) ** 4).sum() * math.cos(step) for k, p in enumerate(parameters)]).sum()


_RATES = (0.1, 1e-4, 0.02, 0.02, 3e-3)


@pytest.mark.parametrize("cosine", [(True,) * 5, (False,) * 5, (False, True, True, False, True)])
def test_moves_are_those_of_one_group_each(cosine: tuple[bool, ...]):
    expected, found = _parameters(), _parameters()
    reference = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(expected, _RATES)])
    steps = Steps([{"params": [p], "lr": r, "cosine": c} for p, r, c in zip(found, _RATES, cosine)])
    for k in range(20):
        for group, rate, falls in zip(reference.param_groups, _RATES, cosine):
            group["lr"] = rate * (0.5 * (1 + math.cos(math.pi * k / 20)) if falls else 1.0)
        reference.zero_grad()
        _loss(expected, k).backward()
        reference.step()
        steps.clear()
        _loss(found, k).backward()
        steps.step(k / 20)
    for one, other in zip(expected, found):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_has_no_gradient_stays():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    steps = Steps([{"params": [p], "lr": 0.1, "cosine": True} for p in (used, unused)])
    steps.clear()
    used.sum().backward()
    steps.step(0.0)
    assert torch.equal(unused, torch.ones(2)) and torch.allclose(used, torch.full((3,), 0.9))
