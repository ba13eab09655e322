"""Block after block: capture what the block sees, fit it to the teacher, harden its weights to integers.

The input of a block comes from the already quantized front of the network, its target from the teacher. Biases are rounded in
training as they will be: at two bits the accumulator's steps are wide, and the weights can make up for it. Where the fitted
block ends above the error of nearest rounding, nearest rounding stays.
"""

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx

from ptq.batch_cache import BatchCache
from ptq.contracts import Feedback, Reconstructor, make_rng
from ptq.graph.blocks import Block, extract, input_value_node, split
from ptq.graph.channel_axis import channel_axis
from ptq.graph.insert import fake_quantize_bias, round_bias
from ptq.graph.ops import input_node, values_of, weighted_nodes
from ptq.precision import pays
from ptq.quant.fake_quant import (
    ActFakeQuant,
    FloatBias,
    integer_codes,
    store_integer,
    swap,
    weight_grid,
)
from ptq.reconstruct._capture import (
    Capture,
    Space,
    channels_second,
    compare_all,
    outputs_of,
    picked,
    quantized_input,
    run_all,
    stored,
)
from ptq.reconstruct._checkpoint import keep, restore
from ptq.reconstruct._fisher import fisher_weights
from ptq.reconstruct._in_place import relus_in_place
from ptq.reconstruct._precision import in_bfloat16
from ptq.reconstruct._soft_round import SoftRound
from ptq.reconstruct._steps import Steps

log = logging.getLogger(__name__)

_LOOK = 50  # steps between looks at the loss, each of which waits for the device


@dataclass(frozen=True, slots=True)
class BlockReport:
    """How one block ended. nearest_error, error: squared error against the teacher with nearest rounding and as kept;
    kept: "fitted" or "nearest"; sqnr_db: of the block's output on the calibration images; seconds: spent on it."""

    name: str
    layers: tuple[str, ...]
    nearest_error: float
    error: float
    kept: str
    sqnr_db: float
    seconds: float


def reconstruct_blocks(
    teacher: fx.GraphModule, student: fx.GraphModule, images: Tensor, method: Reconstructor,
    *, seed: int, device: torch.device, feedback: Feedback, memory: int | None = None,
    precision: str = "auto", cache: BatchCache | None = None,
) -> tuple[fx.GraphModule, list[BlockReport]]:  # fmt: skip
    """A copy of `student` with every weight hardened to integer codes, and a report per block.

    Args:
        teacher: the float network. student: its fake-quantized copy (`insert_fake_quant`).
        images: calibration images `[N, C, H, W]`, in host memory.
        method: the rounding method. seed: of every random choice. device: where blocks are trained.
        memory: bytes of host memory for what blocks see, the rest goes to disk; default: a quarter of what is free.
        precision: of the layers' sums of products in training, of `ptq.spec.PRECISIONS`.
        cache: keeps finished blocks; those that are there are not trained again. Its name must cover all other arguments.

    Raises:
        ReconstructionError: neither memory nor disk hold what a block sees, or the method does not suit the network.
        CalibrationError: the cache cannot be written.
    """
    student, space = copy.deepcopy(student), Space(memory)
    try:
        half = pays(precision, device)
        return student, list(_blocks(teacher, student, images, method, seed, device, feedback, space, half, cache))
    finally:
        space.close()


def _blocks(
    teacher: fx.GraphModule, student: fx.GraphModule, images: Tensor, method: Reconstructor, seed: int,
    device: torch.device, feedback: Feedback, space: Space, half: bool, cache: BatchCache | None,
) -> Iterator[BlockReport]:  # fmt: skip
    blocks = split(student, method.unit)
    stem = input_value_node(student)
    if stem.op != "placeholder":  # its values are captured now: no block that shares its scale may train it
        student.get_submodule(str(stem.target)).frozen = True  # type: ignore[assignment]
    teacher_values = Capture({input_node(teacher).meta["value"]: images}, space)
    student_values = Capture({stem.meta["value"]: quantized_input(student, stem, images, device, space)}, space)
    for k, block in enumerate(blocks):
        start = time.perf_counter()
        job = _Job(teacher, student, block, teacher_values, student_values, device, space, half)
        found = restore(cache, k, student, block)
        kept = "" if found else _fit(job, method, seed, feedback, (k, len(blocks)), images)
        biases = _biases(student, block)
        _harden(student, block)
        outputs = run_all(extract(student, block.inputs, block.outputs), job.student_in, device, space)
        if found:
            report = BlockReport(**found)
            feedback.progress("reconstruction", (k + 1) * method.steps, len(blocks) * method.steps)
        else:
            error, sqnr = compare_all(stored(outputs), job.targets, job.axes)
            seconds = round(time.perf_counter() - start, 3)
            report = BlockReport(block.name, block.layers, job.nearest_error, error, kept, sqnr, seconds)
            keep(cache, k, student, block, biases, asdict(report))
        yield report
        still_read = {name for later in blocks[k + 1 :] for name in later.inputs}
        teacher_values.store(block, job.targets)
        student_values.store(block, outputs)
        teacher_values.forget(still_read)
        student_values.forget(still_read)
        del job, outputs  # the next block's values would be made beside this one's


