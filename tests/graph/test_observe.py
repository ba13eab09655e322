"""Ranges from the teacher's values."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ptq.contracts import make_rng
from ptq.graph import observe as module
from ptq.graph.observe import input_params, observe, weight_params
from ptq.graph.ops import find_op
from ptq.graph.plan import QuantPlan, make_plan
from ptq.graph.trace import trace
from ptq.quant.affine import QParams, fake_quantize
from ptq.quant.ranges import lp, minmax
from ptq.spec import BitConfig, PlanRules, QuantSpec
from tests.stages import Prepared, assert_unchanged, fingerprint, prepare, values
from tests.zoo import SHAPE, ZOO, images


class Noting:
    """An estimator that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, QuantSpec]] = []
        self.ends: list[Tensor] = []

    def __call__(self, x: Tensor, spec: QuantSpec, ends: Tensor | None) -> QParams:
        self.shown.append((x, spec))
        if ends is not None:
            self.ends.append(ends)
        return minmax(x, spec, ends)


def _members(made: Prepared, group: str, batches: Sequence[Tensor]) -> Tensor:
    """All elements of a group's values, of those that are no mere moves, in the teacher."""
    made_by = {n.meta["value"]: n for n in made.teacher.graph.nodes if n.op != "output"}
    tied = [v for v in made.plan.values if made.plan.group(v) == group]
    sources = [
        v for v in tied if (op := find_op(made.teacher, made_by[v])) is None or op.role not in ("same", "concat")
    ]
    found = [values(made.teacher, x) for x in batches]
    return torch.cat([v[name].reshape(-1) for v in found for name in sources]).cpu()


@pytest.mark.parametrize("name", ZOO)
def test_every_group_is_estimated_once_from_all_its_values(name: str, device: torch.device):
    made, estimator = prepare(name), Noting()
    batches = images(6, seed=1).split(4)
    made.teacher.to(device)
    acts = observe(made.teacher, made.plan, iter(batches), estimator, rng=make_rng(0, "ranges"), device=device)
    assert set(acts) == {made.plan.group(v) for v in made.plan.values}
    for (group, q), (sample, spec) in zip(acts.items(), estimator.shown):
        expected = _members(made, group, [x.to(device) for x in batches])
        assert spec == q.spec == made.plan.values[group]
        # Few images: every element is in the sample, and no element more often than it occurs.
        assert torch.equal(sample.cpu().sort().values, expected.sort().values)


def test_samples_of_large_values_are_bounded_and_their_ends_are_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SAMPLES", 1000)
    made, estimator = prepare("residual"), Noting()
    batches = images(8).split(2)
    acts = observe(made.teacher, made.plan, batches, estimator, rng=make_rng(0, "ranges"))
    for group, (sample, _), ends in zip(acts, estimator.shown, estimator.ends):
        values_in_group = sum(made.plan.group(v) == group for v in made.plan.values)
        assert sample.numel() <= values_in_group * 1000
        expected = _members(made, group, batches)
        assert len(ends) == 8 and ends[:, 0].min() == expected.min() and ends[:, 1].max() == expected.max()


def test_one_large_element_counts_as_one(monkeypatch: pytest.MonkeyPatch):
    """A sample that always held each batch's greatest element would count it hundreds of times."""
    monkeypatch.setattr(module, "_SAMPLES", 1000)
    made = prepare("residual")
    batches = images(8).split(2)
    scales = []
    for height in (3.0, 50.0):
        batches[1][0, 0, 0, :2] = torch.tensor([height, -height])
        acts = observe(made.teacher, made.plan, batches, lp, rng=make_rng(0, "ranges"))
        scales.append(float(acts[made.plan.group("x")].scale))
    assert scales[1] < 1.5 * scales[0]


def test_sampling_is_determined_by_its_generator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SAMPLES", 100)
    made, rng = prepare("residual"), torch.random.get_rng_state()
    a, b, c = (observe(made.teacher, made.plan, [images()], lp, rng=make_rng(seed, "ranges")) for seed in (0, 0, 1))
    assert all(torch.equal(a[k].scale, b[k].scale) and torch.equal(a[k].zero_point, b[k].zero_point) for k in a)
    assert any(not torch.equal(a[k].scale, c[k].scale) for k in a)
    assert torch.equal(torch.random.get_rng_state(), rng)


@pytest.mark.parametrize("name", ZOO)
def test_teacher_is_unchanged(name: str):
    made = prepare(name)
    before = fingerprint(made.teacher)
    observe(made.teacher, made.plan, [images()], lp, rng=make_rng(0, "ranges"))
    weight_params(made.teacher, made.plan, lp, made.acts)
    assert_unchanged(made.teacher, before)


@pytest.mark.parametrize("name", ZOO)
def test_the_teachers_values_fit_their_grids(name: str):
    """minmax clips nothing that it was shown: values move by less than one step, also those that only move others."""
    made = prepare(name)
    acts = observe(made.teacher, made.plan, [images()], minmax, rng=make_rng(0, "ranges"))
    for value, x in values(made.teacher, images()).items():
        if value in made.plan.values:
            q = acts[made.plan.group(value)]
            assert float((fake_quantize(x, q) - x).abs().max()) <= float(q.scale) * 1.001, value


@pytest.mark.parametrize("name", ZOO)
def test_weight_grids(name: str):
    made = prepare(name)
    found = weight_params(made.folded, made.plan, minmax, made.acts)
    assert {path: q.spec for path, q in found.items()} == made.plan.weights
    for path, q in found.items():
        weight = made.folded.get_submodule(path).weight
        assert torch.equal(q.scale, minmax(weight, q.spec).scale) and q.scale.shape == weight.shape[:1]


@pytest.mark.parametrize("ends", [(-2.1179, 2.64), (0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_input_grid_covers_all_valid_pixels(ends: tuple[float, float]):
    made = prepare("residual")
    ((group, q),) = input_params(*ends, made.teacher, made.plan, made.acts).items()
    assert group == made.plan.group("x")
    x = torch.linspace(*ends, 1000)
    # The zero point is rounded to an even number: the grid may be off by one step at one end.
    assert float((fake_quantize(x, q) - x).abs().max()) <= 1.001 * float(q.scale)
    assert float(q.scale) == pytest.approx((ends[1] - ends[0]) / 255)


def test_input_grid_covers_what_shares_it():
    """A concatenation of the input with a layer's result: the valid pixels say nothing of the result's range."""
    x = images(8)
    gm = trace(_Stem(), SHAPE)
    plan = make_plan(gm, BitConfig.parse("w8a8"), PlanRules())
    acts = observe(gm, plan, [x], minmax, rng=make_rng(0, "ranges"))
    observed = acts[plan.group("x")]
    q = input_params(-1.0, 1.0, gm, plan, acts)[plan.group("x")]
    assert float(q.scale) >= 0.99 * float(observed.scale) and float(observed.scale) * 255 > 20
    wide = input_params(-1000.0, 1000.0, gm, plan, acts)[plan.group("x")]
    assert float(wide.scale) * 255 == pytest.approx(2000, rel=0.02)


class _Stem(nn.Module):
    """What the first block of ENet does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.after = nn.Conv2d(3, 5, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
        nn.init.constant_(self.conv.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat([self.conv(x), self.pool(x)], 1)).mean((2, 3))


def test_weights_only_has_no_input_grid():
    assert input_params(-1.0, 1.0, prepare("residual").teacher, QuantPlan({}, {}), {}) == {}
