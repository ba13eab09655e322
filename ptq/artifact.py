"""A quantized network on disk: `manifest.json` and `tensors.safetensors`, written whole or not at all, read without pickle."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, fx

from ptq.errors import ArtifactError, PtqError, SpecError
from ptq.graph.integer import to_integer
from ptq.graph.ops import weighted_nodes
from ptq.graph.plan import QuantPlan
from ptq.graph.serialize import graph_from_json, graph_to_json
from ptq.integrity import check_file, check_seal, sealed
from ptq.quant.affine import QParams
from ptq.quant.fake_quant import ActFakeQuant, integer_codes

SCHEMA = 1
MANIFEST, TENSORS, PLAN = "manifest.json", "tensors.safetensors", "plan.json"


@dataclass(frozen=True)
class Manifest:
    """All that is known of a run, as plain data; its `recipe` repeats the run.

    input_shape: (C, H, W). mean, std: the normalization inputs carry, or None. recipe: resolved options and seed.
    ranges: grid of every quantized value. blocks: how each block's reconstruction ended. metrics: figures measured on the
    calibration images or on labelled pictures. seconds: per stage. notes: what the user was told.
    """

    source: str
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    bits: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    ranges: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`; keys it does not know are ignored."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for name in ("input_shape", "mean", "std"):
            known[name] = tuple(known[name]) if known[name] is not None else None
        made = cls(**known)
        shape = made.input_shape
        if len(shape) != 3 or not all(isinstance(n, int) for n in shape) or not isinstance(made.recipe, dict):
            raise ArtifactError(
                f"input shape {shape}, recipe {type(made.recipe).__name__}: three numbers and a table are needed"
            )
        return made


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized network.

    student: the hardened student, layers and fake-quant modules as trained; what exporters read.
    plan: which tensor has which grid. manifest: how it came about.
    images: the calibration images `[N, C, H, W]` of the run that made it; None when loaded. Never written to disk.
    """

    student: fx.GraphModule
    plan: QuantPlan
    manifest: Manifest
    images: Tensor | None = None

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The network to run: `[B, C, H, W] → …`, on the CPU. It computes what integer kernels do, to the last bit."""
        return to_integer(self.student)

    def integer_weights(self) -> Mapping[str, tuple[Tensor, QParams]]:
        """Module path → (codes int32, grid) of every quantized weight."""
        paths = [str(n.target) for n in weighted_nodes(self.student)]
        held = {path: integer_codes(self.student.get_submodule(path), "weight") for path in paths}
        return {path: h for path, h in held.items() if h is not None}

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the network into `folder`, which appears whole or not at all.

        Raises:
            ArtifactError: the folder exists and `overwrite` is false, or it cannot be written.
        """
        with whole_folder(Path(folder), overwrite) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Writes manifest and tensors into an existing folder; the manifest has the checksums of all files that are there."""
        rows = {"manifest": asdict(self.manifest), "plan": self.plan.to_json(), "graph": graph_to_json(self.student)}
        write_plan(self.plan, folder / PLAN)
        state = {k: v.detach().cpu().contiguous().clone() for k, v in self.student.state_dict().items()}
        (folder / TENSORS).write_bytes(save(state))  # save_file would let nobody else read it, whatever the umask
        data = sealed(rows, sorted(f for f in folder.iterdir() if f.is_file() and f.name != MANIFEST))
        (folder / MANIFEST).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; the network runs bit-equal to the one saved. Reads JSON and safetensors only.

        Raises:
            ArtifactError: no such folder, or its files are damaged, changed or of another kind.
        """
        folder = Path(folder)
        data = _read_manifest(folder)
        check_seal(data, folder / MANIFEST)
        check_file(data, folder / TENSORS)
        try:
            manifest, plan = Manifest.from_json(data["manifest"]), QuantPlan.from_json(data["plan"])
            graph = graph_from_json(data["graph"], plan)
            graph.load_state_dict(load_file(str(folder / TENSORS)), assign=True)
            graph.requires_grad_(False)
        except (OSError, SafetensorError) as e:
            raise ArtifactError(f"{folder / TENSORS} cannot be read: {e}") from e
        except Exception as e:  # a damaged manifest can fail anywhere in rebuilding the network
            raise ArtifactError(
                f"{folder} does not hold a network this version understands: {type(e).__name__}: {_line(e)}"
            ) from e
        return cls(graph, plan, manifest)


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0]


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ArtifactError(
            f"{folder} holds no {MANIFEST}; give a folder that 'ptq quantize -o' or save() wrote"
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} cannot be read: {_line(e)}") from e
    if not isinstance(data, dict) or not isinstance(data.get("manifest"), dict):
        raise ArtifactError(f"{path} is not a manifest of this program")
    if data["manifest"].get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has schema {data['manifest'].get('schema')!r}; this version reads {SCHEMA}")
    return data


def check_written(folder: Path, file: Path) -> bool:
    """Whether the manifest in a folder, or the record beside a file that was exported later, vouches for the file.

    Raises:
        ArtifactError: one names it, and it is another.
    """
    record = proof_record(file)
    if record.is_file():  # written later than the manifest, of a file that may have taken another's place
        try:
            data = json.loads(record.read_text(encoding="utf-8"))
            check_seal(data, record)
            return check_file(data, file)
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise ArtifactError(f"{record} cannot be read: {_line(e)}") from e
    return check_file(_read_manifest(folder), file)


