"""Every data source side by side: likeness to the training data, cost, and accuracy of what is quantized with it.

    python benchmarks/data_sources.py --networks resnet20 --count 256 --steps 200 --iterations 500
    python benchmarks/data_sources.py --table

One row per network × source × seed, written as soon as it is known; a row that is there is not made again. J_KL is the paper's
data similarity, small for images that look like the training data to the network; seconds are those of making the images, which
are not kept; then top-1 accuracy of the integer network, or, where the pictures are ImageNet's, its agreement with float. Real
pictures stand last. Uses the public API only.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from networks import HERE, SHARED, Network, load
from rows import Rows, markdown, mean_and_deviation
from torch import Tensor

import ptq

SOURCES = (
    "gaussian", "gaussian:teacher_bn=batch", "inceptionism", "bn_stats", "bn_stats:inception=0.1", "bn_stats:objective=mse",
    "zeroq", "zeroq:swing=true", "genie:swing=false", "genie", "dgh", "nayer", "vae_replay", "mix:genie+bn_stats", "real",
)  # fmt: skip
_KEYS = ("network", "source", "count", "batch", "steps", "iterations", "bits", "rounding", "device", "seed")
_AGREEMENT = ("mobilenet_v1_025",)  # networks with too few pictures for an accuracy


def main() -> None:
    """Runs what the command line asks for."""
    args = _arguments()
    rows = Rows(args.out, _KEYS)
    if args.table:
        print(_table(rows))
        sys.exit()
    for name in args.networks.split(","):
        network = load(name, args.shared)
        for seed in range(args.seeds):
            for source in args.sources.split(";"):
                key = {
                    k: getattr(args, k) for k in ("count", "batch", "steps", "iterations", "bits", "rounding", "device")
                }
                key |= {"network": name, "source": source, "seed": seed}
                if rows.find(**key) is None:
                    rows.add(row := key | _measure(network, source, seed, args))
                    print(row, flush=True)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--networks", default="resnet20", help="comma-separated, of cases.toml")
    p.add_argument("--sources", default=";".join(SOURCES), help="separated by semicolons")
    p.add_argument("--bits", default="w8a8,w4a4,w2a4", help="comma-separated")
    p.add_argument("--rounding", default="nearest,genie_m", help="comma-separated")
    p.add_argument("--count", type=int, default=512, help="images")
    p.add_argument("--batch", type=int, default=128, help="images a batch")
    p.add_argument("--steps", type=int, default=500, help="synthesis steps a batch, where a source takes steps")
    p.add_argument("--iterations", type=int, default=1000, help="reconstruction steps a block")
    p.add_argument("--recon-batch", type=int, default=32, help="images a reconstruction step")
    p.add_argument("--seeds", type=int, default=1, help="runs with seeds 0, 1, …")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=HERE / "results" / "data_sources.jsonl")
    p.add_argument("--table", action="store_true", help="only print the rows of --out")
    return p.parse_args()


def _measure(network: Network, source: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    common = {
        "input_shape": network.shape,
        "mean": network.mean,
        "std": network.std,
        "seed": seed,
        "device": args.device,
    }
    start = time.perf_counter()
    images = _images(network, source, seed, args, common)  # without a cache: its time is part of the result
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    try:
        row["j_kl"] = ptq.data_similarity(network.model, images, **common).mean
    except ptq.CalibrationError:
        row["j_kl"] = None  # no BatchNorm
    for bits in args.bits.split(","):
        for method in args.rounding.split(","):
            row[f"{bits} {method}"] = _quality(network, source, images, bits, method, args, common)
    return row | {"torch": torch.__version__, "threads": torch.get_num_threads()}


def _images(network: Network, source: str, seed: int, args: argparse.Namespace, common: dict[str, Any]) -> Tensor:
    if source == "real":
        return network.real[
            torch.randperm(len(network.real), generator=torch.Generator().manual_seed(seed))[: args.count]
        ]
    text = source + ("," if ":" in source else ":") + f"count={args.count},batch_size={args.batch}"
    kind = source.partition(":")[0]
    if kind == "mix":
        text = text.replace("genie", f"genie(steps={args.steps})").replace("bn_stats", f"bn_stats(steps={args.steps})")
    elif kind != "gaussian":  # NAYER's rounds are short, and its generator is warmed up for some before
        text += f",steps={min(args.steps, 60) if kind == 'nayer' else args.steps}"
    return ptq.synthesize(network.model, text, **common).images


def _quality(
    network: Network,
    source: str,
    images: Tensor,
    bits: str,
    method: str,
    args: argparse.Namespace,
    common: dict[str, Any],
) -> float:
    """Top-1 accuracy, or agreement with the float network, in per cent."""
    rounding = method if method == "nearest" else f"{method}:steps={args.iterations},batch_size={args.recon_batch}"
    data: Any = images
    if "teacher_bn=batch" in source:  # how the teacher normalizes is the source's to say
        data = f"gaussian:teacher_bn=batch,count={args.count},batch_size={args.batch}"
    qm = ptq.quantize(network.model, bits, data, rounding=rounding, **common)
    with torch.no_grad():
        found = torch.cat([qm.graph(x) for x in network.x.split(128)]).argmax(1)
        wanted = network.y
        if network.name in _AGREEMENT:
            wanted = torch.cat([network.model(x) for x in network.x.split(128)]).argmax(1)
    return round(100 * float((found == wanted).float().mean()), 2)


def _table(rows: Rows) -> str:
    """Per network and size, a line per source, seeds together; a source that was not run is marked so."""
    parts = []
    for size in dict.fromkeys(tuple(row[k] for k in _KEYS if k not in ("source", "seed")) for row in rows.rows):
        here = [r for r in rows.rows if tuple(r[k] for k in _KEYS if k not in ("source", "seed")) == size]
        figures = [k for k in here[0] if k.startswith("w") and " " in k]
        heads = ["source", "J_KL", "seconds", *figures]
        lines = []
        for source in SOURCES:
            found = [r for r in here if r["source"] == source]
            cells = [_cell(found, name) for name in ("j_kl", "seconds", *figures)]
            lines.append([source, *cells] if found else [source, *["not run"] * (len(heads) - 1)])
        what = "agreement with float" if size[0] in _AGREEMENT else "top-1"
        title = f"{size[0]}, {size[1]} images, {size[3]} steps, {size[4]} iterations a block; {what} in per cent"
        parts.append(f"**{title}**\n\n{markdown(heads, lines)}")
    return "\n\n".join(parts)


def _cell(found: list[dict[str, Any]], name: str) -> str:
    figures = [row[name] for row in found if row.get(name) is not None]
    return mean_and_deviation(figures, 4 if name == "j_kl" else 2) if figures else "-"


if __name__ == "__main__":
    main()
