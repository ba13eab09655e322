"""What happens to the networks of torchvision, family by family: traced, quantized, exported, integer layers, parity.

    python benchmarks/families.py --networks resnet18,mobilenet_v2

Random weights with BatchNorm statistics calibrated on noise (their scores mean nothing, their graphs do), nearest rounding on 16
noise images. One row per network × width, written as soon as it is known. The table in README.md is written, and held to, by
tests/exporters/test_families.py. Uses the public API only.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision
from networks import HERE
from rows import Rows, markdown
from torch import nn

import ptq

# Family → its smallest member, and the pixels of its input: enough for its last layers to have something to see.
FAMILIES = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "googlenet": 64,
    "inception_v3": 299, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64, "swin_t": 224, "vgg11_bn": 64, "vit_b_16": 224, "wide_resnet50_2": 64, "deeplabv3_mobilenet_v3_large": 64,
    "fcn_resnet50": 64, "lraspp_mobilenet_v3_large": 64,
}  # fmt: skip
TIED = ("maxvit_t", "vit_b_16")  # whose scores need `tell_apart`
WIDTHS = ("w8a8", "w4a4")
_KEYS = ("network", "bits")


def main() -> None:
    """Runs what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--networks", default=",".join(FAMILIES), help="comma-separated")
    p.add_argument("--bits", default=",".join(WIDTHS), help="comma-separated")
    p.add_argument("--out", type=Path, default=HERE / "results" / "families.jsonl")
    args = p.parse_args()
    rows = Rows(args.out, _KEYS)
    for name in args.networks.split(","):
        for bits in args.bits.split(","):
            if rows.find(network=name, bits=bits) is None:
                rows.add(row := {"network": name, "bits": bits} | covered(name, bits))
                print(row, flush=True)
    heads = (*_KEYS, "traced", "quantized", "exported", "layers", "float regions", "step", "differing")
    print(markdown(list(heads), [[row[k] for k in heads[:4]] + cells(row) for row in rows.rows]))


def cells(row: dict[str, Any]) -> list[str]:
    """Whether a row was exported or why not, its layers in integer kernels, float regions, largest step, differing outputs."""
    if row["exported"] != "yes":
        return [f"no: {row['why not']}", "", "", "", ""]
    return [str(row[k]) for k in ("exported", "integer layers", "float regions", "worst steps", "differing outputs")]


def network(name: str) -> nn.Module:
    """A network of torchvision with random weights, its BatchNorm statistics from one batch of noise."""
    torch.manual_seed(0)
    segments = hasattr(torchvision.models.segmentation, name)
    family: Any = getattr(torchvision.models.segmentation if segments else torchvision.models, name)
    options = {"weights": None} | ({"weights_backbone": None} if segments else {})
    model = family(**options, **({"init_weights": True} if name in ("googlenet", "inception_v3") else {}))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None  # the statistics of this batch alone
        with torch.no_grad():
            model.train()(torch.randn(8, 3, max(FAMILIES[name], 96), max(FAMILIES[name], 96)))
    return model.eval()


@torch.no_grad()
def tell_apart(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """The network with a classifier that has a row per image: what sets the image's features apart.

    Of random weights the scores all but tie, and torchvision's vision transformer begins with a classifier of zeros: the class says
    nothing of a file in which codes behind float operations move by a step now and then.
    """
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    handle.remove()
    mean = seen[0].mean(0)
    head.weight.zero_()
    head.weight[: len(images)] = nn.functional.normalize(seen[0] - mean)
    head.bias = nn.Parameter(-head.weight @ mean)
    return model


def covered(name: str, bits: str) -> dict[str, Any]:
    """How far a network comes, with the figures of its file; `why not` says what stopped it."""
    size, row = FAMILIES[name], {"traced": "no", "quantized": "no", "exported": "no"}
    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1))
    try:
        model = tell_apart(network(name), images) if name in TIED else network(name)
        qm = ptq.quantize(model, bits, images, input_shape=(3, size, size), rounding="nearest", ranges="minmax")
        row |= {"traced": "yes", "quantized": "yes"}
        with tempfile.TemporaryDirectory() as folder:
            proof = ptq.export(qm, "onnx_qdq", Path(folder) / "model.onnx")
    except ptq.PtqError as e:
        return row | {"why not": str(e).partition("; known:")[0].partition(" (File")[0]}
    return row | {
        "exported": "yes", "integer layers": f"{proof['integer_layers']} of {len(qm.plan.weights)}",
        "float layers": len(proof["float_layers"]), "float regions": len(proof["float_regions"]), "worst steps": proof["worst_steps"],
        "differing outputs": f"{proof['differing_outputs']} of {proof['outputs']}", "why not": "",
    }  # fmt: skip


if __name__ == "__main__":
    main()
