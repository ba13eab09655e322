"""The embedded example: a small residual network trained on scikit-learn's handwritten digits, then quantized without them."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.errors import ModelError

# The command of the README; the demo runs these very words.
COMMAND = (
    "ptq quantize demo/model.pt --arch ptq.demo:DigitsNet --bits w2a4 --data genie --input-shape 1,8,8 "
    "--mean 0.3053 --std 0.3761 --effort quick --val demo/val.npz -o demo/out --force"
)
_MEAN, _STD = 0.3053, 0.3761  # of the training pixels, in [0, 1]
_EPOCHS, _BATCH, _TRAINED_ON = 40, 64, 1200


class _Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        changes = stride != 1 or cin != cout
        self.shortcut = nn.Conv2d(cin, cout, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual BatchNorm network for 8 × 8 digits. Input [B, 1, 8, 8], output [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 32, 1), _Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=(2, 3)))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: pixels uint8 [N, 8, 8, 1] and labels, in a fixed random order.

    Raises:
        ModelError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ModelError("the demo needs scikit-learn; install the extra, pip install 'ptq[demo]'") from e
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return np.round(x[order].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8), y[order].astype(np.int64)


def train(x: np.ndarray, y: np.ndarray, seed: int = 0) -> nn.Module:
    """A trained `DigitsNet`; SGD with momentum, one-cycle rate, shifts by up to a pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
        images = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD
        labels = torch.from_numpy(y)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = _EPOCHS * -(-len(x) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        for _ in range(_EPOCHS):
            for pick in torch.randperm(len(x)).split(_BATCH):
                shift = torch.randint(-1, 2, (2,)).tolist()
                batch = torch.roll(images[pick], shift, dims=(2, 3))
                loss = F.cross_entropy(model(batch), labels[pick], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def run_demo(folder: Path, command: Callable[[Sequence[str]], int], say: Callable[[str], None]) -> int:
    """Trains, saves `model.pt` and `val.npz` in `folder`, runs the README's command with `command`; speaks through `say`."""
    x, y = digits()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"training a small residual network on {_TRAINED_ON} handwritten digits …")
    model = train(x[:_TRAINED_ON], y[:_TRAINED_ON])
    torch.save(model.state_dict(), folder / "model.pt")
    np.savez_compressed(folder / "val.npz", x=x[_TRAINED_ON:], y=y[_TRAINED_ON:])
    words = [word.replace("demo/", f"{folder}/") for word in shlex.split(COMMAND)]
    say(f"\n$ {shlex.join(words)}\n")
    return command(words[1:])
