"""`distill`: a student learns to give what its teacher gives, on images made from the teacher.

The student is a network of another architecture (`distill`) or the teacher's own quantized copy (`distill_quantized`).
"""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.artifact import QuantizedModel, value_ranges, versions
from ptq.contracts import Feedback
from ptq.distilling.course import Course
from ptq.distilling.loop import Job, train
from ptq.distilling.quantized import borders, harden, make_trainable, with_values
from ptq.distilling.statistics import check_batch_norms, re_estimate
from ptq.errors import SpecError
from ptq.evaluate import likeness, runner, top1
from ptq.graph.batch_statistics import use_batch_statistics
from ptq.graph.fold_bn import fold_batch_norm
from ptq.pictures import Pictures
from ptq.run import Run, floats, outside_inference_mode, start_run
from ptq.sources import Data, build_source, describe_data, gather, settle_source, trace_all
from ptq.training import Training
from ptq.training_setup import (
    Labelled,
    check_feed,
    check_pair,
    classes_of,
    data_of,
    forward,
    fresh_copy,
    kept_state,
    make_feed,
    open_labelled,
    read_training,
    reporter,
    student_graph,
    trainer_of,
    training_of_quantized,
)

_SAMPLE = 1024  # of the images a student was trained on, kept to quantize it with
# For students on a fixed set of images, of which none of the papers speaks: rate and decay that such networks are trained with.
_ON_A_SET = Training(lr=0.1, decay=5e-4, clip=0.0, iq=0.0)
_RESTORE = "bn_stats:count=320"
_BATCH = 16  # images a batch when running statistics are estimated anew


@dataclass(frozen=True)
class Distilled:
    """A trained student. student: a copy of the one given, in eval mode. course: loss and reported accuracy per epoch.

    images: some of those it was trained on or, after training under batch statistics, those that its running statistics come
    from; they suit it for calibration. recipe: resolved options. top1: reported accuracy at the end, in per cent.
    """

    student: nn.Module
    course: Course
    images: Tensor
    recipe: dict[str, Any]
    top1: float | None
    seconds: dict[str, float]
    notes: tuple[str, ...]


@outside_inference_mode
def distill(
    model: nn.Module,
    student: nn.Module,
    data: Data = "auto",
    *,
    input_shape: tuple[int, int, int],
    training: str | Training = "",
    restore: Data | None = None,
    report_on: Labelled | None = None,
    teachers: Sequence[nn.Module] = (),
    effort: str = "standard",
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    feedback: Feedback | None = None,
) -> Distilled:
    """Trains a student of any architecture to give what a trained network gives; neither argument is changed.

    Args:
        model: the teacher. student: a network with the same input and number of outputs, fresh or trained.
        data: what both see, as for `ptq.quantize`; "nayer", "vae_replay" and "gaussian" bring their paper's own training.
        input_shape: (C, H, W).
        training: options that differ from the data source's, "epochs=20,steps=100", or all of them, see `ptq.training.Training`.
        restore: for students that learn under the batch's statistics (`gaussian`): images on which their running statistics are
            estimated afterwards, "bn_stats:count=320" if nothing is said, see `ptq.distilling.statistics`.
        report_on: labelled pictures, a path or (images, labels), on which accuracy is told after every epoch. Nothing is ever
            chosen by it.
        teachers: further networks that images shall suit. effort: "quick", "standard" or "full", the papers' epochs and steps.
        mean, std, seed, device, feedback: as for `ptq.quantize`.
        cache: folder that keeps the state after every epoch, and batches of images: a run that was interrupted goes on there.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError: a bad argument, before any work is spent; the message says what
            to do. ReconstructionError: the training diverged.
    """
    run = start_run(input_shape, device, seed, mean, std, feedback, cache)
    source = build_source(data, effort, training=True)
    networks = run.timed("trace", trace_all, model, teachers, run)
    source = settle_source(source, networks, run, effort)
    how, by_batch = read_training(training, getattr(source, "training", _ON_A_SET), effort), _by_batch(source)
    graph, labelled, pupil = (
        student_graph(student, networks[0], run),
        open_labelled(report_on, run, classes_of(networks[0])),
        fresh_copy(student, run.device),
    )
    check_feed(how, source)
    if by_batch:
        check_batch_norms(pupil)
        wanted = build_source(_RESTORE if restore is None else restore, effort)
        restore = settle_source(wanted, networks, run, effort, option="--restore")
    elif restore is not None:
        raise SpecError(
            "restore is given; it is for students that learn under the batch's statistics, with 'gaussian' as data"
        )
    images = run.timed("images", gather, source, networks, run) if how.feed == "set" else None
    kept = kept_state(run, (*networks, graph), source, how, images, labelled, re.sub(r" at 0x\w+", "", str(pupil)))
    feed = make_feed(how, source, networks, pupil, run, images, kept)
    teacher = use_batch_statistics(networks[0]) if by_batch else networks[0]
    job = Job(
        forward(teacher, how), forward(pupil, how), pupil, [{"params": list(pupil.parameters())}], feed, how, seed, run.device,
        run.stage_feedback, reporter(labelled, pupil, run, by_batch), kept, learns_statistics=True,
    )  # fmt: skip
    course = run.timed("distillation", train, job)
    pupil.eval().requires_grad_(False)
    seen = run.timed("statistics", _restored, pupil, restore, networks, run) if by_batch else feed.sample(_SAMPLE, seed)
    recipe = _recipe(source, how, run) | {
        "restore": describe_data(restore) if by_batch else None,
        "further_teachers": len(teachers),
    }
    final = None if labelled is None else 100 * top1(runner(pupil, run.device), labelled)
    return Distilled(pupil.to("cpu"), course, seen, recipe, final, run.seconds, tuple(run.notes))


