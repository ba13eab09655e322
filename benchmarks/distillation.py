"""What distillation brings: the papers' tables, on trained networks, as JSON lines.

    python benchmarks/distillation.py --tables ablation --teacher resnet20 --batch 128 --epochs 4 --steps 75
    python benchmarks/distillation.py --tables nayer --teacher resnet44 --student 'CifarResNet(3)' --full --device cuda

| table | of | rows |
|---|---|---|
| ablation | The Knowledge Within, table 1 | KD, KD+IQ, KD+Mix, KD+IQ+Mix of a quantized student, on 10 and 100 real pictures a class |
| sources | The Knowledge Within, table 2 | the same student on 50 images a class: real, BNS, I, BNS+I, Gaussian |
| statistics | Gaussian noise, table 1 | a fresh student on noise, its teacher on running and on current statistics |
| replay | PRE-DFKD, table 1 | a fresh student's course over epochs with memory and without |
| nayer | NAYER, tables 1 and 3 | a fresh student; label embeddings, one-hot labels, noise |
| bits | NAYER, table 9 | reconstruction alone, and then distillation on NAYER's images |

One line per row and seed, written as soon as it is known; what is in the file is not run again, and a row that was stopped goes on
after its last epoch (cache/ beside the file). --batch, --epochs and --steps (in an epoch) take the place of the paper's; --full
leaves those. Uses the public API only.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import HERE, SHARED, Network, load
from rows import Rows, markdown, mean_and_deviation
from torch import Tensor, nn

import ptq

_KEYS = ("table", "row", "teacher", "student", "size", "seed")
_LOSSES = {"KD": "iq=0,mix=0", "KD+IQ": "mix=0", "KD+Mix": "iq=0", "KD+IQ+Mix": ""}
_BITS = "w2a4e4"  # two bits, four in the first and the last layer
TABLES = ("ablation", "sources", "statistics", "replay", "nayer", "bits")


@dataclass(frozen=True)
class Row:
    """One measurement. student: "quantized" or what builds a fresh network. per_class: images a class of a fixed set."""

    table: str
    name: str
    data: str
    student: str = "quantized"
    training: str = ""
    per_class: int | None = None
    bits: str = _BITS
    rounding: str = "nearest"


def rows_of(table: str, student: str, bits: list[str]) -> Iterator[Row]:
    """The rows of a table, those first that show its effect."""
    if table == "ablation":
        for count in (100, 10):
            for name, options in _LOSSES.items():
                yield Row(table, f"{name}, {count} a class", "real", training=options, per_class=count)
    elif table == "sources":
        for data in ("real", "bn_stats", "gaussian", "inceptionism", "bn_stats:inception=0.1"):
            yield Row(table, data, data, training="feed=set", per_class=50)
    elif table == "statistics":
        for name in ("running", "batch"):
            yield Row(table, name, f"gaussian:teacher_bn={name}", student)
    elif table == "replay":
        for name, data in (("memory", "vae_replay"), ("no memory", "vae_replay:memory=false")):
            yield Row(table, name, data, student)
    elif table == "nayer":
        for name in ("labels", "one_hot", "noise"):
            yield Row(table, name, f"nayer:input={name}", student)
    else:
        for width in bits:
            yield Row(table, f"{width}, GENIE", "genie", bits=width, rounding="genie_m", training="epochs=0")
            yield Row(table, f"{width}, GENIE, then NAYER", "nayer", bits=width, rounding="genie_m")


def main() -> None:
    """Runs what the command line asks for."""
    args = _arguments()
    rows = Rows(args.out, _KEYS)
    if args.table:
        print(_table(rows))
        sys.exit()
    network = load(args.teacher, args.shared)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for row in (r for table in args.tables.split(",") for r in rows_of(table, args.student, args.bits.split(","))):
            if args.rows and row.name not in args.rows.split(";"):
                continue
            key = {"table": row.table, "row": row.name, "teacher": args.teacher, "student": row.student, "seed": seed}
            key["size"] = _size(args)
            if rows.find(**key) is None:
                rows.add(found := key | measure(row, network, seed, args))
                print({k: v for k, v in found.items() if k != "course"}, flush=True)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--tables", default="ablation", help=f"comma-separated, of {', '.join(TABLES)}")
    p.add_argument("--rows", help="only these rows, by name, separated by semicolons")
    p.add_argument("--teacher", default="resnet20", help="of cases.toml")
    p.add_argument("--student", default="CifarResNet(1)", help="what builds fresh students, of zoo/nets.py")
    p.add_argument("--bits", default="w4a4,w2a4", help="of the table called bits")
    p.add_argument("--batch", type=int, help="images a step")
    p.add_argument("--epochs", type=int)
    p.add_argument("--steps", type=int, help="optimizer steps an epoch")
    p.add_argument("--more", default="", help="further options of the training: lr=0.1,first_rounds=10")
    p.add_argument("--source", default="", help="further options of the data source: steps=200,count=500")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--full", action="store_true", help="the papers' sizes, where nothing above says otherwise")
    p.add_argument("--table", action="store_true", help="only print the rows of --out as a table")
    p.add_argument("--out", type=Path, default=HERE / "results" / "distillation.jsonl")
    return p.parse_args()


def _size(args: argparse.Namespace) -> str:
    """What the command line says of sizes: rows of another size are other rows."""
    given = {"batch_size": args.batch, "epochs": args.epochs, "steps": args.steps}
    parts = [*(f"{k}={v}" for k, v in given.items() if v is not None), args.more, args.source]
    return " ".join(filter(None, ["full" if args.full else "", *parts])) or "standard"


def measure(row: Row, network: Network, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Top-1 in per cent, at the end and over the epochs, on the network's labelled pictures."""
    start = time.perf_counter()
    given = {"batch_size": args.batch, "epochs": args.epochs, "steps": args.steps}
    sized = [f"{k}={v}" for k, v in given.items() if v is not None]
    training = ",".join(filter(None, [*sized, args.more, row.training]))
    common: dict[str, Any] = {
        "training": training, "report_on": (network.x, network.y), "effort": "full" if args.full else "standard", "seed": seed,
        "device": args.device, "cache": args.out.parent / "cache" / "distillation",
    }  # fmt: skip
    work = _quantized if row.student == "quantized" else _fresh
    found = work(row, network, common, args)
    return found | {
        "seconds": round(time.perf_counter() - start, 1), "device": args.device, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "training": training,
    }  # fmt: skip