class _Job:
    """One block with all that its fitting reads."""

    def __init__(
        self, teacher: fx.GraphModule, student: fx.GraphModule, block: Block,
        teacher_values: Capture, student_values: Capture, device: torch.device, space: Space, half: bool,
    ) -> None:  # fmt: skip
        self.block, self.device, self.teacher, self.student = block, device, teacher, student
        self.space, self.half = space, half
        self.teacher_in, self.student_in = teacher_values.inputs(block), student_values.inputs(block)
        self.targets = run_all(extract(teacher, block.inputs, block.outputs), self.teacher_in, device, space)
        nodes = values_of(teacher)
        self.axes = [channel_axis(teacher, nodes[name]) for name in block.outputs]
        self.fisher: list[Tensor] | None = None
        self.module = extract(student, block.inputs, block.outputs)
        self.paths = [
            p for p in block.layers if weight_grid(student.get_submodule(p)) is not None
        ]  # the others stay float
        self.layers = [student.get_submodule(path) for path in self.paths]
        self.nearest_error = math.inf

    def error(self) -> float:
        """The block's error with biases on the accumulator's grid, as they will be; afterwards they are float again."""
        biases = [None if layer.bias is None else layer.bias.detach().clone() for layer in self.layers]  # pyright: ignore[reportCallIssue]
        _round_biases(self.student, self.block)
        error, _ = compare_all(outputs_of(self.module, self.student_in, self.device), self.targets, self.axes)
        for layer, bias in zip(self.layers, biases):
            if bias is not None:
                swap(layer, "bias", FloatBias(), bias)
        return error


def _fit(
    job: _Job, method: Reconstructor, seed: int, feedback: Feedback, place: tuple[int, int], images: Tensor
) -> str:
    """Trains the block's rounding; puts nearest rounding back where that was better. Says which was kept."""
    job.nearest_error = job.error()
    if method.steps == 0:
        return "nearest"
    if method.needs_fisher:
        rng = make_rng(seed, f"fisher/{job.block.name}")
        job.fisher = fisher_weights(job.teacher, job.block, images, rng, job.device, job.space)
    kept = _trained(job, method, seed, feedback, place)
    for weights in job.fisher or []:
        job.space.free(weights)
    return kept


def _trained(job: _Job, method: Reconstructor, seed: int, feedback: Feedback, place: tuple[int, int]) -> str:
    quantizers = [m for m in job.module.modules() if isinstance(m, ActFakeQuant)]
    scales = [m.scale.detach().clone() for m in quantizers]
    nearest = [integer_codes(layer, "weight") for layer in job.layers]
    biases = _biases(job.student, job.block)
    # The caller may have switched gradients off.
    with torch.enable_grad(), relus_in_place(job.module), in_bfloat16(job.layers, job.half) as job.half:
        sound = _train(job, method, seed, feedback, place)
    for quantizer in quantizers:
        quantizer.drop, quantizer.mask_rng, quantizer.idle = 0.0, None, False
        quantizer.scale.requires_grad_(False)
    for path, layer in zip(job.paths, job.layers):
        if path in biases:
            swap(layer, "bias", FloatBias())  # no longer rounded where it is read
            layer.parametrizations["bias"].original.requires_grad_(False)  # type: ignore[index, operator]
        grid = weight_grid(layer)
        if isinstance(grid, SoftRound):
            store_integer(layer, "weight", *grid.harden())
    error = job.error() if sound and _sound(job, quantizers) else math.inf
    if error < job.nearest_error:
        return "fitted"
    if math.isfinite(error):
        log.info("block %s: fitted error %.4g, nearest %.4g; nearest is kept", job.block.name, error, job.nearest_error)
    else:
        feedback.note(f"block {job.block.name}: training diverged; it keeps nearest rounding")
    for path, layer, held in zip(job.paths, job.layers, nearest):
        if held is not None:
            store_integer(layer, "weight", *held)
        if path in biases:
            swap(layer, "bias", FloatBias(), biases[path])
    for quantizer, scale in zip(quantizers, scales):
        quantizer.scale.data.copy_(scale)
    return "nearest"