def _recipe(source: Any, how: Training, run: Run) -> dict[str, Any]:
    return {
        "data": describe_data(source), "training": plugins.describe_options(how), "seed": run.seed, "device": str(run.device),
        "input_shape": list(run.shape), "mean": floats(run.mean), "std": floats(run.std), "versions": versions(),
    }  # fmt: skip


def _by_batch(source: Any) -> bool:
    return getattr(source, "teacher_bn", "running") == "batch"


def _restored(student: nn.Module, source: Any, networks: tuple[fx.GraphModule, ...], run: Run) -> Tensor:
    """Estimates running statistics on the source's images, which it returns."""
    images = gather(source, networks, run)
    batches = -(-len(images) // _BATCH)
    re_estimate(student, images.tensor_split(batches), run.device)
    return images


@outside_inference_mode
def distill_quantized(
    model: nn.Module,
    qm: QuantizedModel,
    data: Data | None = None,
    *,
    training: str | Training = "",
    report_on: Labelled | None = None,
    teachers: Sequence[nn.Module] = (),
    effort: str = "standard",
    seed: int | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    feedback: Feedback | None = None,
) -> QuantizedModel:
    """Trains a quantized network further, the float network it was made from as its teacher; neither argument is changed.

    Args:
        model: the float network. qm: what `ptq.quantize` made of it.
        data: images to train on, as for `ptq.quantize`; default: those of `qm`'s recipe.
        training, report_on, teachers, effort, device, cache, feedback: as for `distill`. seed: default: that of `qm`'s recipe.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError: a bad argument, before any work is spent; the message says what
            to do. ReconstructionError: the training diverged.
    """
    manifest = qm.manifest
    seed = int(manifest.recipe.get("seed", 0)) if seed is None else seed
    own, data = data is None, data_of(qm) if data is None else data
    told = manifest.recipe.get("data") if own else None  # what images that it holds were
    run = start_run(manifest.input_shape, device, seed, manifest.mean, manifest.std, feedback, cache)
    source, further = build_source(data, effort), int(manifest.recipe.get("further_teachers", 0))
    if own and getattr(source, "synthetic", False) and further != len(teachers):  # they are made once more
        raise SpecError(
            f"this network's images suit {further} further networks, {len(teachers)} given; name as many (teachers=, --with), or data"
        )
    networks = run.timed("trace", trace_all, model, teachers, run)
    folded = fold_batch_norm(networks[0])
    check_pair(qm, folded)
    source = settle_source(source, networks, run, effort)
    trainer, how = prepare_distillation(training, data, source, effort)
    labelled = open_labelled(report_on, run, classes_of(folded))
    made = run.timed("calibration images", gather, source, networks, run) if how.feed == "set" else None
    student = copy.deepcopy(qm.student).to(run.device)
    graph, course, images = run.timed(
        "distillation", distill_graph, student, folded, networks, trainer, made, how, run, labelled
    )
    seen = images[:1024].split(128)
    real, *others = (runner(m, run.device) for m in (networks[0], copy.deepcopy(qm.student).to(run.device), graph))
    before, found = likeness(real, others, seen)
    figures = {
        "agreement": found.agreement, "sqnr_db": found.sqnr_db, "course": course.to_json(),
        "agreement_nearest": before.agreement, "sqnr_db_nearest": before.sqnr_db,
        "calibration_images": len(images), "beside": "before distillation",
    }  # fmt: skip
    added = {
        "distill": plugins.describe_options(how), "distill_data": told or describe_data(source), "distill_seed": seed,
        "distill_further_teachers": len(teachers),
    }  # fmt: skip
    graph = graph.to("cpu")
    manifest = replace(
        manifest, recipe=manifest.recipe | added, ranges=value_ranges(graph), metrics=manifest.metrics | figures,
        seconds=manifest.seconds | run.seconds, notes=[*manifest.notes, *run.notes],
    )  # fmt: skip
    return QuantizedModel(graph, qm.plan, manifest, images)


def prepare_distillation(given: str | Training, data: Data, source: Any, effort: str) -> tuple[Any, Training]:
    """Where a quantized student's images come from while it is trained, and how it is.

    Args:
        data: as it was asked for. source: what that is, for images made before.

    Raises:
        SpecError, PluginError: an option that does not exist, or images that do not suit a quantized student.
    """
    trainer = trainer_of(data, source, effort)
    how = training_of_quantized(given, trainer, effort)
    check_feed(how, trainer)
    return trainer, how


def distill_graph(
    student: fx.GraphModule, folded: fx.GraphModule, networks: tuple[fx.GraphModule, ...], source: Any, images: Tensor | None,
    how: Training, run: Run, labelled: Pictures | None = None,
) -> tuple[fx.GraphModule, Course, Tensor]:  # fmt: skip
    """The hardened student trained further, as a copy, how that went, and some of the images it saw.

    Args:
        student: hardened. folded: the float network, same value names. networks: the teachers with their BatchNorms.
        source: where images come from while it is trained. images: those made before, where it is trained on a fixed set.
    """
    kept = kept_state(run, (*networks, student), source, how, images if how.feed == "set" else None, labelled)
    student, names = copy.deepcopy(student), borders(student) if how.iq > 0 else ()
    folded = folded.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = make_trainable(student, folded, how)
    feed = make_feed(how, source, networks, student, run, images, kept)
    job = Job(
        forward(with_values(folded, names), how), forward(with_values(student, names), how), student, groups, feed, how,
        run.seed, run.device, run.stage_feedback, reporter(labelled, student, run, False), kept,
    )  # fmt: skip
    course = train(job)
    harden(student)
    return student, course, images if images is not None else feed.sample(_SAMPLE, run.seed)