def proof_record(file: Path) -> Path:
    """Where it stands what was found of a file that was exported on its own: model.openvino.onnx, model.openvino.proof.json."""
    return file.with_name(f"{file.stem}.proof.json")


def written_files(folder: Path, suffix: str) -> list[Path]:
    """Files of a kind that are in a folder, and those that its manifest says there were."""
    listed = _read_manifest(folder).get("files") or {}
    return sorted({*folder.glob(f"*{suffix}"), *(folder / name for name in listed if name.endswith(suffix))})


def value_ranges(graph: fx.GraphModule) -> dict[str, Any]:
    """Every activation grid: scale, zero point, and the real values of its ends."""
    rows = {}
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActFakeQuant):
            s, z, spec = float(module.scale), int(module.qparams.zero_point), module.spec
            ends = ((spec.qmin - z) * s, (spec.qmax - z) * s)
            rows[node.meta["value"]] = {"bits": spec.bits, "scale": s, "zero_point": z, "min": ends[0], "max": ends[1]}
    return rows


def integer_bytes(qm: QuantizedModel) -> int:
    """Bytes of the quantized weights alone, packed at their widths."""
    return sum(-(-codes.numel() * q.spec.bits // 8) for codes, q in qm.integer_weights().values())


def check_free(folder: Path, overwrite: bool, mark: str = MANIFEST) -> None:
    """Raises ArtifactError if `folder` must not be written: called before work, so that none is lost.

    mark: the file by which a folder that may be overwritten is known.
    """
    named, folder = folder, _resolved(folder)  # "missing/../here" is here, though the system finds nothing by that name
    check_writable(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{named} is a file; name a folder")
    if folder.exists() and not overwrite:
        raise ArtifactError(f"{named} exists; name another folder or overwrite it with --force (overwrite=True)")
    if folder.exists() and not (folder / mark).is_file():
        raise ArtifactError(f"{named} was not written by this program (no {mark}); it is not overwritten")


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as e:  # links in a circle
        raise ArtifactError(f"{path} cannot be written: {e}") from e


def check_writable(path: Path) -> None:
    """Raises ArtifactError where no file or folder of that name could be made: called before work, so that none is lost."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"{path} cannot be written: no permission in {parent}, or it is no folder")


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False, mark: str = MANIFEST) -> Iterator[Path]:
    """Yields a hidden folder to write into; it takes the name `folder` at the end, or vanishes if the body raises.

    Where something else has taken that name meanwhile, it takes the next free one, and the error says which.
    """
    check_free(folder, overwrite, mark)
    folder = _resolved(folder)  # a link stays one: what it points to is written
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as e:
        raise ArtifactError(f"{folder} cannot be written: {e}") from e
    try:
        yield partial
        try:
            check_free(folder, overwrite, mark)
        except ArtifactError as e:
            partial.rename(spare := free_name(folder))
            raise ArtifactError(f"{e}; it has changed since the work began. The result is in {spare}") from e
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            if old.exists():  # the old result is better than none
                old.rename(folder if not folder.exists() else free_name(folder))
            raise
    except OSError as e:
        raise ArtifactError(f"{folder} cannot be written: {e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():  # stopped between two renamings
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(path: Path, error: type[PtqError]) -> Iterator[Path]:
    """Yields a hidden name to write to; the file takes the name `path` at the end, or vanishes if the body raises.

    Raises:
        PtqError: `error`, where the system refuses.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as e:
        raise error(f"{path} cannot be written: {e}") from e
    finally:
        with suppress(OSError):  # where there is no such folder, nothing is left either
            partial.unlink()


def free_name(path: Path) -> Path:
    """The first of name-2, name-3, … beside `path` that nothing has."""
    names = (path.with_name(f"{path.name}-{k}") for k in itertools.count(2))
    return next(p for p in names if not os.path.lexists(p))


def read_plan(path: Path) -> QuantPlan:
    """The plan in a JSON file: what a run wrote as `plan.json`, or its manifest.

    Raises:
        ArtifactError: the file cannot be read or holds no plan.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return QuantPlan.from_json(data.get("plan", data))
    except OSError as e:
        raise ArtifactError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SpecError) as e:
        raise ArtifactError(f"{path} is not a plan of this program: {type(e).__name__}: {e}") from e


def write_plan(plan: QuantPlan, path: Path) -> None:
    """Writes a plan that `read_plan` reads; the file appears whole or not at all.

    Raises:
        ArtifactError: it cannot be written.
    """
    text = json.dumps(plan.to_json(), indent=1, ensure_ascii=False) + "\n"
    with whole_file(path, ArtifactError) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def versions() -> dict[str, str]:
    """Versions of this package and of what results depend on."""

    return {
        "ptq": version("ptq"),
        "torch": torch.__version__,
        **{p: version(p) for p in ("numpy", "onnx", "onnxruntime")},
    }
