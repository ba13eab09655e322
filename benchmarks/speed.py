"""Seconds of block reconstruction, on one thread and on more, with the agreement it reaches; or speed of the written files.

    python benchmarks/speed.py --threads 1,2
    python benchmarks/speed.py --threads 1 --runtime resnet18,mobilenet_v2        see `runtime.py`

ResNet-20 by default: 512 real pictures, 11 blocks of 1,000 steps at batch 32. One row per method × threads, written as soon as
it is known; a row that is there is not made again. Uses the public API only.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from networks import HERE, SHARED, Network, load
from rows import Rows, markdown

import ptq

_KEYS = ("network", "bits", "rounding", "images", "iterations", "batch", "threads", "device", "precision")
_FIGURES = ("seconds", "steps_per_second", "agreement")


def main() -> None:
    """Runs what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--network", default="resnet20", help="of cases.toml")
    p.add_argument("--bits", default="w4a4")
    p.add_argument("--rounding", default="genie_m", help="separated by semicolons")
    p.add_argument("--images", type=int, default=512)
    p.add_argument("--iterations", type=int, default=1000, help="steps a block")
    p.add_argument("--batch", type=int, default=32, help="images a step")
    p.add_argument("--threads", default="1,2", help="comma-separated")
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    p.add_argument("--out", type=Path, default=HERE / "results" / "speed.jsonl")
    p.add_argument("--runtime", help="measure the files of these torchvision networks instead, comma-separated")
    p.add_argument("--size", type=int, default=224, help="pixels of --runtime's pictures, each way")
    p.add_argument("--rounds", type=int, default=40, help="runs of each of --runtime's files")
    args = p.parse_args()
    if args.runtime:
        _runtime(args)
        return
    rows, network = Rows(args.out, _KEYS), load(args.network, args.shared)
    for method in args.rounding.split(";"):
        for threads in map(int, args.threads.split(",")):
            key = {
                k: getattr(args, k) for k in ("network", "bits", "images", "iterations", "batch", "device", "precision")
            }
            key |= {"rounding": method, "threads": threads}
            if rows.find(**key) is None:
                rows.add(row := key | _measure(network, key))
                print(row, flush=True)
    print(markdown([*_KEYS, *_FIGURES], [[row[k] for k in (*_KEYS, *_FIGURES)] for row in rows.rows]))


def _runtime(args: argparse.Namespace) -> None:
    """The speed of the written files, all of a network's rows at once."""
    import runtime  # it needs more packages than the rest

    rows = Rows(args.out.with_name("runtime.jsonl"), (*runtime.KEYS, "file"))
    for name in args.runtime.split(","):
        for threads in map(int, args.threads.split(",")):
            if rows.find(network=name, size=args.size, threads=threads, batch=1, file="float32") is None:
                for row in runtime.rows(name, args.size, threads, args.rounds):
                    rows.add(row)
                    print(row, flush=True)
    heads = (*runtime.KEYS, *runtime.FIGURES)
    print(markdown(list(heads), [[row[k] for k in heads] for row in rows.rows]))


def _measure(network: Network, key: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(key["threads"])
    method = (
        f"{key['rounding']}{',' if ':' in key['rounding'] else ':'}steps={key['iterations']},batch_size={key['batch']}"
    )
    qm = ptq.quantize(
        network.model, key["bits"], network.real[: key["images"]], input_shape=network.shape, mean=network.mean,
        std=network.std, rounding=method, device=key["device"], precision=key["precision"],
    )  # fmt: skip
    x = network.real[key["images"] :][:1024]  # pictures that calibration has not seen
    with torch.no_grad():
        same = [qm.graph(part).argmax(1) == network.model(part).argmax(1) for part in x.split(128)]
    seconds, blocks = qm.manifest.seconds["reconstruction"], len(qm.manifest.blocks)
    return {
        "seconds": seconds, "steps_per_second": round(blocks * key["iterations"] / seconds, 1), "blocks": blocks,
        "agreement": round(100 * float(torch.cat(same).float().mean()), 2), "torch": torch.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    main()
