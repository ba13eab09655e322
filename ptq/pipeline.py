"""`quantize`: the whole run, as ten lines; the only place where strings become objects."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.activation_ranges import activation_ranges
from ptq.artifact import Manifest, QuantizedModel, read_plan, value_ranges, versions
from ptq.contracts import Exporter, Feedback, Finisher, Reconstructor, hold_back, make_rng
from ptq.distillation import distill_graph, prepare_distillation
from ptq.errors import ExportError, ModelError, SpecError
from ptq.evaluate import agreement, outputs, runner, sqnr_db
from ptq.graph.channel_means import expected_means
from ptq.graph.equalize import equalize
from ptq.graph.float_region import float_remainders
from ptq.graph.fold_bn import fold_batch_norm, fold_error, give_biases, unfolded
from ptq.graph.insert import insert_fake_quant
from ptq.graph.observe import weight_params
from ptq.graph.ops import input_node
from ptq.graph.plan import QuantPlan, make_plan
from ptq.mixed_precision import check_budget, plan_within
from ptq.quant.ranges import estimators
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.reconstruct._repair import mend
from ptq.run import Run, floats, start_run
from ptq.sources import Data, build_source, describe_data, gather, settle_source, trace_all
from ptq.spec import PRECISIONS, BitConfig, Budget, Override, PlanRules, Repair
from ptq.training import Training

_FOLD_TOLERANCE = 1e-5  # relative; folding in float64 costs one rounding of each weight
_EQUAL_TOLERANCE = 1e-3  # likewise; equalized channels differ by orders of magnitude in what they round


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
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
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
            "epochs=20,steps=100" or "", or all of them, see `ptq.training.Training`.
        repair: "equalize", "bias", "analytic_bias", "statistics", joined by +; see `ptq.spec.Repair`.
        edges, adds, weights, activations, scales, placement, ties: where which grid goes, see `ptq.spec.PlanRules`; "auto" is
            what the target asks for.
        layers: widths of single layers, "layer3.*=w8a8", "fc=w8", "conv1=float"; of several that match, the last counts.
        plan: every width, in place of `bits` and the rules: a plan or the `plan.json` of an earlier run.
        effort: "quick", "standard" or "full" (the papers' numbers): defaults for what `data` and `rounding` leave open.
        target: an exporter to check the plan against before any work is spent, such as "onnx_qdq".
        teachers: further trained networks that take the same inputs; synthetic images are then made to suit all.
        mean, std: the normalization that inputs carry, per channel, `(pixel / 255 - mean) / std`; where known, the input's
            grid covers exactly the valid pixels.
        seed: of every random choice. device: where the work is done. source: what the manifest calls the network.
        cache: folder that keeps finished batches of images; a run that was interrupted goes on from there.
        cache_memory: gigabytes of host memory for what blocks see, the rest goes to disk; default: a quarter of what is free.
        precision: in which rounding is trained: "float32", "bfloat16" for blocks whose weights have at most 4 bits, or "auto",
            the latter on CPUs with instructions for it.
        feedback: where progress and notes go.

    Returns:
        The quantized network; `.graph` runs, `.save(folder)` writes it, `ptq.export` writes ONNX.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError, ExportError, ReconstructionError: a bad argument, before any
            work is spent, or a network that cannot be served; the message says what to do.
    """
    if precision not in PRECISIONS:
        raise SpecError(f"precision {precision!r} asked for; known: {', '.join(PRECISIONS)}")
    images_from, (method, finisher, exporter) = build_source(data, effort), _plugins(rounding, finish, target, effort)
    placed = _asked({"placement": placement, "ties": ties}, exporter)
    rules = PlanRules(edges, adds, weights, activations, scales, tuple(map(_override, layers)), **placed)
    if plan is not None and rules.overrides:
        raise SpecError(f"a plan and {rules.overrides[0]} given; a plan says every width already")
    wanted = None if plan is not None else read_bits(bits)
    estimates, mends = estimators(ranges), Repair.parse(repair) if isinstance(repair, str) else repair
    memory, run = _bytes(cache_memory), start_run(input_shape, device, seed, mean, std, feedback, cache)
    common: dict[str, Any] = {"device": run.device, "feedback": replace(run.feedback, note=run.note)}
    networks, folded = run.timed("trace", _prepare, model, teachers, run, mends)
    teacher, planned = networks[0], _planned(folded, wanted, rules, plan)
    if exporter is not None:
        exporter.check(folded, planned)
    images_from = settle_source(images_from, networks, run, effort)
    trainer, how = (None, None) if distill is None else prepare_distillation(distill, data, images_from, effort)
    method, finisher = _suited(method, finisher, images_from, mends, wanted, run)
    images = run.timed("calibration images", gather, images_from, networks, run)
    metrics: dict[str, Any] = {"fold_error": _check_fold(teacher, folded, images, run)}
    reference, folded, expected = _equalized(teacher, folded, images, mends, run)
    if isinstance(wanted, Budget):
        planned = run.timed(
            "bit widths", plan_within, folded, wanted, rules, images[:256], estimates[0], seed=seed, **common
        )
        if exporter is not None:
            exporter.check(folded, planned)
    acts = run.timed("ranges", activation_ranges, reference, folded, planned, images, estimates, images_from, run)
    grids = weight_params(folded, planned, estimates[0], acts)
    student, folded = insert_fake_quant(folded, planned, acts, grids).to(run.device), folded.to(run.device)
    seen, held = (images, images[:0]) if finisher is None else hold_back(images, finisher.held_out, seed)
    graph, blocks = run.timed(
        "reconstruction", reconstruct_blocks, reference, student, seen, method, seed=seed, memory=memory,
        precision=precision, **common,
    )  # fmt: skip
    if mends.bias != "none":
        graph = run.timed("repair", mend, folded, graph, seen, mends, expected, memory=memory, **common)
    if finisher is not None:
        graph, figures = run.timed("joint pass", finisher.finish, folded, graph, seen, held, seed=seed, **common)
        metrics |= figures
    if how is not None:
        graph, course, _ = run.timed("distillation", distill_graph, graph, folded, networks, trainer, images, how, run)
        metrics["course"] = course.to_json()
    metrics |= run.timed("comparison", _compare, teacher, student, graph, images, run)
    asked = "plan" if wanted is None else str(wanted)
    recipe = {
        "bits": asked, "data": describe_data(images_from), "rounding": plugins.describe(method), "ranges": ranges,
        "edges": edges, "adds": adds, "weights": weights, "activations": activations, "scales": scales,
        "placement": rules.placement, "ties": rules.ties, "layers": [str(o) for o in rules.overrides], "repair": str(mends),
        "finish": None if finisher is None else plugins.describe(finisher),
        "distill": None if how is None else plugins.describe_options(how),
        "precision": precision, "seed": seed, "device": str(device), "further_teachers": len(teachers),
    }  # fmt: skip
    manifest = Manifest(
        source, run.shape, floats(run.mean), floats(run.std), asked, recipe, versions(), value_ranges(graph),
        [{**asdict(b), "layers": list(b.layers)} for b in blocks], metrics, run.seconds, run.notes,
    )  # fmt: skip
    return QuantizedModel(graph.to("cpu"), planned, manifest, images)


