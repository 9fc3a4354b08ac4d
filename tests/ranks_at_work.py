"""Starts a program once for each rank, each process by itself, as a cluster does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from cellhpc.ranks import MEETING, RANK, RANKS

HERE = Path(__file__).parent


def start_ranks(program: str, size: int, meeting: Path, *words: object, killed: int = -1) -> list[dict[str, Any]]:
    """Run tests/`program` on `size` ranks and return what each printed behind SAW; a `killed` one says nothing."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / program), *map(str, words)],
            env={**os.environ, RANK: str(rank), RANKS: str(size), MEETING: str(meeting), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    answers = []
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=540)
            assert process.returncode == (-signal.SIGKILL if rank == killed else 0), output
            if rank == killed:
                continue
            said = next(line for line in output.splitlines() if line.startswith("SAW "))
            answers.append(json.loads(said.removeprefix("SAW ")))
    finally:
        for process in processes:
            process.kill()
    return answers
