"""The arithmetic, against numpy and against formulas."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq.quant.affine import QParams, along_axis, dequantize, fake_quantize, quantize, stored_scale
from ptq.spec import QuantSpec

# Every bit width, signed and unsigned, with and without zero point, per tensor and per channel.
SPECS = [
    QuantSpec(bits, signed, symmetric, axis)
    for bits, signed, symmetric, axis in itertools.product((2, 3, 4, 8), (True, False), (True, False), (None, 0, 1))
]
SHAPE = (6, 5, 7)


def _grid(spec: QuantSpec, seed: int = 0) -> QParams:
    """Scales that are no powers of two, so that divisions round; zero points anywhere on the grid."""
    rng = torch.Generator().manual_seed(seed)
    size = () if spec.axis is None else (SHAPE[spec.axis],)
    scale = 0.01 + torch.rand(size, generator=rng)
    zero = torch.randint(spec.qmin, spec.qmax + 1, size, generator=rng, dtype=torch.int32)
    return QParams(scale, zero * 0 if spec.symmetric else zero, spec)


def _values(seed: int = 1) -> Tensor:
    """Values on both sides of every grid's range, and inside it."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=rng)
    return x * 10 ** (4 * torch.rand(SHAPE, generator=rng) - 2)


def _numpy(x: Tensor, q: QParams) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values as ONNX QuantizeLinear and DequantizeLinear define them: divide, round, add, clamp."""
    shape = [1] * x.ndim
    if q.spec.axis is not None:
        shape[q.spec.axis] = -1
    s, z = q.scale.numpy().reshape(shape), q.zero_point.numpy().reshape(shape)
    codes = np.clip(np.rint(x.numpy() / s) + z, q.spec.qmin, q.spec.qmax).astype(np.int32)
    return codes, (codes - z).astype(np.float32) * s


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_numpy(spec: QuantSpec, device: torch.device):
    x, q = _values(), _grid(spec)
    codes, real = _numpy(x, q)
    on_device = x.to(device), q.to(device)
    assert np.array_equal(quantize(*on_device).cpu().numpy(), codes)
    assert np.array_equal(fake_quantize(*on_device).cpu().numpy(), real)
    assert np.array_equal(dequantize(torch.from_numpy(codes).to(device), on_device[1]).cpu().numpy(), real)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_is_dequantize_of_quantize(spec: QuantSpec, device: torch.device):
    x, q = _values().to(device), _grid(spec).to(device)
    codes = quantize(x, q)
    assert codes.dtype == torch.int32
    assert spec.qmin <= int(codes.min()) <= int(codes.max()) <= spec.qmax
    assert torch.equal(fake_quantize(x, q), dequantize(codes, q))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_is_idempotent(spec: QuantSpec):
    q = _grid(spec)
    once = fake_quantize(_values(), q)
    assert torch.equal(fake_quantize(once, q), once)
    assert torch.equal(quantize(once, q), quantize(_values(), q))


@pytest.mark.parametrize("zero", [0, 3])
def test_exact_ties_go_to_the_even_multiple(zero: int):
    """Half a step rounds before the zero point is added; 0.25 makes every tie exact in binary."""
    q = QParams(torch.tensor(0.25), torch.tensor(zero, dtype=torch.int32), QuantSpec(8, True, False))
    halves = torch.arange(-20, 20, dtype=torch.float32) + 0.5
    codes = quantize(halves * 0.25, q) - zero
    assert torch.equal(codes % 2, torch.zeros_like(codes))
    assert torch.equal((codes - halves).abs(), torch.full_like(halves, 0.5))


def test_ties_of_other_scales_are_decided_by_the_quotient():
    """0.1 · 2.5 is no exact tie, but its float32 quotient by 0.1 is: a product with the reciprocal would differ."""
    rng = torch.Generator().manual_seed(0)
    scale = 0.001 + torch.rand(1000, generator=rng)
    x = (torch.arange(1000) % 40 - 20 + 0.5) * scale
    q = QParams(scale, torch.zeros(1000, dtype=torch.int32), QuantSpec(8, True, True, axis=0))
    assert np.array_equal(quantize(x, q).numpy(), np.rint(x.numpy() / scale.numpy()).astype(np.int32))
    assert not torch.equal(quantize(x, q), torch.round(x * (1 / scale)).int())  # the data tells both apart


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_stays_zero(spec: QuantSpec):
    q = _grid(spec)
    assert torch.equal(fake_quantize(torch.zeros(SHAPE), q), torch.zeros(SHAPE))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_passes_inside_the_range_only(spec: QuantSpec, device: torch.device):
    x, q = _values().to(device).requires_grad_(), _grid(spec).to(device)
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(device)
    fake_quantize(x, q).backward(upstream)
    s = along_axis(q.scale, 3, spec.axis)
    wide = torch.round(x.detach() / s) + along_axis(q.zero_point, 3, spec.axis)
    inside = (wide >= spec.qmin) & (wide <= spec.qmax)
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(x.grad, upstream * inside)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scale_gradient_is_lsq(spec: QuantSpec, device: torch.device):
    """d x̂/d s: round(v) - v inside (v = x/s), the distance of the clamped code from zero outside; summed per scale."""
    x, q = _values().to(device), _grid(spec).to(device)
    scale = q.scale.clone().requires_grad_()
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(device)
    fake_quantize(x, QParams(scale, q.zero_point, spec)).backward(upstream)

    s = along_axis(q.scale, 3, spec.axis).double()
    z = along_axis(q.zero_point, 3, spec.axis).double()
    v = (x / s.float()).double()
    code = v.round() + z
    slope = torch.where(code < spec.qmin, spec.qmin - z, torch.where(code > spec.qmax, spec.qmax - z, code - z - v))
    expected = (slope * upstream).sum([d for d in range(3) if d != spec.axis]).reshape(scale.shape)
    # A float32 sum of up to 210 terms of up to 255 each against one in float64.
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-5, atol=210 * 255 * 2**-23)


def test_no_gradient_is_made_for_what_needs_none():
    x, q = torch.randn(8), _grid(QuantSpec(4, True, True))
    assert not fake_quantize(x, q).requires_grad
    x.requires_grad_()
    fake_quantize(x, q).sum().backward()
    assert q.scale.grad is None


def test_inputs_are_not_changed():
    x, q = _values(), _grid(QuantSpec(4, False, False, axis=1))
    before = x.clone(), q.scale.clone(), q.zero_point.clone()
    fake_quantize(x, q)
    quantize(x, q)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, q.scale, q.zero_point)))


@pytest.mark.parametrize("spec", SPECS[::5], ids=str)
def test_skipped_elements_stay_float_and_pass_the_gradient(spec: QuantSpec, device: torch.device):
    x, q = _values().to(device).requires_grad_(), _grid(spec).to(device)
    scale = q.scale.clone().requires_grad_()
    q = QParams(scale, q.zero_point, spec)
    skip = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5).float().to(device)
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(device)
    grads = []
    for mask in (skip, None):
        out = fake_quantize(x, q, mask)
        grads.append(torch.autograd.grad(out, (x, scale), upstream if mask is not None else upstream * (1 - skip)))
        if mask is not None:
            assert torch.equal(out, torch.where(skip == 1, x, fake_quantize(x, q)))
    (grad_x, grad_scale), (rounded_x, rounded_scale) = grads
    # Through the identity where skipped; elsewhere, and to the scale, as if only the others were there.
    assert torch.equal(grad_x, torch.where(skip == 1, upstream, rounded_x))
    # The same terms, each a difference of two of up to 255: float32 sums of up to 210 of them.
    torch.testing.assert_close(grad_scale, rounded_scale, rtol=1e-5, atol=210 * 255 * 2**-23)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_the_scales_gradient_is_exact_on_large_tensors(bits: int, low: float):
    """Sums of half a million products, beside the same in double precision: values far from 0, nothing cancels by chance."""
    torch.manual_seed(0)
    x = (torch.rand(8, 16, 64, 64) * (1 - low) + low).to(memory_format=torch.channels_last)
    scale = torch.tensor(0.9 * (1 - low) / (2**bits - 1), requires_grad=True)
    zero = torch.tensor(round(-low / scale.item()), dtype=torch.int32)
    q = QParams(scale, zero, QuantSpec(bits, False, False))
    grad = 1 + torch.rand_like(x)
    out = fake_quantize(x, q)
    out.backward(grad)
    s, wide = scale.item(), x.double()
    code = wide / s + int(zero)
    inside = (code >= -0.5) & (code <= 2**bits - 0.5)
    expected = float((grad.double() * (out.detach().double() - wide * inside)).sum() / s)
    assert scale.grad is not None and float(scale.grad) == pytest.approx(expected, rel=2e-3)


def test_what_comes_in_bfloat16_is_quantized_in_float32():
    x = torch.rand(1000).mul(25).bfloat16().requires_grad_()
    q = QParams(torch.tensor(0.1, requires_grad=True), torch.tensor(0, dtype=torch.int32), QuantSpec(8, False, True))
    out = fake_quantize(x, q)
    out.sum().backward()
    assert out.dtype == torch.float32 and torch.equal(out, fake_quantize(x.detach().float(), q))
    assert x.grad is not None and bool((x.grad == 1).all())  # all of them are inside


def test_scales_of_narrow_weights_are_numbers_of_half_precision():
    scale = torch.tensor([0.1, 1 / 3, 7e-5, 6.1e-5, 1e-9, 6.6e4, 1e30])
    kept = stored_scale(scale, QuantSpec(4, True, True, axis=0))
    assert torch.equal(kept[:3].half().float(), kept[:3])
    torch.testing.assert_close(kept[:3], scale[:3], rtol=2**-11, atol=0)
    assert torch.equal(kept[3:], scale[3:])  # beyond its normal numbers
    assert torch.equal(stored_scale(kept, QuantSpec(4, True, True, axis=0)), kept)
    assert torch.equal(stored_scale(scale, QuantSpec(8, True, True, axis=0)), scale)