def _asked(given: dict[str, str], exporter: Exporter | None) -> dict[str, Any]:
    """Settings of `PlanRules`, those that are "auto" as the target wants them, or by default."""
    wanted = {} if exporter is None else exporter.rules
    return {k: wanted[k] if v == "auto" else v for k, v in given.items() if v != "auto" or k in wanted}


def read_bits(bits: str | BitConfig | Budget) -> BitConfig | Budget:
    """Widths or a budget, from text where it is text.

    Raises:
        SpecError: the text is neither.
    """
    if not isinstance(bits, str):
        return bits
    return Budget.parse(bits) if bits.strip().lower().startswith("auto") else BitConfig.parse(bits)


def _override(given: str | Override) -> Override:
    return Override.parse(given) if isinstance(given, str) else given


def _plugins(
    rounding: str | Reconstructor, finish: str | Finisher | None, target: str | Exporter | None, effort: str
) -> tuple[Reconstructor, Finisher | None, Exporter | None]:
    return (
        plugins.build("reconstructors", rounding, effort) if isinstance(rounding, str) else rounding,
        plugins.build("finishers", finish, effort) if isinstance(finish, str) else finish,
        plugins.build("exporters", target) if isinstance(target, str) else target,
    )


def _prepare(
    model: nn.Module, teachers: Sequence[nn.Module], run: Run, mends: Repair
) -> tuple[tuple[fx.GraphModule, ...], fx.GraphModule]:
    networks = trace_all(model, teachers, run)
    folded = fold_batch_norm(networks[0])
    left = unfolded(folded)
    if left:
        run.note(f"{len(left)} BatchNorm without a layer before it stay float: {', '.join(left[:5])}")
    if remainders := float_remainders(folded):
        listed = ", ".join(remainders[:5]) + (", …" if len(remainders) > 5 else "")
        run.note(f"{len(remainders)} operations run in float: {listed}")
    return networks, folded if mends.bias == "none" else give_biases(folded)


