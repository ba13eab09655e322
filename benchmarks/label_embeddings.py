"""What NAYER's input brings: cross-entropy of the generator's images to their labels, step by step (its table 3).

    python benchmarks/label_embeddings.py --network resnet44 --seeds 5 --rounds 5 --steps 30 --count 100

A fresh generator, trained for some rounds of equal steps, each with a noisy layer of its own: label embeddings through it (one
layer for all classes, K-to-1, and one per image, 1-to-1), one-hot labels through the same, random noise drawn in every step (the
paper's Z), and noise drawn once a round, which a generator can learn by heart. The last round's images are scored, without
augmentation.
Uses the interface of data sources (`ptq.contracts`), which tells which labels the images were made for.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import HERE, SHARED, Network, load
from ptq.calibrators.nayer import Nayer
from rows import Rows, markdown, mean_and_deviation

from ptq.contracts import CalibrationContext, make_rng
from ptq.graph.trace import trace

_KEYS = ("network", "input", "rounds", "steps", "count", "seed")
_FIGURES = ("cross_entropy", "right", "spread", "seconds")
_INPUTS = {
    "label embeddings, K-to-1": {"input": "labels"},
    "label embeddings, 1-to-1": {"input": "labels", "noisy": "each"},
    "one-hot labels, K-to-1": {"input": "one_hot"},
    "noise, Z": {"input": "noise"},
    "noise, once a round": {"input": "latents"},
}


def main() -> None:
    """Runs what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--network", default="resnet44", help="of cases.toml")
    p.add_argument("--seeds", type=int, default=5, help="generators, each with its own seed")
    p.add_argument("--rounds", type=int, default=5, help="rounds of each generator")
    p.add_argument("--steps", type=int, default=30, help="generator steps a round")
    p.add_argument("--count", type=int, default=100, help="images a round")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=HERE / "results" / "label_embeddings.jsonl")
    args = p.parse_args()
    rows, network = Rows(args.out, _KEYS), load(args.network, args.shared)
    for seed in range(args.seeds):
        for name, options in _INPUTS.items():
            key = {"network": args.network, "input": name, "seed": seed}
            key |= {k: getattr(args, k) for k in ("rounds", "steps", "count")}
            if rows.find(**key) is None:
                rows.add(row := key | _round(network, options, seed, args))
                print(row, flush=True)
    mine = [r for r in rows.rows if all(r[k] == getattr(args, k) for k in ("network", "rounds", "steps", "count"))]
    groups = {name: [r for r in mine if r["input"] == name] for name in dict.fromkeys(r["input"] for r in mine)}
    table = [
        [name, *(mean_and_deviation([r[f] for r in found], 3) for f in _FIGURES)] for name, found in groups.items()
    ]
    print(markdown(["input", "cross-entropy", "images of their class, %", "spread", "seconds"], table))


def _round(network: Network, options: dict[str, str], seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Of the last round: cross-entropy to the labels, share of images of their class, spread of the images; seconds in all."""
    total = args.rounds * args.count
    source = Nayer(count=total, batch_size=args.count, steps=args.steps, reset=args.rounds, **options)
    device = torch.device(args.device)
    ctx = CalibrationContext(
        trace(network.model, network.shape).to(device), network.shape, torch.tensor(network.mean),
        torch.tensor(network.std), total, args.count, device, make_rng(seed, "calibration"),
    )  # fmt: skip
    start = time.perf_counter()
    *_, images = source.batches(ctx)
    seconds = time.perf_counter() - start
    labels = source.labels(ctx, args.rounds - 1, args.count).to(device)
    with torch.no_grad():
        logits = ctx.model(images)
    spread = (images - images.mean(0)).square().mean().sqrt()
    right = (logits.argmax(1) == labels).float().mean()
    figures = (float(F.cross_entropy(logits, labels)), 100 * float(right), float(spread), seconds)
    return dict(zip(_FIGURES, figures))


if __name__ == "__main__":
    main()
