"""How alike two networks are, and how often one is right."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq.errors import CalibrationError, ModelError
from ptq.evaluate import agreement, likeness, runner, sqnr_db, top1
from ptq.pictures import Pictures

_CPU = torch.device("cpu")


def _scores(seed: int, *shape: int) -> Tensor:
    return torch.randn(50, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 7, 50])
def test_likeness_of_batches_is_that_of_all_images(size: int):
    a, b, c = _scores(0, 5), _scores(0, 5) + 0.3 * _scores(1, 5), _scores(0, 5)
    found = likeness(lambda k: a[k], [lambda k: b[k], lambda k: c[k]], torch.arange(50).split(size))
    assert found[0].agreement == pytest.approx(agreement(a, b)) and 0.5 < found[0].agreement < 1
    assert found[0].sqnr_db == pytest.approx(sqnr_db(a, b)) and found[1].sqnr_db == 200 and found[1].agreement == 1


def test_likeness_to_what_is_not_finite():
    a = _scores(0, 5)
    a[17, 2] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        likeness(lambda k: a[k], [lambda k: a[k]], torch.arange(50).split(10))


def test_a_lone_score_agrees_by_its_sign():
    a = _scores(0, 1)
    assert agreement(a, 2 * a) == 1 and agreement(a, -a) == 0
    assert agreement(a, a.abs()) == pytest.approx(float((a > 0).float().mean()))


def test_maps_of_classes_agree_place_by_place():
    a = _scores(0, 3, 4, 4)
    b = a.clone()
    b[:, :, 0] = -b[:, :, 0]
    assert agreement(a, b) == 0.75


def test_one_tensor_however_it_is_returned():
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"out": [2 * x]}

    assert torch.equal(runner(Named(), _CPU)(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_scores_with_dimensions_of_one():
    scores, y = _scores(0, 4, 1, 1), torch.arange(50) % 4
    pictures = Pictures(np.zeros((50, 3, 2, 2), np.float32), y, (3, 2, 2), None, None)
    expected = float((scores.flatten(1).argmax(1) == y).float().mean())
    assert top1(lambda x: scores[: len(x)], pictures) == pytest.approx(expected)
    with pytest.raises(CalibrationError, match=r"\[N, 4, 2, 2\]"):
        top1(lambda x: torch.zeros(len(x), 4, 2, 2), pictures)
