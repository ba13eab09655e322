"""Eight tiny networks, 3 × 16 × 16 in, 10 logits out."""

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 16, 16)


def _conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1, **options) -> list[nn.Module]:
    options = {"padding": kernel // 2, "bias": False} | options
    return [nn.Conv2d(cin, cout, kernel, stride, **options), nn.BatchNorm2d(cout)]


class _ResidualBlock(nn.Module):
    """Two convolutions; the shortcut is added in place."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(cin, cout, stride=stride)
        self.conv2, self.bn2 = _conv_bn(cout, cout)
        changes = stride != 1 or cin != cout
        self.shortcut = nn.Sequential(*_conv_bn(cin, cout, 1, stride)) if changes else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class Residual(nn.Module):
    """A CIFAR ResNet, as its authors wrote it: sizes asked of the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 8)
        self.layers = nn.Sequential(_ResidualBlock(8, 8, 1), _ResidualBlock(8, 16, 2))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.avg_pool2d(x, x.size()[3])
        return self.fc(x.view(x.size(0), -1))


class _Separable(nn.Module):
    """Depthwise, then pointwise; strides behind an explicit, uneven padding."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
        depthwise = _conv_bn(cin, cin, 3, stride, padding=0 if stride == 2 else 1, groups=cin)
        self.body = nn.Sequential(*depthwise, nn.ReLU6(inplace=True), *_conv_bn(cin, cout, 1), nn.ReLU6(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.pad(x))


class Depthwise(nn.Module):
    """A MobileNet v1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), *_conv_bn(3, 8, 3, 2, padding=0), nn.ReLU6(inplace=True))
        self.blocks = nn.Sequential(_Separable(8, 16, 1), _Separable(16, 16, 2))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class _Excite(nn.Module):
    """Channels weighted by what the whole picture says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(gate))))


class SqueezeExcite(nn.Module):
    """Two convolutions, each behind it a squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv_bn(3, 8, stride=2), nn.ReLU(), _Excite(8), *_conv_bn(8, 16), nn.ReLU(), _Excite(16)
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.features(x)), 1))


class _Inception(nn.Module):
    """Three branches, joined along channels."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.one = nn.Sequential(*_conv_bn(cin, 4, 1), nn.ReLU())
        self.three = nn.Sequential(*_conv_bn(cin, 4, 1), nn.ReLU(), *_conv_bn(4, 8), nn.ReLU())
        self.pooled = nn.Sequential(*_conv_bn(cin, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.max_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([self.one(x), self.three(x), pooled], 1)


class Concat(nn.Module):
    """Inception-like."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 8, stride=2), nn.ReLU())
        self.mixed = nn.Sequential(_Inception(8), _Inception(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.mixed(self.stem(x)), (1, 1)).flatten(1))


class _PreBlock(nn.Module):
    """BatchNorm and ReLU before each convolution: the first BatchNorm reads a sum and cannot fold."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class PreActivation(nn.Module):
    """A pre-activation ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.Sequential(_PreBlock(8), _PreBlock(8))
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.blocks(self.conv(x))))
        return self.fc(x.mean([2, 3]))


class SharedReLU(nn.Module):
    """One ReLU module used throughout; the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 8)
        self.conv2, self.bn2 = _conv_bn(8, 16, stride=2)
        self.conv3, self.bn3 = _conv_bn(16, 16)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        return self.fc(self.relu(y).mean((2, 3)))


class Plain(nn.Module):
    """A LeNet: no BatchNorm, biases, max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 16, 3)
        self.pool, self.fc1, self.fc2 = nn.MaxPool2d(2), nn.Linear(144, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        return self.fc2(F.relu(self.fc1(x.reshape(x.shape[0], -1))))


def _grouped() -> nn.Module:
    return nn.Sequential(
        *_conv_bn(3, 8, stride=2, bias=True), nn.ReLU(), *_conv_bn(8, 16, groups=4, bias=True), nn.ReLU(),
        nn.AvgPool2d(8), nn.Flatten(), nn.Dropout(), nn.Linear(16, 10),
    )  # fmt: skip


ZOO: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual, "depthwise": Depthwise, "squeeze_excite": SqueezeExcite, "concat": Concat,
    "pre_activation": PreActivation, "shared_relu": SharedReLU, "plain": Plain, "grouped": _grouped,
}  # fmt: skip


@cache
def _fitted(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed every GPU as well, which the fork does not put back.
        torch.default_generator.manual_seed(sum(name.encode()))
        net = ZOO[name]().train()
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.6, 1.4)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            norm.momentum = None  # the plain average over the batches below
        with torch.no_grad():
            for _ in range(4):
                net(torch.randn(32, *SHAPE))
        for norm in norms:
            norm.momentum = 0.1
    return net.eval()


def build(name: str) -> nn.Module:
    """A net of the zoo in eval mode, its BatchNorm statistics those of noise; always the same. Moves no global RNG."""
    return copy.deepcopy(_fitted(name))


def images(count: int = 16, seed: int = 0) -> Tensor:
    """Noise `[count, 3, 16, 16]`."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
