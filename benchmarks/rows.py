"""Results as JSON lines: written as soon as they are known, and not made again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Rows:
    """The rows of one file. keys: the fields that tell one measurement from another."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The row with these keys, or None."""
        return next((row for row in self.rows if all(row.get(k) == wanted[k] for k in self.keys)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, in the file too."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def table(self, heads: Sequence[str]) -> str:
        """The rows as a Markdown table."""
        return markdown(heads, [[row.get(head, "not run") for head in heads] for row in self.rows])


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def mean_and_deviation(figures: Sequence[float], digits: int = 2) -> str:
    """ "88.12 ± 0.30 (3)" of several seeds; the plain figure of one."""
    mean = sum(figures) / len(figures)
    if len(figures) == 1:
        return f"{mean:.{digits}f}"
    deviation = (sum((v - mean) ** 2 for v in figures) / (len(figures) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} ({len(figures)})"
