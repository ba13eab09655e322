"""BatchNorm of students that learnt under the statistics of each batch.

    μ ← mean over batches of m,   σ² ← mean over batches of s² · n / (n - 1)

m, s², n: mean, variance and number of elements per channel, of a batch that passes a student normalizing by that batch. Trained on
noise, its own running statistics are those of noise, and pictures meet the wrong ones; on a few images that look like the
training data they become right, and the student may see one image at a time.

Ref: Raikwar and Mishra, Discovering and Overcoming Limitations of Noise-engineered Data-free Knowledge Distillation, NeurIPS 2022,
§3.3, §4.4 (20 batches of 16).
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ptq.errors import ModelError
from ptq.graph.taps import batch_norms


def check_batch_norms(student: nn.Module) -> None:
    """Raises ModelError where the student has no BatchNorm that could take the batch's statistics."""
    if not batch_norms(student):
        raise ModelError(
            "the student has no BatchNorm, and these images are for networks that normalize by the batch; take other images, "
            "such as --data nayer or genie"
        )


@torch.no_grad()
def re_estimate(student: nn.Module, batches: Iterable[Tensor], device: torch.device) -> None:
    """Sets the student's running statistics to the plain average over the batches `[B, C, H, W]`, B > 1, in place."""
    norms = list(batch_norms(student).values())
    momenta = [norm.momentum for norm in norms]
    student.eval()
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]  # torch's word for the plain average
        norm.train()
    for batch in batches:
        student(batch.to(device))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    student.eval()


def under_batch_statistics(student: nn.Module) -> nn.Module:
    """A copy in eval mode whose BatchNorms normalize by the batch they see."""
    out = copy.deepcopy(student).eval()
    for norm in batch_norms(out).values():
        norm.running_mean = norm.running_var = None  # type: ignore[assignment]
    return out
