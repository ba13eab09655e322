"""What a plug-in is: the protocols `Calibrator`, `Reconstructor`, `Finisher` and `Exporter`, and what they are handed.

A plug-in is a frozen dataclass: its fields are its hyper-parameters (defaults: its paper's), its methods the algorithm, its
file name its registration. `presets` gives the fields that the named efforts "quick" and "standard" change.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, fx, nn

from ptq.batch_cache import BatchCache
from ptq.errors import CalibrationError
from ptq.graph.plan import QuantPlan

if TYPE_CHECKING:
    from ptq.artifact import QuantizedModel

Presets = Mapping[str, Mapping[str, Any]]
EFFORTS = ("quick", "standard", "full")


def _silent_progress(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


def _silent_note(text: str) -> None:
    """Says nothing."""


def _silent_loss(step: int, value: Tensor) -> None:
    """Keeps nothing."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """How long work speaks: `progress(stage, done, total)` on every step, `note(text)` for what the user should know,
    `loss(step, value)` the objective of a synthesis, steps counted over all batches."""

    progress: Callable[[str, int, int], None] = _silent_progress
    note: Callable[[str], None] = _silent_note
    loss: Callable[[int, Tensor], None] = _silent_loss


def make_rng(seed: int, label: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator for one purpose: the same seed and label give the same numbers, other labels unrelated ones."""
    digest = hashlib.sha256(f"{seed}:{label}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def hold_back(images: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] to work on, and a random `share` of them, at least 16, that shall only judge the result.

    Fewer than 48 images are all worked on: none are held back.
    """
    if len(images) < 48:
        return images, images[:0]
    held = max(16, int(share * len(images)))
    order = torch.randperm(len(images), generator=make_rng(seed, "held back"))
    return images[order[held:]], images[order[:held]]


def valid_range(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest input per channel, [1, C, 1, 1] each: those of a black and a white pixel."""
    return ((0 - mean) / std).view(1, -1, 1, 1), ((1 - mean) / std).view(1, -1, 1, 1)


def of_a_data_set(std: Tensor) -> bool:
    """Whether a normalization by `std` [C], of pixels in [0, 1], is a data set's own, so that inputs are of unit deviation."""
    return bool(((std > 0.15) & (std < 0.4)).all())


@dataclass
class Carry:
    """Lets a source that makes images while a student is trained go on where an earlier run of it stopped.

    done: batches of that run, which are not made again: they come out empty. kept: name → state that the last of them left.
    """

    done: int = 0
    kept: Mapping[str, Any] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)  # name → what has that state now

    def reach(self, index: int, state: Mapping[str, Any]) -> bool:
        """Whether batch `index` is to be made; the first that is starts from what was kept."""
        if index < self.done:
            return False
        if not self.held:
            self.held = dict(state)
            for name, kept in self.kept.items():
                state[name].load_state_dict(kept)
        return True

    def state(self) -> dict[str, Any]:
        """name → state as it is now."""
        return {name: part.state_dict() for name, part in self.held.items()} or dict(self.kept)


