"""How a training is put together: its options, where images come from, what is kept and what is told."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq import plugins
from ptq.artifact import QuantizedModel
from ptq.batch_cache import BatchCache, digest_of, open_cache
from ptq.contracts import Carry, Feedback, make_rng
from ptq.distilling.feed import Feed, FromPool, FromSet, FromStream, Source
from ptq.distilling.loop import Forward
from ptq.distilling.statistics import under_batch_statistics
from ptq.errors import CalibrationError, ModelError, PluginError, SpecError
from ptq.evaluate import check_labels, runner, top1
from ptq.graph.network_checks import own_copy
from ptq.graph.ops import output_node, values_of
from ptq.graph.source_line import first_line
from ptq.graph.trace import tensors_of, trace
from ptq.pictures import Pictures, open_pictures
from ptq.quant.affine import dequantize
from ptq.run import Run
from ptq.sources import Data, batches_of, build_source, settings
from ptq.training import Training

_LIKE = 0.3  # cosine between a network's weights and their codes' values; below, they are not of one network
Labelled = str | Path | Pictures | tuple[Tensor, Tensor]


def read_training(given: str | Training, base: Training, effort: str) -> Training:
    """The options of a training: what was given, else the effort's, else `base`.

    Raises:
        PluginError, SpecError: an option that does not exist, or a value that does not fit.
    """
    if isinstance(given, Training):
        return given
    return replace(base, **{**Training.presets.get(effort, {}), **plugins.read_options(Training, "training", given)})


def training_of_quantized(given: str | Training, trainer: Any, effort: str) -> Training:
    """The same of a quantized student: the defaults, and the source's word on how its images come."""
    its: Training = getattr(trainer, "training", Training())
    fed = {name: getattr(its, name) for name in ("feed", "rounds", "first_rounds", "pool")}
    how = read_training(given, replace(Training(), **fed), effort)
    if how.precision == "bfloat16":
        raise SpecError("precision=bfloat16 given; codes of 8 bits are as fine as bfloat16 itself: leave it out")
    return replace(how, precision="float32")


def trainer_of(data: Data, source: Any, effort: str) -> Any:
    """The source as it makes images while a quantized student is trained, which has no BatchNorm to follow a batch.

    Raises:
        SpecError: the source was asked to make images for the batch's statistics.
    """
    if getattr(source, "teacher_bn", "running") == "batch":
        raise SpecError(
            "a quantized student has its BatchNorm folded and cannot normalize by the batch; leave out teacher_bn=batch, or "
            "take other images"
        )
    trainer = build_source(data, effort, training=True)
    if isinstance(trainer, str) or getattr(trainer, "teacher_bn", "running") == "batch":
        return source
    return trainer


def make_feed(
    how: Training, source: Any, networks: tuple[fx.GraphModule, ...], student: nn.Module, run: Run, images: Tensor | None,
    kept: BatchCache | None,
) -> Feed:  # fmt: skip
    """Where batches come from.

    Raises:
        SpecError: the source makes its images once and for all, and more are asked for.
    """
    if how.feed == "set":
        assert images is not None
        return FromSet(images, how.batch_size)
    check_feed(how, source)
    if how.feed == "stream":
        return FromStream(_opened(source, networks, run, how.batch_size, clip=False), student, how)
    pool = None if kept is None else kept.within("pool")
    return FromPool(_opened(source, networks, run, source.batch_size, clip=True), student, how, source.batch_size, pool)


def check_feed(how: Training, source: Any) -> None:
    """Raises SpecError where images are to be made in training by a source that makes a fixed set."""
    its: Training | None = getattr(source, "training", None)
    if how.feed != "set" and (its is None or its.feed == "set"):
        able = [name for name, cls in plugins.classes("calibrators").items() if hasattr(cls, "training")]
        raise SpecError(
            f"feed={how.feed} asked for, of a source that makes a fixed set; those that make images while a student is "
            f"trained: {', '.join(able)}"
        )
    if how.feed != "set" and not how.epochs:
        raise SpecError(f"epochs=0 with feed={how.feed} asked for; there are no images without epochs")


