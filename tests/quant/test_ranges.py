"""How scales are chosen."""

import itertools

import pytest
import torch
from torch import Tensor

from ptq.errors import SpecError
from ptq.quant.affine import along_axis, fake_quantize, quantize, stored_scale
from ptq.quant.ranges import ESTIMATORS, NORMS, Estimator, estimators, kl, lp, minmax, percentile, smoothed
from ptq.spec import QuantSpec

SPECS = [
    QuantSpec(bits, signed, symmetric, axis)
    for bits, signed, symmetric, axis in itertools.product((2, 4, 8), (True, False), (True, False), (None, 0, 1))
]


def _samples(spec: QuantSpec) -> dict[str, Tensor]:
    """Tensors [8, 6, 5] of several shapes of distribution; never negative where the grid is not."""
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(8, 6, 5, generator=rng)
    found = {
        "normal": normal,
        "skewed": normal.exp() - 0.3,
        "outlier": normal.clone(),
        "constant": torch.full_like(normal, 0.7),
    }
    found["outlier"][0, 0, 0] = 30.0
    found["channels"] = normal * torch.logspace(-3, 1, 8).view(8, 1, 1)
    return {k: v.abs() if spec.symmetric and not spec.signed else v for k, v in found.items()}


def _error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().pow(2.4).sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_lp_is_never_worse_than_minmax(spec: QuantSpec):
    for x in _samples(spec).values():
        errors = [_error(x, fake_quantize(x, f(x, spec))) for f in (lp, minmax)]
        # The search sums in float32, this comparison in float64.
        assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-30


