"""The command `ptq sensitivity`."""

import argparse
import json
from pathlib import Path
from typing import Any

from ptq.artifact import check_writable, write_plan
from ptq.cli_images import common, further, sized
from ptq.errors import SpecError
from ptq.loading import load_model
from ptq.mixed_precision import BitSensitivity, bit_sensitivity
from ptq.report import Section, print_sections
from ptq.sensitivity import Cost
from ptq.terminal import plain_console, shown

_KINDS = (
    ("weight", "Weights of one layer", "layer"), ("block", "Weights of one block", "block"),
    ("activation", "One tensor that enters a layer", "value"),
)  # fmt: skip


def run_sensitivity(args: argparse.Namespace) -> int:
    """Prints what each width costs, and writes the plan that meets a budget."""
    options = common(args)
    if (args.bits is None) != (args.output is None):
        raise SpecError("a plan takes both a budget and a file to write, as in --bits auto:size=300KB,a4 -o plan.json")
    if args.output is not None:
        _check_file(args.output, args.force)
    model = load_model(args.model, args.arch, trust_pickle=args.trust_pickle)
    with shown(args.quiet or args.json, plain_console(stderr=True)) as feedback:
        found = bit_sensitivity(
            model, sized(args.data or "auto", args), teachers=further(args), widths=args.widths,
            count=args.count or 256, budget=args.bits, ranges=args.ranges, edges=args.edges, weights=args.weights,
            activations=args.activations, scales=args.scales, target=args.target, feedback=feedback, **options,
        )  # fmt: skip
    if found.plan is not None and args.output is not None:
        write_plan(found.plan, args.output)
    if args.json:
        print(json.dumps(_rows(found, args.output), indent=1))
        return 0
    print_sections(
        plain_console(),
        [_table(found.costs, *kind) for kind in _KINDS if any(c.kind == kind[0] for c in found.costs)],
    )
    if found.plan is not None and args.output is not None:
        plain_console().print(
            f"{args.output}: weights of {found.bytes / 1000:.1f} kB, {found.bops / 1e9:.3f} G bit operations an image; "
            f"use it with 'ptq quantize --plan {args.output}'"
        )
    return 0


def _check_file(path: Path, overwrite: bool) -> None:
    """Before work, so that none is lost."""
    if path.is_dir():
        raise SpecError(f"{path} is a folder; name the file to write")
    if path.exists() and not overwrite:
        raise SpecError(f"{path} exists; name another file or overwrite it with --force")
    check_writable(path)


def _rows(found: BitSensitivity, output: Path | None) -> dict[str, Any]:
    costs = [
        {"place": c.place, "kind": c.kind, "bits": c.bits, "sqnr_db": c.sqnr_db, "agreement": c.agreement}
        for c in found.costs
    ]
    plan = None if found.plan is None else {"file": str(output), "bytes": found.bytes, "bops": found.bops}
    return {"costs": costs, "plan": plan}


def _table(costs: tuple[Cost, ...], kind: str, title: str, noun: str) -> Section:
    """A line per place, a column per width: SQNR of the output and agreement of classes."""
    mine = [c for c in costs if c.kind == kind]
    widths = sorted({c.bits for c in mine})
    cells = {(c.place, c.bits): f"{c.sqnr_db:.1f} dB, {100 * c.agreement:.1f} %" for c in mine}
    rows = [[place, *(cells.get((place, b), "") for b in widths)] for place in dict.fromkeys(c.place for c in mine)]
    return Section(
        f"{title} quantized alone: output SQNR, classes that stay", [noun, *(f">{b} bits" for b in widths)], rows
    )
