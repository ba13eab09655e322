"""One vector per class, in which classes that are alike are near each other."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from ptq.calibrators._classifier import class_rows
from torch import Tensor, fx

from ptq.errors import CalibrationError

_PROMPT = "A class of {}"  # NAYER, table 5, the best of three


def label_embeddings(
    model: fx.GraphModule, number: int, *, embeddings: Path | None, names: Path | None, encoder: str
) -> Tensor:
    """Label embeddings `[number, D]`: of a file, of a sentence encoder, or the teacher's own classifier rows.

    Args:
        embeddings: .npz (its first array) or .npy, [number, D]. names: text file with one class name a line.
        encoder: of sentence-transformers, by name or folder.

    Raises:
        CalibrationError: both given, a file that cannot be read or does not fit, or the encoder is not installed.
    """
    if embeddings is not None and names is not None:
        raise CalibrationError("both embeddings= and names= given; one of them makes the label embeddings")
    if embeddings is not None:
        found = _from_file(Path(embeddings))
    elif names is not None:
        found = _encoded(Path(names), encoder)
    else:
        return class_rows(model)
    if found.ndim != 2 or len(found) != number:
        raise CalibrationError(
            f"label embeddings of shape {tuple(found.shape)} found; the network has {number} classes"
        )
    return found.float()


def _from_file(path: Path) -> Tensor:
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
        return torch.from_numpy(np.asarray(array, dtype=np.float32))
    except (OSError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as e:
        raise CalibrationError(f"{path} is not a readable .npz or .npy file of label embeddings: {e}") from e


def _encoded(path: Path, encoder: str) -> Tensor:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path} cannot be read as a list of class names: {e}") from e
    try:
        from sentence_transformers import SentenceTransformer  # an extra, slow to import
    except ImportError as e:
        raise CalibrationError("names= needs a sentence encoder; install the extra, pip install 'ptq[text]'") from e
    try:
        model = SentenceTransformer(encoder, device="cpu")
    except Exception as e:  # whatever its hub or its files raise
        raise CalibrationError(f"the sentence encoder {encoder!r} cannot be loaded: {type(e).__name__}: {e}") from e
    vectors = model.encode([_PROMPT.format(name) for name in lines if name], convert_to_numpy=True)
    return torch.from_numpy(np.asarray(vectors))
