"""The network with its BatchNorms on the statistics of the batch at hand.

    BN(x) = γ (x - m) / s + β,   m, s of x itself instead of μ, σ kept from training

For images whose own statistics are far from the training data's, such as noise.

Ref: Raikwar and Mishra, Discovering and Overcoming Limitations of Noise-engineered Data-free Knowledge Distillation,
NeurIPS 2022.
"""

from torch import fx

from ptq.graph.taps import batch_norms
from ptq.graph.trace import rewrite


def use_batch_statistics(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` whose BatchNorms normalize by the current batch; nothing is ever written to running statistics."""
    with rewrite(gm) as out:
        for norm in batch_norms(out).values():
            norm.running_mean = norm.running_var = None  # type: ignore[assignment]
    return out
