"""Networks of torchvision, random weights, through everything: whatever comes out computes what was simulated.

Writes the table of benchmarks/README.md, with `pytest tests/exporters/test_families.py -m slow --rewrite-tables`, and holds it to
what is found without.
"""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
families = pytest.importorskip("families", reason="torchvision is not installed", exc_type=ImportError)

TABLE = BENCHMARKS / "README.md"
# Seconds each; the others take up to a few minutes. Families with an operation of their own: means of windows and BatchNorm
# between (densenet), sigmoids (regnet_y), a result that is a mean (squeezenet), bilinear resizing (lraspp), attention (swin).
SHORT = (
    "densenet121", "efficientnet_b0", "googlenet", "lraspp_mobilenet_v3_large", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
)  # fmt: skip
# Behind a float region, how many outputs differ depends on the processor.
WITH_REGIONS = ("maxvit_t", "swin_t", "vit_b_16")
ROWS = [
    pytest.param(
        name,
        bits,
        marks=() if name in SHORT or (name, bits) == ("swin_t", "w8a8") else pytest.mark.long,
        id=f"{name}-{bits}",
    )
    for name in families.FAMILIES
    for bits in families.WIDTHS
]


def _line(text: str, name: str) -> list[str]:
    """The cells of a network's line in the table."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} | yes | yes |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def _place(bits: str) -> slice:
    """Where a width's cells are in a line: name, traced, quantized, then five for each width."""
    first = 3 + 5 * families.WIDTHS.index(bits)
    return slice(first, first + 5)


def _rewrite(name: str, bits: str, found: list[str]) -> None:
    text = TABLE.read_text()
    line = _line(text, name)
    old = "| " + " | ".join(line) + " |"
    line[_place(bits)] = found
    assert old in text
    TABLE.write_text(text.replace(old, "| " + " | ".join(line) + " |"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), ROWS)
def test_family(name: str, bits: str, request: pytest.FixtureRequest):
    row = families.covered(name, bits)
    assert row["traced"] == row["quantized"] == "yes", row["why not"]
    found = families.cells(row)
    if request.config.getoption("rewrite_tables", default=False):
        _rewrite(name, bits, found)
    told = _line(TABLE.read_text(), name)[_place(bits)]
    if told[0] != "yes":  # a file that was refused for how it rounds may pass on another processor
        assert name in WITH_REGIONS
        return
    assert found[:3] == told[:3]  # not the step: none or one is the processor's to say
    done, _, planned = row["integer layers"].partition(" of ")
    assert done == planned and row["float layers"] == 0 and row["worst steps"] <= 1
    if name not in WITH_REGIONS:
        # Not one output differs: where no integer kernel is, the runtime's float arithmetic is known.
        assert found[4] == told[4] and told[4].startswith("0 of ")


def test_the_table_has_every_family():
    text = TABLE.read_text()
    for name in families.FAMILIES:
        cells = _line(text, name)
        assert len(cells) == 3 + 5 * len(families.WIDTHS)
        assert all(cells[_place(bits)][0].startswith(("yes", "no: ")) for bits in families.WIDTHS)


def test_what_cannot_be_quantized_says_why(monkeypatch):
    noisy = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.FractionalMaxPool2d(2, output_size=4), torch.nn.Flatten()
    )
    monkeypatch.setattr(families, "network", lambda name: noisy)
    row = families.covered("swin_t", "w8a8")
    assert row["quantized"] == "no" and row["why not"].startswith("unknown module")
