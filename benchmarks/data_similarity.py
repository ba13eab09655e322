"""The data similarity measure on real data sets: table 4 of The Knowledge Within.

    python benchmarks/data_similarity.py --network resnet44

J_KL of each set, relative to that of the reference (training pictures of the network's own data set): other pictures of the same
set, a set of like pictures, digits, the reference perturbed by FGSM, noise. Uses the public API only.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import SHARED, Network, load, pictures
from rows import markdown
from torch import Tensor

import ptq

_EPSILON = 0.1  # of FGSM, as in the paper, in normalized units


def main() -> None:
    """Runs what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--network", default="resnet44", help="of cases.toml, for CIFAR-10")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    network = load(args.network, args.shared)
    found = {}
    for name, images in _sets(network, args.shared / "data").items():
        result = ptq.data_similarity(
            network.model, images, input_shape=network.shape, mean=network.mean, std=network.std, device=args.device
        )
        found[name] = (len(images), result.mean)
    reference = found["training pictures (reference)"][1]
    rows = [[name, number, f"{value:.4f}", f"{value / reference:.2f}"] for name, (number, value) in found.items()]
    print(markdown(["images", "number", "J_KL", "of reference"], rows))


def _sets(network: Network, data: Path) -> dict[str, Tensor]:
    real, labels = pictures(data / "cifar10_calib.npz", network.mean, network.std)
    rng = torch.Generator().manual_seed(0)
    uniform = (
        torch.rand(2048, *network.shape, generator=rng) - torch.tensor(network.mean).view(-1, 1, 1)
    ) / torch.tensor(network.std).view(-1, 1, 1)
    return {
        "training pictures (reference)": real,
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
