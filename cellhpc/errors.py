"""What a user is told when something is wrong: one clear message, no traceback, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something failed for a reason that the user can act on; the command ends with code 1."""

    exit_code = 1


class UsageError(UserError):
    """The command line or the job file is wrong; the command ends with code 2."""

    exit_code = 2


class DataError(UserError):
    """Tables or pictures are wrong: carries every problem found, not only the first.

    Parameters
    ----------
    summary
        One sentence: what is wrong, and where.
    problems
        One line for each thing found; the message shows the first `shown`.
    remedy
        What to change or to type next.
    """

    shown = 20

    def __init__(self, summary: str, problems: Sequence[str] = (), remedy: str = "") -> None:
        lines = [summary, *(f"  - {problem}" for problem in problems[: self.shown])]
        if len(problems) > self.shown:
            lines.append(f"  ... and {len(problems) - self.shown} more")
        if remedy:
            lines.append(remedy)
        super().__init__("\n".join(lines))
        self.problems = tuple(problems)


def listing(values: Iterable[object], most: int = 12) -> str:
    """Write values as a short, sorted, comma-separated list for a message."""
    names = sorted(str(value) for value in values)
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
