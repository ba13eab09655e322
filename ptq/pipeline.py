"""`quantize`: the whole run, as ten lines; the only place where strings become objects."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.artifact import Manifest, QuantizedModel, value_ranges, versions
from ptq.contracts import EFFORTS, CalibrationContext, Calibrator, Exporter, Feedback, Reconstructor, make_rng
from ptq.errors import CalibrationError, ExportError, ModelError, SpecError
from ptq.evaluate import agreement, outputs, runner, sqnr_db
from ptq.graph.fold_bn import fold_batch_norm, fold_error, unfolded
from ptq.graph.insert import insert_fake_quant
from ptq.graph.observe import input_params, observe, weight_params
from ptq.graph.ops import input_node
from ptq.graph.plan import QuantPlan, make_plan
from ptq.graph.trace import trace
from ptq.quant.affine import QParams
from ptq.quant.ranges import estimator
from ptq.reconstruct._loop import reconstruct_blocks
from ptq.spec import BitConfig, PlanRules

Data = str | Calibrator | Tensor | Iterable[Tensor]
_FOLD_TOLERANCE = 1e-5  # relative; folding in float64 costs one rounding of each weight


@dataclass
class _Run:
    """What the steps of one run share."""

    shape: tuple[int, int, int]
    device: torch.device
    seed: int
    mean: Tensor | None
    std: Tensor | None
    feedback: Feedback
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Tells the user, and the manifest."""
        self.notes.append(text)
        self.feedback.note(text)

    def timed(self, stage: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of `work(...)`, its seconds added to the manifest."""
        start = time.perf_counter()
        result = work(*args, **kwargs)
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        return result


def quantize(
    model: nn.Module,
    bits: str | BitConfig = "w8a8",
    data: Data = "genie",
    *,
    input_shape: tuple[int, int, int],
    rounding: str | Reconstructor = "genie_m",
    ranges: str = "lp",
    edges: str = "brecq",
    adds: int = 8,
    effort: str = "standard",
    target: str | Exporter | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    source: str = "python",
    feedback: Feedback | None = None,
) -> QuantizedModel:
    """Quantizes a trained float network; `model` itself is not changed.

    Args:
        model: a network with one tensor in, `[B, C, H, W]`, and one out.
        bits: "w4a4": 4-bit weights, 4-bit activations; "w4": weights only; 2 to 8 each.
        data: calibration images: a source by name with options, "genie:steps=500,count=256", "gaussian", "images:PATH"; a
            calibrator object; a tensor `[N, C, H, W]` or an iterable of such, in the network's input space.
        input_shape: (C, H, W).
        rounding: "genie_m", "nearest", with options as above, or a reconstructor object.
        ranges: how scales are chosen: "lp" or "minmax".
        edges, adds: where which width goes, see `ptq.spec.PlanRules`.
        effort: "quick", "standard" or "full" (the papers' numbers): defaults for what `data` and `rounding` leave open.
        target: an exporter to check the plan against before any work is spent, such as "onnx_qdq".
        mean, std: the normalization that inputs carry, per channel, `(pixel / 255 - mean) / std`; where known, the input's
            grid covers exactly the valid pixels.
        seed: of every random choice. device: where the work is done. source: what the manifest calls the network.
        feedback: where progress and notes go.

    Returns:
        The quantized network; `.graph` runs, `.save(folder)` writes it, `ptq.export` writes ONNX.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError, ExportError: a bad argument, before any work is spent, or a
            network that cannot be served; the message says what to do.
    """
    bits = BitConfig.parse(bits) if isinstance(bits, str) else bits
    rules, estimate = PlanRules(edges, adds), estimator(ranges)
    source_of_images, method, exporter = _plugins(data, rounding, target, effort)
    run = _Run(
        _shape(input_shape), _device(device), seed,
        *normalization(mean, std, input_shape[0]), feedback or Feedback(),
    )  # fmt: skip
    teacher, folded = run.timed("trace", _prepare, model, run)
    plan = make_plan(folded, bits, rules)
    if exporter is not None:
        exporter.check(folded, plan)
    images = run.timed("calibration images", _images, source_of_images, teacher, run)
    metrics: dict[str, Any] = {"fold_error": _check_fold(teacher, folded, images, run)}
    ends = _input_ends(images, getattr(source_of_images, "synthetic", False), run)
    acts = run.timed("ranges", _ranges, teacher, plan, images, estimate, ends, run)
    student = insert_fake_quant(folded, plan, acts, weight_params(folded, plan, estimate, acts)).to(run.device)
    graph, blocks = run.timed(
        "reconstruction", reconstruct_blocks, teacher, student, images, method,
        seed=seed, device=run.device, feedback=run.feedback,
    )  # fmt: skip
    metrics |= run.timed("comparison", _compare, teacher, student, graph, images, run)
    recipe = {
        "bits": str(bits), "data": _describe(source_of_images), "rounding": plugins.describe(method), "ranges": ranges,
        "edges": edges, "adds": adds, "seed": seed, "device": str(device),
    }  # fmt: skip
    manifest = Manifest(
        source, run.shape, _floats(run.mean), _floats(run.std), str(bits), recipe, versions(), value_ranges(graph),
        [{**asdict(b), "layers": list(b.layers)} for b in blocks], metrics, run.seconds, run.notes,
    )  # fmt: skip
    return QuantizedModel(graph.to("cpu"), plan, manifest, images)


def _plugins(
    data: Data, rounding: str | Reconstructor, target: str | Exporter | None, effort: str
) -> tuple[Any, Reconstructor, Exporter | None]:
    if effort not in EFFORTS:
        raise SpecError(f"unknown effort {effort!r}; known: {', '.join(EFFORTS)}")
    calibrator = plugins.build("calibrators", data, effort) if isinstance(data, str) else data
    method = plugins.build("reconstructors", rounding, effort) if isinstance(rounding, str) else rounding
    exporter = plugins.build("exporters", target) if isinstance(target, str) else target
    return calibrator, method, exporter


def _shape(shape: Iterable[int]) -> tuple[int, int, int]:
    shape = tuple(shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise SpecError(f"input shape {shape} given; it is (channels, height, width), as in (3, 224, 224)")
    return shape


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros((), device=found)
    except (RuntimeError, AssertionError) as e:
        raise SpecError(f"device {str(device)!r} is not there: {str(e).splitlines()[0]}") from e
    return found


def normalization(
    mean: Iterable[float] | None, std: Iterable[float] | None, channels: int
) -> tuple[Tensor | None, Tensor | None]:
    """`mean` and `std` as tensors [C], one number standing for every channel; None where neither is given.

    Raises:
        SpecError: only one is given, their lengths do not fit, or a deviation is not above 0.
    """
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise SpecError("mean and std belong together; give both or neither")
    both = [torch.tensor(list(v), dtype=torch.float32) for v in (mean, std)]
    both = [v.repeat(channels) if len(v) == 1 else v for v in both]
    if any(len(v) != channels for v in both) or not bool((both[1] > 0).all()):
        raise SpecError(
            f"mean and std have one number per channel ({channels}), std above 0; got {_floats(both[0])} and {_floats(both[1])}"
        )
    return both[0], both[1]


def _floats(v: Tensor | None) -> tuple[float, ...] | None:
    return None if v is None else tuple(v.tolist())


def _prepare(model: nn.Module, run: _Run) -> tuple[fx.GraphModule, fx.GraphModule]:
    teacher = trace(model, run.shape).to(run.device)
    folded = fold_batch_norm(teacher)
    left = unfolded(folded)
    if left:
        run.note(f"{len(left)} BatchNorm without a layer before it stay float: {', '.join(left[:5])}")
    return teacher, folded


def _images(source: Any, teacher: fx.GraphModule, run: _Run) -> Tensor:
    """All calibration images `[N, C, H, W]` in host memory, checked."""
    if isinstance(source, str) or not hasattr(source, "batches"):
        batches: Iterator[Tensor] = iter([source] if isinstance(source, Tensor) else source)
        limit = None
    else:
        ctx = CalibrationContext(
            teacher, run.shape, run.mean, run.std, source.count, source.batch_size, run.device,
            make_rng(run.seed, "calibration"), Feedback(run.feedback.progress, run.note),
        )  # fmt: skip
        batches, limit = source.batches(ctx), source.count
    kept = [_checked(batch, run.shape) for batch in batches]
    if not kept or not sum(len(b) for b in kept):
        raise CalibrationError("the data source gave no images")
    images = torch.cat(kept)[:limit]
    if run.mean is None or run.std is None:
        return images
    low, high = _valid_range(run.mean, run.std)
    return torch.minimum(torch.maximum(images, low), high)


def _checked(batch: Any, shape: tuple[int, int, int]) -> Tensor:
    if not isinstance(batch, Tensor) or batch.dtype != torch.float32 or tuple(batch.shape[1:]) != shape:
        found = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise CalibrationError(f"the data source gave {found}; batches are float32 [B, {', '.join(map(str, shape))}]")
    if not bool(torch.isfinite(batch).all()):
        raise CalibrationError("the data source gave values that are not finite")
    return batch.detach().cpu()


def _valid_range(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest input per channel, [1, C, 1, 1] each: those of a black and a white pixel."""
    return ((0 - mean) / std).view(1, -1, 1, 1), ((1 - mean) / std).view(1, -1, 1, 1)


def _check_fold(teacher: fx.GraphModule, folded: fx.GraphModule, images: Tensor, run: _Run) -> float:
    error = fold_error(teacher, folded, images[:16].to(run.device))
    if not error < _FOLD_TOLERANCE:
        run.note(
            f"folding BatchNorm changed the outputs by {error:.1e} of their largest, more than {_FOLD_TOLERANCE:.0e}"
        )
    return error


def _input_ends(images: Tensor, synthetic: bool, run: _Run) -> tuple[float, float] | None:
    """Least and greatest value the network's input can take; None where the images themselves say.

    The valid pixels where the normalization is stated. Else, for synthetic images, three deviations around the mean:
    statistics are what such images share with real ones, not extremes, and an input cut off costs more than a coarser step.
    """
    if run.mean is not None and run.std is not None:
        low, high = _valid_range(run.mean, run.std)
        return float(low.min()), float(high.max())
    if not synthetic:
        return None
    std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    return float(torch.minimum((mean - 3 * std).min(), images.min())), float(
        torch.maximum((mean + 3 * std).max(), images.max())
    )


def _ranges(
    teacher: fx.GraphModule, plan: QuantPlan, images: Tensor, estimate: Any, ends: tuple[float, float] | None, run: _Run
) -> dict[str, QParams]:
    if not plan.values:
        return {}
    rng = make_rng(run.seed, "ranges")
    acts = observe(teacher, plan, images.split(64), estimate, rng=rng, device=run.device)
    if ends is not None:
        acts |= input_params(*ends, plan, input_node(teacher).meta["value"])
    return {name: q.to(run.device) for name, q in acts.items()}


def _compare(
    teacher: fx.GraphModule, student: fx.GraphModule, graph: fx.GraphModule, images: Tensor, run: _Run
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
