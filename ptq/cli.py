"""The command line: `ptq quantize`, `inspect`, `export`, `eval`, `list`, `demo`; the other commands are in `cli_*.py`."""

import argparse
import copy
import io
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq import plugins
from ptq.artifact import QuantizedModel, check_free, check_written, read_plan, written_files
from ptq.cli_distill import run_distill
from ptq.cli_images import further, labelled, run_similarity, run_synthesize, sized
from ptq.cli_options import build_parser
from ptq.cli_output import TARGET, Again, close, forget_progress, progress_folder, target_of, where_from, write_network
from ptq.cli_sensitivity import run_sensitivity
from ptq.distilling.course import Course
from ptq.errors import ArtifactError, ExportError, PtqError, ReconstructionError, SpecError
from ptq.evaluate import check_labels, class_scores, onnx_runner, runner, top1
from ptq.graph.fold_bn import fold_batch_norm
from ptq.graph.plan import make_plan
from ptq.graph.trace import tensors_of, trace
from ptq.loading import load_model
from ptq.pictures import Pictures
from ptq.pipeline import quantize
from ptq.proof import PLAN_AGAIN, check_target, proof_images, record_proof, write_verified
from ptq.report import Section, course_sections, plan_sections, print_sections, proof_section
from ptq.spec import BitConfig, Override, PlanRules
from ptq.terminal import plain_console, shown
from ptq.vectors import write_vectors

_CPU = torch.device("cpu")
# What --recipe takes over from a manifest, and what stands where neither says anything.
_RECIPE: dict[str, Any] = {
    "bits": "w8a8", "data": "auto", "rounding": "genie_m", "ranges": "lp_best", "finish": None, "repair": "none",
    "distill": None,
    "edges": "brecq", "adds": 8, "weights": "auto", "activations": "unsigned", "scales": "free", "placement": "auto", "ties": "auto",
    "layers": None, "precision": "auto", "seed": 0, "target": None,
}  # fmt: skip


_OF_A_PLAN = ("bits", "weights", "activations", "scales", "edges", "adds", "placement", "ties")  # what it says already


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Exit status: 0; 2 for a usage error or bad input; 1 where the work itself failed; 130 interrupted; 143 stopped by SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks is no reason to fail
    args = build_parser(_COMMANDS).parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.debug else logging.WARNING, format="%(name)s: %(message)s")
    try:
        with _stoppable():
            return args.run(args)
    except PtqError as e:
        if args.debug:
            raise
        print(f"ptq: {' '.join(str(e).split())}", file=sys.stderr)
        return 1 if isinstance(e, ExportError | ReconstructionError) else 2
    except KeyboardInterrupt as e:
        told = isinstance(e, _Stopped)
        print(
            f"ptq: {'told to stop' if told else 'interrupted'}; no output was written; "
            "a run that keeps its progress goes on by the same command",
            file=sys.stderr,
        )
        return 143 if told else 130
    except Exception as e:  # the last resort: one line for the user, the traceback on request
        if args.debug:
            raise
        print(f"ptq: {type(e).__name__}: {' '.join(str(e).split())[:500]}; --debug shows where", file=sys.stderr)
        return 1


