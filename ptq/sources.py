"""Calibration images of a run: which source, from which networks, gathered and checked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset

from ptq import plugins
from ptq.batch_cache import open_cache
from ptq.contracts import EFFORTS, CalibrationContext, Calibrator, Feedback, make_rng, of_a_data_set, valid_range
from ptq.errors import CalibrationError, SpecError
from ptq.graph.ops import find_op, output_node
from ptq.graph.taps import batch_norms
from ptq.graph.trace import trace
from ptq.integrity import file_sum
from ptq.run import Run, floats, outside_inference_mode, start_run
from ptq.similarity import Similarity, similarity

Data = str | Calibrator | Tensor | Dataset | Iterable[Any]
# What `auto` takes: the first whose needs the network meets, and for which networks that is.
_WHY = {"genie": "BatchNorm", "inceptionism": "no BatchNorm", "gaussian": "no BatchNorm and no classes"}
_AUTO = tuple(_WHY)


@dataclass(frozen=True)
class Synthesis:
    """Images `[N, C, H, W]` in the network's input space. curve: (step, loss), of sources that minimize something.

    source: the resolved options. clipped: share of the source's values that were no valid pixels, and were clipped to such.
    """

    images: Tensor
    source: str
    curve: tuple[tuple[int, float], ...]
    clipped: float
    seconds: float
    notes: tuple[str, ...]


@outside_inference_mode
def synthesize(
    model: nn.Module,
    data: str | Calibrator = "auto",
    *,
    input_shape: tuple[int, int, int],
    teachers: Sequence[nn.Module] = (),
    effort: str = "standard",
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    feedback: Feedback | None = None,
) -> Synthesis:
    """Makes calibration images from a trained network; the arguments are those of `ptq.quantize`.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError: a bad argument, or a network the source cannot serve.
    """
    source = build_source(data, effort)
    curve: list[tuple[int, Tensor]] = []
    feedback = feedback or Feedback()

    def keep(step: int, value: Tensor) -> None:
        curve.append((step, value))
        feedback.loss(step, value)

    spoken = replace(feedback, loss=keep)
    run = start_run(input_shape, device, seed, mean, std, spoken, cache)
    networks = trace_all(model, teachers, run)
    source = settle_source(source, networks, run, effort)
    images = run.timed("synthesis", gather, source, networks, run)
    steps = tuple((step, float(value)) for step, value in curve)
    clipped = sum(run.clipped) / max(1, len(run.clipped))
    return Synthesis(images, describe_data(source), steps, clipped, run.seconds["synthesis"], tuple(run.notes))


@outside_inference_mode
def data_similarity(
    model: nn.Module,
    data: Data,
    *,
    input_shape: tuple[int, int, int],
    effort: str = "standard",
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    feedback: Feedback | None = None,
) -> Similarity:
    """How much images look like the training data to a trained network: J_KL, see `ptq.similarity`.

    Args:
        data: as for `ptq.quantize`; all images of a tensor or an iterable count, of a source as many as it is asked for.
        mean, std: the normalization inputs carry. Where it is a data set's own (a std of 0.15 to 0.4), inputs have zero mean
            and unit deviation over the training data, and count as one more layer.

    Raises:
        SpecError, PluginError, ModelError, CalibrationError: a bad argument, or a network without BatchNorm.
    """
    source = build_source(data, effort)
    run = start_run(input_shape, device, seed, mean, std, feedback, cache)
    networks = trace_all(model, (), run)
    if not batch_norms(networks[0]):
        raise CalibrationError("images are compared by the network's BatchNorm statistics, and the network has none")
    source = settle_source(source, networks, run, effort)
    normalized = run.std is not None and of_a_data_set(run.std)
    # What is given is measured as it is; what a source makes, as it would be used: with valid pixels only.
    batches = batches_of(source, networks, run, clip=getattr(source, "synthetic", False))
    total = source.count if hasattr(source, "batches") else 0
    return similarity(
        networks[0], batches, device=run.device, normalized=normalized, total=total, feedback=run.feedback
    )


def build_source(data: Data, effort: str, *, training: bool = False) -> Any:
    """The source that `data` names, or `data` itself; "auto" stays as it is until the network is known.

    training: its images are made while a student is trained.

    Raises:
        SpecError: an unknown effort. PluginError: an unknown source or option. CalibrationError: a file of its is not there.
    """
    if effort not in EFFORTS:
        raise SpecError(f"unknown effort {effort!r}; known: {', '.join(EFFORTS)}")
    if isinstance(data, str) and data.partition(":")[0] != "auto":
        data = plugins.build("calibrators", data, effort, training=training)
    if gone := [path for path in _files(data) if not path.exists()]:  # said before anything is traced
        raise CalibrationError(f"{gone[0]} is neither a folder nor a file")
    return data


def _files(source: Any) -> list[Path]:
    """What a source reads, and each of its sources where it mixes some."""
    parts = [part for part in getattr(source, "sources", (source,)) if _has_options(part)]
    named = [(getattr(part, f.name), str(f.type)) for part in parts for f in fields(part)]
    return [Path(v) for v, kind in named if isinstance(v, Path) or (isinstance(v, str) and "Path" in kind)]


def trace_all(model: nn.Module, teachers: Sequence[nn.Module], run: Run) -> tuple[fx.GraphModule, ...]:
    """The network, and further teachers of the same images, traced, on the run's device."""
    networks = tuple(trace(m, run.shape).to(run.device) for m in (model, *teachers))
    if any(_ends_in_softmax(network) for network in networks):
        run.note(
            "the network ends in a softmax: methods that read scores (inceptionism, nayer, vae_replay, distillation, the joint pass) "
            "take its probabilities for scores; give it without the softmax where they are used"
        )
    return networks


