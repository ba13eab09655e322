"""Where in the user's source something came from: what an error about a network names."""

import os
import traceback
from pathlib import Path

import torch
from torch import fx

_OURS = tuple(str(Path(f).parent) + os.sep for f in (torch.__file__, __file__))  # folders that are not the user's


def user_line(e: BaseException) -> str:
    """Where in the user's source an exception came up: "file.py:12 `code`"."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(_OURS)]
    return f"{frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`" if frames else "no source line known"


def first_line(e: BaseException) -> str:
    """The first line of an exception's message, or its class where it has none."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def source_of(node: fx.Node) -> str:
    """Where in the user's source a node came from."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    theirs = [i for i, line in enumerate(lines) if line.startswith('File "') and not line[6:].startswith(_OURS)]
    return " ".join(lines[theirs[-1] : theirs[-1] + 2]) if theirs else "no source line known"
