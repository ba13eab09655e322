"""Accuracy of trained networks before and after quantization, with each data source, as JSON lines.

    python benchmarks/accuracy.py --networks resnet20 --bits w8a8,w4a4,w2a4 --data genie --out benchmarks/results/accuracy.jsonl

One line per network × data source × bits × rounding × seed, written as soon as it is known; a row that is in the file already
is not run again, and calibration images and quantized networks are kept in cache/ beside it, so that an interrupted benchmark
goes on where it stopped. Uses the public API only.
"""

import argparse
import itertools
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from networks import HERE, SHARED, Network, load
from rows import Rows, markdown, mean_and_deviation
from torch import Tensor, nn

import ptq

_KEYS = ("network", "data", "bits", "rounding", "ranges", "edges", "repair", "finish", "seed")
_HEADS = (*_KEYS, "float", "simulation", "onnx", "agreement", "float_agreement", "seconds")


def main() -> None:
    """Runs what the command line asks for."""
    args = _arguments()
    rows = Rows(args.out, _KEYS)
    for name in args.networks.split(","):
        network = load(name, args.shared)
        for data in args.data.split(";"):
            for seed in range(args.seeds):
                run(network, data, seed, args, rows)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--networks", default="resnet20", help="comma-separated, of cases.toml")
    p.add_argument("--bits", default="w8a8,w4a4,w2a4", help="comma-separated; auto:size=99KB,a4 too")
    p.add_argument("--data", default="genie", help="sources, separated by semicolons: genie:steps=500;gaussian;real")
    p.add_argument("--rounding", default="nearest;genie_m", help="separated by semicolons")
    p.add_argument("--ranges", default="lp_best", help="how scales are chosen")
    p.add_argument("--repair", default="none", help="separated by semicolons: none;equalize;bias;equalize+statistics")
    p.add_argument("--finish", default="none", help="joint passes, separated by semicolons: none;logits")
    p.add_argument("--edges", default="brecq", help="brecq, qdrop or all")
    p.add_argument("--effort", default="standard", help="quick, standard or full: sizes left open")
    p.add_argument("--count", type=int, help="calibration images, where the source's options do not say")
    p.add_argument("--steps", type=int, help="synthesis steps per batch, likewise (genie)")
    p.add_argument("--iterations", type=int, help="reconstruction steps per block, where a method trains")
    p.add_argument("--seeds", type=int, default=1, help="runs with seeds 0, 1, …")
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--no-normalization", action="store_true", help="do not state mean and std: the input space is fitted"
    )
    p.add_argument("--table", action="store_true", help="only print the rows of --out as a table")
    p.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.jsonl")
    args = p.parse_args()
    if args.table:
        print(_table(Rows(args.out, _KEYS)))
        sys.exit()
    return args


def run(network: Network, data: str, seed: int, args: argparse.Namespace, rows: Rows) -> None:
    """All widths and roundings on one set of calibration images, which is made once."""
    options = _with(data, {"count": args.count} | ({"steps": args.steps} if _has_steps(data) else {}))
    methods = [m if m == "nearest" else _with(m, {"steps": args.iterations}) for m in args.rounding.split(";")]
    widths = re.split(r",(?=w\d|auto)", args.bits)
    for bits, method, repair, finish in itertools.product(
        widths, methods, args.repair.split(";"), args.finish.split(";")
    ):
        key = {"network": network.name, "data": options, "bits": bits, "rounding": method, "seed": seed}
        key |= {"ranges": args.ranges, "edges": args.edges, "repair": repair, "finish": finish}
        if rows.find(**key) is not None:
            continue
        qm = _quantize(network, key, args)
        row = key | measure(network, qm) | {
            "stages": qm.manifest.seconds, "seconds": round(sum(qm.manifest.seconds.values()), 1),
            "images": qm.manifest.metrics["calibration_images"], "effort": args.effort, "device": args.device,
            "weight_bytes": sum(codes.numel() * q.spec.bits / 8 for codes, q in qm.integer_weights().values()),
            "torch": torch.__version__, "threads": torch.get_num_threads(),
        }  # fmt: skip
        rows.add(row)
        print({k: row[k] for k in _HEADS}, flush=True)


def _has_steps(data: str) -> bool:
    return data.partition(":")[0] not in ("real", "gaussian", "images", "mix")


def _quantize(network: Network, key: dict[str, Any], args: argparse.Namespace) -> ptq.QuantizedModel:
    """The quantized network; an earlier run's where it is kept. Calibration images are made once per source and seed."""
    kept = args.out.parent / "cache" / " ".join(map(str, key.values())).replace("/", "_").replace(":", " ")
    if kept.is_dir():
        return ptq.load(kept)
    data: Any = key["data"]
    if data.startswith("real"):
        pick = torch.randperm(len(network.real), generator=torch.Generator().manual_seed(key["seed"]))
        data = network.real[pick[: args.count or 1024]]
    stated = {} if args.no_normalization else {"mean": network.mean, "std": network.std}
    qm = ptq.quantize(
        network.model, key["bits"], data, input_shape=network.shape, rounding=key["rounding"], ranges=key["ranges"],
        edges=key["edges"], repair=key["repair"], finish=None if key["finish"] == "none" else key["finish"],
        effort=args.effort, seed=key["seed"], device=args.device, target="onnx_qdq",
        cache=args.out.parent / "cache" / "images", **stated,
    )  # fmt: skip
    qm.save(kept)
    return qm


def _with(text: str, options: dict[str, int | None]) -> str:
    extra = [f"{k}={v}" for k, v in options.items() if v is not None and f"{k}=" not in text]
    return text if not extra else text + (":" if ":" not in text else ",") + ",".join(extra)


def _outputs(run: Any, x: Tensor) -> Tensor:
    return torch.cat([run(part) for part in x.split(128)])


def _module(model: nn.Module) -> Any:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def measure(network: Network, qm: ptq.QuantizedModel) -> dict[str, Any]:
    """Top-1 of float network, simulation and ONNX file, the share of pictures the last two agree on, and the gate's figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        proof = ptq.export(qm, "onnx_qdq", path)
        size = path.stat().st_size
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    real = _outputs(lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), network.x)
    simulated, floats = _outputs(_module(qm.graph), network.x), _outputs(_module(network.model), network.x)
    top1 = {
        k: round(100 * float((out.argmax(1) == network.y).float().mean()), 2)
        for k, out in (("float", floats), ("simulation", simulated), ("onnx", real))
    }
    return top1 | {
        "agreement": round(100 * float((real.argmax(1) == simulated.argmax(1)).float().mean()), 2),
        "float_agreement": round(100 * float((real.argmax(1) == floats.argmax(1)).float().mean()), 2),
        "worst_steps": proof["worst_steps"], "integer_layers": proof["integer_layers"],
        "float_layers": len(proof["float_layers"]), "onnx_bytes": size,
        "blocks_nearest": sum(b["kept"] == "nearest" for b in qm.manifest.blocks),
    }  # fmt: skip


def _table(rows: Rows) -> str:
    """One line per case, its seeds together."""
    heads = ("network", "data", "bits", "rounding", "ranges", "edges", "repair", "finish", "float")
    figures = ("simulation", "onnx", "agreement", "float_agreement", "onnx_bytes")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows.rows:
        groups.setdefault(tuple(row.get(h) for h in heads), []).append(row)
    lines = [[*key, *(mean_and_deviation([r[f] for r in group]) for f in figures)] for key, group in groups.items()]
    return markdown([*heads, *figures], lines)


if __name__ == "__main__":
    main()
