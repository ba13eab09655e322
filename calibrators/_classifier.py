"""What a classifier tells of its classes: their number, their rows, the features they are read from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ptq.errors import CalibrationError
from ptq.graph.ops import output_node, weighted_nodes


def classes(model: fx.GraphModule) -> int:
    """K, of a network whose output is [B, K].

    Raises:
        CalibrationError: the output has another shape.
    """
    shape = output_node(model).meta["shape"]
    if len(shape) != 1:
        shown = ", ".join(map(str, shape))
        raise CalibrationError(
            f"this source needs a classifier, [B, classes] out; the network gives [B, {shown}]; "
            "use '--data genie' or real pictures, '--data images:PATH'"
        )
    return shape[0]


def common_classes(models: tuple[fx.GraphModule, ...]) -> int:
    """K of several networks.

    Raises:
        CalibrationError: one is no classifier, or they differ in their number of classes.
    """
    found = [classes(model) for model in models]
    if len(set(found)) != 1:
        raise CalibrationError(
            f"networks with {', '.join(map(str, found))} classes found; images of classes need the same"
        )
    return found[0]


def average(loss: Callable[[Tensor], Tensor], logits: list[Tensor]) -> Tensor:
    """The mean of a loss over the outputs of several networks."""
    return torch.stack([loss(out) for out in logits]).mean()


def confident(logits: Tensor) -> Tensor:
    """Cross-entropy of predictions to their own largest class."""
    return F.cross_entropy(logits, logits.argmax(1))


def _last_layer(model: fx.GraphModule) -> nn.Module:
    return model.get_submodule(str(weighted_nodes(model)[-1].target))


def class_rows(model: fx.GraphModule) -> Tensor:
    """The classifier's weights, one row [D] per class: they hold which classes are alike.

    Raises:
        CalibrationError: the last layer has not one row per class.
    """
    weight = _last_layer(model).weight.detach().flatten(1)  # type: ignore[union-attr, operator]
    if len(weight) != classes(model):
        raise CalibrationError(
            f"the last layer has {len(weight)} rows for {classes(model)} classes; give label embeddings, embeddings=FILE.npz"
        )
    return weight


@contextmanager
def last_features(model: fx.GraphModule) -> Iterator[list[Tensor]]:
    """While open, the list holds the last layer's input `[B, D]` of the last forward pass."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept[:] = [args[0].flatten(1)]

    handle = _last_layer(model).register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def balance(logits: Tensor) -> Tensor:
    """-H( mean prediction ): least where a batch holds all classes alike. In nats."""
    p = F.softmax(logits, 1).mean(0)
    return (p * (p + 1e-8).log()).sum()


def balanced_labels(count: int, number: int, rng: torch.Generator) -> Tensor:
    """`count` labels of `number` classes: all of them in random order, and again, so that any run of `number` has each once."""
    rounds = [torch.randperm(number, generator=rng) for _ in range(-(-count // number))]
    return torch.cat(rounds)[:count]