def _sound(job: _Job, quantizers: list[ActFakeQuant]) -> bool:
    """Whether every scale of the block is still a positive number."""
    grids = [weight_grid(layer) for layer in job.layers]
    scales = [m.scale for m in (*quantizers, *grids) if m is not None]
    return all(bool((torch.isfinite(s) & (s > 0)).all()) for s in scales)


def _train(job: _Job, method: Reconstructor, seed: int, feedback: Feedback, place: tuple[int, int]) -> bool:
    """Trains what the method made learnable; False where the loss was no longer finite and it stopped."""
    # Masks are drawn where they are used; which images are picked is the same on every device.
    mask_rng = make_rng(seed, f"drop/{job.block.name}", job.device)
    pick_rng = make_rng(seed, f"batches/{job.block.name}")
    groups = method.attach(job.module, mask_rng)
    if not groups:  # every layer of the block stays float
        feedback.progress("reconstruction", (place[0] + 1) * method.steps, place[1] * method.steps)
        return True
    for node in _weighted(job.student, job.block):
        fake_quantize_bias(job.student, node)  # what that costs, the rest of the block makes up for
    steps, count, (k, total) = Steps(groups), len(job.targets[0]), place
    for step in range(method.steps):
        pick = torch.randint(count, (min(method.batch_size, count),), generator=pick_rng)
        loss = _step(job, method, steps, pick, mask_rng, step / method.steps)
        feedback.progress("reconstruction", k * method.steps + step + 1, total * method.steps)
        if step % _LOOK == 0 and not math.isfinite(float(loss)):
            feedback.progress("reconstruction", (k + 1) * method.steps, total * method.steps)
            return False
    return True


def _step(
    job: _Job, method: Reconstructor, steps: Steps, pick: Tensor, rng: torch.Generator, progress: float
) -> Tensor:
    """One optimizer step; the loss before it."""

    def batch(values: list[Tensor]) -> list[Tensor]:
        return [picked(v, pick).to(job.device) for v in values]

    def compared(values: list[Tensor]) -> list[Tensor]:
        return channels_second(values, job.axes)

    seen = [method.mix(t, s, rng) for t, s in zip(batch(job.teacher_in), batch(job.student_in))]
    with torch.autocast(job.device.type, torch.bfloat16, enabled=job.half):
        outputs = job.module(*seen)
    fisher = None if job.fisher is None else compared(batch(job.fisher))
    loss = method.loss(job.module, compared(list(outputs)), compared(batch(job.targets)), fisher, progress)
    steps.clear()
    loss.backward()
    steps.step(progress)
    return loss.detach()


def _biases(student: fx.GraphModule, block: Block) -> dict[str, Tensor]:
    """Copies of the biases of the block's layers, by layer, but for those that are integers or whose layer stays float."""
    layers = {path: student.get_submodule(path) for path in block.layers}
    return {
        path: layer.bias.detach().clone()  # pyright: ignore[reportCallIssue]
        for path, layer in layers.items()
        if weight_grid(layer) is not None and layer.bias is not None and integer_codes(layer, "bias") is None
    }


def _round_biases(student: fx.GraphModule, block: Block) -> None:
    """Stores the block's biases as integers, on the grid of its weights and inputs as they are."""
    for node in _weighted(student, block):
        round_bias(student, node)


def _weighted(student: fx.GraphModule, block: Block) -> list[fx.Node]:
    """The nodes of the block's layers."""
    return [node for node in weighted_nodes(student) if node.target in block.layers]


def _harden(student: fx.GraphModule, block: Block) -> None:
    """Stores the block's weights and biases as integers and freezes its activation scales."""
    for path in block.layers:
        layer = student.get_submodule(path)
        held = integer_codes(layer, "weight")
        if held is not None:
            store_integer(layer, "weight", *held)
    _round_biases(student, block)
    for module in extract(student, block.inputs, block.outputs).modules():
        if isinstance(module, ActFakeQuant):
            module.frozen = True
