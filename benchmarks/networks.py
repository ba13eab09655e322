"""The trained float networks of `cases.toml` and their pictures."""

import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"


@dataclass(frozen=True)
class Network:
    """A trained float network with its pictures: `x` float32 in its input space, `y` labels, `real` for calibration."""

    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    x: Tensor
    y: Tensor
    real: Tensor


def load(name: str, shared: Path) -> Network:
    """The network called `name` in `cases.toml`, from the folders zoo/ and data/ of `shared`."""
    case = tomllib.loads((HERE / "cases.toml").read_text())[name]
    spec = importlib.util.spec_from_file_location("nets", shared / "zoo" / "nets.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    mean, std = nets.ZOO[name][2]
    x, y = pictures(shared / "data" / case["val"], mean, std)
    real = pictures(shared / "data" / case["real"], mean, std)[0]
    return Network(name, nets.load(name), tuple(case["shape"]), mean, std, x, y, real)


def pictures(path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Normalized pictures `[N, C, H, W]` and labels of a folder or an `.npz`; grey ones as colour where `mean` has three."""
    if path.is_dir():
        files = sorted(path.glob("*.jpg"))
        raw, y = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]), [int(f.name[:4]) for f in files]
    else:
        loaded = np.load(path)
        raw, y = loaded["x"], loaded["y"]
    x = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255
    x = x.expand(-1, len(mean), -1, -1)
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1), torch.tensor(y)
