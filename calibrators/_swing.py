"""Swing convolution: strided convolutions that see a randomly shifted input, for distillation only.

    conv(x), stride s > 1      →      conv(random_crop(reflection_pad(x, s - 1)))

so that every pixel contributes over the steps, and no checkerboard is left in the images.

Ref: Jeon et al., GENIE, CVPR 2023, §3.1.1 and figure 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ptq.graph.trace import rewrite


class SwingConv(nn.Module):
    """A convolution behind a random shift of up to stride - 1 pixels; one offset per forward, for the whole batch."""

    def __init__(self, conv: nn.Conv2d, rng: torch.Generator) -> None:
        super().__init__()
        self.conv, self.rng = conv, rng

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # Reflection needs more pixels than it adds.
        down, right = (min(s - 1, size - 1) for s, size in zip(self.conv.stride, (height, width)))
        x = F.pad(x, (right, right, down, down), mode="reflect")
        top = int(torch.randint(2 * down + 1, (), generator=self.rng))
        left = int(torch.randint(2 * right + 1, (), generator=self.rng))
        return self.conv(x[:, :, top : top + height, left : left + width])


def with_swing(gm: fx.GraphModule, rng: torch.Generator) -> fx.GraphModule:
    """A copy of `gm` whose strided convolutions swing, with offsets drawn from `rng`."""
    with rewrite(gm) as out:
        for node in out.graph.find_nodes(op="call_module"):
            module = out.get_submodule(node.target)
            if isinstance(module, nn.Conv2d) and max(module.stride) > 1:
                parent, _, name = node.target.rpartition(".")
                setattr(out.get_submodule(parent), name, SwingConv(module, rng))
    return out