def _ends_in_softmax(network: fx.GraphModule) -> bool:
    op = find_op(network, output_node(network))
    return op is not None and op.name == "softmax"


def settle_source(
    source: Any, networks: tuple[fx.GraphModule, ...], run: Run, effort: str, option: str = "--data"
) -> Any:
    """The source, "auto" resolved, once it is clear that every network has what it needs.

    option: where another would be named.

    Raises:
        CalibrationError: the network lacks what the source needs; names the sources that serve it.
    """
    has = set.intersection(*(_has(network) for network in networks))
    if isinstance(source, str):
        chosen = next(name for name in _AUTO if set(plugins.load("calibrators", name).needs) <= has)
        run.note(f"data source: {chosen}, the best for a network with {_WHY[chosen]}")
        return plugins.build("calibrators", chosen + source.removeprefix("auto"), effort)
    for part in getattr(source, "sources", (source,)):
        missing = [need for need in getattr(part, "needs", ()) if need not in has]
        if missing:
            name = plugins.describe(part).partition(":")[0] if _has_options(part) else type(part).__name__
            raise CalibrationError(_refusal(name, missing[0], has, option))
    return source


def _has(teacher: fx.GraphModule) -> set[str]:
    """What the network has, of what sources need."""
    found = {"BatchNorm"} if batch_norms(teacher) else set()
    shape = output_node(teacher).meta["shape"]
    return found | ({"classes"} if len(shape) == 1 and shape[0] > 1 else set())


def _refusal(name: str, missing: str, has: set[str], option: str) -> str:
    why = {
        "BatchNorm": "draws on the network's BatchNorm statistics, and the network has none",
        "classes": "needs a classifier, [B, classes] out with two classes or more, and the network's output has another shape",
    }
    fit = [name for name, cls in plugins.classes("calibrators").items() if name != "mix" and set(cls.needs) <= has]
    return (
        f"{name} {why[missing]}; sources that serve it: {', '.join(fit)}, as in '{option} {fit[0]}', or '{option} auto'"
    )


def describe_data(source: Any) -> str:
    """A source as its options name it; what somebody brings as an object without options is known by its images alone."""
    return plugins.describe(source) if _has_options(source) else "tensors given from Python"


def _has_options(source: Any) -> bool:
    return hasattr(source, "batches") and is_dataclass(source)


def describe_asked(data: Data, source: Any, effort: str) -> str:
    """A source as its options name it, and what they are where a student is trained, if not the same: it can be built from this.

    data: as it was asked for. source: what that is.
    """
    text, own = describe_data(source), getattr(source, "in_training", {})
    if not own or not isinstance(data, str):
        return text
    trainer = build_source(data, effort, training=True)
    if isinstance(trainer, str):  # "auto": what it stands for is built anew
        return text
    then = [f"{name}={getattr(trainer, name)}" for name in own if getattr(trainer, name) != getattr(source, name)]
    return f"{text},training=({','.join(then)})" if then else text