def _bytes(gigabytes: float | None) -> int | None:
    if gigabytes is None:
        return None
    if not 0 <= gigabytes < 1e9:  # NaN too
        raise SpecError(f"cache memory of {gigabytes} GB asked for; give gigabytes, 0 or more")
    return int(gigabytes * 1e9)


def _planned(
    folded: fx.GraphModule, wanted: BitConfig | Budget | None, rules: PlanRules, given: QuantPlan | str | Path | None
) -> QuantPlan:
    """The plan: as given, or by the rules. Of a budget, with all widths at 8 bits until there are images to choose by."""
    if isinstance(wanted, Budget):
        check_budget(folded, wanted, rules)
        return make_plan(folded, BitConfig(8, wanted.act), rules)
    if wanted is not None:
        return make_plan(folded, wanted, rules)
    assert given is not None
    plan = given if isinstance(given, QuantPlan) else read_plan(Path(given))
    plan.check(folded)
    return plan


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
        run.note(f"equalization changed the outputs by {error:.1e} of their largest")
    return equal, equal, {v: m / factors[v].cpu() if v in factors else m for v, m in expected.items()}


def _check_fold(teacher: fx.GraphModule, folded: fx.GraphModule, images: Tensor, run: Run) -> float:
    error = fold_error(teacher, folded, images[:16].to(run.device))
    if not error < _FOLD_TOLERANCE:
        run.note(
            f"folding BatchNorm changed the outputs by {error:.1e} of their largest, more than {_FOLD_TOLERANCE:.0e}"
        )
    return error


def _suited(
    method: Reconstructor, finisher: Finisher | None, images_from: Any, mends: Repair, wanted: Any, run: Run
) -> tuple[Reconstructor, Finisher | None]:
    """Rounding and joint pass, or nearest and none where the images do not suit the network's own statistics.

    Raises:
        SpecError: they do not, and more is asked for that would look at them.
    """
    if getattr(images_from, "teacher_bn", "running") == "running":
        return method, finisher
    if mends.equalize or mends.bias == "images" or isinstance(wanted, Budget):
        what = f"repair {mends}" if str(mends) != "none" else str(wanted)
        raise SpecError(
            f"{what} looks at the network's own statistics; these images are for those of the batch; take other images"
        )
    if method.steps or finisher:
        run.note("images for BatchNorms on batch statistics give ranges only; rounding is to nearest")
    return (plugins.build("reconstructors", "nearest") if method.steps else method), None


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
