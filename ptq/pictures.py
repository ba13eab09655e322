"""Reads pictures: a folder of image files, or an `.npz`/`.npy` array; labels where there are any.

uint8 pixels are brought into the network's input space as `(pixel / 255 - mean) / std`; float arrays are taken as they are.
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptq.errors import CalibrationError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True, slots=True)
class Pictures:
    """A set of pictures on disk: `read(indices)` gives `[B, C, H, W]` float32; `labels` int64 `[N]` or None."""

    source: "list[Path] | np.ndarray"
    labels: Tensor | None
    input_shape: tuple[int, int, int]
    mean: Tensor | None
    std: Tensor | None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Tensor) -> Tensor:
        """The pictures with these indices, in the network's input space."""
        if isinstance(self.source, list):
            raw = np.stack([_decode(self.source[i], self.input_shape) for i in indices.tolist()])
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
            channels_last = (
                raw.ndim == 4 and raw.shape[-1] == self.input_shape[0] and raw.shape[1] != self.input_shape[0]
            )
            raw = raw.transpose(0, 3, 1, 2) if channels_last else raw
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


def open_pictures(path: Path, input_shape: tuple[int, int, int], mean: Tensor | None, std: Tensor | None) -> Pictures:
    """The pictures at `path`.

    A folder: image files below it; with sub-folders, each is a class (sorted); without, a leading number in the file
    name is the class ("0017_cat.jpg"). Pictures of another size are resized on their shorter side and cropped in the middle.
    An `.npz`: pixels under "x", labels under "y" where there are any. An `.npy`: pixels.

    Raises:
        CalibrationError: nothing there, no pictures, or not such a file.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise CalibrationError(f"no pictures in {path}; looked for {', '.join(sorted(_SUFFIXES))}")
        return Pictures(files, _folder_labels(path, files), input_shape, mean, std)
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
    return Pictures(x, labels, input_shape, mean, std)


def _read_array(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            if "x" not in loaded:
                raise CalibrationError(f"{path} has no array 'x'; it has {', '.join(loaded) or 'none'}")
            return loaded["x"], loaded.get("y", None)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise CalibrationError(f"{path} is not a readable .npz or .npy file of plain arrays: {e}") from e


def _folder_labels(root: Path, files: list[Path]) -> Tensor | None:
    parents = [p.relative_to(root).parts[0] if p.parent != root else "" for p in files]
    if all(parents):
        index = {name: i for i, name in enumerate(sorted(set(parents)))}
        return torch.tensor([index[name] for name in parents])
    numbers = [re.match(r"\d+", p.name) for p in files]
    return torch.tensor([int(m.group()) for m in numbers if m]) if all(numbers) else None


def _decode(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One picture as uint8 [H, W, C]."""
    from PIL import Image, UnidentifiedImageError  # slow to import, needed only here

    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as e:
        raise CalibrationError(f"{path} cannot be read as a picture: {e}") from e
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels
