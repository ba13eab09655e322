"""What tells a student how far it is from its teacher.

    kl    T² · KL( softmax(z / T) ‖ softmax(z_s / T) ),   per image
    l1    mean |z - z_s|
    iq    mean over blocks of Σ smooth_l1(y_s - y),   per image

A single score has no classes to tell apart: there, kl is l1.
z, z_s: scores of teacher and student; y, y_s: what their blocks yield; T: temperature.

Ref: Hinton et al., 2015 (kl); Binici et al., PRE-DFKD, AAAI 2022, eq. 9 (l1); Haroush et al., The Knowledge Within, CVPR 2020,
algorithm 2 (iq).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq.training import Training


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of class probabilities `[B, K, …]`, averaged over images and places."""
    q, p = (F.log_softmax(v.movedim(1, -1).flatten(0, -2) / temperature, 1) for v in (student, teacher))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def iq(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The intermediate-quantization loss.

    Differs: the paper's text has the mean over outputs, times 0.001. Over the elements of a block, that mean is a thousandth of
    the other loss and moves nothing; the sum over an image's elements has its size.
    """
    terms = [F.smooth_l1_loss(a, b, reduction="sum") / len(a) for a, b in zip(student, teacher)]
    return torch.stack(terms).mean()


def distance(student: Sequence[Tensor], teacher: Sequence[Tensor], training: Training) -> Tensor:
    """The loss of a training. First come the networks' results, then what blocks yield, where that counts."""
    scores = student[0], teacher[0]
    by_score = training.loss == "l1" or scores[0].ndim < 2 or scores[0].shape[1] < 2
    loss = F.l1_loss(*scores) if by_score else kl(*scores, training.temperature)
    return loss + training.iq * iq(student[1:], teacher[1:]) if len(student) > 1 else loss
