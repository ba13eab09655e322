"""ReLUs in place: only where autograd does not need what they write over, and only for a while."""

import copy

import torch
from torch import nn

from ptq.graph.trace import trace
from ptq.reconstruct._in_place import relus_in_place


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second, self.third, self.tanh = nn.ReLU(), nn.ReLU6(), nn.ReLU(), nn.Tanh()
        self.fourth, self.shared = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.a(x))
        y = self.b(x)
        z = self.second(y + x)
        y = self.shared(self.third(self.tanh(z)) + self.fourth(y) * y)
        return self.shared(self.tanh(y))


def test_gradients_and_values_stay_and_modules_are_put_back():
    torch.manual_seed(0)
    gm = trace(_Net().eval(), (3, 8, 8))
    plain, x = copy.deepcopy(gm), torch.randn(2, 3, 8, 8)
    relus = {name: m for name, m in gm.named_modules() if isinstance(m, nn.ReLU | nn.ReLU6)}
    before = {name: m.inplace for name, m in relus.items()}
    with relus_in_place(gm):
        # tanh's gradient needs what tanh gave; y is read elsewhere
        free = [relus[name].inplace for name in ("first", "second", "third", "fourth")]
        assert free == [True, True, False, False]
        for p in (*gm.parameters(), *plain.parameters()):
            p.requires_grad_()
        found, expected = gm(x), plain(x)
        found.square().sum().backward()
        expected.square().sum().backward()
    assert torch.equal(found, expected)
    for one, other in zip(gm.parameters(), plain.parameters()):
        assert one.grad is not None and torch.allclose(one.grad, other.grad)
    assert {name: m.inplace for name, m in relus.items()} == before
