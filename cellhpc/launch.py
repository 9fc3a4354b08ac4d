"""The executor of this machine: local processes, one for each rank of a task, each started by itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cellhpc.attempts import FAILED
from cellhpc.errors import DataError
from cellhpc.hosts import MEETING, PLACE, RANK, RANKS
from cellhpc.ledger import read_json
from cellhpc.study import StudyFolder
from cellhpc.submission import AGAIN, CHECKPOINTED, DONE, ENDS, LOGS, Submission, Task

GRACE_SECONDS = 30.0
"""How long ranks may take to leave a checkpoint when they are told to stop."""
DEATH_SECONDS = 10.0
"""How long the other ranks may take to notice that one has died, before they are ended."""
POLL_SECONDS = 0.5
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class _Started:
    """A task whose ranks run."""

    task: Task
    number: int
    place: int
    attempt: Path
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
        """Tell the ranks to stop, which leaves a checkpoint; end those that don't."""
        for process in self.ranks:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + (GRACE_SECONDS if self.first_failed is None else 0)
        for process in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()

    def record_end(self) -> None:
        """Write down how the attempt ended, as a batch script does on Slurm."""
        how = next((mark for mark in (DONE, CHECKPOINTED, AGAIN) if (self.attempt / mark).exists()), "crashed")
        code = max((abs(process.returncode) for process in self.ranks), default=0)
        with (self.attempt.parent / ENDS).open("a") as file:
            file.write(f"{time.time():.0f} {platform.node()} {self.attempt.name} {code} {how}\n")


def run_here(study: StudyFolder, submission: Submission, parallel: int, watch: Callable[[], None]) -> None:
    """Carry out a submission's tasks as local processes, `parallel` at a time.

    Parameters
    ----------
    study, submission
        The study, and what is to be done of it.
    parallel
        Tasks that run at the same time.
    watch
        Called about twice a second.

    Raises
    ------
    DataError
        Tasks or runs failed: names each with its reason and its log. The others were finished first.
    """
    tasks = list(submission.tasks.values())
    waiting, crashed = [(task, 0) for task in tasks], []
    running: list[_Started] = []
    (submission.folder / LOGS).mkdir(mode=0o700)
    with _ended_on_exit() as started:
        while waiting or running:
            while waiting and len(running) < parallel:
                place = min(set(range(parallel)) - {one.place for one in running})
                running.append(_start(study, submission, *waiting.pop(0), place, parallel))
                started.append(running[-1])
            time.sleep(POLL_SECONDS)
            watch()
            for one in list(running):
                one.look()
                if one.failed_at and one.running() and time.monotonic() - one.failed_at > DEATH_SECONDS:
                    one.end()
                if not one.running():
                    one.look()
                    running.remove(one)
                    if (one.attempt / AGAIN).exists():  # each time there is one run less
                        waiting.insert(0, (one.task, one.number + 1))
                    elif not (one.attempt / DONE).exists():
                        crashed.append(f"{one.task.name}: {_reason(submission, one)}")
    failed = _failures(study, tasks, submission)
    if crashed or failed:
        raise DataError(
            f"{len(crashed)} of {len(tasks)} training task(s) and {len(failed)} run(s) failed; finished runs are kept.",
            crashed + failed,
            "Run the same command again to do what is missing.",
        )


@contextlib.contextmanager
def _ended_on_exit() -> Iterator[list[_Started]]:
    """End every rank that still runs when the executor is left, for whatever reason."""
    started: list[_Started] = []
    try:
        yield started
    finally:
        for one in started:
            one.end()
            one.record_end()


def rank_cores(place: int, rank: int, ranks: int, threads: int, parallel: int = 1) -> set[int]:
    """Choose the cores of a rank: its own, else ranks that wait for each other are moved to and fro between them.

    Parameters
    ----------
    place
        Number of the task among those that run at the same time, from 0.
    rank, ranks
        The rank, and how many there are; a single one waits for nobody and may use all cores.
    threads
        Threads of a rank.
    parallel
        Tasks that run at the same time; where all of their threads have no core each, ranks use all cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    first = (place * ranks + rank) * threads
    own = ranks > 1 and parallel * ranks * threads <= len(cores)
    return set(cores[first : first + threads] if own else cores)


def _start(study: StudyFolder, submission: Submission, task: Task, number: int, place: int, parallel: int) -> _Started:
    """Start the ranks of a task, for the first time with the number 0."""
    attempt = submission.task_folder(task.name) / f"here-{number}"
    attempt.mkdir(parents=True, mode=0o700)
    words = [sys.executable, "-m", "cellhpc.work", str(study.path), str(submission.folder), task.name, str(attempt)]
    processes = []
    for rank in range(task.ranks):
        environment = {**os.environ, RANK: str(rank), RANKS: str(task.ranks), MEETING: str(attempt)}
        environment[PLACE] = str(place * task.ranks + rank)
        cores = rank_cores(place, rank, task.ranks, task.threads, parallel)
        with _log(submission, task, rank).open("ab") as log:
            processes.append(
                subprocess.Popen(
                    words,
                    env=environment,
                    preexec_fn=functools.partial(_begin, os.getpid(), cores),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return _Started(task, number, place, attempt, processes)


def _log(submission: Submission, task: Task, rank: int) -> Path:
    return submission.folder / LOGS / f"{task.name}_{rank}_log.out"


def _begin(parent: int, cores: set[int]) -> None:
    """Keep to these cores, and ask Linux to end this process with its parent: a killed command leaves no rank."""
    os.sched_setaffinity(0, cores)
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _failures(study: StudyFolder, tasks: list[Task], submission: Submission) -> list[str]:
    """Say why tasks and runs failed that ended in good order."""
    units = [(task.name, submission.task_folder(task.name)) for task in tasks]
    units += [(run, study.runs / run) for task in tasks for run in task.runs]
    told = [(name, read_json(unit / FAILED)) for name, unit in units if (unit / FAILED).exists()]
    return [f"{name}: {why['reason']}" for name, why in told if why["submission"] == submission.number]


def _reason(submission: Submission, started: _Started) -> str:
    """Say how the rank that failed first ended: the signal that ended it, or its own last words."""
    rank = started.first_failed or 0
    log = _log(submission, started.task, rank)
    code = started.ranks[rank].returncode
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"rank {rank} was ended by signal {-code}{hint}; log: {log}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [number for number, line in enumerate(lines) if line.startswith("cellhpc: ")]
    words = " ".join(lines[said[-1] :]) if said else (lines or ["it said nothing"])[-1]
    return f"rank {rank}: {words.removeprefix('cellhpc: ')}; log: {log}"
