"""One call as it ran, which is all that lowering knows of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Step = nn.Module | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class TensorShape:
    """Stands for a tensor among the recorded arguments of a call: its dimensions, batch included, and its type."""

    dims: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor among the arguments that does not depend on the network's input: a parameter, or computed from some."""

    value: Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it ran: `args` and `kwargs` with tensors replaced by their `TensorShape`.

    shape, out: shapes of the first tensor and of the result, without the batch dimension.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    out: tuple[int, ...]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tensor(self, position: int, name: str) -> Tensor | None:
        """A constant argument's tensor, or None where there is none.

        Raises:
            Unsupported: it is computed from the network's input.
        """
        found = self.get(position, name)
        if isinstance(found, TensorShape):
            raise Unsupported(f"{name} computed from the network's input; a parameter is supported")
        return found.value if isinstance(found, Constant) else None


class Unsupported(Exception):
    """A known function in a form that is not supported; the message says which."""


def pair(v: Any) -> tuple[int, int]:
    """A number for height and width alike, or one for each."""
    if isinstance(v, int):
        return v, v
    return (int(v[0]), int(v[0])) if len(v) == 1 else (int(v[0]), int(v[1]))
