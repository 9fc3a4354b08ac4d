"""Executors: how planned jobs are carried out. Here: local processes, one for each rank, each started by itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
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

JOB = "job.json"
"""What a job's processes are told to do, in the folder of the attempt."""
GRACE_SECONDS = 10.0
"""How long the other ranks may take to notice that one has died, before they are ended."""
POLL_SECONDS = 0.5
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class _Started:
    """A job whose ranks run."""

    job: TrainingJob
    folder: Path
    ranks: list[subprocess.Popen[bytes]]
    failed_at: float | None = None
    first_failed: int | None = None

    def look(self) -> None:
        """Note which rank failed first; the others fail for want of it."""
        failed = [rank for rank, process in enumerate(self.ranks) if process.poll() not in (None, 0)]
        if failed and self.first_failed is None:
            self.first_failed = min(failed, key=lambda rank: self.ranks[rank].returncode)  # signals are negative
            self.failed_at = time.monotonic()

    def running(self) -> bool:
        return any(process.poll() is None for process in self.ranks)

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
                job.look()
                if job.failed_at and job.running() and time.monotonic() - job.failed_at > GRACE_SECONDS:
                    job.end()
                if not job.running():
                    job.look()
                    running.remove(job)
                    if job.first_failed is not None:
                        failures.append(f"{job.job.id}: {_reason(job, job.first_failed)}")
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
    write_json(folder / JOB, job.to_json())
    processes = []
    for rank in range(job.ranks):
        environment = {**os.environ, RANK: str(rank), RANKS: str(job.ranks), MEETING: str(folder)}
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cellhpc.work", str(study.path), str(folder / JOB)],
                    env=environment,
                    preexec_fn=functools.partial(_end_with, os.getpid()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    write_json(
        folder / "processes.json", {"host": socket.gethostname(), "pids": [process.pid for process in processes]}
    )
    return _Started(job, folder, processes)


def _end_with(parent: int) -> None:
    """Ask Linux to end this process with its parent: a command that is killed leaves no rank behind."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _reason(started: _Started, rank: int) -> str:
    """Say how the rank that failed first ended: the signal that ended it, or its own last words."""
    log = started.folder / f"rank-{rank}.log"
    code = started.ranks[rank].returncode
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"rank {rank} was ended by signal {-code}{hint}; log: {log}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [number for number, line in enumerate(lines) if line.startswith("cellhpc: ")]
    words = " ".join(lines[said[-1] :]) if said else (lines or ["it said nothing"])[-1]
    return f"rank {rank}: {words.removeprefix('cellhpc: ')}; log: {log}"
