"""Activation grids of a run: what is looked at, with which estimator, and how far the input may reach."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ptq.contracts import make_rng, valid_range
from ptq.errors import CalibrationError
from ptq.evaluate import likeness, runner
from ptq.graph.batch_statistics import use_batch_statistics
from ptq.graph.insert import insert_fake_quant
from ptq.graph.observe import input_params, observe
from ptq.graph.plan import QuantPlan
from ptq.quant.affine import QParams
from ptq.quant.ranges import Estimator
from ptq.run import Run


def _input_ends(images: Tensor, synthetic: bool, run: Run) -> tuple[float, float] | None:
    """Least and greatest value the network's input can take; None where the images themselves say.

    The valid pixels where the normalization is stated. Else, for synthetic images, three deviations around the mean:
    statistics are what such images share with real ones, not extremes, and an input cut off costs more than a coarser step.
    """
    if run.mean is not None and run.std is not None:
        low, high = valid_range(run.mean, run.std)
        return float(low.min()), float(high.max())
    if not synthetic:
        return None
    std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    return float(torch.minimum((mean - 3 * std).min(), images.min())), float(
        torch.maximum((mean + 3 * std).max(), images.max())
    )


def activation_ranges(
    teacher: fx.GraphModule, folded: fx.GraphModule, plan: QuantPlan, images: Tensor, estimates: Sequence[Estimator],
    images_from: Any, run: Run,
) -> dict[str, QParams]:  # fmt: skip
    """Activation grids by the estimator with which activations alone, quantized, change the network's output least."""
    if not plan.values:
        return {}
    parts, watched = images.tensor_split(-(-len(images) // 64)), teacher  # alike in size: each gives as many samples
    if getattr(images_from, "teacher_bn", "running") == "batch":
        if len(images) < 2:
            raise CalibrationError("BatchNorms on the batch's own statistics need at least 2 images; raise count")
        watched, parts = (
            use_batch_statistics(teacher),
            images.tensor_split(-(-len(images) // max(images_from.batch_size, 2))),
        )
        estimates = estimates[-1:]  # the output, by which the best would be chosen, is not the network's own here
    ends = _input_ends(images, getattr(images_from, "synthetic", False), run)
    found = []
    for estimate in estimates:
        acts = observe(watched, plan, parts, estimate, rng=make_rng(run.seed, "ranges"), device=run.device)
        if ends is not None:
            acts |= input_params(*ends, teacher, plan, acts)
        found.append({name: q.to(run.device) for name, q in acts.items()})
    if len(found) == 1:
        return found[0]
    batches, alone = images[:512].split(128), replace(plan, weights={})
    students = [runner(insert_fake_quant(folded, alone, acts, {}).to(run.device), run.device) for acts in found]
    figures = likeness(runner(teacher, run.device), students, batches)
    return max(zip(found, figures), key=lambda pair: pair[1].sqnr_db)[0]
