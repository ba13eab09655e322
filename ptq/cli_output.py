"""What commands that quantize write: one folder, verified, whole or not at all."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.console import Console
from torch import nn

from ptq import plugins
from ptq.artifact import MANIFEST, QuantizedModel, free_name, integer_bytes, whole_folder
from ptq.batch_cache import ALL_CACHES
from ptq.contracts import CalibrationContext, Exporter, Presets
from ptq.errors import ExportError
from ptq.evaluate import Runner, onnx_runner, top1
from ptq.pictures import Pictures
from ptq.proof import proof_images
from ptq.report import Section, markdown, print_sections, run_sections
from ptq.terminal import plain_console


@dataclass(frozen=True)
class Again:
    """A calibrator that gives the images of an earlier run."""

    images: torch.Tensor
    synthetic: bool
    teacher_bn: Literal["running", "batch"]
    batch_size: int
    count: int

    presets: ClassVar[Presets] = {}

    def batches(self, ctx: CalibrationContext) -> Iterator[torch.Tensor]:
        """The images, as one batch."""
        yield self.images


TARGET = "onnx_qdq"  # where nothing else is said


def where_from(model: Path, arch: str | None, target: str) -> dict[str, Any]:
    """What a recipe says of the float network's file, as it was named where `ptq distill` looks for the teacher, and of the target."""
    return {"model": str(model), "arch": arch, "target": target}


def target_of(args: argparse.Namespace) -> Exporter | None:
    """The exporter of `--target`, or None where it says none."""
    return plugins.chosen("exporters", args.target)


def progress_folder(args: argparse.Namespace) -> Path:
    """Where what is done so far is kept, unless --cache says where: beside the output, until that is there."""
    output = args.output.absolute()
    return args.cache or output.with_name(f"{output.name}.progress")


def forget_progress(args: argparse.Namespace) -> None:
    """Removes it, once the output is there; a folder that the user named stays."""
    if args.cache is None and (folder := progress_folder(args)).is_dir():
        for part in folder.glob(ALL_CACHES):
            shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # the user's own files are in it too
            folder.rmdir()


def write_network(
    qm: QuantizedModel, model: nn.Module, output: Path, force: bool, target: Exporter | None, pictures: Pictures | None,
    runs: Mapping[str, Runner], write_more: Callable[[Path], None] = lambda folder: None,
) -> tuple[QuantizedModel, list[Section]]:  # fmt: skip
    """Writes a quantized network, its file for the target and the report, once that file computes what was simulated.

    Args:
        model: the float network. pictures, runs: what accuracy is measured on, and of what beside the file. write_more: adds
            files to the folder.

    Returns:
        The network with the figures in its manifest, and the closing tables.

    Raises:
        ExportError: the file does not; everything is then kept in `output`.failed. ArtifactError: it cannot be written.
    """
    measured = dict(runs)
    with whole_folder(output, force) as folder:
        proof = None
        if target is not None:
            file = target.export(qm, folder / f"model{target.suffix}")
            proof = target.verify(qm, file, proof_images(qm))
            if pictures is not None and target.suffix == ".onnx":
                measured["onnxruntime"] = onnx_runner(file)
        accuracy = {name: top1(run, pictures) for name, run in measured.items()} if pictures is not None else {}
        found = {"proof": proof, "top1": accuracy, "bytes": _sizes(model, qm, folder)}
        qm = replace(qm, manifest=replace(qm.manifest, metrics={**qm.manifest.metrics, **found}))
        write_more(folder)
        sections = run_sections(qm, found["bytes"], proof, accuracy)
        title = f"{qm.manifest.source} at {qm.manifest.bits}"
        (folder / "report.md").write_text(markdown(title, sections, qm.manifest.notes), "utf-8", errors="replace")
        qm.write(folder)  # last: the manifest has the checksums of all others
        if proof is not None and not proof["passed"]:
            kept = output.with_name(f"{output.name}.failed")
            if (kept / MANIFEST).is_file():  # an earlier run's
                shutil.rmtree(kept, ignore_errors=True)
            kept = free_name(kept) if kept.exists() else kept
            shutil.copytree(folder, kept)
            raise ExportError(
                f"the exported file does not compute what was simulated: {proof['failure']}; it is kept in {kept}"
            )
    return qm, sections


def _sizes(model: nn.Module, qm: QuantizedModel, folder: Path) -> dict[str, int]:
    floats = 4 * sum(p.numel() for p in model.state_dict().values() if p.is_floating_point())
    files = {f.name: f.stat().st_size for f in sorted(folder.iterdir()) if f.suffix == ".onnx"}
    return {"float weights": floats, "integer weights": integer_bytes(qm), **files}


def close(args: argparse.Namespace, qm: QuantizedModel, sections: list[Section], console: Console) -> None:
    """Prints what a run ended with, as asked for."""
    if args.json:
        metrics = {
            **qm.manifest.metrics,
            "seconds": qm.manifest.seconds,
            "notes": qm.manifest.notes,
            "blocks": qm.manifest.blocks,
        }
        print(json.dumps(metrics, indent=1))
    elif not args.quiet:
        print_sections(plain_console(), sections)
        console.print(f"written to {args.output}")
