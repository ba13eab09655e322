"""Augmentations: what they may and may not change."""

import pytest
import torch
from ptq.calibrators._augment import cutout, duplicates, flip_and_crop

from ptq.augment import mix_up, shift_and_flip
from ptq.contracts import make_rng

X = torch.arange(2 * 3 * 8 * 6, dtype=torch.float32).view(2, 3, 8, 6)


def test_one_view_is_the_image_itself():
    assert duplicates(X, 1, make_rng(0, "a")) is X


def test_copies_are_in_order_and_differ():
    views = duplicates(torch.randn(4, 3, 16, 16), 3, make_rng(0, "a"))
    assert views.shape == (12, 3, 16, 16)
    assert not torch.equal(views[:4], views[4:8])


@pytest.mark.parametrize("augment", [flip_and_crop, cutout, lambda x, rng: shift_and_flip(x, rng, 2)])
def test_same_rng_same_views(augment):
    assert torch.equal(augment(X, make_rng(1, "a")), augment(X, make_rng(1, "a")))
    assert augment(X, make_rng(1, "a")).shape == X.shape


def test_flip_and_crop_stays_within_the_values():
    out = flip_and_crop(X, make_rng(0, "a"))
    assert float(out.min()) >= float(X.min()) and float(out.max()) <= float(X.max())


def test_half_of_the_views_keep_every_pixel():
    x = torch.randn(400, 1, 8, 8)
    out = flip_and_crop(x, make_rng(0, "a"))
    same = [torch.allclose(a, b, atol=1e-4) or torch.allclose(a, b.flip(2), atol=1e-4) for a, b in zip(out, x)]
    assert 0.4 < sum(same) / len(same) < 0.6


def test_whole_window_flips_only():
    out = flip_and_crop(X, make_rng(0, "a"), least=1.0)
    for image, source in zip(out, X):  # bilinear sampling at pixel centres: equal but for rounding of coordinates
        assert torch.allclose(image, source, atol=1e-2) or torch.allclose(image, source.flip(2), atol=1e-2)


def test_cutout_zeroes_a_rectangle_at_most():
    x = torch.ones(200, 3, 16, 16)
    out = cutout(x, make_rng(0, "a"))
    holes = (out == 0).flatten(1).float().mean(1)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    # Half of the images, but for rectangles of less than half a pixel.
    assert float(holes.max()) <= 0.25**2 + 1e-6 and 0.3 < float((holes > 0).float().mean()) < 0.55


def test_shift_moves_whole_images():
    out = shift_and_flip(X + 1, make_rng(3, "a"), 2)
    for image, source in zip(out, X + 1):
        found = False
        padded = torch.nn.functional.pad(source, (2, 2, 2, 2))
        for top in range(5):
            for left in range(5):
                window = padded[:, top : top + 8, left : left + 6]
                found |= torch.equal(image, window) or torch.equal(image, window.flip(2))
        assert found


def test_no_border_no_shift():
    out = shift_and_flip(X, make_rng(0, "a"), 0)
    assert all(torch.equal(o, x) or torch.equal(o, x.flip(2)) for o, x in zip(out, X))


def test_gradients_reach_every_pixel_that_is_seen():
    x = X.clone().requires_grad_()
    shift_and_flip(x, make_rng(0, "a"), 0).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_blends_lie_between_an_image_and_its_neighbour():
    x = torch.randn(6, 3, 4, 4)
    out = mix_up(x, 1.0, make_rng(0, "a"))
    w = ((out - x.roll(1, 0)) / (x - x.roll(1, 0))).flatten(1)
    # One weight for all pixels of an image; where two pixels are nearly equal the quotient loses digits.
    assert bool(((w.median(1).values > 0) & (w.median(1).values < 1)).all())
    assert torch.allclose(out, torch.lerp(x.roll(1, 0), x, w.median(1).values.view(-1, 1, 1, 1)), atol=1e-4)
    assert len(w.median(1).values.unique()) == 6
