"""GENIE-M's training loop written as plainly as PyTorch allows, to compare times with on one machine, in one quarter of an hour.

    python benchmarks/plain_loop.py --iterations 50 --rounds 3

Clouds' machines differ from day to day, so that seconds measured elsewhere say little. This is the paper's algorithm, step by step
as it is printed: autograd on every formula, masks by `torch.rand` and `torch.where`, one Adam for each kind of parameter,
tensors as they come, BatchNorm in float. It stands beside the package's loop on the same blocks, images and steps, in turn; for
each block the least of several rounds counts. It is a baseline, not somebody's program, and returns no quantized network.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import SHARED, load
from rows import markdown
from torch import Tensor, nn

import ptq


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0]


class _Activation(nn.Module):
    """LSQ with dropped elements, unsigned."""

    def __init__(self, scale: float, bits: int) -> None:
        super().__init__()
        self.scale, self.top = nn.Parameter(torch.tensor(scale)), 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        code = torch.clamp(_Round.apply(x / self.scale), 0, self.top)
        return torch.where(torch.rand_like(x) < 0.5, code * self.scale, x)


class _Weight(nn.Module):
    """A layer with soft bits on its weight and trained scales per channel."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: int) -> None:
        super().__init__()
        self.layer, w = layer, layer.weight.detach()
        self.ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        shape = [-1, *[1] * (w.ndim - 1)]
        self.scale = nn.Parameter((w.abs().flatten(1).amax(1) / self.ends[1]).view(shape))
        base = torch.floor(w / self.scale.detach())
        self.register_buffer("base", base)
        rest = w / self.scale.detach() - base
        self.v = nn.Parameter(-torch.log(1.2 / (rest.clamp(1e-4, 1 - 1e-4) + 0.1) - 1))

    def softness(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.v) * 1.2 - 0.1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.clamp(self.base + self.softness(), *self.ends) * self.scale
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, w, self.layer.bias)
        return F.conv2d(x, w, None, self.layer.stride, self.layer.padding)


class _Block(nn.Module):
    """A residual block, its layers and activations quantized as the paper has it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.one, self.two = _Weight(block.conv1, 4), _Weight(block.conv2, 4)
        self.norm1, self.norm2, self.shortcut = block.bn1, block.bn2, block.shortcut
        self.middle, self.end = _Activation(0.1, 4), _Activation(0.1, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(F.relu(self.norm1(self.one(x))))
        return self.end(F.relu(self.norm2(self.two(y)) + self.shortcut(x)))


def _units(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Each unit with its inputs and targets for all images: the stem, the residual blocks, the classifier."""
    with torch.no_grad():
        y = F.relu(model.bn1(model.conv1(x)))
        stem = nn.Sequential(_Weight(model.conv1, 8), model.bn1, nn.ReLU(), _Activation(0.1, 8))
        found: list[tuple[nn.Module, Tensor, Tensor]] = [(stem, x, y)]
        for block in [*model.layer1, *model.layer2, *model.layer3]:
            z = block(y)
            found.append((_Block(block), y, z))
            y = z
        y = F.avg_pool2d(y, y.shape[-1]).flatten(1)
        return [*found, (_Weight(model.linear, 8), y, model.linear(y))]


def _train(unit: nn.Module, x: Tensor, target: Tensor, steps: int) -> float:
    """Milliseconds a step."""
    unit.eval()
    soft = [m for m in unit.modules() if isinstance(m, _Weight)]
    active = [m for m in unit.modules() if isinstance(m, _Activation)]
    optimizers = [torch.optim.Adam([m.v for m in soft], lr=1e-3), torch.optim.Adam([m.scale for m in soft], lr=1e-4)]
    optimizers += [torch.optim.Adam([m.scale for m in active], lr=4e-5)] if active else []
    falling = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers[1:]]
    start = time.perf_counter()
    for step in range(steps):
        pick = torch.randint(len(x), (32,))
        ours = x[pick]
        seen = torch.where(torch.rand_like(ours) < 0.5, ours, x[pick])  # quantized input, float input
        error = (unit(seen) - target[pick]).abs().pow(2)
        loss = error.sum(1).mean()
        if step >= 0.2 * steps:
            beta = 2 + 18 * (1 - (step / steps - 0.2) / 0.8)
            loss = loss + sum((1 - (2 * m.softness() - 1).abs().pow(beta)).sum() for m in soft)
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in [*optimizers, *falling]:
            o.step()
    return 1000 * (time.perf_counter() - start) / steps


def _package(network, images: Tensor, steps: int, precision: str) -> list[float]:
    """Milliseconds a step of each block, the capture of its inputs and its judgement included."""
    qm = ptq.quantize(
        network.model, "w4a4", images, input_shape=network.shape, mean=network.mean, std=network.std, precision=precision,
        rounding=f"genie_m:steps={steps},batch_size=32",
    )  # fmt: skip
    return [1000 * block["seconds"] / steps for block in qm.manifest.blocks]


def main() -> None:
    """Runs what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=SHARED, help="folder with zoo/ and data/")
    p.add_argument("--images", type=int, default=512)
    p.add_argument("--iterations", type=int, default=50, help="steps a block and round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--precision", default="auto", help="of the package's loop: auto, float32 or bfloat16")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    network = load("resnet20", args.shared)
    images = network.real[: args.images]
    plain: list[list[float]] = []
    ours: list[list[float]] = []
    for _ in range(args.rounds):
        plain.append([_train(*unit, args.iterations) for unit in _units(network.model, images)])
        ours.append(_package(network, images, args.iterations, args.precision))
    least = [[min(times) for times in zip(*rounds)] for rounds in (plain, ours)]
    rows = [[k, round(a, 2), round(b, 2), round(a / b, 2)] for k, (a, b) in enumerate(zip(*least))]
    total = [sum(times) for times in least]
    rows.append(["all", *(round(t, 1) for t in total), round(total[0] / total[1], 2)])
    print(markdown(["block", "plain, ms a step", "package, ms a step", "times faster"], rows))


if __name__ == "__main__":
    main()
