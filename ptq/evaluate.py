"""How good a quantized network is: top-1 accuracy with labels, agreement with the float network without."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq.errors import ArtifactError, CalibrationError
from ptq.onnx_session import onnx_session
from ptq.pictures import Pictures

Runner = Callable[[Tensor], Tensor]


def runner(model: nn.Module, device: torch.device) -> Runner:
    """`images → outputs`, both in host memory, on `device`."""

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x.to(device)).cpu()

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
        out = run(x)
        if int(y.max()) >= out.shape[1]:
            raise CalibrationError(f"label {int(y.max())} found; the network has {out.shape[1]} classes")
        right += int((out.argmax(1) == y).sum())
    return right / len(pictures)


def outputs(run: Runner, images: Iterable[Tensor]) -> Tensor:
    """The outputs for all batches, concatenated."""
    return torch.cat([run(x) for x in images])


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of images on which two networks' outputs `[N, K, …]` have the same largest class everywhere."""
    same = (a.argmax(1) == b.argmax(1)).reshape(len(a), -1)
    return float(same.float().mean())


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: power of `reference` over power of the difference; 200 where they are equal."""
    noise = float((other - reference).double().square().sum())
    signal = float(reference.double().square().sum())
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
