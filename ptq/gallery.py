"""Synthetic images for the eye: PNG pictures, a contact sheet, the loss curve."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_SHEET = 100  # pictures on a contact sheet
_LARGEST = 1600  # pixels across a contact sheet


def to_pixels(images: Tensor, mean: Tensor | None, std: Tensor | None) -> tuple[np.ndarray, float]:
    """uint8 pixels `[N, H, W, C]` of images in the network's input space, and the share of values that are clipped here.

    Without a normalization, all images are scaled alike, so that three deviations around the mean of each channel fit.
    """
    if mean is None or std is None:
        deviation, middle = torch.std_mean(images, dim=(0, 2, 3), correction=0)
        scale, shift = 1 / (6 * deviation.clamp_min(1e-12)), 0.5 - middle / (6 * deviation.clamp_min(1e-12))
    else:
        scale, shift = std, mean
    x = 255 * (images * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    # Half a step: rounding brings what is nearer than that to a valid pixel without any loss.
    clipped = float(((x < -0.5) | (x > 255.5)).float().mean())
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(), clipped


def write_pictures(pixels: np.ndarray, folder: Path) -> None:
    """One PNG per picture, `00000.png` on."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pixels):
        _image(picture).save(folder / f"{index:05}.png")


def write_sheet(pixels: np.ndarray, file: Path) -> None:
    """The first hundred pictures on one sheet, small ones enlarged."""
    shown = pixels[:_SHEET]
    across = int(np.ceil(np.sqrt(len(shown))))
    height, width = shown.shape[1:3]
    times = max(1, min(4, _LARGEST // (across * (max(height, width) + 2))))
    rows = -(-len(shown) // across)
    sheet = Image.new("RGB", (across * (width * times + 2), rows * (height * times + 2)), "white")
    for index, picture in enumerate(shown):
        row, column = divmod(index, across)
        tile = _image(picture).convert("RGB").resize((width * times, height * times), Image.Resampling.NEAREST)
        sheet.paste(tile, (column * (width * times + 2) + 1, row * (height * times + 2) + 1))
    sheet.save(file)


def _image(picture: np.ndarray) -> Image.Image:
    if picture.shape[2] not in (1, 3):  # no colours: the first channel, in grey
        picture = picture[..., :1]
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def write_curve(curve: Sequence[tuple[int, float]], folder: Path) -> bool:
    """`loss.csv`, and `loss.png` where matplotlib is installed: the result says whether it was."""
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "loss"), *curve])
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot([step for step, _ in curve], [loss for _, loss in curve], linewidth=0.8)
    axes.set(xlabel="optimizer step, over all batches", ylabel="loss", title="Synthesis")
    if curve and min(loss for _, loss in curve) > 0:
        axes.set_yscale("log")
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
