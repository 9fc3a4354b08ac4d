"""A study's status as a terminal shows it: counts, what runs now, what failed and why."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cellhpc.status import RunStatus, Status

SHOWN = 20
"""Runs of one kind that are listed; `--json` has them all."""
COLOURS = {"done": "green", "running": "cyan", "waiting": "blue", "failed": "red", "stopped": "yellow"}


def render_status(status: Status) -> RenderableType:
    """Draw a status: what matters most last, where the eye is."""
    counts = ", ".join(f"{count:,} {state}" for state, count in status.counts.items()) or "not planned yet"
    parts: list[RenderableType] = [Text(f"{status.study}: {len(status.runs):,} runs: {counts}", style="bold")]
    stages = Table(box=None, show_header=False, padding=(0, 2))
    for stage in status.stages:
        where = " on ".join(text for text in (f"job {stage.job}" if stage.job else "", stage.node) if text)
        elapsed = _clock(stage.seconds) if stage.seconds else ""
        stages.add_row(stage.stage, Text(stage.state, COLOURS.get(stage.state, "")), where, elapsed, Text(stage.reason))
    parts.append(stages)
    if running := [run for run in status.runs if run.state == "running"]:
        parts.append(_running(running))
    for state in ("failed", "stopped", "stale"):
        if found := [run for run in status.runs if run.state == state]:
            parts.append(_ended(state, found))
    waits = [run for run in status.runs if run.state == "waiting" and run.reason]
    if waits:
        parts.append(Text(f"waiting: {', '.join(sorted({run.reason for run in waits}))}", style="blue"))
    why_missing = sorted({run.reason for run in status.runs if run.state == "missing" and run.reason})
    parts += [Text(f"missing: {reason}") for reason in why_missing[:SHOWN]]
    parts += [Text(note, style="yellow") for note in status.notes]
    parts.append(Text(_next(status)))
    return Group(*parts)


def _running(runs: list[RunStatus]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for title, justify in (
        ("running", "left"), ("job", "left"), ("node", "left"), ("elapsed", "right"), ("epoch", "right"),
        ("images/s", "right"), ("waits for data", "right"), ("memory", "right"),
    ):  # fmt: skip
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for run in runs[:SHOWN]:
        table.add_row(
            run.run,
            run.job,
            run.node,
            _clock(run.seconds) if run.seconds else "",
            f"{run.epoch}/{run.epochs}" + (f", candidate {run.candidate}" if run.candidate else ""),
            f"{run.images_per_s:,.0f}" if run.images_per_s else "",
            f"{100 * run.waiting_for_data:.1f} %" if run.waiting_for_data is not None else "",
            f"{run.memory_mb / 1024:.1f} GB" if run.memory_mb else "",
        )
    if len(runs) > SHOWN:
        table.add_row(f"... and {len(runs) - SHOWN:,} more")
    return table


def _ended(state: str, runs: list[RunStatus]) -> Table:
    """List runs that ended without being done, those with one reason together."""
    together: dict[str, list[RunStatus]] = defaultdict(list)
    for run in runs:
        together[run.reason].append(run)
    table = Table(box=None, header_style=COLOURS.get(state, ""), padding=(0, 1))
    table.add_column(state, no_wrap=True)
    table.add_column("job")
    table.add_column("why", overflow="fold")
    for reason, same in list(together.items())[:SHOWN]:
        more = f" and {len(same) - 1:,} more" if len(same) > 1 else ""
        table.add_row(f"{same[0].run}{more}", same[0].job, Text(reason))
    if len(together) > SHOWN:
        table.add_row(f"... and {len(together) - SHOWN:,} more reasons")
    return table


def _next(status: Status) -> str:
    """Say what to type next."""
    if status.complete:
        return f"All is done. Report: {status.folder / 'results' / 'report.html'}"
    if status.at_work:
        return f"At work. What a run says: cellhpc logs {status.folder} RUN"
    return f"Nothing of it waits or runs. Do what is missing: cellhpc resume {status.folder}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
