"""Progress: a bar where somebody looks on, a line now and then in a log."""

from __future__ import annotations

import io
import sys

import pytest

from cellhpc import progress as shown
from cellhpc.progress import progress


def advance_ten_times() -> None:
    with progress("Converting", 10, "fields") as advance:
        for _ in range(10):
            advance(1, "1 MB/s")


def test_a_log_gets_a_line_at_the_end_and_none_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    advance_ten_times()
    assert capsys.readouterr().err.splitlines() == ["Converting: 10/10 fields in 0 s  1 MB/s"]


def test_a_long_step_tells_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 6))
    monkeypatch.setattr(shown.time, "monotonic", lambda: float(next(seconds)))
    advance_ten_times()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 10
    assert all("left" in line for line in lines[:-1])
    assert lines[-1].startswith("Converting: 10/10 fields in ")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    advance_ten_times()
    assert "10/10 fields" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()  # it is drawn anew in its place
