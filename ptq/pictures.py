"""Reads pictures: a folder of image files, or an `.npz`/`.npy` array; labels where there are any.

uint8 pixels are brought into the network's input space as `(pixel / 255 - mean) / std`; float arrays are taken as they are.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ptq.errors import CalibrationError

if TYPE_CHECKING:
    from PIL import Image

_LONGEST = 9  # digits of a class number
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True, slots=True)
class Fit:
    """How pictures come to the input's size: shorter side to `resize` pixels, then a square of `crop` cut from the middle.

    What is left open follows from the input: as much of the picture as fits.

    Raises:
        CalibrationError: a size below 1, or a crop larger than what it is cut from.
    """

    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        if any(size is not None and size < 1 for size in (self.resize, self.crop)):
            raise CalibrationError(f"resize {self.resize}, crop {self.crop} given; sizes are pixels, at least 1")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise CalibrationError(
                f"crop {self.crop} is larger than the picture's shorter side after resize {self.resize}"
            )


@dataclass(frozen=True, slots=True)
class Pictures:
    """A set of pictures on disk: `read(indices)` gives `[B, C, H, W]` float32; `labels` int64 `[N]` or None."""

    source: "list[Path] | np.ndarray"
    labels: Tensor | None
    input_shape: tuple[int, int, int]
    mean: Tensor | None
    std: Tensor | None
    fit: Fit = Fit()

    def __len__(self) -> int:
        return len(self.source)

    def digest(self) -> str:
        """A name that these pictures share only with equal ones; of files, with such of equal names and sizes."""
        space = [None if v is None else v.tolist() for v in (self.mean, self.std)]
        told = hashlib.sha256(repr((self.input_shape, *space, self.fit)).encode())
        if self.labels is not None:
            told.update(self.labels.numpy().tobytes())
        if isinstance(self.source, list):
            told.update(repr([(f.name, f.stat().st_size) for f in self.source]).encode())
        else:
            told.update(np.ascontiguousarray(self.source).data)
        return told.hexdigest()

    def read(self, indices: Tensor) -> Tensor:
        """The pictures with these indices, in the network's input space."""
        if isinstance(self.source, list):
            raw = np.stack([_decode(self.source[i], self.input_shape, self.fit) for i in indices.tolist()])
        else:
            raw = self.source[indices.numpy()]
        return self._normalize(raw)

    def _normalize(self, raw: np.ndarray) -> Tensor:
        if raw.dtype != np.uint8 and raw.dtype.kind != "f":
            raise CalibrationError(
                f"an array of {raw.dtype} found; pictures are uint8 pixels, or float in the network's input space"
            )
        if raw.dtype != np.uint8:
            x = torch.from_numpy(np.ascontiguousarray(raw, dtype=np.float32))
        else:
            raw = _channels_last(raw, self.input_shape[0])
            if self.fit != Fit():
                raw = np.stack([_refit(pixels, self.input_shape, self.fit) for pixels in raw])
            raw = raw.transpose(0, 3, 1, 2)
            if self.mean is None or self.std is None:
                raise CalibrationError(
                    "these pictures are 8-bit pixels; state the normalization with --mean and --std (mean=, std=)"
                )
            x = torch.from_numpy(np.ascontiguousarray(raw)).float() / 255
            x = (x - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)
        if tuple(x.shape[1:]) != self.input_shape:
            raise CalibrationError(
                f"pictures of shape {tuple(x.shape[1:])} found; the network takes {self.input_shape}"
            )
        return x

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All pictures in order, `size` at a time, with their labels."""
        for part in torch.arange(len(self)).split(size):
            yield self.read(part), None if self.labels is None else self.labels[part]


def _channels_last(raw: np.ndarray, channels: int) -> np.ndarray:
    """Pixels as [N, H, W, C]; grey ones repeated where the network takes colours."""
    last = raw.shape[-1] in (1, channels) and raw.shape[1] != channels
    raw = raw if last else raw.transpose(0, 2, 3, 1)
    return raw.repeat(channels, axis=3) if raw.shape[-1] == 1 else raw


def open_pictures(
    path: Path, input_shape: tuple[int, int, int], mean: Tensor | None, std: Tensor | None, fit: Fit | None = None
) -> Pictures:
    """The pictures at `path`.

    A folder: image files below it; with sub-folders, each is a class (by its number, where all are numbers, else sorted); without,
    a leading number in the file name is the class ("0017_cat.jpg"). Pictures of another size are resized on their shorter side and
    cropped in the middle.
    An `.npz`: pixels under "x", labels under "y" where there are any. An `.npy`: pixels.

    Raises:
        CalibrationError: nothing there, no pictures, or not such a file.
    """
    path, fit = Path(path), fit or Fit()
    if path.is_dir():
        found = (p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        files = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not files:
            raise CalibrationError(f"no pictures in {path}; looked for {', '.join(sorted(_SUFFIXES))}")
        return Pictures(files, _folder_labels(path, files), input_shape, mean, std, fit)
    if not path.is_file():
        raise CalibrationError(f"{path} is neither a folder nor a file")
    x, y = _read_array(path)
    if x.ndim != 4 or not len(x):
        raise CalibrationError(
            f"{path} holds an array of shape {x.shape}; pictures are [N, H, W, C] uint8 or [N, C, H, W] float"
        )
    if y is not None and y.dtype.kind not in "iu":
        raise CalibrationError(f"{path} holds labels of type {y.dtype}; labels are class numbers")
    labels = None if y is None else torch.from_numpy(y.astype(np.int64))
    if labels is not None and labels.shape != (len(x),):
        raise CalibrationError(f"{path} holds {len(x)} pictures and labels of shape {tuple(labels.shape)}")
    return Pictures(x, labels, input_shape, mean, std, fit)


def _read_array(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)  # of an .npy, only what is asked for is read
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            if "x" not in loaded:
                raise CalibrationError(f"{path} has no array 'x'; it has {', '.join(loaded) or 'none'}")
            return loaded["x"], loaded.get("y", None)
    except (CalibrationError, MemoryError):
        raise
    except Exception as e:  # a damaged file may fail anywhere in numpy, zipfile and zlib
        raise CalibrationError(f"{path} is not a readable .npz or .npy file of plain arrays: {e}") from e


def _folder_labels(root: Path, files: list[Path]) -> Tensor | None:
    parents = [p.relative_to(root).parts[0] if p.parent != root else "" for p in files]
    if all(parents):
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        index = {name: i for i, name in enumerate(folders)}  # an empty folder is a class too
        if all(name.isdecimal() and len(name) <= _LONGEST for name in folders):  # which need not all be there
            index = {name: int(name) for name in folders}
        return torch.tensor([index[name] for name in parents])
    numbers = [re.match(r"\d+", p.name) for p in files]
    if not all(m and len(m.group()) <= _LONGEST for m in numbers):  # longer ones tell the time
        return None
    return torch.tensor([int(m.group()) for m in numbers if m])


def _decode(path: Path, shape: tuple[int, int, int], fit: Fit) -> np.ndarray:
    """One picture as uint8 [H, W, C]."""
    from PIL import Image, UnidentifiedImageError  # slow to import, needed only here

    try:
        with Image.open(path) as opened:
            deep = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))
            if opened.mode in ("I", "F") and not deep:
                raise CalibrationError(
                    f"{path} holds grey values of 32 bits, whose range nobody knows; convert it to 8 or 16 bits"
                )
            if deep:  # converted, all but the darkest would be white
                opened = Image.fromarray((np.asarray(opened, dtype=np.float64) / 257).round().astype(np.uint8))
            picture = opened.convert("L" if shape[0] == 1 else "RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as e:
        raise CalibrationError(f"{path} cannot be read as a picture: {e}") from e
    return _refit(np.asarray(picture, dtype=np.uint8), shape, fit)


def _refit(pixels: np.ndarray, shape: tuple[int, int, int], fit: Fit) -> np.ndarray:
    """A picture [H, W] or [H, W, C] at the input's size."""
    from PIL import Image

    _, height, width = shape
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if pixels.shape[:2] != (height, width) or fit != Fit():
        if pixels.ndim == 3 and pixels.shape[2] != 3:
            raise CalibrationError(
                f"pictures of {pixels.shape[2]} channels and another size than the input's cannot be resized"
            )
        picture = Image.fromarray(pixels)
        if fit.resize is not None:
            picture = _resized(picture, fit.resize / min(picture.size), (1, 1))
        if fit.crop is not None:
            if fit.crop > min(picture.size):
                raise CalibrationError(
                    f"crop {fit.crop} is larger than a picture of {picture.width} × {picture.height}"
                )
            picture = _middle(picture, (fit.crop, fit.crop))
        if picture.size != (width, height):
            picture = _resized(picture, max(width / picture.width, height / picture.height), (width, height))
            picture = _middle(picture, (width, height))
        pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _resized(picture: "Image.Image", scale: float, least: tuple[int, int]) -> "Image.Image":
    size = (max(least[0], round(picture.width * scale)), max(least[1], round(picture.height * scale)))
    return picture if size == picture.size else picture.resize(size, resample=2)  # 2: bilinear


def _middle(picture: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
    return picture.crop((left, top, left + size[0], top + size[1]))