def _opened(source: Any, networks: tuple[fx.GraphModule, ...], run: Run, size: int, *, clip: bool) -> Source:
    """Opens the source for batches of `size`; what is made for the student of the moment is not cached, and not told of.

    clip: images that are kept are pictures, as if they had been stored as such; those of one step are as they are made.
    """

    def opened(student: nn.Module | None, count: int, carry: Carry | None) -> Iterator[Tensor]:
        sized = replace(source, count=count * size, batch_size=size)
        if carry is None:
            return batches_of(sized, networks, run, clip=clip)
        return batches_of(
            sized, networks, run, clip=clip, student=None if student is None else _Scores(student), carry=carry, cache=None,
            rng=make_rng(run.seed, "in training"), feedback=Feedback(note=run.note),
        )  # fmt: skip

    return opened


class _Scores(nn.Module):
    """A student as sources see it: images → scores, also where it gives them by name."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        return tensors_of(self.student(x))[0]


def kept_state(
    run: Run, networks: tuple[fx.GraphModule, ...], source: Any, how: Training, images: Tensor | None, labelled: Pictures | None,
    trained: str = "",
) -> BatchCache | None:  # fmt: skip
    """Where the state after each epoch is kept; its name covers all that the training depends on.

    trained: what the graphs, which are of networks in eval mode, leave out of the student: dropout, momentum.
    """
    if run.cache is None:
        return None
    told: dict[str, Any] = {"training": plugins.describe_options(how), "student": trained, "seed": run.seed}
    told["reported"] = None if labelled is None else labelled.digest()
    told |= settings(source, run)
    if images is not None:
        told["images"] = digest_of(images)
    return open_cache(run.cache, networks, told).within("training")


def student_graph(student: nn.Module, teacher: fx.GraphModule, run: Run) -> fx.GraphModule:
    """The student as a graph, once it is clear that it takes and gives what the teacher does.

    Raises:
        ModelError: it does not.
    """
    try:
        traced = trace(student, run.shape)
    except ModelError as e:
        raise ModelError(f"the student: {e}") from e
    theirs, wanted = (tuple(output_node(gm).meta["shape"]) for gm in (traced, teacher))
    if theirs != wanted:
        given, asked = (", ".join(map(str, ("B", *shape))) for shape in (theirs, wanted))
        raise ModelError(
            f"the student gives [{given}], its teacher [{asked}]; a student has as many classes as its teacher"
        )
    _check_alone(student, run)
    return traced


def classes_of(graph: fx.GraphModule) -> int:
    """K, of a network whose output is [B, K] or [B, K, …]."""
    return output_node(graph).meta["shape"][0]


def _check_alone(student: nn.Module, run: Run) -> None:
    """Raises unless the student gives one tensor in training too, and not the scores of auxiliary heads beside it."""
    learning = own_copy(student).to("cpu").train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = tensors_of(learning(torch.rand(2, *run.shape)))
    except Exception as e:  # whatever a network's own code raises
        raise ModelError(f"the student fails in training mode: {first_line(e)}") from e
    if len(found) != 1:
        raise ModelError(
            f"the student gives {len(found)} tensors in training; wrap it in a module that gives the scores alone"
        )


def open_labelled(given: Labelled | None, run: Run, classes: int | None = None) -> Pictures | None:
    """The labelled pictures to report on, in random order: statistics of a batch are those of all classes.

    Raises:
        CalibrationError: they are not there, or have no labels, or some beyond the `classes`.
    """
    if given is None:
        return None
    if isinstance(given, Pictures):
        pictures = given
    elif isinstance(given, tuple | list):
        pictures = _pictures_of(given, run)
    else:
        pictures = open_pictures(Path(given), run.shape, run.mean, run.std)
    pictures.read(torch.tensor([0]))
    check_labels(pictures, classes)
    assert pictures.labels is not None
    order = torch.randperm(len(pictures), generator=make_rng(0, "report"))
    found = pictures.source
    mixed = [found[i] for i in order.tolist()] if isinstance(found, list) else found[order.numpy()]
    return replace(pictures, source=mixed, labels=pictures.labels[order])


def _pictures_of(given: Sequence[Any], run: Run) -> Pictures:
    """(images, labels), as tensors or arrays: images [N, …], labels [N]."""
    try:
        images, labels = (torch.as_tensor(part).detach().cpu() for part in given)
    except (TypeError, ValueError, RuntimeError) as e:
        raise CalibrationError(
            f"labelled pictures are (images, labels), two tensors or arrays; found otherwise: {e}"
        ) from e
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images) or labels.is_floating_point():
        raise CalibrationError(
            f"images of shape {tuple(images.shape)} and labels {labels.dtype} of shape {tuple(labels.shape)} found; "
            "to report on, there are [N, C, H, W] and class numbers [N], N at least 1"
        )
    pixels = images if images.dtype == torch.uint8 else images.float()
    return Pictures(pixels.numpy(), labels.long(), run.shape, run.mean, run.std)


def reporter(pictures: Pictures | None, student: nn.Module, run: Run, by_batch: bool) -> Callable[[], float] | None:
    """Top-1 of the student as it stands, in per cent; under the batch's statistics where it learns under them."""
    if pictures is None:
        return None
    size = -(-len(pictures) // -(-len(pictures) // 256))  # batches as equal as can be: small ones have poor statistics

    def report() -> float:
        as_is = under_batch_statistics(student) if by_batch else student.eval()
        return 100 * top1(runner(as_is, run.device), pictures, size)

    return report


def forward(module: nn.Module, how: Training) -> Forward:
    """What runs in training: a tuple of outputs.

    Where networks are compiled, its first run raises SpecError if that does not work here.
    """
    run: Any = torch.compile(module) if how.compile else module

    def tupled(x: Tensor) -> tuple[Tensor, ...]:
        try:
            out = run(x)
        except torch._dynamo.exc.TorchDynamoException as e:  # pyright: ignore[reportAttributeAccessIssue]
            why = str(e).strip().splitlines()[0]
            raise SpecError(f"compile=true asked for, and torch.compile fails: {why}; leave compile out") from e
        return tuple(tensors_of(out))

    return tupled


def fresh_copy(student: nn.Module, device: torch.device) -> nn.Module:
    """A copy to be trained, in float32, every parameter of it."""
    return copy.deepcopy(student).float().requires_grad_(True).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def data_of(qm: QuantizedModel) -> Data:
    """The images of a quantized network's recipe: made again, or those it still holds where they are a fixed set.

    Raises:
        SpecError: they came from Python and are gone.
    """
    text = str(qm.manifest.recipe.get("data", ""))
    if text.startswith("tensors"):
        if qm.images is None:
            raise SpecError(
                "this network was calibrated on images given from Python, which it does not hold; name data"
            )
        return qm.images
    try:
        source = plugins.build("calibrators", text)
    except PluginError:
        if qm.images is None:
            raise
        return qm.images  # of a source that was given as an object
    return text if qm.images is None or hasattr(source, "training") else qm.images


def check_pair(qm: QuantizedModel, folded: fx.GraphModule) -> None:
    """Raises unless the quantized network was made from this float network.

    Raises:
        ModelError: another architecture, or other weights. SpecError: channels were rescaled between the two.
    """
    if "equalize" in str(qm.manifest.recipe.get("repair", "")) and qm.manifest.metrics.get("equalized", True):
        raise SpecError(
            "this network's channels were equalized before it was quantized, so that its blocks are not the float network's; "
            "distil in the run that quantizes: ptq quantize --repair equalize --distill"
        )
    floats_by_name = dict(folded.named_parameters())
    for path, (codes, q) in qm.integer_weights().items():
        weight = floats_by_name.get(f"{path}.weight")
        if weight is None or weight.shape != codes.shape:
            raise ModelError(
                f"the float network has no layer {path} like the quantized one's; name the network it was made from"
            )
        like = torch.cosine_similarity(weight.detach().cpu().flatten(), dequantize(codes, q).flatten(), dim=0)
        if codes.numel() > 64 and float(like) < _LIKE:  # a handful of weights may look like any other
            raise ModelError(
                f"layer {path} has other weights than the quantized network was made from; name that network"
            )
    missing = set(values_of(qm.student)) - set(values_of(folded))
    if missing:
        raise ModelError(
            f"the float network has no value {sorted(missing)[0]}; name the network the quantized one was made from"
        )
