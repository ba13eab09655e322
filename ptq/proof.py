"""`export`: a quantized network as a file, proved to compute what was simulated before it appears."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ptq import plugins
from ptq.artifact import MANIFEST, QuantizedModel, proof_record, whole_file
from ptq.contracts import Exporter, make_rng
from ptq.errors import ExportError
from ptq.graph.ops import input_node
from ptq.graph.plan import QuantPlan
from ptq.integrity import sealed


def export(qm: QuantizedModel, target: str | Exporter, path: Any, *, images: Tensor | None = None) -> dict[str, Any]:
    """Writes `qm` for a target and proves that the file computes what `qm.graph` does.

    Args:
        qm: a quantized network.
        target: an exporter by name, "onnx_qdq", or an object.
        path: the file to write; it appears once it is verified or, where it fails, not at all. In the folder of a saved network,
            what was found stands beside it, `model.proof.json`: by that, `ptq eval` knows it.
        images: `[N, C, H, W]` to verify with; default: up to 512 of the calibration images, or noise for a loaded network.

    Returns:
        The figures of the comparison (see `exporters/_parity.py`).

    Raises:
        ExportError: the network cannot be written for the target, or the file does not compute what was simulated.
    """
    exporter, path = plugins.build("exporters", target) if isinstance(target, str) else target, Path(path)
    proof = write_verified(qm, exporter, path, images)
    if (path.parent / MANIFEST).is_file():
        record_proof(path, target if isinstance(target, str) else type(target).__name__, proof)
    return proof


def write_verified(qm: QuantizedModel, exporter: Exporter, path: Path, images: Tensor | None = None) -> dict[str, Any]:
    """`export` without a record of what was found."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name the file to write")
    check_target(
        exporter, qm.student, qm.plan, "The network stands as it was quantized: quantize it again with what is missing"
    )
    with whole_file(path, ExportError) as partial:
        exporter.export(qm, partial)
        proof = exporter.verify(qm, partial, proof_images(qm) if images is None else images)
        if not proof["passed"]:
            raise ExportError(f"the exported network does not compute what was simulated: {proof['failure']}")
    return proof


def check_target(exporter: Exporter | None, network: fx.GraphModule, plan: QuantPlan, instead: str = "") -> None:
    """The exporter's check; `instead`: what to do where it asks for an option and the plan is settled.

    Raises:
        ExportError: the target cannot take the plan.
    """
    if exporter is None:
        return
    try:
        exporter.check(network, plan)
    except ExportError as e:
        if not instead or "; add --" not in str(e):
            raise
        raise ExportError(f"{e}. {instead}") from e


PLAN_AGAIN = "The plan says every grid: have it made again with that option, by ptq sensitivity or ptq quantize"


def record_proof(path: Path, target: str, proof: dict[str, Any]) -> Path:
    """Writes what was found of an exported file beside it, with the file's checksum: see `proof_record`.

    Raises:
        ExportError: it cannot be written.
    """
    record = proof_record(path)
    with whole_file(record, ExportError) as partial:
        rows = sealed({"target": target, "proof": proof}, [path])
        partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return record


def proof_images(qm: QuantizedModel) -> Tensor:
    """Images to verify an exported file with: calibration images, or noise over the input's grid for a loaded network."""
    if qm.images is not None:
        return qm.images[:512]
    name = input_node(qm.student).name
    ends = qm.manifest.ranges.get(name, {"min": -2.0, "max": 2.0})
    rng = make_rng(0, "proof")
    noise = torch.rand(128, *qm.manifest.input_shape, generator=rng)
    return ends["min"] + (ends["max"] - ends["min"]) * noise
