"""What a run has made so far, on disk, batch by batch, block by block, epoch by epoch: what is there is not made again.

One file per batch, in a folder whose name is a hash of all that the images depend on: networks, source and its options,
seed, shape, normalization, device and torch's version. A file appears whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ptq.errors import CalibrationError
from ptq.graph.serialize import graph_to_json

_NAME = 24  # hexadecimal digits
ALL_CACHES = "[0-9a-f]" * _NAME  # below a root, as a pattern for names


@dataclass(frozen=True, slots=True)
class BatchCache:
    """The batches of one run of one source."""

    folder: Path

    def within(self, name: str) -> "BatchCache":
        """The cache of a source that is part of this one."""
        return BatchCache(self.folder / name)

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]] | None:
        """Images and state of a batch; None where it is not there, or damaged."""
        try:
            content = torch.load(self._file(index), map_location="cpu", weights_only=True)
            return content["images"], content["state"]
        except Exception:  # a damaged file can fail anywhere in reading it
            return None

    def write(self, index: int, images: Tensor, state: Mapping[str, Any]) -> None:
        """Keeps a batch, and what the next one starts from.

        Raises:
            CalibrationError: the folder cannot be written.
        """
        file = self._file(index)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save({"images": images, "state": dict(state)}, partial)
            partial.replace(file)
        except (OSError, RuntimeError) as e:
            raise CalibrationError(f"the cache {self.folder} cannot be written: {e}") from e
        finally:
            with suppress(OSError):
                partial.unlink()

    def has(self, index: int) -> bool:
        """Whether a batch was kept, be it damaged or not."""
        return self._file(index).exists()

    def drop(self, index: int) -> None:
        """Forgets a batch, where it was there."""
        with suppress(OSError):
            self._file(index).unlink()

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05}.pt"


def open_cache(root: Path, models: tuple[fx.GraphModule, ...], settings: Mapping[str, Any]) -> BatchCache:
    """The cache below `root` for images made from these networks under these settings (plain data)."""
    digest = hashlib.sha256(json.dumps({**settings, "torch": torch.__version__}, sort_keys=True).encode())
    for model in models:
        digest.update(
            json.dumps(graph_to_json(model), sort_keys=True).encode()
        )  # the code alone lacks strides, slopes …
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return BatchCache(Path(root) / digest.hexdigest()[:_NAME])


def digest_of(images: Tensor) -> str:
    """A name that images share only with equal ones."""
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
