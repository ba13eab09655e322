"""Accuracy of trained networks before and after quantization, with each data source, as JSON lines.

    python benchmarks/accuracy.py --networks resnet20 --bits w8a8,w4a4,w2a4 --data genie --out benchmarks/results/accuracy.jsonl

One line per network × data source × bits × rounding × seed, written as soon as it is known; a row that is in the file already
is not run again, and calibration images and quantized networks are kept in cache/ beside it, so that an interrupted benchmark
goes on where it stopped. Uses the public API only.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

import ptq

HERE = Path(__file__).resolve().parent
_HEADS = (
    "network", "data", "bits", "rounding", "seed", "float", "simulation", "onnx", "agreement", "float_agreement", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A trained float network with its pictures: `x` float32 in its input space, `y` labels."""

    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    x: Tensor
    y: Tensor
    real: Tensor


def main() -> None:
    """Runs what the command line asks for."""
    args = _arguments()
    done = {_key(row) for row in _rows(args.out)}
    cases = tomllib.loads((HERE / "cases.toml").read_text())
    for name in args.networks.split(","):
        network = _load(name, cases[name], args.shared)
        for data in args.data.split(";"):
            for seed in range(args.seeds):
                _run(network, data, seed, args, done)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared", help="folder with zoo/ and data/")
    p.add_argument("--networks", default="resnet20", help="comma-separated, of cases.toml")
    p.add_argument("--bits", default="w8a8,w4a4,w2a4", help="comma-separated")
    p.add_argument("--data", default="genie", help="sources, separated by semicolons: genie:steps=500;gaussian;real")
    p.add_argument("--rounding", default="nearest;genie_m", help="separated by semicolons")
    p.add_argument("--effort", default="standard", help="quick, standard or full: sizes left open")
    p.add_argument("--count", type=int, help="calibration images, where the source's options do not say")
    p.add_argument("--steps", type=int, help="synthesis steps per batch, likewise (genie)")
    p.add_argument("--iterations", type=int, help="reconstruction steps per block (genie_m)")
    p.add_argument("--seeds", type=int, default=1, help="runs with seeds 0, 1, …")
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--no-normalization", action="store_true", help="do not state mean and std: the input space is fitted"
    )
    p.add_argument("--table", action="store_true", help="only print the rows of --out as a table")
    p.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.jsonl")
    args = p.parse_args()
    if args.table:
        _print_table(args.out)
        sys.exit()
    (args.out.parent / "cache").mkdir(parents=True, exist_ok=True)
    return args


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("network", "data", "bits", "rounding", "seed"))


def _load(name: str, case: dict[str, Any], shared: Path) -> Network:
    spec = importlib.util.spec_from_file_location("nets", shared / "zoo" / "nets.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    mean, std = nets.ZOO[name][2]
    x, y = _pictures(shared / "data" / case["val"], mean, std)
    real = _pictures(shared / "data" / case["real"], mean, std)[0]
    return Network(name, nets.load(name), tuple(case["shape"]), mean, std, x, y, real)


def _pictures(path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    if path.is_dir():
        files = sorted(path.glob("*.jpg"))
        raw, y = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]), [int(f.name[:4]) for f in files]
    else:
        loaded = np.load(path)
        raw, y = loaded["x"], loaded["y"]
    x = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1), torch.tensor(y)


def _run(network: Network, data: str, seed: int, args: argparse.Namespace, done: set[tuple[Any, ...]]) -> None:
    """All widths and roundings on one set of calibration images, which is made once."""
    options = _with(data, {"count": args.count} | ({"steps": args.steps} if data.startswith("genie") else {}))
    methods = [_with(m, {"steps": args.iterations}) if m.startswith("genie_m") else m for m in args.rounding.split(";")]
    todo = [
        (bits, method)
        for bits in args.bits.split(",")
        for method in methods
        if (network.name, options, bits, method, seed) not in done
    ]
    for bits, method in todo:
        key = f"{network.name} {options} {bits} {method} {seed}".replace("/", "_").replace(":", " ")
        qm = _quantize(network, options, bits, method, seed, args, args.out.parent / "cache" / key)
        row = {"network": network.name, "data": options, "bits": bits, "rounding": method, "seed": seed}
        row |= _measure(network, qm) | {
            "stages": qm.manifest.seconds,
            "seconds": round(sum(qm.manifest.seconds.values()), 1),
        }
        row |= {"images": qm.manifest.metrics["calibration_images"], "effort": args.effort, "device": args.device}
        row |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        with args.out.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print({k: row[k] for k in _HEADS}, flush=True)


def _quantize(
    network: Network, options: str, bits: str, method: str, seed: int, args: argparse.Namespace, kept: Path
) -> ptq.QuantizedModel:
    """The quantized network; an earlier run's where it is kept. Calibration images are made once per source and seed."""
    if kept.is_dir():
        return ptq.load(kept)
    pictures = kept.parent / f"{network.name} {options} {seed}.npy".replace("/", "_").replace(":", " ")
    data: Any = options
    if args.no_normalization:
        stated = {}
    else:
        stated = {"mean": network.mean, "std": network.std}
        data = torch.from_numpy(np.load(pictures)) if pictures.is_file() else data
    if options.startswith("real"):
        pick = torch.randperm(len(network.real), generator=torch.Generator().manual_seed(seed))
        data = network.real[pick[: args.count or 1024]]
    qm = ptq.quantize(
        network.model, bits, data, input_shape=network.shape, rounding=method, effort=args.effort, seed=seed,
        device=args.device, target="onnx_qdq", **stated,
    )  # fmt: skip
    qm.save(kept)
    if not pictures.is_file() and stated:
        np.save(pictures, qm.images.numpy())
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


def _measure(network: Network, qm: ptq.QuantizedModel) -> dict[str, Any]:
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


def _print_table(path: Path) -> None:
    print("| " + " | ".join(_HEADS) + " |\n|" + "---|" * len(_HEADS))
    for row in _rows(path):
        print("| " + " | ".join(str(row[h]) for h in _HEADS) + " |")


if __name__ == "__main__":
    main()
