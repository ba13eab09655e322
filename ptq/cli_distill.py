"""`ptq distill`: a quantized network trained further, or a student of another architecture."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ptq import plugins
from ptq.artifact import MANIFEST, QuantizedModel, check_free, whole_folder
from ptq.cli_images import further, labelled, sized
from ptq.cli_output import TARGET, Again, close, forget_progress, progress_folder, target_of, where_from, write_network
from ptq.contracts import Exporter, Feedback
from ptq.distillation import Distilled, distill, distill_quantized
from ptq.distilling.course import Course
from ptq.errors import ExportError, SpecError
from ptq.evaluate import runner
from ptq.graph.fold_bn import fold_batch_norm
from ptq.graph.trace import trace
from ptq.loading import fresh_model, load_model
from ptq.mixed_precision import first_plan
from ptq.pictures import Pictures
from ptq.pipeline import check_fisher, quantize
from ptq.report import Section, course_sections, print_sections
from ptq.request import read_bits
from ptq.spec import PlanRules
from ptq.terminal import plain_console, shown

STUDENT, FACTS = "student.pt", "distillation.json"
_CPU = torch.device("cpu")


def run_distill(args: argparse.Namespace) -> int:
    """Trains a student and writes it. A command that was interrupted, given again, goes on after the last whole epoch.

    Raises:
        SpecError: neither a folder nor a student is named, or both.
    """
    named = args.student is not None or args.student_arch is not None
    if args.folder is not None and named:
        raise SpecError(f"{args.folder} and a student given: only one of them can learn")
    if args.folder is None and not named:
        raise SpecError(
            "name what shall learn: a folder that 'ptq quantize -o' wrote, or a student by --student-arch (and --student)"
        )
    console = plain_console(stderr=True)
    if args.folder is not None:
        _quantized(args, console)
    else:
        _student(args, console)
    return 0


def _training(args: argparse.Namespace) -> str:
    """The training's options as one text: what the single options say counts last."""
    single = {"epochs": args.epochs, "steps": args.steps, "batch_size": args.batch}
    return ",".join(filter(None, [args.training, *(f"{key}={v}" for key, v in single.items() if v is not None)]))


def _common(args: argparse.Namespace, feedback: Feedback, reported: Pictures | None) -> dict[str, Any]:
    return {
        "training": _training(args), "report_on": reported, "effort": args.effort, "device": args.device,
        "cache": progress_folder(args), "feedback": feedback,
    }  # fmt: skip


def _quantized(args: argparse.Namespace, console: Console) -> None:
    """A quantized network, trained further."""
    for name in ("then", "restore", "rounding", "input_shape", "mean", "std"):
        if getattr(args, name):
            raise SpecError(
                f"--{name.replace('_', '-')} given; it belongs to students of another architecture, not to a folder"
            )
    args.output = args.output or args.folder.absolute().with_name(f"{args.folder.absolute().name}-distilled")
    check_free(args.output, args.force)
    if args.count is not None and args.data is None:
        raise SpecError("-n is given without --data; the folder's own images are as many as they are")
    qm = QuantizedModel.load(args.folder)
    model = _teacher_of(args, qm)
    args.target = args.target or str(qm.manifest.recipe.get("target") or TARGET)
    target = target_of(args)
    if target is not None:
        target.check(qm.student, qm.plan)
    pictures = labelled(args.report_on, args, qm.manifest.input_shape, qm.manifest.mean, qm.manifest.std)
    data = None if args.data is None else sized(args.data, args)
    with shown(args.quiet, console) as feedback:
        given = _common(args, feedback, pictures)
        qm = distill_quantized(model, qm, data, teachers=further(args), seed=args.seed, **given)
    qm = replace(qm, manifest=replace(qm.manifest, recipe=qm.manifest.recipe | {"target": args.target}))
    runs = {"float": runner(model, _CPU), "distilled": runner(qm.graph, _CPU)} if pictures is not None else {}
    qm, sections = write_network(qm, model, args.output, args.force, target, pictures, runs)
    forget_progress(args)
    close(args, qm, [*course_sections(Course.from_json(qm.manifest.metrics["course"])), *sections], console)


def _recorded_arch(qm: QuantizedModel) -> str | None:
    """What the folder's recipe says builds the float network, where that runs no code but torchvision's.

    Raises:
        SpecError: it is other code, which runs only where the user names it: folders may come from anybody.
    """
    found = qm.manifest.recipe.get("arch")
    if found is None or re.fullmatch(r"torchvision:\w+(\(.*\))?", str(found)):  # arguments are literals
        return found
    raise SpecError(
        f"what builds the float network is code: name it by --arch; the folder says it was {str(found)[:200]!r}"
    )


def _teacher_of(args: argparse.Namespace, qm: QuantizedModel) -> nn.Module:
    """The float network: the file that was named, else the one that the folder's recipe names.

    Raises:
        SpecError: neither names one that is there.
    """
    path, found = args.teacher, qm.manifest.recipe.get("model")
    if path is None:
        args.arch = args.arch or _recorded_arch(qm)
        if found is None or not Path(found).is_file():
            raise SpecError(
                f"the float network is needed as teacher, and {found or 'the file it was made from'} is not there; name it by "
                "--teacher MODEL --arch ARCH"
            )
        path = Path(found)
    return load_model(path, args.arch, trust_pickle=args.trust_pickle)


