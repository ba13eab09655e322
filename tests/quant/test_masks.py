"""Random masks: how often they are 1, that draws are independent, that a generator decides them."""

import gc
import weakref

import pytest
import torch

from ptq.contracts import make_rng
from ptq.quant import masks
from ptq.quant.masks import mix_into, random_mask


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_mix_takes_the_first_with_probability_p(p: float, layout: torch.memory_format, device: torch.device):
    x = torch.ones(9, 7, 31, 33, device=device).to(memory_format=layout)
    share = float(mix_into(-x, x, p, make_rng(0, "mix", device)).eq(1).float().mean())
    # 64449 draws: 5 standard deviations are at most 0.01.
    assert share == pytest.approx(p, abs=0.01)
    if p in (0.0, 1.0):
        assert share == p


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_random_mask(p: float, device: torch.device):
    x = torch.full((3, 5, 31, 33), torch.nan, device=device)
    mask = random_mask(x, p, make_rng(0, "mask", device))
    assert mask.shape == x.shape and mask.dtype == x.dtype and mask.device == x.device
    assert bool(((mask == 0) | (mask == 1)).all())
    # 15345 draws: 5 standard deviations are 0.019.
    assert float(mask.mean()) == pytest.approx(p, abs=0.019)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 5, 7), (4, 1, 3, 3), (1, 8, 1, 1)])
def test_mix_is_determined_by_its_generator(shape: tuple[int, ...], device: torch.device):
    layouts = (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,)
    for layout in layouts:
        a, b = (torch.randn(shape, device=device).to(memory_format=layout) for _ in range(2))
        runs = [mix_into(b.clone(), a, 0.5, make_rng(3, "mix", device)) for _ in range(2)]
        assert torch.equal(*runs) and runs[0].shape == a.shape
        assert bool(((runs[0] == a) | (runs[0] == b)).all())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mix_draws_differ(layout: torch.memory_format, device: torch.device):
    x = torch.ones(2, 16, 8, 8, device=device).to(memory_format=layout)
    rng = make_rng(0, "mix", device)
    first, second, other = (mix_into(-x, x, 0.5, r) for r in (rng, rng, make_rng(1, "mix", device)))
    # Independent masks agree on half of the 2048 elements; 5 standard deviations are 0.055.
    for a, b in ((first, second), (first, other), (first[0], first[1]), (first[:, 0], first[:, 1])):
        assert float((a == b).float().mean()) == pytest.approx(0.5, abs=0.055 if a is first else 0.25)


def test_mix_leaves_the_global_rng_alone():
    before = torch.random.get_rng_state()
    mix_into(torch.ones(100), torch.zeros(100), 0.5, make_rng(0, "mix"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_each_element_is_drawn_anew_by_every_mask(device: torch.device):
    x, rng = torch.zeros(4, 8, 6, 6, device=device), make_rng(0, "mask", device)
    masks = torch.stack([random_mask(x, 0.5, rng) for _ in range(400)])
    share = masks.mean(0)  # of each of 1152 elements, over 400 masks: five standard deviations are 0.125
    assert float((share - 0.5).abs().max()) < 0.125
    follows = (masks[1:] == masks[:-1]).float().mean(0)
    assert float((follows - 0.5).abs().max()) < 0.13


def test_one_generator_serves_every_size_and_probability(device: torch.device):
    rng = make_rng(0, "mask", device)
    for size, p in ((10, 0.5), (100_000, 0.5), (3_000_000, 0.5), (3, 0.5), (2_000_000, 0.9), (50, 0.9)):
        mask = random_mask(torch.zeros(size, device=device), p, rng)
        assert mask.shape == (size,)
        assert size < 1000 or float(mask.mean()) == pytest.approx(p, abs=0.01)


def test_a_mask_of_a_view_has_its_shape(device: torch.device):
    wide = torch.zeros(4, 6, 8, 10, device=device)
    for x in (wide[:, ::2], wide.transpose(1, 3), wide[0, 0, 0].expand(3, 10), torch.zeros((), device=device)):
        mask = random_mask(x, 0.5, make_rng(1, "mask", device))
        assert mask.shape == x.shape and bool(((mask == 0) | (mask == 1)).all())
    rows = random_mask(wide[0, 0, 0].expand(30, 10), 0.5, make_rng(1, "mask", device))
    assert len(rows.unique(dim=0)) > 1  # elements that share a place in memory are drawn apart


def test_bits_are_freed_with_their_generator():
    rng = make_rng(0, "mask")
    random_mask(torch.zeros(10), 0.5, rng)
    before, gone = len(masks._pools), weakref.ref(rng)
    del rng
    gc.collect()
    assert gone() is None and len(masks._pools) == before - 1


def test_without_a_generator_torchs_own_draws():
    torch.manual_seed(3)
    first = random_mask(torch.zeros(1000), 0.5, None)
    torch.manual_seed(3)
    assert torch.equal(first, random_mask(torch.zeros(1000), 0.5, None))
