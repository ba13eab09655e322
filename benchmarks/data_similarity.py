"""The data similarity measure on real data sets: table 4 of The Knowledge Within.

    python benchmarks/data_similarity.py --network resnet44

J_KL of each set, relative to that of the reference (training pictures of the network's own data set): other pictures of the same
set, a set of like pictures, digits, the reference perturbed by FGSM, noise. Uses the public API only.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import HERE, SHARED, Network, load, pictures
from rows import Rows, markdown
from torch import Tensor

import ptq

_KEYS = ("network", "images", "count", "seed")
_REFERENCE = "training pictures (reference)"
_EPSILON = 0.1  # of FGSM, as in the paper, in normalized units


def main() -> None:
    """Runs what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--network", default="resnet44", help="of cases.toml, for CIFAR-10")
    p.add_argument("--count", type=int, default=2048, help="images of each set, at most")
    p.add_argument("--seeds", type=int, default=1, help="draws of noise and of --count images, with seeds 0, 1, …")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=HERE / "results" / "data_similarity.jsonl")
    args = p.parse_args()
    rows, network = Rows(args.out, _KEYS), load(args.network, args.shared)
    for seed in range(args.seeds):
        for name, images in _sets(network, args.shared / "data", seed).items():
            key = {"network": args.network, "images": name, "count": args.count, "seed": seed}
            if rows.find(**key) is None:
                pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: args.count]
                found = ptq.data_similarity(
                    network.model, images[pick], input_shape=network.shape, mean=network.mean, std=network.std,
                    device=args.device,
                )  # fmt: skip
                rows.add(key | {"number": found.images, "j_kl": found.mean})
    mine = [r for r in rows.rows if (r["network"], r["count"]) == (args.network, args.count)]
    reference = _mean(mine, _REFERENCE)
    numbers = {r["images"]: r["number"] for r in mine}
    table = [
        [name, number, f"{_mean(mine, name):.4f}", f"{_mean(mine, name) / reference:.2f}"]
        for name, number in numbers.items()
    ]
    print(markdown(["images", "number", "J_KL", "of reference"], table))


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    found = [row["j_kl"] for row in rows if row["images"] == name]
    return sum(found) / len(found)


def _sets(network: Network, data: Path, seed: int) -> dict[str, Tensor]:
    real, labels = pictures(data / "cifar10_calib.npz", network.mean, network.std)
    rng = torch.Generator().manual_seed(seed)
    uniform = (
        torch.rand(2048, *network.shape, generator=rng) - torch.tensor(network.mean).view(-1, 1, 1)
    ) / torch.tensor(network.std).view(-1, 1, 1)
    return {
        _REFERENCE: real,
        "CIFAR-10 test": network.x,
        "CIFAR-100 test": pictures(data / "cifar100_1000.npz", network.mean, network.std)[0],
        f"training pictures under FGSM, ε = {_EPSILON}": _fgsm(network, real, labels),
        "MNIST test, as RGB": pictures(data / "mnist_test.npz", network.mean, network.std)[0],
        "normal noise, N(0, 1)": torch.randn(2048, *network.shape, generator=rng),
        "uniform noise, all pixels": uniform,
    }


def _fgsm(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """Pictures moved by ε along the sign of the loss's gradient: Goodfellow et al., ICLR 2015."""
    moved = []
    for x, y in zip(images.split(128), labels.split(128)):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network.model(x), y), x)
        moved.append((x + _EPSILON * gradient.sign()).detach())
    return torch.cat(moved)


if __name__ == "__main__":
    main()