def _check_then(args: argparse.Namespace, student: nn.Module, target: Exporter | None) -> None:
    """Raises what quantizing the student would, before it is trained."""
    method = plugins.build("reconstructors", args.rounding or "nearest")
    placed: dict[str, Any] = {} if target is None else dict(target.rules)
    rules = PlanRules(**placed)
    folded = fold_batch_norm(trace(student, tuple(args.input_shape)))
    check_fisher(method, folded)
    plan = first_plan(folded, read_bits(args.then), rules)
    if target is not None:
        try:
            target.check(folded, plan)
        except ExportError as e:
            raise ExportError(
                f"{e}; --then has no such options: leave it out, and run ptq quantize on student.pt"
            ) from e


def _student(args: argparse.Namespace, console: Console) -> None:
    """A student of another architecture, and what quantizing it gives where that is asked for."""
    for name in ("teacher", "input_shape", "output"):
        if getattr(args, name) is None:
            raise SpecError(
                f"--{name.replace('_', '-')} is missing; a student learns from a teacher, -o is the folder to write"
            )
    if args.then is None and args.rounding is not None:
        raise SpecError("--rounding is given without --then; it says how the student is quantized")
    check_free(args.output, args.force)
    if args.then is None and args.target is not None:
        raise SpecError("--target is given without --then; a float student is written for no runtime")
    args.target = args.target or TARGET
    target = target_of(args)
    seed, arch = args.seed or 0, args.student_arch or args.arch
    model = load_model(args.teacher, args.arch, trust_pickle=args.trust_pickle)
    student = (
        fresh_model(arch, seed)
        if args.student is None
        else load_model(args.student, arch, trust_pickle=args.trust_pickle)
    )
    if args.then is not None:
        _check_then(args, student, target)
    pictures = labelled(args.report_on, args, args.input_shape, args.mean, args.std)
    stated = {"input_shape": args.input_shape, "mean": args.mean, "std": args.std, "seed": seed}
    more = {} if args.restore is None else {"restore": args.restore}
    with shown(args.quiet, console) as feedback:
        found = distill(
            model,
            student,
            sized(args.data or "auto", args),
            teachers=further(args),
            **stated,
            **more,
            **_common(args, feedback, pictures),
        )
        qm = None if args.then is None else _then(args, found, stated, feedback)
    _write_student(args, model, found, qm, pictures, console=console)


def _write_student(
    args: argparse.Namespace, model: nn.Module, found: Distilled, qm: QuantizedModel | None, pictures: Pictures | None,
    *, console: Console,
) -> None:  # fmt: skip
    """Writes the student and, where it was quantized, what `quantize` writes beside it; prints what it ended with."""
    facts, sections = _facts(args, found), course_sections(found.course, found.top1)

    def write_more(folder: Path) -> None:
        torch.save(found.student.state_dict(), folder / STUDENT)
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    if qm is None:
        with whole_folder(args.output, args.force) as folder:
            write_more(folder)
            (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        forget_progress(args)
        _say(args, facts, sections, console)
        return
    origin = where_from(args.output / STUDENT, args.student_arch or args.arch, args.target)
    qm = replace(qm, manifest=replace(qm.manifest, recipe=qm.manifest.recipe | origin))
    target = target_of(args)
    floats = {"teacher": runner(model, _CPU), "student, float": runner(found.student, _CPU)}
    runs = {**floats, "student": runner(qm.graph, _CPU)} if pictures is not None else {}
    qm, tables = write_network(qm, found.student, args.output, args.force, target, pictures, runs, write_more)
    forget_progress(args)
    close(args, qm, [*sections, *tables], console)


def _then(args: argparse.Namespace, found: Distilled, stated: dict[str, Any], feedback: Feedback) -> QuantizedModel:
    """The student quantized, on images that it was trained on."""
    real = str(found.recipe["data"]).startswith("images")
    data: Any = Again(found.images, not real, "running", 64, len(found.images))
    qm = quantize(
        found.student, args.then, data, rounding=args.rounding or "genie_m", effort=args.effort, device=args.device,
        target=None if args.target == "none" else args.target, source=f"the student of {args.teacher.name}", feedback=feedback,
        cache=progress_folder(args), **stated,
    )  # fmt: skip
    images = {name: found.recipe[name] for name in ("data", "further_teachers")}
    recipe = {**qm.manifest.recipe, **images, "student": found.recipe}
    return replace(qm, manifest=replace(qm.manifest, recipe=recipe, notes=[*found.notes, *qm.manifest.notes]))


def _facts(args: argparse.Namespace, found: Distilled) -> dict[str, Any]:
    files = {"teacher": str(args.teacher), "student": args.student and str(args.student)}
    return {
        **files, "student_arch": args.student_arch or args.arch, "recipe": found.recipe, "course": found.course.to_json(),
        "top1": found.top1, "seconds": found.seconds, "notes": list(found.notes),
    }  # fmt: skip


def _say(args: argparse.Namespace, facts: dict[str, Any], sections: list[Section], console: Console) -> None:
    if args.json:
        print(json.dumps(facts, indent=1))
    elif not args.quiet:
        print_sections(plain_console(), sections)
        console.print(f"written to {args.output}: {STUDENT}, {FACTS}")
