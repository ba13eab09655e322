"""Images whose pixels are the parameters."""

from collections.abc import Callable

import torch
from ptq.calibrators._plateau import Plateau
from torch import Tensor

from ptq.errors import CalibrationError


def fit_pixels(
    u: Tensor, loss: Callable[[Tensor], Tensor], *, steps: int, lr: float, patience: int,
    clip: Callable[[Tensor], Tensor] | None, done: Callable[[int, Tensor], None],
) -> Tensor:  # fmt: skip
    """Normalized images `[B, C, H, W]`, from start `u`, that minimize `loss`.

    Adam at `lr`, ×0.1 when the loss has not fallen for `patience` steps. clip: applied at the start of each step.
    done: told every step and its loss.

    Raises:
        CalibrationError: the loss or the images are no longer finite.
    """
    u = u.clone().requires_grad_()
    adam = torch.optim.Adam([u], lr=lr)
    plateau = Plateau(adam, patience, u.device)
    seen = u.detach()
    with torch.enable_grad():
        for step in range(steps):
            if clip is not None:
                with torch.no_grad():
                    u.copy_(clip(u))
            seen = u.detach().clone() if step == steps - 1 else seen
            adam.zero_grad()
            value = loss(u)
            value.backward()
            adam.step()
            plateau.step(value.detach())
            done(step, value)
    # The images belong to the loss of the last forward pass, not to the parameters after the last step.
    if not bool(torch.isfinite(seen).all()):
        raise CalibrationError("synthesis diverged: the images are not finite; lower lr")
    return seen
