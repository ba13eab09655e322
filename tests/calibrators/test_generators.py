"""Generators of images: the papers' maps, any size, and what they yield."""

import pytest
import torch
from ptq.calibrators._generators import ConvGenerator, Encoder
from ptq.calibrators.vae_replay import Memory

from ptq.contracts import make_rng


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 130, 129), (2, 5, 9)])
def test_generators_of_any_size(shape):
    x = ConvGenerator(shape, 6)(torch.randn(4, 6)).detach()
    assert x.shape == (4, *shape)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    assert float(mean.abs().max()) < 1e-4 and float((var - 1).abs().max()) < 0.05
    assert all(v.shape == (4, 7) for v in Encoder(shape, 7)(x))


@pytest.mark.parametrize(
    ("shape", "maps"),
    [
        ((3, 32, 32), [(128, 8, 8), (64, 16, 16), (3, 32, 32)]),
        ((3, 224, 224), [(128, 14, 14), (128, 28, 28), (64, 56, 56), (64, 112, 112), (3, 224, 224)]),
    ],
)
def test_generator_has_the_papers_maps(shape, maps):
    # NAYER, tables 6 and 7: what every convolution yields.
    generator, seen = ConvGenerator(shape, 6), []
    for norm in (*generator.norms, generator.last):
        norm.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[1:])))
    generator(torch.randn(2, 6))
    assert seen == maps
    assert len(generator.convs) == len(maps)


def test_generators_yield_float32_whatever_they_multiply_in(monkeypatch: pytest.MonkeyPatch):
    images = {}
    for able in (False, True):
        monkeypatch.setattr("ptq.calibrators._generators.pays", lambda *_, able=able: able)
        torch.manual_seed(0)
        generator, encoder, memory = ConvGenerator((3, 8, 8), 6), Encoder((3, 8, 8), 5), Memory((3, 8, 8), 5)
        x = generator(torch.randn(16, 6))
        found = [x, *encoder(x), *memory.rebuild(x, make_rng(0, "here"))]
        assert all(v.dtype == torch.float32 for v in found)
        images[able] = x.detach()
    # Eight significant bits: another sum of products, the same images to about a hundredth of their deviation.
    apart = (images[True] - images[False]).abs().mean()
    assert 0 < float(apart) < 0.05
