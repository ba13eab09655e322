"""Networks of torchvision, random weights, through everything: whatever comes out computes what was simulated."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
families = pytest.importorskip("families", reason="torchvision is not installed", exc_type=ImportError)

# Not one output differs: where no integer kernel is, the runtime's float arithmetic is known. Families with an operation of
# their own: means of windows and BatchNorm between (densenet), sigmoids (regnet_y), a result that is a mean (squeezenet), bilinear
# resizing (lraspp).
EQUAL = [
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "lraspp_mobilenet_v3_large",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", EQUAL)
def test_family(name: str, bits: str):
    row = families.covered(name, bits)
    assert row["exported"] == "yes", row["why not"]
    done, _, planned = row["integer layers"].partition(" of ")
    assert done == planned and row["float layers"] == 0 and row["worst steps"] <= 1
    assert row["differing outputs"].startswith("0 of ")


@pytest.mark.slow
def test_a_family_with_operations_outside_the_table():
    """Swin: every linear layer is an integer layer, in windows folded into the batch too; attention itself is float."""
    row = families.covered("swin_t", "w8a8")
    assert row["exported"] == "yes", row["why not"]
    assert row["integer layers"] == "53 of 53" and row["float layers"] == 0 and row["worst steps"] <= 1
    assert row["float regions"] == 15  # attention in 12 blocks, and what merges patches, three times


def test_what_cannot_be_quantized_says_why(monkeypatch):
    noisy = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.FractionalMaxPool2d(2, output_size=4), torch.nn.Flatten()
    )
    monkeypatch.setattr(families, "network", lambda name: noisy)
    row = families.covered("swin_t", "w8a8")
    assert row["quantized"] == "no" and row["why not"].startswith("unknown module")
