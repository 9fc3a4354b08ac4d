"""Progress of a long step: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float, str], None]

SECONDS_BETWEEN_LINES = 15.0


@contextlib.contextmanager
def progress(title: str, total: float, unit: str) -> Iterator[Advance]:
    """Show the progress of a step on standard error.

    Yields
    ------
    advance
        ``advance(amount, note)`` adds `amount` (in `unit`) and shows `note` behind the counts.
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")

            def move(amount: float, note: str = "") -> None:
                bar.update(task, advance=amount, note=note)

            yield move
        return

    done, last, began = 0.0, time.monotonic(), time.monotonic()

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or done >= total:
            last = time.monotonic()
            left_s = (last - began) * (total - done) / done if done else 0
            text = f"{title}: {done:,.0f}/{total:,.0f} {unit} in {last - began:.0f} s"
            text += f", about {left_s:,.0f} s left" if left_s >= 1 else ""
            print(f"{text}  {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
