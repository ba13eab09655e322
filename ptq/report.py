"""The tables a run ends with, in the terminal and as `report.md`; and the plan table of `ptq inspect`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import fx

from ptq.artifact import QuantizedModel
from ptq.distilling.course import Course
from ptq.graph.float_region import FloatRegion
from ptq.graph.ops import find_op, weighted_nodes
from ptq.graph.plan import QuantPlan
from ptq.spec import QuantSpec

Row = Sequence[str]


@dataclass(frozen=True, slots=True)
class Section:
    """One table: a title, column heads (a leading ">" aligns right) and rows."""

    title: str
    heads: Row
    rows: Sequence[Row]


def plan_sections(gm: fx.GraphModule, plan: QuantPlan) -> list[Section]:
    """The plan of a folded network: a table of layers and one of values."""
    layers = []
    for node in weighted_nodes(gm):
        path, weight = str(node.target), gm.get_submodule(str(node.target)).weight
        source = plan.values.get(node.all_input_nodes[0].meta["value"])
        layers.append(
            [path, _operation(gm, node), "×".join(map(str, weight.shape)), _grid(plan.weights.get(path)), _grid(source)]  # pyright: ignore[reportArgumentType]
        )
    values = []
    for node in gm.graph.nodes:
        name = node.meta.get("value")
        if node.op != "output":
            group = plan.group(name) if name in plan.values else ""
            tied = "" if group in ("", name) else f"as {group}"
            values.append(
                [name, _operation(gm, node), "×".join(map(str, node.meta["shape"])), _grid(plan.values.get(name)), tied]
            )
    return [
        Section("Layers", ["layer", "operation", "weight", "weight grid", "input grid"], layers),
        Section("Values", ["value", "operation", "shape", "grid", "shared"], values),
    ]


def _operation(gm: fx.GraphModule, node: fx.Node) -> str:
    op = find_op(gm, node)
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, FloatRegion):
        return ", ".join(f"aten.{name}" for name in module.names)
    return "input" if op is None else op.name


def _grid(spec: QuantSpec | None) -> str:
    if spec is None:
        return "float"
    sign = "int" if spec.signed else "uint"
    return (
        f"{sign}{spec.bits}"
        + ("" if spec.symmetric else " + zero point")
        + (" per channel" if spec.axis is not None else "")
    )


def run_sections(
    qm: QuantizedModel, sizes: Mapping[str, int], proof: Mapping[str, Any] | None, accuracy: Mapping[str, float]
) -> list[Section]:
    """What a run ended with: blocks, agreement, accuracy where labels were given, the file's proof, sizes, notes."""
    m, manifest = qm.manifest.metrics, qm.manifest
    blocks = [
        [
            b["name"],
            _widths(qm, b["layers"]),
            f"{b['nearest_error']:.4g}",
            f"{b['error']:.4g}",
            b["kept"],
            f"{b['sqnr_db']:.1f}",
        ]
        for b in manifest.blocks
    ]
    results = [
        ["agrees with float on calibration images", _percent(m["agreement_nearest"]), _percent(m["agreement"])],
        ["folding BatchNorm changed outputs by, of the largest", "", f"{m['fold_error']:.1e}"],
        ["SQNR of the output, calibration images", f"{m['sqnr_db_nearest']:.1f} dB", f"{m['sqnr_db']:.1f} dB"],
    ]
    sections = [
        Section("Blocks", ["block", "weights", ">nearest error", ">error", "kept", ">SQNR dB"], blocks),
        Section(
            "Against the float network",
            ["", f">{m.get('beside', 'rounded to nearest, biases in float')}", f">{_result(manifest.recipe)}"],
            results,
        ),
    ]
    if accuracy:
        sections.append(
            Section("Top-1 accuracy", ["network", ">top-1"], [[k, _percent(v)] for k, v in accuracy.items()])
        )
    if proof is not None:
        sections.append(proof_section(proof))
    files = [[name, f"{size:,}", f"1/{sizes['float weights'] / size:.1f}"] for name, size in sizes.items()]
    sections.append(Section("Bytes", ["", ">bytes", ">of float"], files))
    seconds = [[stage, f"{s:.1f}"] for stage, s in manifest.seconds.items()]
    sections.append(Section("Time", ["stage", ">seconds"], seconds))
    return sections


