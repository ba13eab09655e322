"""What long work shows in a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptq.contracts import Feedback


def plain_console(*, stderr: bool = False) -> Console:
    """A console that shows text as it is: names of files may hold brackets."""
    return Console(stderr=stderr, markup=False)


@contextmanager
def shown(quiet: bool, console: Console) -> Iterator[Feedback]:
    """Feedback that draws progress bars with the time left; notes go above them."""
    if quiet:
        yield Feedback()
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=2, speed_estimate_period=60) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield Feedback(progress, lambda text: bars.console.print(f"note: {text}"))
