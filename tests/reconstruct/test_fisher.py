"""Fisher weights: squared gradients of the teacher's own loss."""

import pytest
import torch
from torch import nn

from ptq.contracts import make_rng
from ptq.errors import ReconstructionError
from ptq.graph.blocks import split
from ptq.graph.fold_bn import fold_batch_norm
from ptq.graph.trace import trace
from ptq.reconstruct._capture import Space, block_error
from ptq.reconstruct._fisher import fisher_weights
from tests.stages import prepare
from tests.zoo import SHAPE, images

_CPU = torch.device("cpu")


def test_of_scores_it_is_the_variance_of_the_classes():
    """∂L/∂z_k = p_k - 1[y = k]; over y ~ p its square has the mean p_k (1 - p_k)."""
    made = prepare("residual")
    last = split(made.student)[-1]
    with torch.no_grad():
        p = made.teacher(images()).softmax(1)
    draws = [fisher_weights(made.teacher, last, images(), make_rng(k, "fisher"), _CPU, Space())[0] for k in range(200)]
    expected = p * (1 - p)
    mean = torch.stack(draws).mean(0)
    assert float(mean.mean()) == pytest.approx(1.0, rel=1e-4)
    relative = (mean / mean.mean() - expected / expected.mean()).abs().mean()
    assert float(relative) < 0.25


def test_blocks_nearer_to_the_result_are_weighted_by_it(device: torch.device):
    made = prepare("residual")
    teacher = made.teacher.to(device)
    for block in split(made.student):
        (weights,) = fisher_weights(teacher, block, images(), make_rng(0, "fisher"), device, Space())
        assert weights.shape[0] == len(images()) and bool((weights >= 0).all())
        assert float(weights.mean()) == pytest.approx(1.0, rel=1e-3) and float(weights.std()) > 0.1


def test_a_network_without_classes_is_refused():
    gm = fold_batch_norm(trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)), SHAPE))
    with pytest.raises(ReconstructionError, match="fisher=false"):
        fisher_weights(gm, split(gm)[0], images(), make_rng(0, "fisher"), _CPU, Space())


def test_weights_count_in_the_error():
    y = torch.zeros(2, 3, 4, 4)
    out = torch.ones_like(y)
    weights = torch.zeros_like(y)
    weights[:, 0] = 3
    assert float(block_error([out], [y])) == 3.0 and float(block_error([out], [y], [weights])) == 3.0
    weights[:, 0] = 1
    assert float(block_error([out], [y], [weights])) == 1.0
