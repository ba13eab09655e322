"""What the steps of one run share, and the arguments that every command has."""

import operator
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.contracts import Feedback
from ptq.errors import SpecError

# Of functions that train something: their callers may be within torch.inference_mode, where nothing can be.
outside_inference_mode = torch.inference_mode(False)


@dataclass
class Run:
    """One run: where, with which seed, in which input space; what was said and how long it took."""

    shape: tuple[int, int, int]
    device: torch.device
    seed: int
    mean: Tensor | None
    std: Tensor | None
    feedback: Feedback
    cache: Path | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    clipped: list[float] = field(default_factory=list)  # per batch, the share of values that were no valid pixels

    @property
    def stage_feedback(self) -> Feedback:
        """The feedback for a stage, whose notes reach the manifest too."""
        return replace(self.feedback, note=self.note)

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


def start_run(
    input_shape: Iterable[int], device: str | torch.device, seed: int, mean: float | Iterable[float] | None,
    std: float | Iterable[float] | None, feedback: Feedback | None, cache: str | Path | None = None,
) -> Run:  # fmt: skip
    """A run from the arguments of a command.

    Raises:
        SpecError: a shape that is not (C, H, W), a device that is not there, or a normalization that does not fit.
    """
    shape = checked_shape(input_shape)
    stated = normalization(mean, std, shape[0])
    return Run(shape, _device(device), seed, *stated, feedback or Feedback(), None if cache is None else Path(cache))


def checked_shape(shape: Iterable[int]) -> tuple[int, int, int]:
    """(C, H, W). Raises SpecError unless it is three positive numbers."""
    with suppress(TypeError):  # no whole numbers
        found = tuple(operator.index(n) for n in shape)
        if len(found) == 3 and all(n > 0 for n in found):
            return found
    raise SpecError(f"input shape {shape} given; it is (channels, height, width), as in (3, 224, 224)")


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise SpecError(f"device {str(device)!r} is not there: {str(e).splitlines()[0]}") from e
    return found


def normalization(
    mean: float | Iterable[float] | None, std: float | Iterable[float] | None, channels: int
) -> tuple[Tensor | None, Tensor | None]:
    """`mean` and `std` as tensors [C], one number standing for every channel; None where neither is given.

    Raises:
        SpecError: only one is given, their lengths do not fit, or a deviation is not above 0.
    """
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise SpecError("mean and std belong together; give both or neither")
    both = [
        torch.as_tensor(v if isinstance(v, int | float) else list(v), dtype=torch.float32).reshape(-1)
        for v in (mean, std)
    ]
    both = [v.repeat(channels) if len(v) == 1 else v for v in both]
    finite = all(bool(v.isfinite().all()) for v in both)
    if any(len(v) != channels for v in both) or not finite or not bool((both[1] > 0).all()):
        raise SpecError(
            f"mean and std have one number per channel ({channels}), finite, std above 0; got {floats(both[0])} and {floats(both[1])}"
        )
    return both[0], both[1]


def floats(v: Tensor | None) -> tuple[float, ...] | None:
    """A tensor [C] as plain numbers."""
    return None if v is None else tuple(v.tolist())
