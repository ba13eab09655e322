"""Imports point down: every import statement of the package, parsed and compared with the layers below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "ptq": 6, "ptq.__main__": 6, "ptq.cli": 6, "ptq.cli_options": 6, "ptq.cli_images": 6, "ptq.cli_sensitivity": 6,
    "ptq.cli_distill": 6, "ptq.cli_output": 6,
    "ptq.pipeline": 5, "ptq.distillation": 5, "ptq.training_setup": 5, "ptq.sources": 5, "ptq.plugins": 5,
    "ptq.run": 5, "ptq.report": 5, "ptq.terminal": 5, "ptq.gallery": 5, "ptq.demo": 5, "ptq.activation_ranges": 5,
    "ptq.sensitivity": 5, "ptq.mixed_precision": 5, "ptq.proof": 5, "ptq.request": 5,
    "ptq.distilling": 4, "ptq.evaluate": 4, "ptq.similarity": 4, "ptq.vectors": 4, "ptq.reconstruct": 4,
    "ptq.finish": 4, "ptq.calibrators": 4, "ptq.exporters": 4,
    "ptq.contracts": 3, "ptq.training": 3, "ptq.augment": 3, "ptq.batch_cache": 3, "ptq.artifact": 3,
    "ptq.loading": 3, "ptq.onnx_session": 3, "ptq.pictures": 3, "ptq.precision": 3,
    "ptq.graph": 2,
    "ptq.quant": 1,
    "ptq.spec": 0, "ptq.errors": 0, "ptq.integrity": 0,
}  # fmt: skip
PLUGINS = ("ptq.calibrators", "ptq.reconstruct", "ptq.finish", "ptq.exporters")
# The loop that drives a rounding method is shared machinery, of which there is one; methods are found by name.
ALLOWED = {("ptq.pipeline", "ptq.reconstruct._loop"), ("ptq.pipeline", "ptq.reconstruct._repair")}


def _modules() -> dict[str, Path]:
    """Module name → file, for all of the distribution."""
    found = {}
    for folder, package in (("ptq", "ptq"), ("calibrators", "ptq.calibrators"), ("exporters", "ptq.exporters")):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


MODULES = _modules()


def _is_type_checking(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def _statements(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, but for those under `if TYPE_CHECKING:`."""
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        stack.extend(node.orelse if _is_type_checking(node) else ast.iter_child_nodes(node))
    return found


def imported(name: str, source: str, is_package: bool = False) -> set[str]:
    """Modules of this package that a module imports; `from ptq import plugins` is `ptq.plugins`."""
    found = set()
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            parents = name.split(".") if is_package else name.split(".")[:-1]
            base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
        found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {m for m in found if m == "ptq" or m.startswith("ptq.")}


def part(name: str) -> str:
    """The entry of `LAYERS` that a module belongs to: itself, or the package around it."""
    return name if name in LAYERS else ".".join(name.split(".")[:2])


def complaints(name: str, imports: set[str]) -> list[str]:
    """What is wrong with a module's imports."""
    found, mine = [], part(name)
    for other in sorted(imports - {name}):
        theirs = part(other)
        if theirs not in LAYERS:
            found.append(f"{name} imports {other}, which has no layer")
        elif LAYERS[theirs] > LAYERS[mine]:
            found.append(f"{name} (layer {LAYERS[mine]}) imports {other} (layer {LAYERS[theirs]})")
        elif LAYERS[theirs] == LAYERS[mine] == 4 and theirs != mine:
            found.append(f"{name} imports {other}, beside it")
        if theirs in PLUGINS and mine != theirs and (name, other) not in ALLOWED:
            found.append(f"{name} names {other}: plug-ins are found by name")
        if other == "ptq" and mine in PLUGINS:
            found.append(f"plug-in {name} imports ptq itself")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str):
    file = MODULES[name]
    assert part(name) in LAYERS, f"{name} has no layer: give it one in this file"
    imports = imported(name, file.read_text(encoding="utf-8"), file.name == "__init__.py")
    assert complaints(name, imports) == []


def test_imports_are_found():
    """The parser sees what there is: a file that imports from every layer below."""
    assert {"ptq.plugins", "ptq.artifact", "ptq.graph.fold_bn", "ptq.spec"} <= imported(
        "ptq.pipeline", MODULES["ptq.pipeline"].read_text(encoding="utf-8")
    )
    assert any(name.startswith("ptq.calibrators.") for name in MODULES)


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("ptq.spec", "from ptq.quant.affine import QParams", True),
        ("ptq.graph.plan", "def f():\n    import ptq.contracts", True),
        ("ptq.graph.plan", "from ..artifact import QuantizedModel", True),
        (
            "ptq.contracts",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ptq.pipeline import export",
            False,
        ),
        ("ptq.contracts", "if TYPE_CHECKING:\n    pass\nelse:\n    from ptq.pipeline import export", True),
        ("ptq.evaluate", "from ptq.reconstruct._loop import BlockReport", True),
        ("ptq.calibrators.genie", "from ptq.reconstruct._capture import Capture", True),
        ("ptq.calibrators.genie", "from ptq.calibrators._losses import Taps", False),
        ("ptq.calibrators.genie", "import ptq", True),
        ("ptq.calibrators.genie", "from ptq import BitConfig", True),
        ("ptq.calibrators.genie", "from ptq import contracts", False),
        ("ptq.pipeline", "from ptq.calibrators.genie import Genie", True),
        ("ptq.pipeline", "from ptq.reconstruct import _loop", False),
        ("ptq.pipeline", "from ptq.reconstruct import genie_m", True),
        ("ptq.plugins", "import ptq.exporters.onnx_qdq", True),
        ("ptq.pipeline", "from ptq.cli import main", True),
    ],
)
def test_the_rules_can_fail(name: str, source: str, wrong: bool):
    assert bool(complaints(name, imported(name, source))) == wrong
