"""A bar for what is being asked, by its name: shared by report, evaluate, train and demo."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorasmith.cli.console import console


@contextmanager
def asking_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield what takes (what is asked, answers done, answers asked for). Without a terminal, one line each."""
    columns = (
        TextColumn("asking {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)
            if done == total and not console.is_terminal:
                console.print(f"asked {what}: {total}")

        yield show
