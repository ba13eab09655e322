"""A data source run on a network of the tests, outside the pipeline."""

import torch
from torch import Tensor

from ptq.contracts import CalibrationContext, make_rng
from tests.stages import prepare
from tests.zoo import SHAPE

# A normalization whose deviation is a data set's own: inputs count as normalized, as those of the zoo's nets are.
STATED = {"mean": [0.5] * 3, "std": [0.25] * 3}
COMMON = {"input_shape": SHAPE, **STATED}


def context_of(source, net: str = "residual", **changes) -> CalibrationContext:
    """What the pipeline would hand to the source; `changes` take the place of single fields."""
    given = {"count": source.count, "batch_size": source.batch_size, "rng": make_rng(0, "calibration")}
    fixed = {"input_shape": SHAPE, "device": torch.device("cpu"), **{k: torch.tensor(v) for k, v in STATED.items()}}
    return CalibrationContext(prepare(net).teacher, **(fixed | given | changes))


def images_of(source, net: str = "residual", **changes) -> Tensor:
    """All images of the source, `[N, C, H, W]`."""
    return torch.cat(list(source.batches(context_of(source, net, **changes))))