class _Stopped(KeyboardInterrupt):
    """SIGTERM, by which batch systems and containers end a program: it unwinds as Ctrl-C does."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within it, SIGTERM raises `_Stopped`, so that unfinished files are removed. Only the main thread can receive signals."""

    def stop(number: int, frame: Any) -> None:
        raise _Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _settle(args: argparse.Namespace) -> None:
    """Fills in what the command line left open: from the recipe, then the defaults."""
    given = [name for name in _OF_A_PLAN if getattr(args, name) is not None]
    recipe = dict(_RECIPE)
    if getattr(args, "recipe", None) is not None:
        found = _read_recipe(args.recipe)
        if (number := found.pop("further_teachers")) != len(args.with_models or []):
            raise SpecError(f"that run made its images with {number} further networks; name as many by --with")
        if found["bits"] == "plan" and args.bits is None and args.plan is None:
            args.plan = args.recipe  # a manifest holds its plan
        recipe |= found | {"bits": _RECIPE["bits"] if found["bits"] == "plan" else found["bits"]}
    if args.plan is not None:
        if given:
            raise SpecError(f"--{given[0]} and a plan given; a plan says every width and grid already")
        read_plan(args.plan)  # before any work is spent
        recipe["layers"] = None  # which the plan takes the place of
    for name, setting in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, setting)
    args.layers = args.layers or []
    for name in ("finish", "distill"):
        if getattr(args, name, None) == "none":
            setattr(args, name, None)
    if args.input_shape is None:
        raise SpecError("the input shape is missing; give --input-shape C,H,W, as in --input-shape 3,224,224")


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))["manifest"]
        if "distill_data" in manifest["recipe"]:
            raise SpecError(
                f"{path} is of a network that 'ptq distill' trained further: repeat the recipe of the folder it was made from, "
                "then run ptq distill on the result"
            )
        if "student" in manifest["recipe"]:
            raise SpecError(
                f"{path} is of a student that 'ptq distill --then' quantized, on images made from its teacher: repeat that command"
            )
        found = {name: manifest["recipe"].get(name, default) for name, default in _RECIPE.items()}
        found["further_teachers"] = manifest["recipe"].get("further_teachers", 0)
        return found | {name: manifest[name] and tuple(manifest[name]) for name in ("input_shape", "mean", "std")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ArtifactError(f"{path} is not a manifest of this program: {type(e).__name__}: {e}") from e


def _quantize(args: argparse.Namespace) -> int:
    _settle(args)
    args.target = args.target or TARGET
    check_free(args.output, args.force)
    target = target_of(args)
    model = load_model(args.model, args.arch, trust_pickle=args.trust_pickle)
    console = plain_console(stderr=True)
    common: dict[str, Any] = {
        "input_shape": args.input_shape, "ranges": args.ranges, "edges": args.edges, "adds": args.adds,
        "weights": args.weights, "activations": args.activations, "scales": args.scales,
        "placement": args.placement, "ties": args.ties,
        "layers": args.layers, "repair": args.repair,
        "effort": args.effort, "target": target, "mean": args.mean, "std": args.std, "seed": args.seed,
        "device": args.device, "cache": progress_folder(args),
        "source": f"{args.model.name}" + (f" ({args.arch})" if args.arch else ""),
    }  # fmt: skip
    pictures = _pictures(args, model)
    teachers = further(args)
    with shown(args.quiet, console) as feedback:
        qm = quantize(
            model,
            args.bits,
            sized(args.data, args),
            rounding=args.rounding,
            finish=args.finish,
            distill=args.distill,
            report_on=labelled(args.report_on, args, args.input_shape, args.mean, args.std),
            plan=args.plan,
            cache_memory=args.cache_memory,
            precision=args.precision,
            teachers=teachers,
            feedback=feedback,
            **common,
        )
    said = where_from(args.model, args.arch, args.target)
    qm = replace(qm, manifest=replace(qm.manifest, recipe=qm.manifest.recipe | said))
    runs = _baselines(model, qm, args, common) if pictures is not None else {}
    qm, sections = write_network(qm, model, args.output, args.force, target, pictures, runs)
    forget_progress(args)
    course = qm.manifest.metrics.get("course")
    close(args, qm, [*(course_sections(Course.from_json(course)) if course else []), *sections], console)
    return 0


def _pictures(args: argparse.Namespace, model: nn.Module) -> Pictures | None:
    """The validation pictures, opened and looked at before any work is spent."""
    pictures = labelled(args.val, args, args.input_shape, args.mean, args.std)
    if pictures is not None:
        check_labels(pictures, _classes(model, pictures.read(torch.tensor([0]))))
    return pictures


def _classes(model: nn.Module, x: torch.Tensor) -> int | None:
    try:
        with torch.no_grad():
            (out,) = tensors_of(copy.deepcopy(model).float().eval()(x))
    except Exception:  # what is wrong with a network is said when it is traced
        return None
    return class_scores(out).shape[1]


def _baselines(
    model: nn.Module, qm: QuantizedModel, args: argparse.Namespace, common: dict[str, Any]
) -> dict[str, Any]:
    """What stands beside the result wherever accuracy is measured: float, and nearest rounding on the same images."""
    assert qm.images is not None
    source = plugins.build("calibrators", qm.manifest.recipe["data"])
    again = Again(qm.images, source.synthetic, source.teacher_bn, source.batch_size, len(qm.images))
    same = common | {"layers": ()}
    nearest = quantize(model, data=again, rounding="nearest", plan=qm.plan, **same)  # pyright: ignore[reportArgumentType]
    name = qm.manifest.recipe["rounding"].partition(":")[0]
    runs = {"float": runner(model, _CPU), "nearest": runner(nearest.graph, _CPU)}
    return runs | ({} if name == "nearest" else {name: runner(qm.graph, _CPU)})


def _inspect(args: argparse.Namespace) -> int:
    _settle(args)
    model = load_model(args.model, args.arch, trust_pickle=args.trust_pickle)
    target = target_of(args)
    folded = fold_batch_norm(trace(model, args.input_shape))
    if args.plan is not None:
        if args.layers:
            raise SpecError(f"a plan and {args.layers[0]} given; a plan says every width already")
        plan = read_plan(args.plan)
        plan.check(folded)
    else:
        if args.bits.startswith("auto"):
            raise SpecError(
                f"{args.bits} takes images to choose by; make the plan with 'ptq sensitivity --bits {args.bits} -o plan.json', "
                "and inspect it with --plan plan.json"
            )
        overrides = tuple(Override.parse(text) for text in args.layers)
        placed: dict[str, Any] = {} if target is None else dict(target.rules)
        placed |= {k: v for k in ("placement", "ties") if (v := getattr(args, k)) != "auto"}
        rules = PlanRules(args.edges, args.adds, args.weights, args.activations, args.scales, overrides, **placed)
        plan = make_plan(folded, BitConfig.parse(args.bits), rules)
    check_target(target, folded, plan, "" if args.plan is None else PLAN_AGAIN)
    print_sections(plain_console(), plan_sections(folded, plan))
    return 0


def _export(args: argparse.Namespace) -> int:
    qm = QuantizedModel.load(args.folder)
    images = proof_images(qm)
    if args.vectors is not None and not 0 < args.vectors <= len(images):
        raise SpecError(f"golden vectors on {args.vectors} images asked for; 1 to {len(images)} can be had")
    target = plugins.build("exporters", args.target)
    path = args.output or _free_name(args.folder, target)
    proof = write_verified(qm, target, path)
    record_proof(path, args.target, proof)
    print_sections(plain_console(), [proof_section(proof, f"{path}: passed")])
    if args.vectors is not None:
        plain_console().print(f"{write_vectors(qm, images[: args.vectors], path.parent / 'vectors')}: golden vectors")
    return 0


def _free_name(folder: Path, target: Any) -> Path:
    """model.onnx, or where that is there, verified and reported, model.TARGET.onnx beside it."""
    path = folder / f"model{target.suffix}"
    taken = path in written_files(folder, target.suffix)
    return folder / f"model.{getattr(target, 'profile', 'exported')}{target.suffix}" if taken else path


def _eval(args: argparse.Namespace) -> int:
    qm = QuantizedModel.load(args.folder)
    m = qm.manifest
    pictures = labelled(args.val, args, m.input_shape, args.mean or m.mean, args.std or m.std)
    assert pictures is not None  # --val is required
    runs = {"simulation": runner(qm.graph, _CPU)}
    for file in written_files(args.folder, ".onnx"):
        if not check_written(args.folder, file):
            print(f"ptq: note: nothing here vouches for {file}; it was put there by other means", file=sys.stderr)
        runs[file.name] = onnx_runner(file)
    accuracy = {name: top1(run, pictures) for name, run in runs.items()}
    if args.json:
        print(json.dumps({"top1": accuracy, "pictures": len(pictures)}))
    else:
        rows = [[name, f"{100 * v:.2f} %"] for name, v in accuracy.items()]
        print_sections(plain_console(), [Section(f"Top-1 on {len(pictures)} pictures", ["network", ">top-1"], rows)])
    return 0


def _list(args: argparse.Namespace) -> int:
    kinds: tuple[tuple[plugins.Kind, str], ...] = (
        ("calibrators", "Data sources (--data)"), ("reconstructors", "Rounding (--rounding)"),
        ("finishers", "Joint passes (--finish)"), ("exporters", "Targets (--target)"),
    )  # fmt: skip
    for kind, title in kinds:
        found = plugins.classes(kind)
        heads = ["needs", "cost", "paper"] if kind == "calibrators" else []
        rows = [
            [
                name,
                (sys.modules[cls.__module__].__doc__ or "").splitlines()[0],
                *(_source_columns(cls) if heads else []),
            ]
            for name, cls in found.items()
        ]
        rows += [[alias, what] for cls in found.values() for alias, what in getattr(cls, "summaries", {}).items()]
        options = [
            [name, ", ".join(f"{f}={d}" if d is not None else f for f, d in plugins.options(cls).items())]
            for name, cls in found.items()
        ]
        sections = [
            Section(title, ["name", "what it is", *heads], rows),
            Section("Their options", ["name", "options"], options),
        ]
        print_sections(plain_console(), sections)
        for name in plugins.names(kind):
            if why := plugins.why_not(kind, name):
                print(f"ptq: {why}", file=sys.stderr)
    return 0


def _source_columns(cls: Any) -> list[str]:
    """What a data source needs, what it costs at its paper's size (steps × images, for each batch), and the paper."""
    defaults = plugins.options(cls)
    cost = f"{defaults['steps']} × {defaults['batch_size']}" if "steps" in defaults else "none"
    if "sources" in defaults:
        return ["what they need", "theirs", cls.paper]
    return [", ".join(cls.needs) or "nothing", cost, cls.paper]


def _demo(args: argparse.Namespace) -> int:
    from ptq.demo import run_demo  # scikit-learn, an extra, is needed only here

    return run_demo(args.folder, main, print)


_COMMANDS = {
    "quantize": _quantize, "inspect": _inspect, "export": _export, "eval": _eval, "list": _list, "demo": _demo,
    "synthesize": run_synthesize, "similarity": run_similarity, "sensitivity": run_sensitivity,
    "distill": run_distill,
}  # fmt: skip