def _data(row: Row, network: Network, seed: int, args: argparse.Namespace) -> Any:
    """The row's images, or the text that makes them."""
    if row.data == "real":
        labels = np.load(args.shared / "data" / "cifar10_calib.npz")["y"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
        by_class = [[i for i in order if labels[i] == c][: row.per_class] for c in range(10)]
        return network.real[[i for part in by_class for i in part]]
    options = [args.source, *([f"count={10 * row.per_class}"] if row.per_class else [])]
    name, _, own = row.data.partition(":")
    text = ",".join(filter(None, [own, *options]))
    return f"{name}:{text}" if text else name


def _quantized(row: Row, network: Network, common: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    stated = {"input_shape": network.shape, "mean": network.mean, "std": network.std, "seed": common["seed"]}
    data = _data(row, network, common["seed"], args)
    on = "genie" if row.table == "bits" else data
    qm = ptq.quantize(
        network.model,
        row.bits,
        on,
        rounding=row.rounding,
        effort="standard",
        device=args.device,
        cache=common["cache"],
        **stated,
    )
    before = _top1(qm.graph, network)
    made = ptq.distill_quantized(network.model, qm, None if row.data == "genie" else data, **common)
    return {"before": before, "top1": _top1(made.graph, network), "course": made.manifest.metrics["course"]}


def _fresh(row: Row, network: Network, common: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    stated = {"input_shape": network.shape, "mean": network.mean, "std": network.std}
    student = _build(row.student, args.shared, common["seed"])
    made = ptq.distill(network.model, student, _data(row, network, common["seed"], args), **stated, **common)
    return {"before": _top1(student.eval(), network), "top1": made.top1, "course": made.course.to_json()}


def _build(text: str, shared: Path, seed: int) -> nn.Module:
    spec = importlib.util.spec_from_file_location("nets", shared / "zoo" / "nets.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    name, _, size = text.rstrip(")").partition("(")
    torch.manual_seed(seed)
    return getattr(nets, name)(*(float(v) if "." in v else int(v) for v in filter(None, size.split(","))))


def _top1(model: nn.Module, network: Network) -> float:
    with torch.no_grad():
        out: Tensor = torch.cat([model(part) for part in network.x.split(250)])
    return round(100 * float((out.argmax(1) == network.y).float().mean()), 2)


def _table(rows: Rows) -> str:
    """One line per row, its seeds together."""
    heads = ("table", "row", "teacher", "student", "size")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows.rows:
        groups.setdefault(tuple(row[h] for h in heads), []).append(row)
    lines = []
    for key, found in groups.items():
        figures = [mean_and_deviation([r[f] for r in found]) for f in ("before", "top1")]
        courses = [r["course"] for r in found if r["course"]["mean"] is not None]
        for name in ("mean", "variance", "best"):
            figures.append(mean_and_deviation([c[name] for c in courses]) if courses else "-")
        lines.append([*key, *figures, mean_and_deviation([r["seconds"] for r in found], 0)])
    return markdown([*heads, "before", "top-1", "μ", "σ²", "best", "seconds"], lines)


if __name__ == "__main__":
    main()