@dataclass(frozen=True, slots=True)
class CalibrationContext:
    """What a calibrator is handed.

    model: the teacher: eval, parameters frozen, BatchNorm intact. input_shape: (C, H, W).
    mean, std: [C] each, the normalization that inputs carry, `(pixel / 255 - mean) / std`; None where it was not stated.
    count, batch_size: images wanted in all, and per batch. device: where batches are made.
    rng: a CPU generator, for what is drawn once; a batch draws from its own, see `batch`.
    others: more teachers, which take the same inputs: one set of images shall suit all. student: the network that is being
    trained on the images, where there is one. cache: keeps finished batches. carry: what passes from one batch to the next where
    there is no end of them.
    """

    model: fx.GraphModule
    input_shape: tuple[int, int, int]
    mean: Tensor | None
    std: Tensor | None
    count: int
    batch_size: int
    device: torch.device
    rng: torch.Generator
    feedback: Feedback = field(default_factory=Feedback)
    others: tuple[fx.GraphModule, ...] = ()
    student: nn.Module | None = None
    cache: BatchCache | None = None
    carry: Carry | None = None

    def sizes(self) -> list[int]:
        """Images per batch, adding up to `count`, as equal as can be: a lone image has no batch statistics."""
        batches = -(-self.count // self.batch_size)
        return [self.count // batches + (k < self.count % batches) for k in range(batches)]

    def rng_of(self, index: int) -> torch.Generator:
        """The random generator of batch, or part of the run, `index`: it depends on the seed and the index alone."""
        return make_rng(self.rng.initial_seed(), f"batch {index}")

    def keep(self, part: int, state: Mapping[str, Any]) -> None:
        """Keeps what a source has after `part` parts of its run, in place of what was kept before; see `batch`."""
        if self.cache is not None:
            kept = {name: held.state_dict() for name, held in state.items()}
            self.cache.write(0, torch.tensor(part), kept)

    def restore(self, state: Mapping[str, Any]) -> int:
        """Restores what `keep` kept; returns how many parts were done, 0 where nothing was kept."""
        found = None if self.cache is None else self.cache.read(0)
        if found is None:
            return 0
        for name, held in state.items():
            held.load_state_dict(found[1][name])
        return int(found[0])

    def batch(
        self, index: int, make: Callable[[torch.Generator], Tensor], state: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The images that `make(rng)` gives for batch `index`, from the cache where they are there.

        `rng` depends on the seed and the index alone, so that a run that goes on makes what it would have made at once.

        Args:
            state: name → what has `state_dict` and `load_state_dict` and is carried from one batch to the next: kept
                beside the batch and restored with it; of the latest two batches only, for it may be large.

        Raises:
            CalibrationError: the cache is damaged, or cannot be written.
        """
        state = state or {}
        if self.carry is not None and not self.carry.reach(index, state):
            return torch.empty(0, *self.input_shape)
        if self.cache is None:
            return make(self.rng_of(index))
        states, found = self.cache.within("state"), self.cache.read(index)
        if found is not None:
            if state and states.has(index):
                kept = states.read(index)
                if kept is None:
                    raise CalibrationError(f"{states.folder} is damaged; delete {self.cache.folder}")
                for name, part in state.items():
                    part.load_state_dict(kept[1][name])
            return found[0].to(self.device)
        if state and index and not states.has(index - 1):
            raise CalibrationError(f"batch {index} in {self.cache.folder} is damaged; delete that folder")
        images = make(self.rng_of(index))
        if state:
            states.write(index, torch.empty(0), {name: part.state_dict() for name, part in state.items()})
            states.drop(index - 2)
        self.cache.write(index, images.cpu(), {})
        return images


class Calibrator(Protocol):
    """A source of calibration images.

    needs: what the network must have, of "BatchNorm" and "classes" (an output [B, K]). paper: where the method is from.
    A source whose paper trains a student may have `training`, how it does so (`ptq.training.Training`), and `in_training`, fields
    that it gives other values then.
    """

    needs: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]
    teacher_bn: Literal["running", "batch"]  # statistics the teacher uses on these batches
    synthetic: ClassVar[bool]  # whether the images' extremes say nothing of those of real inputs
    presets: ClassVar[Presets]
    count: int
    batch_size: int

    def batches(self, ctx: CalibrationContext) -> Iterator[Tensor]:
        """Batches [B, C, H, W], float32, in the network's input space; `ctx.count` images in all.

        Raises:
            CalibrationError: the network or the input cannot serve this source.
        """
        ...

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Options that finish on a CPU in a second; may write inputs into `folder`."""
        ...


class Reconstructor(Protocol):
    """A rounding method, block by block."""

    presets: ClassVar[Presets]

    @property
    def unit(self) -> Literal["layer", "block"]:
        """What is fitted at a time."""
        ...

    @property
    def needs_fisher(self) -> bool:
        """Whether `loss` is to be handed Fisher weights."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps a block; 0: nearest rounding stays."""
        ...

    @property
    def batch_size(self) -> int:
        """Images a step."""
        ...

    def attach(self, block: nn.Module, rng: torch.Generator) -> list[dict[str, Any]]:
        """Makes the rounding in `block` learnable. Returns Adam parameter groups, each with `params`, `lr` and `cosine`
        (whether its learning rate falls to 0 along a half cosine), and what else Adam takes.

        In training, ReLUs behind layers and sums write over what they read, hooks on those layers included."""
        ...

    def mix(self, teacher_in: Tensor, student_in: Tensor, rng: torch.Generator) -> Tensor:
        """What the block sees in training, of the teacher's and the student's input: this step's copies, which may be written to."""
        ...

    def loss(
        self,
        block: nn.Module,
        outputs: list[Tensor],
        targets: list[Tensor],
        fisher: list[Tensor] | None,
        progress: float,
    ) -> Tensor:
        """The scalar to minimize, of the block's outputs and the teacher's; `progress` runs from 0 to 1."""
        ...

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Options that finish on a CPU in a second."""
        ...


class Finisher(Protocol):
    """A pass over the whole network after its blocks.

    held_out: share of the calibration images that neither blocks nor this pass are fitted to, and that judge it.
    """

    presets: ClassVar[Presets]

    @property
    def held_out(self) -> float:
        """Of all images, between 0 and 1."""
        ...

    def finish(
        self, reference: fx.GraphModule, student: fx.GraphModule, images: Tensor, judges: Tensor,
        *, seed: int, device: torch.device, feedback: Feedback,
    ) -> tuple[fx.GraphModule, dict[str, float]]:  # fmt: skip
        """The hardened student, tuned or, where that does not help, as it was; and figures for the manifest.

        Args:
            reference: the folded float network, same value names. student: hardened; it is not changed.
            images: calibration images [N, C, H, W], in host memory. judges: those held back; there may be none.
        """
        ...

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Options that finish on a CPU in a second."""
        ...


class Exporter(Protocol):
    """A target format."""

    suffix: ClassVar[str]  # of the file it writes, with the dot
    presets: ClassVar[Presets]

    @property
    def rules(self) -> dict[str, str]:
        """What the target asks of a plan, `placement` and `ties` of `PlanRules`; taken where the user leaves it open."""
        ...

    def check(self, graph: fx.GraphModule, plan: QuantPlan) -> None:
        """Raises ExportError if the target cannot hold the planned network; called before any work is spent."""
        ...

    def export(self, qm: "QuantizedModel", path: Path) -> Path:
        """Writes the file and returns its path."""
        ...

    def verify(self, qm: "QuantizedModel", path: Path, images: Tensor) -> dict[str, Any]:
        """Runs the written file on `images` and compares it with the simulation.

        Returns the figures of the comparison; `passed` says whether they are within bounds, `failure` which is not.
        """
        ...

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """Options that finish on a CPU in a second."""
        ...