def test_lp_clips_where_that_pays():
    """Three levels for a normal distribution: its ends are not worth one."""
    spec = QuantSpec(2, True, True)
    x = _samples(spec)["normal"]
    assert float(lp(x, spec).scale) < 0.8 * float(minmax(x, spec).scale)
    assert _error(x, fake_quantize(x, lp(x, spec))) < 0.9 * _error(x, fake_quantize(x, minmax(x, spec)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lp_finds_the_best_ratio(bits: int):
    """Against a search written out, one scale after another."""
    spec = QuantSpec(bits, True, True)
    for x in _samples(spec).values():
        bound = float(x.abs().max())
        tried = [bound * (1 - k / 100) / spec.qmax for k in range(100)]
        errors = [_error(x, (x / s).round().clamp(spec.qmin, spec.qmax) * s) for s in tried]
        # The ratios are the same, the scales to float32 rounding.
        assert float(lp(x, spec).scale) == pytest.approx(tried[errors.index(min(errors))], rel=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_minmax_covers_the_range(spec: QuantSpec):
    """To half a step; per tensor to a whole one, since its zero point is rounded to an even number."""
    reach = 0.5 if spec.axis is not None or spec.symmetric else 1.0
    for x in _samples(spec).values():
        q = minmax(x, spec)
        s = along_axis(q.scale, 3, spec.axis)
        # 1e-4 of a step: float32 rounding of the quotient at up to 255 steps.
        assert bool(((x - fake_quantize(x, q)).abs() <= (reach + 1e-4) * s).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("f", ESTIMATORS.values(), ids=ESTIMATORS)
def test_form_of_the_result(f: Estimator, spec: QuantSpec):
    for x in _samples(spec).values():
        q = f(x, spec)
        size = () if spec.axis is None else (x.shape[spec.axis],)
        assert q.spec == spec
        assert (q.scale.shape, q.scale.dtype) == (size, torch.float32)
        assert (q.zero_point.shape, q.zero_point.dtype) == (size, torch.int32)
        assert bool((q.scale > 0).all()) and bool(torch.isfinite(q.scale).all())
        # Zero is on the grid: padding and ReLU produce it exactly.
        assert bool(((q.zero_point >= spec.qmin) & (q.zero_point <= spec.qmax)).all())
        assert torch.equal(fake_quantize(torch.zeros_like(x), q), torch.zeros_like(x))
        if spec.symmetric:
            assert not q.zero_point.any()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("f", ESTIMATORS.values(), ids=ESTIMATORS)
def test_zero_points_of_a_tensor_are_even(f: Estimator, signed: bool):
    rng = torch.Generator().manual_seed(0)
    for bits, shift in itertools.product((2, 3, 4, 8), (-2, -1, -0.3, 0, 0.3, 1, 2)):
        x = torch.randn(50, generator=rng) + shift
        x[0] = 0.1  # some value above 0
        assert int(f(x, QuantSpec(bits, signed, symmetric=False)).zero_point) % 2 == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("f", ESTIMATORS.values(), ids=ESTIMATORS)
def test_zero_points_are_even_where_no_value_is_above_zero(f: Estimator, signed: bool):
    """There the last code would be zero's, which is odd."""
    x = -torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert [int(f(x, QuantSpec(bits, signed, symmetric=False)).zero_point) % 2 for bits in range(2, 9)] == [0] * 7


@pytest.mark.parametrize("f", ESTIMATORS.values(), ids=ESTIMATORS)
def test_scales_are_positive_whatever_the_tensor(f: Estimator):
    """All zero; all negative, on grids without negative values too; below float32's normal range; very large."""
    for value, axis in itertools.product((0.0, -1.0, 1e-44, 1e30), (None, 0)):
        x = torch.full((4, 9), value)
        for signed, symmetric in itertools.product((True, False), (True, False)):
            q = f(x, QuantSpec(8, signed, symmetric, axis))
            assert bool((q.scale > 0).all()), (value, q)
            assert bool(torch.isfinite(fake_quantize(x, q)).all()), (value, q)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("f", ESTIMATORS.values(), ids=ESTIMATORS)
def test_dead_channels_get_an_ordinary_scale_and_zero_codes(f: Estimator, symmetric: bool):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(9, 20, generator=rng)
    x[2], x[5] = 0.0, torch.randn(20, generator=rng) * 1e-15
    q = f(x, QuantSpec(4, True, symmetric, axis=0))
    alive = [c for c in range(9) if c not in (2, 5)]
    for dead in (2, 5):
        assert float(q.scale[alive].min()) <= float(q.scale[dead]) <= float(q.scale[alive].max())
        assert not quantize(x, q)[dead].any() and int(q.zero_point[dead]) == 0
    assert quantize(x, q)[alive].any(1).all()


def test_a_layer_of_zeros_has_a_grid():
    q = lp(torch.zeros(3, 4), QuantSpec(8, True, True, axis=0))
    assert torch.equal(q.scale, torch.ones(3))


def test_channels_do_not_influence_each_other():
    """Per channel is per tensor, channel by channel; symmetric, since zero points round differently there."""
    x = _samples(QuantSpec(4, True, True))["channels"]
    for f in ESTIMATORS.values():
        together = f(x, QuantSpec(4, True, True, axis=0)).scale
        alone = torch.stack([f(row, QuantSpec(4, True, True)).scale for row in x])
        # Means over 30 values in another memory layout may pick the neighbouring ratio only on a tie; none here.
        torch.testing.assert_close(together, stored_scale(alone, QuantSpec(4, True, True)), rtol=1e-6, atol=0)


def test_estimators_by_name():
    assert {name: estimators(name) for name in ("lp", "minmax")} == {"lp": [lp], "minmax": [minmax]}
    with pytest.raises(SpecError, match=r"unknown range estimator 'best'; known: kl, lp, minmax"):
        estimators("best")


def test_smoothed_is_the_mean_of_chunks():
    ends = torch.stack([torch.zeros(32), torch.cat([torch.ones(16), torch.full((16,), 3.0)])], 1)
    ends[0, 1], ends[0, 0] = 5.0, -1.0
    q = smoothed(torch.empty(0), QuantSpec(8, True, False), ends)
    # Chunks of 16 images: ends (-1, 5) and (0, 3), in the mean (-0.5, 4).
    assert float(q.scale) == pytest.approx(4.5 / 255)
    x = torch.randn(3, 20)
    assert torch.equal(smoothed(x, QuantSpec(4, True, True, 0)).scale, minmax(x, QuantSpec(4, True, True, 0)).scale)


def test_norms_are_tried_on_activations_only():
    x, spec = torch.randn(4000).abs() ** 3, QuantSpec(4, False, False)
    ends = torch.stack([x.min(), x.max()]).view(1, 2)
    scales = [float(f(x, spec, ends).scale) for f in estimators("lp_best")]
    assert len(scales) == len(NORMS) and scales == sorted(scales) and scales[0] < scales[-1] == float(lp(x, spec).scale)
    weight, per_row = torch.randn(4, 50), QuantSpec(4, True, False, 0)
    assert all(torch.equal(f(weight, per_row, None).scale, lp(weight, per_row).scale) for f in estimators("lp_best"))


def test_percentile_100_is_the_whole_range():
    x, spec, ends = torch.rand(1000), QuantSpec(8, False, False), torch.tensor([[-3.0, 50.0]])
    assert torch.equal(percentile(x, spec, ends, share=100).scale, minmax(x, spec, ends).scale)
    assert float(minmax(x, spec, ends).scale) == pytest.approx(53 / 255)


def test_percentile_leaves_out_the_ends():
    x = torch.linspace(0, 1, 10_001)
    spec, ends = QuantSpec(8, False, True), torch.tensor([[0.0, 1.0]])
    assert float(percentile(x, spec, ends, share=99.0).scale) == pytest.approx(0.99 / 255, rel=1e-3)
    assert float(percentile(x, spec, None).scale) == pytest.approx(1 / 255)


@pytest.mark.parametrize("bits", [4, 8])
def test_kl_cuts_a_long_tail_and_only_that(bits: int):
    """A thousand of a million values far out: they are cut. A uniform distribution has no tail: all of it stays."""
    rng = torch.Generator().manual_seed(0)
    bulk = torch.randn(100_000, generator=rng).abs()
    tail = torch.cat([bulk, torch.full((20,), 60.0)])
    spec = QuantSpec(bits, False, True)
    ends = torch.tensor([[0.0, 60.0]])
    assert float(kl(tail, spec, ends).scale) * spec.qmax < 20
    assert float((fake_quantize(tail, kl(tail, spec, ends)) - tail)[:-20].square().mean()) < float(
        (fake_quantize(tail, minmax(tail, spec)) - tail)[:-20].square().mean()
    )
    flat = torch.rand(100_000, generator=rng)
    assert float(kl(flat, spec, ends).scale) * spec.qmax > 0.95


def test_kl_is_not_drawn_to_zeros():
    """Half of the values behind a ReLU are zero; the range is that of the others."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=rng).relu()
    spec, ends = QuantSpec(8, False, True), torch.tensor([[0.0, 4.0]])
    assert float(kl(x, spec, ends).scale) == float(kl(x[x > 0], spec, ends).scale)
    assert float(kl(x, spec, ends).scale) * 255 > 2.5


def test_numbers_after_the_name():
    x, spec, ends = torch.randn(4096).abs(), QuantSpec(4, False, True), torch.tensor([[0.0, 4.0]])
    assert torch.equal(estimators("percentile:90")[0](x, spec, ends).scale, percentile(x, spec, ends, share=90).scale)
    assert torch.equal(estimators("lp:2")[0](x, spec, ends).scale, estimators("mse")[0](x, spec, ends).scale)
    for wrong in ("percentile:20", "lp:x", "minmax:3", "percentile:nan"):
        with pytest.raises(SpecError, match=wrong):
            estimators(wrong)


@pytest.mark.parametrize("ends", [None, torch.tensor([[-2.0, 3.0]])])
def test_huge_values_have_the_grid_of_ordinary_ones(ends: torch.Tensor | None):
    x, spec = (
        torch.linspace(-2, 3, 400).pow(3).view(4, 100) / 9,
        QuantSpec(4, True, False, axis=None if ends is not None else 0),
    )
    ordinary, huge = lp(x, spec, ends), lp(x * 2.0**70, spec, None if ends is None else ends * 2.0**70)
    assert torch.equal(huge.scale, ordinary.scale * 2.0**70) and torch.equal(huge.zero_point, ordinary.zero_point)


@pytest.mark.parametrize("p", [8, 16])
@pytest.mark.parametrize("factor", [1e-12, 1.0, 3e6])
def test_high_norms_keep_within_what_numbers_hold(p: int, factor: float):
    """An error of 1e6 to the power of 16 is beyond float32, one of 1e-3 below it: the ratio is the one of float64."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) ** 3
    spec = QuantSpec(4, True, True)
    tried = [float(x.abs().max()) * (1 - k / 100) / spec.qmax for k in range(100)]
    errors = [float((x - (x / s).round().clamp(spec.qmin, spec.qmax) * s).double().abs().pow(p).mean()) for s in tried]
    best = tried[errors.index(min(errors))]
    assert best < tried[0] and float(lp(x * factor, spec, p=p).scale) == pytest.approx(best * factor, rel=1e-5)


def test_percentile_of_what_is_nearly_all_zero():
    x = torch.zeros(10_000)
    x[::400] = torch.linspace(0.001, 0.01, 25)
    ends = torch.tensor([[0.0, 0.01]])
    q = estimators("percentile:99")[0](x, QuantSpec(8, False, False), ends)
    assert float(q.scale) == pytest.approx(0.01 / 255, rel=0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_kl_counts_the_codes_that_a_range_has(bits: int):
    """Behind a ReLU, a grid about 0 has as many codes as an unsigned one of one bit less: it is cut as that is."""
    x = torch.distributions.Exponential(1.0)
    torch.manual_seed(0)
    x = x.sample((40_000,))
    ends = torch.stack([x.min().clamp_max(0), x.max()]).view(1, 2)
    signed = estimators("kl")[0](x, QuantSpec(bits, True, True), ends)
    unsigned = estimators("kl")[0](x, QuantSpec(bits - 1, False, True), ends)
    assert float(signed.scale) == pytest.approx(float(unsigned.scale), rel=1e-6)


def test_smoothed_chunks_are_alike_in_size():
    """The seventeenth image is no chunk of its own, whose ends would count as much as those of sixteen."""
    ends = torch.stack([torch.zeros(17), torch.ones(17)], 1)
    ends[16, 1], ends[15, 1] = 3.0, 3.0
    assert float(smoothed(torch.empty(0), QuantSpec(8, True, False), ends).scale) == pytest.approx(2 / 255)