def gather(source: Any, networks: tuple[fx.GraphModule, ...], run: Run) -> Tensor:
    """All images `[N, C, H, W]` in host memory, channels last; valid pixels where the normalization is stated.

    Every convolution keeps that layout, which is the one it computes fastest in on CPUs.

    Raises:
        CalibrationError: there are none, or they are not what they should be.
    """
    kept = list(batches_of(source, networks, run))
    if not kept or not sum(len(b) for b in kept):
        raise CalibrationError("the data source gave no images")
    return torch.cat(kept).contiguous(memory_format=torch.channels_last)


def batches_of(
    source: Any, networks: tuple[fx.GraphModule, ...], run: Run, *, clip: bool = True, **changes: Any
) -> Iterator[Tensor]:
    """Checked batches in host memory, one at a time.

    Args:
        clip: to valid pixels, where the normalization is stated. changes: to the context that the source is handed.
    """
    if not hasattr(source, "batches"):
        batches, left = _from_python(source), None
    else:
        ctx = replace(_context(source, networks, run), **changes)
        batches, left = source.batches(ctx), ctx.count
    for batch in batches:
        batch = _checked(batch, run.shape)[:left]
        left = None if left is None else left - len(batch)
        if len(batch):
            yield _clipped(batch, run) if clip else batch


def _context(source: Any, networks: tuple[fx.GraphModule, ...], run: Run) -> CalibrationContext:
    root = run.cache if _has_options(source) else None  # nothing tells others' images apart
    cache = None if root is None else open_cache(root, networks, settings(source, run))
    return CalibrationContext(
        networks[0], run.shape, run.mean, run.std, source.count, source.batch_size, run.device,
        make_rng(run.seed, "calibration"), run.stage_feedback, networks[1:], cache=cache,
    )  # fmt: skip


def settings(source: Any, run: Run) -> dict[str, Any]:
    """All that images depend on, besides the networks."""
    read = [file_sum(file) for file in _files(source) if file.is_file()]
    return {
        "source": describe_data(source), "files": read, "seed": run.seed, "shape": run.shape, "device": run.device.type,
        "mean": floats(run.mean), "std": floats(run.std), "ptq": version("ptq"),
    }  # fmt: skip


def _from_python(source: Any, size: int = 64) -> Iterator[Any]:
    """Batches of a tensor, a Dataset, a DataLoader or an iterable; of (images, labels) pairs, the images."""
    if isinstance(source, Tensor):
        yield from source.split(256)
        return
    if (
        source is None
        or isinstance(source, str | Path)
        or (not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"))
    ):
        raise CalibrationError(f"data {source!r} given; pictures on disk are 'images:PATH', a tensor is [N, C, H, W]")
    items = (
        (source[i] for i in range(len(source)))  # type: ignore[arg-type]
        if isinstance(source, Dataset) and hasattr(source, "__len__")
        else source
    )
    single: list[Tensor] = []
    for item in items:
        item = item[0] if isinstance(item, tuple | list) and item else item
        if isinstance(item, Tensor) and item.ndim == 3:
            single.append(item)
            if len(single) == size:
                yield torch.stack(single)
                single = []
        else:
            yield item
    if single:
        yield torch.stack(single)


def _checked(batch: Any, shape: tuple[int, int, int]) -> Tensor:
    if not isinstance(batch, Tensor) or batch.dtype != torch.float32 or tuple(batch.shape[1:]) != shape:
        found = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise CalibrationError(f"the data source gave {found}; batches are float32 [B, {', '.join(map(str, shape))}]")
    if not bool(torch.isfinite(batch).all()):
        raise CalibrationError("the data source gave values that are not finite")
    return batch.detach().cpu()


def _clipped(batch: Tensor, run: Run) -> Tensor:
    if run.mean is None or run.std is None:
        return batch
    low, high = valid_range(run.mean, run.std)
    half = 0.5 / 255 / run.std.view(1, -1, 1, 1)  # nearer than half a step, rounding loses nothing
    run.clipped.append(float(((batch < low - half) | (batch > high + half)).float().mean()))
    return torch.minimum(torch.maximum(batch, low), high)
