"""Checksums: what is read from a folder is what was written into it, or it is said which file is not.

They find damage and mix-ups, not forgery: whoever changes a file can write its checksum anew.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptq.errors import ArtifactError

_DIGEST = "sha256"  # of all else in a sealed file


def file_sum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(rows: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Rows of a JSON file with the checksums of other files, by name, and of itself."""
    text = json.dumps({**rows, "files": {f.name: file_sum(f) for f in files}}, ensure_ascii=False)
    plain = json.loads(text.encode(errors="replace"))  # names of files need not be text
    return plain | {_DIGEST: _digest(plain)}


def check_seal(data: Mapping[str, Any], path: Path) -> None:
    """Raises ArtifactError unless sealed rows, read from `path`, are those that were written."""
    if _DIGEST in data and data[_DIGEST] != _digest(data):
        raise ArtifactError(f"{path} was changed or damaged after it was written; make it again")


def check_file(data: Mapping[str, Any], path: Path) -> bool:
    """Whether sealed rows vouch for a file.

    Raises:
        ArtifactError: they name it, and it is another or not there.
    """
    files = data.get("files")
    wanted = files.get(path.name) if isinstance(files, Mapping) else None
    if wanted is None:
        return False
    try:
        same = file_sum(path) == wanted
    except OSError as e:
        raise ArtifactError(f"{path} cannot be read: {e}") from e
    if not same:
        raise ArtifactError(f"{path} is not the file that was written: changed, damaged or another's; make it again")
    return True


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in data.items() if k != _DIGEST}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
