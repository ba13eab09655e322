"""How good a quantized network is: top-1 accuracy with labels, agreement with the float network without."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq.errors import ArtifactError, CalibrationError, ModelError
from ptq.graph.trace import tensors_of
from ptq.onnx_session import onnx_session
from ptq.pictures import Pictures

Runner = Callable[[Tensor], Tensor]


def runner(model: nn.Module, device: torch.device) -> Runner:
    """`images → outputs`, both in host memory, on `device`; of a network that returns its one tensor in a dictionary, that."""

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            (out,) = tensors_of(model(x.to(device)))
            return out.cpu()

    return run


def check_labels(pictures: Pictures, classes: int | None = None) -> None:
    """Raises CalibrationError unless the pictures have labels, none of them negative nor, where told, beyond the classes."""
    if pictures.labels is None:
        raise CalibrationError(
            "the validation pictures have no labels; an .npz has them under 'y', a folder has one sub-folder per class, "
            "or file names that begin with the class number"
        )
    if int(pictures.labels.min()) < 0:
        raise CalibrationError(f"label {int(pictures.labels.min())} found; labels are class numbers from 0 on")
    if classes is not None and int(pictures.labels.max()) >= classes:
        raise CalibrationError(f"label {int(pictures.labels.max())} found; the network has {classes} classes")


def class_scores(out: Tensor) -> Tensor:
    """The scores [N, K] of a network that gives [N, K], or [N, K, 1, 1].

    Raises:
        CalibrationError: it gives more than one score a class.
    """
    if out.ndim < 2 or out[0].numel() != out.shape[1]:
        raise CalibrationError(
            f"top-1 needs one score a class, [N, K]; the network gives [N, {', '.join(map(str, out.shape[1:]))}]"
        )
    return out.flatten(1)


def top1(run: Runner, pictures: Pictures, batch_size: int = 128) -> float:
    """Share of pictures whose largest output is at their label.

    Raises:
        CalibrationError: the pictures have no labels, or labels the network has no output for.
    """
    check_labels(pictures)
    right = 0
    for x, y in pictures.batches(batch_size):
        assert y is not None
        if not bool(x.isfinite().all()):
            raise CalibrationError("the validation pictures hold values that are not finite")
        out = class_scores(run(x))
        if int(y.max()) >= out.shape[1]:
            raise CalibrationError(f"label {int(y.max())} found; the network has {out.shape[1]} classes")
        right += int((out.argmax(1) == y).sum())
    return right / len(pictures)


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike the outputs of two networks are: see `agreement` and `sqnr_db`."""

    agreement: float
    sqnr_db: float


def likeness(reference: Runner, others: Sequence[Runner], batches: Iterable[Tensor]) -> list[Likeness]:
    """Each of the other networks beside the reference, on the same images, in memory that does not grow with their number.

    Raises:
        ModelError: the reference's outputs are not finite.
    """
    signal, count = 0.0, 0
    noise, same = [0.0] * len(others), [0.0] * len(others)
    for x in batches:
        wanted = reference(x)
        if not bool(torch.isfinite(wanted).all()):
            raise ModelError("the float network's outputs on the calibration images are not finite")
        signal, count = signal + _power(wanted), count + len(x)
        for k, run in enumerate(others):
            found = run(x)
            noise[k] += _power(found - wanted)
            same[k] += len(x) * agreement(wanted, found)
    return [Likeness(s / count, _decibels(signal, n)) for s, n in zip(same, noise)]


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of images on which two networks' outputs `[N, K, …]` have the same largest class; a lone score, the same sign."""
    same = (_decided(a) == _decided(b)).reshape(len(a), -1)
    return float(same.float().mean())


def _decided(out: Tensor) -> Tensor:
    return out.argmax(1) if out.shape[1] > 1 else out > 0


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: power of `reference` over power of the difference; 200 where they are equal."""
    return _decibels(_power(reference), _power(other - reference))


def _power(x: Tensor) -> float:
    return float(x.double().square().sum())


def _decibels(signal: float, noise: float) -> float:
    return 200.0 if noise == 0 else 10 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def onnx_runner(path: Path) -> Runner:
    """`images → outputs` by onnxruntime, as a user runs the file; as it is written where the optimizations break on it, as they do
    on signed codes before a max pool and on types of 4 bits."""
    try:
        session = onnx_session(path)
    except Exception:  # onnxruntime raises classes of its own without a common base
        try:
            session = onnx_session(path, literal=True)
        except Exception as e:
            raise ArtifactError(f"{path} is not a model that onnxruntime loads: {str(e).splitlines()[0]}") from e
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
