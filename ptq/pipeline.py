"""`quantize`: the whole run, a line a stage."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.activation_ranges import activation_ranges
from ptq.artifact import Manifest, QuantizedModel, read_plan, value_ranges, versions
from ptq.batch_cache import BatchCache, digest_of, open_cache
from ptq.contracts import Exporter, Feedback, Finisher, Reconstructor, hold_back
from ptq.distillation import distill_graph, prepare_distillation
from ptq.errors import ReconstructionError, SpecError
from ptq.evaluate import likeness, runner
from ptq.graph.channel_means import expected_means
from ptq.graph.equalize import equalize
from ptq.graph.float_region import float_remainders
from ptq.graph.fold_bn import fold_batch_norm, fold_error, give_biases, unfolded
from ptq.graph.insert import insert_fake_quant
from ptq.graph.observe import weight_params
from ptq.graph.plan import QuantPlan
from ptq.mixed_precision import first_plan, plan_within
from ptq.proof import PLAN_AGAIN, check_target
from ptq.reconstruct._loop import BlockReport, reconstruct_blocks
from ptq.reconstruct._repair import mend
from ptq.request import Request, resolve
from ptq.run import Run, floats, outside_inference_mode, start_run
from ptq.sources import Data, describe_asked, gather, settle_source, trace_all
from ptq.spec import BitConfig, Budget, Override, Repair
from ptq.training import Training
from ptq.training_setup import Labelled, classes_of, open_labelled

_FOLD_TOLERANCE = 1e-5  # relative; folding in float64 costs one rounding of each weight
_EQUAL_TOLERANCE = 1e-3  # likewise; equalized channels differ by orders of magnitude in what they round


@outside_inference_mode
def quantize(
    model: nn.Module,
    bits: str | BitConfig | Budget = "w8a8",
    data: Data = "auto",
    *,
    input_shape: tuple[int, int, int],
    rounding: str | Reconstructor = "genie_m",
    ranges: str = "lp_best",
    finish: str | Finisher | None = None,
    distill: str | Training | None = None,
    report_on: Labelled | None = None,
    repair: str | Repair = "none",
    edges: str = "brecq",
    adds: int = 8,
    weights: str = "auto",
    activations: str = "unsigned",
    scales: str = "free",
    placement: str = "auto",
    ties: str = "auto",
    layers: Iterable[str | Override] = (),
    plan: QuantPlan | str | Path | None = None,
    effort: str = "standard",
    target: str | Exporter | None = None,
    teachers: Sequence[nn.Module] = (),
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    cache_memory: float | None = None,
    precision: str = "auto",
    source: str = "python",
    feedback: Feedback | None = None,
) -> QuantizedModel:
    """Quantizes a trained float network; `model` itself is not changed.

    Args:
        model: a network with one tensor in, `[B, C, H, W]`, and one out.
        bits: "w4a4": 4-bit weights, 4-bit activations; "w4": weights only; 2 to 8 each. "auto:size=1.2MB,a4" or
            "auto:bops=2.5G": the widths of single layers that meet a budget at the least cost, see `ptq.mixed_precision`.
        data: calibration images: a source by name with options, "genie:steps=500,count=256", "gaussian", "images:PATH";
            "auto", the best that the network supports; a calibrator object; a tensor `[N, C, H, W]`, a Dataset, a
            DataLoader or an iterable of images or batches, in the network's input space (of pairs, the first counts).
        input_shape: (C, H, W).
        rounding: "genie_m", "qdrop", "brecq", "adaround" or "nearest", with options as above, or a reconstructor object.
        ranges: how scales are chosen, see `ptq.quant.ranges`: "lp_best", "lp:2", "percentile:99.9", "minmax", …
        finish: a joint pass over all layers after rounding: "logits", with options, or a finisher object.
        distill: trains the quantized network afterwards, the float one as its teacher; options that differ from the defaults,
            "epochs=20,steps=100" or "", or all of them, see `ptq.training.Training`. report_on: labelled pictures, a path or
            (images, labels), on which accuracy is told after every epoch; nothing is ever chosen by it.
        repair: "equalize", "bias", "analytic_bias", "statistics", joined by +; see `ptq.spec.Repair`.
        edges, adds, weights, activations, scales, placement, ties: where which grid goes, see `ptq.spec.PlanRules`; "auto" is
            what the target asks for.
        layers: widths of single layers, "layer3.*=w8a8", "fc=w8", "conv1=float"; of several that match, the last counts.
        plan: every width, in place of `bits` and the rules: a plan or the `plan.json` of an earlier run.
        effort: "quick", "standard" or "full" (the papers' numbers): defaults for what `data` and `rounding` leave open.
        target: an exporter to check the plan against before any work is spent, such as "onnx_qdq".
        teachers: further trained networks that take the same inputs; synthetic images are then made to suit all.
        mean, std: the normalization that inputs carry, per channel, `(pixel / 255 - mean) / std`; where known, the input's
            grid covers the valid pixels.
        seed: of every random choice. device: where the work is done. source: what the manifest calls the network.
        cache: folder that keeps finished batches of images, blocks and epochs; a run that was interrupted goes on from there.
        cache_memory: gigabytes of host memory for what blocks see, the rest goes to disk; default: a quarter of what is free.
        precision: in which rounding is trained: "float32", "bfloat16" for blocks whose weights have at most 4 bits, or "auto",
            the latter on CPUs with AMX.
        feedback: where progress and notes go.

    Returns:
        The quantized network; `.graph` runs, `.save(folder)` writes it, `ptq.export` writes ONNX.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError, ExportError, ReconstructionError: a bad argument, before any
            work is spent, or a network that cannot be served; the message says what to do.
    """
    asked = resolve(
        bits, data, rounding, finish, repair, ranges, target, plan, cache_memory, precision, effort,
        {"edges": edges, "adds": adds, "weights": weights, "activations": activations, "scales": scales}, layers,
        {"placement": placement, "ties": ties},
    )  # fmt: skip
    if report_on is not None and distill is None:
        raise SpecError(
            "pictures to report on given; accuracy is told over the epochs of a distillation: ask for one by distill"
        )
    run = start_run(input_shape, device, seed, mean, std, feedback, cache)
    networks, folded = run.timed("trace", _prepare, model, teachers, run, asked.mends)
    planned = _planned(folded, asked)
    images_from = settle_source(asked.data, networks, run, effort)
    told = describe_asked(data, images_from, effort)
    labelled = open_labelled(report_on, run, classes_of(folded))
    check_fisher(asked.method, folded)
    trainer, how = (None, None) if distill is None else prepare_distillation(distill, data, images_from, effort)
    asked = _suited(asked, images_from, run)
    images = run.timed("calibration images", gather, images_from, networks, run)
    metrics: dict[str, Any] = {"fold_error": _check_fold(networks[0], folded, images, run)}
    reference, folded, expected = _equalized(networks[0], folded, images, asked.mends, run)
    metrics["equalized"] = reference is not networks[0]
    planned = _within_budget(folded, planned, asked, images, run)
    student = _fake_quantized(reference, folded, planned, asked, images, images_from, run)
    folded = folded.to(run.device)
    graph, blocks, figures = _rounded(reference, folded, student, planned, asked, images, expected, run)
    metrics |= figures
    if how is not None:
        graph, course, _ = run.timed(
            "distillation", distill_graph, graph, folded, networks, trainer, images, how, run, labelled
        )
        metrics["course"] = course.to_json()
    metrics |= run.timed("comparison", _compare, networks[0], student, graph, images, run)
    recipe = asked.recipe() | {
        "data": told, "distill": None if how is None else plugins.describe_options(how),
        "seed": seed, "device": str(device), "further_teachers": len(teachers),
    }  # fmt: skip
    manifest = Manifest(
        source, run.shape, floats(run.mean), floats(run.std), recipe["bits"], recipe, versions(), value_ranges(graph),
        [{**asdict(b), "layers": list(b.layers)} for b in blocks], metrics, run.seconds, run.notes,
    )  # fmt: skip
    return QuantizedModel(graph.to("cpu"), planned, manifest, images)


def check_fisher(method: Reconstructor, folded: fx.GraphModule) -> None:
    """Raises ReconstructionError where the method weighs errors by gradients of class scores, and the network has none."""
    if method.needs_fisher and classes_of(folded) < 2:
        raise ReconstructionError("Fisher weights need the scores of classes; the network gives one: use fisher=false")


def _common(run: Run) -> dict[str, Any]:
    """What every stage after the images takes."""
    return {"seed": run.seed, "device": run.device, "feedback": run.stage_feedback}


def _planned(folded: fx.GraphModule, asked: Request) -> QuantPlan:
    """The plan: as given, or by the rules. Of a budget, with all widths at 8 bits until there are images to choose by."""
    if asked.wanted is not None:
        planned = first_plan(folded, asked.wanted, asked.rules)
    else:
        assert asked.plan is not None
        planned = asked.plan if isinstance(asked.plan, QuantPlan) else read_plan(Path(asked.plan))
        planned.check(folded)
    check_target(asked.exporter, folded, planned, PLAN_AGAIN if asked.wanted is None else "")
    return planned


def _within_budget(folded: fx.GraphModule, planned: QuantPlan, asked: Request, images: Tensor, run: Run) -> QuantPlan:
    """The plan with the widths that meet a budget, where one was given."""
    if not isinstance(asked.wanted, Budget):
        return planned
    planned = run.timed(
        "bit widths", plan_within, folded, asked.wanted, asked.rules, images[:256], asked.estimates[0], **_common(run)
    )
    check_target(asked.exporter, folded, planned)
    return planned


def _fake_quantized(
    reference: fx.GraphModule, folded: fx.GraphModule, planned: QuantPlan, asked: Request, images: Tensor, images_from: Any,
    run: Run,
) -> fx.GraphModule:  # fmt: skip
    """The network with ranges settled and every grid in place, rounding to nearest."""
    acts = run.timed("ranges", activation_ranges, reference, folded, planned, images, asked.estimates, images_from, run)
    grids = weight_params(folded, planned, asked.estimates[0], acts)
    return insert_fake_quant(folded, planned, acts, grids).to(run.device)


def _rounded(
    reference: fx.GraphModule, folded: fx.GraphModule, student: fx.GraphModule, planned: QuantPlan, asked: Request,
    images: Tensor, expected: dict[str, Tensor], run: Run,
) -> tuple[fx.GraphModule, list[BlockReport], dict[str, Any]]:  # fmt: skip
    """The network on integers: blocks fitted, biases repaired, the joint pass taken, as asked; with its figures."""
    seen, held = images, images[:0]
    if asked.finisher is not None:
        seen, held = hold_back(images, asked.finisher.held_out, run.seed)
    kept = _kept_blocks(reference, student, planned, asked, seen, run)
    graph, blocks = run.timed(
        "reconstruction", reconstruct_blocks, reference, student, seen, asked.method, memory=asked.memory,
        precision=asked.precision, cache=kept, **_common(run),
    )  # fmt: skip
    if asked.mends.bias != "none":
        graph = run.timed(
            "repair", mend, folded, graph, seen, asked.mends, expected, device=run.device, feedback=run.stage_feedback,
            memory=asked.memory,
        )  # fmt: skip
    if asked.finisher is None:
        return graph, blocks, {}
    graph, figures = run.timed("joint pass", asked.finisher.finish, folded, graph, seen, held, **_common(run))
    return graph, blocks, figures


def _kept_blocks(
    reference: fx.GraphModule, student: fx.GraphModule, planned: QuantPlan, asked: Request, images: Tensor, run: Run
) -> BatchCache | None:
    """Where finished blocks are kept; its name covers all that they depend on."""
    if run.cache is None or not asked.method.steps:
        return None
    told = {
        "rounding": plugins.describe(asked.method), "precision": asked.precision, "seed": run.seed, "device": run.device.type,
        "plan": planned.to_json(), "images": digest_of(images), "ptq": version("ptq"),
    }  # fmt: skip
    return open_cache(run.cache, (reference, student), told).within("blocks")


def _prepare(
    model: nn.Module, teachers: Sequence[nn.Module], run: Run, mends: Repair
) -> tuple[tuple[fx.GraphModule, ...], fx.GraphModule]:
    networks = trace_all(model, teachers, run)
    folded = fold_batch_norm(networks[0])
    left = unfolded(folded)
    if left:
        run.note(f"{len(left)} BatchNorm that no layer before them takes in stay float: {', '.join(left[:5])}")
    if remainders := float_remainders(folded):
        listed = ", ".join(remainders[:5]) + (", …" if len(remainders) > 5 else "")
        what = "operation runs" if len(remainders) == 1 else "operations run"
        run.note(f"{len(remainders)} {what} in float: {listed}")
    return networks, folded if mends.bias == "none" else give_biases(folded)


def _equalized(
    teacher: fx.GraphModule, folded: fx.GraphModule, images: Tensor, mends: Repair, run: Run
) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, Tensor]]:
    """The float network that blocks are fitted to, its folded form, and the means that BatchNorm tells of its values."""
    expected = expected_means(teacher) if mends.bias == "analytic" else {}
    if not mends.equalize:
        return teacher, folded, expected
    equal, factors = equalize(folded.to(run.device), images[:512].split(64), run.device)
    if not factors:
        run.note("no two neighbouring layers can be equalized: nothing to do")
    if not (error := fold_error(teacher, equal, images[:64].to(run.device))) < _EQUAL_TOLERANCE:
        run.note(f"equalization changed the outputs by {error:.1e} of their largest: undone")
        return teacher, folded, expected
    return equal, equal, {v: m / factors[v].cpu() if v in factors else m for v, m in expected.items()}


def _check_fold(teacher: fx.GraphModule, folded: fx.GraphModule, images: Tensor, run: Run) -> float:
    error = fold_error(teacher, folded, images[:16].to(run.device))
    if not error < _FOLD_TOLERANCE:
        run.note(
            f"folding BatchNorm changed the outputs by {error:.1e} of their largest, more than {_FOLD_TOLERANCE:.0e}"
        )
    return error


def _suited(asked: Request, images_from: Any, run: Run) -> Request:
    """The request; without rounding and joint pass where the images do not suit the network's own statistics.

    Raises:
        SpecError: they do not, and more is asked for that would look at them.
    """
    if getattr(images_from, "teacher_bn", "running") == "running":
        return asked
    if asked.mends.equalize or asked.mends.bias == "images" or isinstance(asked.wanted, Budget):
        what = f"repair {asked.mends}" if str(asked.mends) != "none" else str(asked.wanted)
        raise SpecError(
            f"{what} looks at the network's own statistics; these images are for those of the batch; take other images"
        )
    if asked.method.steps or asked.finisher:
        run.note("images for BatchNorms on batch statistics give ranges only; rounding is to nearest")
    method = plugins.build("reconstructors", "nearest") if asked.method.steps else asked.method
    return replace(asked, method=method, finisher=None)


def _compare(
    teacher: fx.GraphModule, student: fx.GraphModule, graph: fx.GraphModule, images: Tensor, run: Run
) -> dict[str, Any]:
    """Float against nearest rounding and against the result, on the calibration images: figures without any label."""
    batches = images[:1024].split(128)
    real, *others = (runner(m, run.device) for m in (teacher, graph, student))
    ours, nearest = likeness(real, others, batches)
    return {
        "agreement": ours.agreement, "agreement_nearest": nearest.agreement,
        "sqnr_db": ours.sqnr_db, "sqnr_db_nearest": nearest.sqnr_db, "calibration_images": len(images),
    }  # fmt: skip
