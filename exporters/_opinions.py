"""Second opinions: what other implementations of ONNX make of an exported file.

    reference   onnx's own evaluator, operator by operator in numpy: what the standard says. Slow, so a few small images.
    OpenVINO    where it is installed; it derives a quantized network of its own from the Q/DQ pairs.

Neither computes with onnxruntime's kernels, and in deep networks float noise moves codes by a step that passes through every layer
behind: whole files of 4-bit activations have been seen 14 dB apart between OpenVINO and onnxruntime, though each operator, given
equal inputs, agreed to a step. So an opinion fails the file only below 5 dB, where the difference has a third of the output's
power: a wrong scale, zero point or order of axes ends there or below; noise does not.
"""

import importlib.util
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from torch import Tensor

_FAR = 5.0  # dB
_REFERENCE_SMALL, _REFERENCE_LARGEST = 64 * 64, 256 * 256  # pixels of an image; of small ones it is given two
_OPENVINO_IMAGES = 16


def second_opinions(path: Path, images: Tensor, simulated: Tensor) -> list[dict[str, Any]]:
    """One row per implementation: `by`, and either its figures or why there are none (`skipped`).

    Args:
        images: [N, C, H, W]. simulated: the integer network's results on them.
    """
    rows: list[dict[str, Any]] = []
    pixels = images.shape[2] * images.shape[3]
    if pixels > _REFERENCE_LARGEST:
        rows.append(
            {"by": "onnx reference", "skipped": f"images of more than {_REFERENCE_LARGEST} pixels take it minutes"}
        )
    else:
        few = images[: 2 if pixels <= _REFERENCE_SMALL else 1]
        rows.append(_opinion(f"onnx reference {onnx.__version__}", _reference, path, few, simulated))
    if importlib.util.find_spec("openvino") is None:
        rows.append({"by": "OpenVINO", "skipped": "not installed; it comes with the extra openvino"})
    else:
        rows.append(_opinion(f"OpenVINO {version('openvino')}", _openvino, path, images[:_OPENVINO_IMAGES], simulated))
    return rows


def far_off(rows: list[dict[str, Any]]) -> str | None:
    """Which opinion contradicts the simulation, or None."""
    for row in rows:
        if "skipped" not in row and row["sqnr_db"] is not None and not row["sqnr_db"] >= _FAR:
            return f"{row['by']} computes something else from the file: {row['sqnr_db']} dB apart on {row['images']} images"
    return None


def _opinion(
    by: str, run: Callable[[Path, np.ndarray], np.ndarray], path: Path, images: Tensor, simulated: Tensor
) -> dict[str, Any]:
    try:
        theirs = run(path, images.numpy())
    except Exception as e:  # either library raises classes of its own without a common base
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        return {"by": by, "skipped": f"it does not run the file: {reason.strip()[:200]}"}
    ours = simulated[: len(images)].numpy().astype(np.float64)
    noise, power = float(((theirs - ours) ** 2).sum()), float((ours**2).sum())
    return {
        "by": by, "images": len(images), "top1_agreement": float((theirs.argmax(1) == ours.argmax(1)).mean()),
        "sqnr_db": None if noise == 0 else round(10 * math.log10(max(power, 1e-30) / noise), 2) if math.isfinite(noise) else -math.inf,
    }  # fmt: skip


def _reference(path: Path, images: np.ndarray) -> np.ndarray:
    (result,) = ReferenceEvaluator(onnx.load(str(path))).run(None, {"input": images})
    return np.asarray(result)


def _openvino(path: Path, images: np.ndarray) -> np.ndarray:
    import openvino

    core = openvino.Core()
    # Read from bytes: it tells ONNX by the file's name, and a file that is not verified yet has another.
    compiled = core.compile_model(core.read_model(path.read_bytes(), b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(next(iter(compiled(images).values())))
