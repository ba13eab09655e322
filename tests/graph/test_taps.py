"""Statistics of a BatchNorm's input, and their gradient."""

import pytest
import torch

from ptq.graph.taps import moments


def _case(shape, memory_format):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 5
    return x.contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 5, 6, 7), torch.contiguous_format),
        ((8, 5, 6, 7), torch.channels_last),
        ((9, 4), torch.contiguous_format),
        ((4, 3, 11), torch.contiguous_format),
    ],
)
def test_moments_are_those_of_the_batch(shape, memory_format):
    x = _case(shape, memory_format)
    mean, var = moments(x)
    wanted_var, wanted_mean = torch.var_mean(x.double(), dim=[d for d in range(x.ndim) if d != 1], correction=0)
    assert mean.shape == var.shape == (shape[1],)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), wanted_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (6, 3)])
def test_moments_have_the_gradient_of_their_definition(shape):
    x = _case(shape, torch.contiguous_format).double().requires_grad_()
    assert torch.autograd.gradcheck(moments, (x,))


def test_gradient_keeps_the_layout():
    # Sums of gradients in two layouts take many times as long as sums in one.
    x = _case((8, 5, 6, 7), torch.channels_last).requires_grad_()
    mean, var = moments(x)
    (grad,) = torch.autograd.grad(mean.sum() + var.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_moments_far_from_zero_do_not_cancel():
    x = _case((64, 3, 8, 8), torch.channels_last) + 1000
    torch.testing.assert_close(
        moments(x)[1].double(), torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)[0], rtol=1e-4, atol=0
    )
