"""Executors: how planned jobs are carried out. Here: local processes, one for each rank, each started by itself."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellhpc.errors import DataError
from cellhpc.ledger import write_json
from cellhpc.ranks import MEETING, RANK, RANKS
from cellhpc.study import StudyFolder
from cellhpc.sweep import TrainingJob

GRACE_SECONDS = 10.0
"""How long the other ranks may take to notice that one has died, before they are ended."""
POLL_SECONDS = 0.5


@dataclass
class _Started:
    """A job whose ranks run."""

    job: TrainingJob
    folder: Path
    ranks: list[subprocess.Popen[bytes]]
    failed_at: float | None = None

    def running(self) -> bool:
        return any(process.poll() is None for process in self.ranks)

    def failed(self) -> bool:
        return any(process.poll() not in (None, 0) for process in self.ranks)

    def end(self) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.terminate()
        for process in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            if process.poll() is None:
                process.kill()
                process.wait()


def run_here(study: StudyFolder, jobs: Sequence[TrainingJob], parallel: int, watch: Callable[[], None]) -> None:
    """Run jobs as local processes, `parallel` at a time.

    Parameters
    ----------
    study
        The study's folder; each attempt of a job gets a folder with its logs below `jobs`.
    jobs
        The jobs, each with its runs and its number of ranks.
    parallel
        Jobs that run at the same time.
    watch
        Called about twice a second.

    Raises
    ------
    DataError
        Some jobs failed: names each with the last line of its error and its log. The others were finished first.
    """
    waiting, failures = list(jobs), []
    running: list[_Started] = []
    with _ended_on_exit() as started:
        while waiting or running:
            while waiting and len(running) < parallel:
                running.append(_start(study, waiting.pop(0)))
                started.append(running[-1])
            time.sleep(POLL_SECONDS)
            watch()
            for job in list(running):
                if job.failed():
                    job.failed_at = job.failed_at or time.monotonic()
                    if job.running() and time.monotonic() - job.failed_at > GRACE_SECONDS:
                        job.end()
                if not job.running():
                    running.remove(job)
                    if job.failed():
                        failures.append(f"{job.job.id}: {_reason(job)}")
    if failures:
        raise DataError(
            f"{len(failures)} of {len(jobs)} training job(s) failed; finished runs are kept.",
            failures,
            "Run the same command again to do what is missing.",
        )


@contextlib.contextmanager
def _ended_on_exit() -> Iterator[list[_Started]]:
    """End every rank that still runs when the executor is left, for whatever reason."""
    started: list[_Started] = []
    try:
        yield started
    finally:
        for job in started:
            job.end()


def _start(study: StudyFolder, job: TrainingJob) -> _Started:
    """Start the ranks of a job in a fresh attempt's folder."""
    unit = study.jobs / job.id
    unit.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name.removeprefix("attempt-")) for path in unit.glob("attempt-*")), default=0)
    folder = unit / f"attempt-{number}"
    folder.mkdir(mode=0o700)
    write_json(unit / "job.json", job.to_json())
    processes = []
    for rank in range(job.ranks):
        environment = {**os.environ, RANK: str(rank), RANKS: str(job.ranks), MEETING: str(folder)}
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cellhpc.work", str(study.path), job.id],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    write_json(
        folder / "processes.json", {"host": socket.gethostname(), "pids": [process.pid for process in processes]}
    )
    return _Started(job, folder, processes)


def _reason(started: _Started) -> str:
    """Say how the first rank that failed ended: its own last words, or the signal that ended it."""
    codes = [process.returncode for process in started.ranks]
    # A rank that was ended with the others says nothing of its own: one with words of its own tells more.
    order = sorted(range(len(codes)), key=lambda rank: (codes[rank] == 0, codes[rank] != 1, rank))
    rank = order[0]
    log = started.folder / f"rank-{rank}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if codes[rank] < 0:
        return f"rank {rank} was ended by signal {-codes[rank]} (log: {log})"
    said = [line for line in lines if line.startswith("cellhpc: ")]
    return f"rank {rank}: {(said or lines or ['no output'])[-1]} (log: {log})"