def course_sections(course: Course, final: float | None = None) -> list[Section]:
    """Loss and reported accuracy of a distillation's epochs; final: accuracy at its end, in per cent."""
    rows = [[str(r.epoch), f"{r.loss:.4g}", *([] if r.top1 is None else [f"{r.top1:.2f} %"])] for r in course.rows]
    told = bool(course.accuracies)
    sections = [Section("Epochs", [">epoch", ">loss", *([">top-1"] if told else [])], rows)]
    if course.mean is not None and course.variance is not None and course.best is not None:
        figures = [["mean over epochs", f"{course.mean:.2f} %"], ["variance", f"{course.variance:.2f}"]]
        figures += [["best epoch (nothing is chosen by it)", f"{course.best:.2f} %"]]
        figures += [] if final is None else [["at the end", f"{final:.2f} %"]]
        sections.append(Section("Reported accuracy", ["", ">top-1"], figures))
    return sections


def _result(recipe: Mapping[str, Any]) -> str:
    distilled = ", distilled" if recipe.get("distill") else ""
    return f"result, {str(recipe['rounding']).partition(':')[0]}{distilled}"


def _widths(qm: QuantizedModel, layers: Sequence[str]) -> str:
    widths = [f"w{qm.plan.weights[p].bits}" if p in qm.plan.weights else "float" for p in layers]
    return ", ".join(f"{widths.count(w)}×{w}" for w in dict.fromkeys(widths))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def proof_section(proof: Mapping[str, Any], title: str = "Exported file against the simulation") -> Section:
    """What was found of an exported file; of another's exporter, what every one says."""
    result = ["result", "passed" if proof["passed"] else f"FAILED: {proof.get('failure')}"]
    if "integer_layers" not in proof:
        return Section(title, ["", ""], [result])
    floats = proof["float_layers"]
    rows = [
        result,
        ["runtime, images", f"{proof['runtime']}, {proof['images']}"],
        ["same class as the simulation", _percent(proof["top1_agreement"])],
        ["outputs that differ in any bit", f"{proof['differing_outputs']:,} of {proof['outputs']:,}"],
        ["SQNR against the simulation", "equal" if proof["sqnr_db"] is None else f"{proof['sqnr_db']:.1f} dB"],
        ["worst step of any tensor, equal inputs", str(proof["worst_steps"])],
        ["layers in integer kernels", f"{proof['integer_layers']} of {proof['integer_layers'] + len(floats)}"],
    ]
    if floats:
        rows.append(["layers in float", _first(floats)])
    for row in proof.get("opinions", ()):
        rows.append([f"second opinion: {row['by']}", row["skipped"] if "skipped" in row else _opinion(row)])
    if regions := proof.get("float_regions"):
        rows.append(["operations outside the table, in float", _first(regions)])
    if others := proof.get("float_operations"):
        rows.append(["further operations in float", _first(others)])
    return Section(title, ["", ""], rows)


def _opinion(row: Mapping[str, Any]) -> str:
    apart = "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
    return f"{apart}, same class on {_percent(row['top1_agreement'])} of {row['images']} images"


def print_sections(console: Console, sections: Sequence[Section], notes: Sequence[str] = ()) -> None:
    """The tables on a terminal."""
    for section in sections:
        table = Table(title=section.title, title_justify="left", title_style="bold", show_header=any(section.heads))
        for head in section.heads:
            table.add_column(head.removeprefix(">"), justify="right" if head.startswith(">") else "left")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
    for note in notes:
        console.print(f"note: {note}")


def markdown(title: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """The tables as a Markdown document."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", "| " + " | ".join(h.removeprefix(">") for h in section.heads) + " |"]
        lines.append("|" + "|".join("---:" if h.startswith(">") else "---" for h in section.heads) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in section.rows] + [""]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)
