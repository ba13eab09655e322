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


def test_what_else_a_group_says_to_adam_counts():
    for cosine in (True, False):
        plain, decayed = (nn.Parameter(torch.ones(3)) for _ in range(2))
        steps = Steps([
            {"params": plain, "lr": 0.1, "cosine": cosine},
            {"params": [decayed], "lr": 0.1, "cosine": cosine, "weight_decay": 10.0},
        ])  # fmt: skip
        steps.clear()
        (-plain.sum() - decayed.sum()).backward()
        steps.step(0.0)
        assert torch.allclose(plain, torch.full((3,), 1.1)) and torch.allclose(decayed, torch.full((3,), 0.9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_trained_too(dtype: torch.dtype):
    first, second = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2))
    steps = Steps([{"params": [p], "lr": 0.5, "cosine": True} for p in (first, second)])
    steps.clear()
    (first.sum() + second.sum()).backward()
    steps.step(0.5)  # half of the rate
    assert torch.allclose(first, torch.full_like(first, 0.75)) and torch.allclose(second, torch.full((2,), 0.75))


def test_a_parameter_in_two_groups_is_refused():
    p = nn.Parameter(torch.ones(3))
    for cosine in ((True, True), (True, False), (False, False)):
        with pytest.raises(ValueError, match="more than one"):
            Steps([{"params": [p], "lr": 0.1, "cosine": c} for c in cosine])


def test_what_has_no_gradient_stays():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    steps = Steps([{"params": [p], "lr": 0.1, "cosine": True} for p in (used, unused)])
    steps.clear()
    used.sum().backward()
    steps.step(0.0)
    assert torch.equal(unused, torch.ones(2)) and torch.allclose(used, torch.full((3,), 0.9))
