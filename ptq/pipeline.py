"""`quantize`: the whole run, as ten lines; the only place where strings become objects."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.artifact import Manifest, QuantizedModel, value_ranges, versions
from ptq.contracts import Exporter, Feedback, Reconstructor, make_rng, valid_range
from ptq.errors import CalibrationError, ExportError, ModelError
from ptq.evaluate import agreement, outputs, runner, sqnr_db
from ptq.graph.batch_statistics import use_batch_statistics
from ptq.graph.fold_bn import fold_batch_norm, fold_error, unfolded
from ptq.graph.insert import insert_fake_quant
from ptq.graph.observe import input_params, observe, weight_params
from ptq.graph.ops import input_node
from ptq.graph.plan import QuantPlan, make_plan
from ptq.quant.affine import QParams
from ptq.quant.ranges import Estimator, estimators
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.run import Run, floats, start_run
from ptq.sources import Data, build_source, gather, settle_source, trace_all
from ptq.spec import BitConfig, PlanRules

_FOLD_TOLERANCE = 1e-5  # relative; folding in float64 costs one rounding of each weight


def quantize(
    model: nn.Module,
    bits: str | BitConfig = "w8a8",
    data: Data = "auto",
    *,
    input_shape: tuple[int, int, int],
    rounding: str | Reconstructor = "genie_m",
    ranges: str = "lp_best",
    edges: str = "brecq",
    adds: int = 8,
    effort: str = "standard",
    target: str | Exporter | None = None,
    teachers: Sequence[nn.Module] = (),
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    source: str = "python",
    feedback: Feedback | None = None,
) -> QuantizedModel:
    """Quantizes a trained float network; `model` itself is not changed.

    Args:
        model: a network with one tensor in, `[B, C, H, W]`, and one out.
        bits: "w4a4": 4-bit weights, 4-bit activations; "w4": weights only; 2 to 8 each.
        data: calibration images: a source by name with options, "genie:steps=500,count=256", "gaussian", "images:PATH";
            "auto", the best that the network supports; a calibrator object; a tensor `[N, C, H, W]`, a Dataset, a
            DataLoader or an iterable of images or batches, in the network's input space (of pairs, the first counts).
        input_shape: (C, H, W).
        rounding: "genie_m", "nearest", with options as above, or a reconstructor object.
        ranges: how scales are chosen: "lp", "lp_best" (the norm too), "minmax" or "smoothed".
        edges, adds: where which width goes, see `ptq.spec.PlanRules`.
        effort: "quick", "standard" or "full" (the papers' numbers): defaults for what `data` and `rounding` leave open.
        target: an exporter to check the plan against before any work is spent, such as "onnx_qdq".
        teachers: further trained networks that take the same inputs; synthetic images are then made to suit all.
        mean, std: the normalization that inputs carry, per channel, `(pixel / 255 - mean) / std`; where known, the input's
            grid covers exactly the valid pixels.
        seed: of every random choice. device: where the work is done. source: what the manifest calls the network.
        cache: folder that keeps finished batches of images; a run that was interrupted goes on from there.
        feedback: where progress and notes go.

    Returns:
        The quantized network; `.graph` runs, `.save(folder)` writes it, `ptq.export` writes ONNX.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError, ExportError: a bad argument, before any work is spent, or a
            network that cannot be served; the message says what to do.
    """
    bits = BitConfig.parse(bits) if isinstance(bits, str) else bits
    rules, estimates = PlanRules(edges, adds), estimators(ranges)
    images_from, (method, exporter) = build_source(data, effort), _plugins(rounding, target, effort)
    run = start_run(input_shape, device, seed, mean, std, feedback, cache)
    networks, folded = run.timed("trace", _prepare, model, teachers, run)
    teacher, plan = networks[0], make_plan(folded, bits, rules)
    if exporter is not None:
        exporter.check(folded, plan)
    images_from = settle_source(images_from, networks, run, effort)
    images = run.timed("calibration images", gather, images_from, networks, run)
    metrics: dict[str, Any] = {"fold_error": _check_fold(teacher, folded, images, run)}
    acts = run.timed("ranges", _ranges, teacher, folded, plan, images, estimates, images_from, run)
    student = insert_fake_quant(folded, plan, acts, weight_params(folded, plan, estimates[0], acts)).to(run.device)
    method = _suited(method, images_from, run)
    graph, blocks = run.timed(
        "reconstruction", reconstruct_blocks, teacher, student, images, method,
        seed=seed, device=run.device, feedback=run.feedback,
    )  # fmt: skip
    metrics |= run.timed("comparison", _compare, teacher, student, graph, images, run)
    recipe = {
        "bits": str(bits), "data": _describe(images_from), "rounding": plugins.describe(method), "ranges": ranges,
        "edges": edges, "adds": adds, "seed": seed, "device": str(device), "further_teachers": len(teachers),
    }  # fmt: skip
    manifest = Manifest(
        source, run.shape, floats(run.mean), floats(run.std), str(bits), recipe, versions(), value_ranges(graph),
        [{**asdict(b), "layers": list(b.layers)} for b in blocks], metrics, run.seconds, run.notes,
    )  # fmt: skip
    return QuantizedModel(graph.to("cpu"), plan, manifest, images)


def _plugins(
    rounding: str | Reconstructor, target: str | Exporter | None, effort: str
) -> tuple[Reconstructor, Exporter | None]:
    method = plugins.build("reconstructors", rounding, effort) if isinstance(rounding, str) else rounding
    return method, plugins.build("exporters", target) if isinstance(target, str) else target


def _prepare(
    model: nn.Module, teachers: Sequence[nn.Module], run: Run
) -> tuple[tuple[fx.GraphModule, ...], fx.GraphModule]:
    networks = trace_all(model, teachers, run)
    folded = fold_batch_norm(networks[0])
    left = unfolded(folded)
    if left:
        run.note(f"{len(left)} BatchNorm without a layer before it stay float: {', '.join(left[:5])}")
    return networks, folded


def _check_fold(teacher: fx.GraphModule, folded: fx.GraphModule, images: Tensor, run: Run) -> float:
    error = fold_error(teacher, folded, images[:16].to(run.device))
    if not error < _FOLD_TOLERANCE:
        run.note(
            f"folding BatchNorm changed the outputs by {error:.1e} of their largest, more than {_FOLD_TOLERANCE:.0e}"
        )
    return error


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


def _ranges(
    teacher: fx.GraphModule, folded: fx.GraphModule, plan: QuantPlan, images: Tensor, estimates: Sequence[Estimator],
    images_from: Any, run: Run,
) -> dict[str, QParams]:  # fmt: skip
    """Activation grids by the estimator with which activations alone, quantized, change the network's output least."""
    if not plan.values:
        return {}
    parts, watched = images.split(64), teacher
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
            acts |= input_params(*ends, plan, input_node(teacher).meta["value"])
        found.append({name: q.to(run.device) for name, q in acts.items()})
    if len(found) == 1:
        return found[0]
    batches, alone = images[:512].split(128), replace(plan, weights={})
    real = outputs(runner(teacher, run.device), batches)
    students = [insert_fake_quant(folded, alone, acts, {}).to(run.device) for acts in found]
    return max(zip(found, students), key=lambda pair: sqnr_db(real, outputs(runner(pair[1], run.device), batches)))[0]


def _suited(method: Reconstructor, images_from: Any, run: Run) -> Reconstructor:
    """The rounding method, or nearest where the images do not suit the network's own statistics."""
    if getattr(images_from, "teacher_bn", "running") == "running" or not method.steps:
        return method
    run.note("images for BatchNorms on batch statistics give ranges only; rounding is to nearest")
    return plugins.build("reconstructors", "nearest")


def _compare(
    teacher: fx.GraphModule, student: fx.GraphModule, graph: fx.GraphModule, images: Tensor, run: Run
) -> dict[str, Any]:
    """Float against nearest rounding and against the result, on the calibration images: figures without any label."""
    batches = images[:1024].split(128)
    real, nearest, ours = (outputs(runner(m, run.device), batches) for m in (teacher, student, graph))
    if not bool(torch.isfinite(real).all()):
        raise ModelError("the float network's outputs on the calibration images are not finite")
    return {
        "agreement": agreement(real, ours), "agreement_nearest": agreement(real, nearest),
        "sqnr_db": sqnr_db(real, ours), "sqnr_db_nearest": sqnr_db(real, nearest), "calibration_images": len(images),
    }  # fmt: skip


def _describe(source: Any) -> str:
    return plugins.describe(source) if hasattr(source, "batches") else "tensors given from Python"


def export(qm: QuantizedModel, target: str | Exporter, path: Any, *, images: Tensor | None = None) -> dict[str, Any]:
    """Writes `qm` for a target and proves that the file computes what `qm.graph` does.

    Args:
        qm: a quantized network.
        target: an exporter by name, "onnx_qdq", or an object.
        path: the file to write; it appears once it is verified or, where it fails, not at all.
        images: `[N, C, H, W]` to verify with; default: up to 512 of the calibration images, or noise for a loaded network.

    Returns:
        The figures of the comparison (see `exporters/_parity.py`).

    Raises:
        ExportError: the network cannot be written for the target, or the file does not compute what was simulated.
    """

    exporter = plugins.build("exporters", target) if isinstance(target, str) else target
    path = Path(path)
    exporter.check(qm.student, qm.plan)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        exporter.export(qm, partial)
        proof = exporter.verify(qm, partial, proof_images(qm) if images is None else images)
        if not proof["passed"]:
            raise ExportError(f"the exported network does not compute what was simulated: {proof['failure']}")
        partial.replace(path)
    except OSError as e:
        raise ExportError(f"{path} cannot be written: {e}") from e
    finally:
        partial.unlink(missing_ok=True)
    return proof


def proof_images(qm: QuantizedModel) -> Tensor:
    """Images to verify an exported file with: calibration images, or noise over the input's grid for a loaded network."""
    if qm.images is not None:
        return qm.images[:512]
    name = input_node(qm.student).name
    ends = qm.manifest.ranges.get(name, {"min": -2.0, "max": 2.0})
    rng = make_rng(0, "proof")
    noise = torch.rand(128, *qm.manifest.input_shape, generator=rng)
    return ends["min"] + (ends["max"] - ends["min"]) * noise
