"""Milliseconds a picture on onnxruntime: float32, onnxruntime's own static quantization, and the files written here, in one run.

    python benchmarks/speed.py --runtime resnet18,mobilenet_v2

Networks of torchvision with random weights, BatchNorm calibrated on noise; times do not depend on the values. All files of a
network are run in turn, again and again, so that a machine whose speed drifts slows all of them; medians. The float file is that of
`torch.onnx.export`; the other tool's is `quantize_static` with its preprocessing: per channel, 8-bit unsigned activations, 8-bit
signed weights. Needs the extra `benchmarks`.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from families import network
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import ptq

WIDTHS = ("w8a8", "w4a8", "w4a4", "w4a4e4")
KEYS = ("network", "size", "threads", "batch")
FIGURES = ("file", "ms", "times_float32", "times_static", "bytes", "bytes_of_float32")


class _Reader(CalibrationDataReader):
    """Hands a few images to onnxruntime's calibration."""

    def __init__(self, images: Tensor) -> None:
        self.rest = iter(images.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self.rest, None)
        return None if found is None else {"input": found.numpy()}


def rows(name: str, size: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row a file of network `name` at `size` × `size` pixels, single pictures."""
    model = network(name)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        files = _files(model, images, Path(folder))
        times = _times({label: _session(file, threads) for label, file in files.items()}, images[:1].numpy(), rounds)
        sizes = {label: file.stat().st_size for label, file in files.items()}
    key = {"network": name, "size": size, "threads": threads, "batch": 1, "onnxruntime": onnxruntime.__version__}
    return [
        key | {
            "file": label, "ms": round(ms, 2), "times_float32": round(times["float32"] / ms, 2),
            "times_static": round(times["quantize_static"] / ms, 2), "bytes": sizes[label],
            "bytes_of_float32": round(sizes["float32"] / sizes[label], 2),
        }
        for label, ms in times.items()
    ]  # fmt: skip


def _files(model: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    found = {label: folder / f"{label}.onnx" for label in ("float32", "quantize_static", *WIDTHS)}
    torch.onnx.export(
        model, (images[:1],), str(found["float32"]), input_names=["input"], dynamo=True, external_data=False, verbose=False
    )  # fmt: skip
    quant_pre_process(str(found["float32"]), str(folder / "prepared.onnx"))
    quantize_static(
        str(folder / "prepared.onnx"), str(found["quantize_static"]), _Reader(images), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    for bits in WIDTHS:
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        qm = ptq.quantize(model, bits, images, input_shape=shape, rounding="nearest", ranges="minmax")
        ptq.export(qm, "onnx_qdq", found[bits])
    return found


def _session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _times(sessions: dict[str, onnxruntime.InferenceSession], x: np.ndarray, rounds: int) -> dict[str, float]:
    """Median milliseconds of each session's runs, taken in turn."""
    taken: dict[str, list[float]] = {label: [] for label in sessions}
    for k in range(rounds + 3):  # three to warm up
        for label, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"input": x})
            if k >= 3:
                taken[label].append(1000 * (time.perf_counter() - start))
    return {label: statistics.median(times) for label, times in taken.items()}
