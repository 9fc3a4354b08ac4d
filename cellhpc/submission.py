"""A submission: the tasks that one command handed to an executor, and where their logs and records lie.

Each is a folder of the study, `jobs/NNNN/`::

    submission.json   the executor, when and by whom; the Slurm jobs and which tasks each carries out
    tasks.json        every task: its stage, its ranks, and for training its runs
    TASK/             one folder for each task: `ends`, a line for each time that it ended
    TASK/ATTEMPT/     one folder for each start of the task: how its ranks met, and the marker of how it ended
    logs/             what the tasks said

A task that is queued again has another attempt, and never meets what is left of an earlier one.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from cellhpc.hosts import MEETING, RANK, RANKS
from cellhpc.ledger import read_json, write_json, write_text
from cellhpc.study import StudyFolder

Executor = Literal["here", "slurm"]
TASKS, RECORD, LOGS = "tasks.json", "submission.json", "logs"
ENDS = "ends"
"""File of a task: a line for each of its ends, ``unix-seconds host attempt exit-code how``."""
DONE, CHECKPOINTED, AGAIN = "done", "checkpointed", "again"
"""Markers of an attempt: it did all that it could (and its exit code); it was told to stop and left what is needed to
go on; a run failed in it, and another attempt has to do the other runs."""
CANCELLED = "cancelled"
"""Marker of a submission: it was cancelled, and nothing of it is queued again."""


@dataclass(frozen=True)
class Task:
    """What one group of ranks carries out: a stage, and of training some runs.

    Attributes
    ----------
    name
        As `train-0003`.
    stage
        `convert`, `train` or `aggregate`.
    ranks, threads
        Processes, and TensorFlow's threads in each.
    runs
        Names of the runs, trained one after the other in the same processes.
    """

    name: str
    stage: str
    ranks: int = 1
    threads: int = 1
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SlurmJob:
    """A job of Slurm, of one task or an array of them: task `first + i` is its element i."""

    id: str
    stage: str
    first: int
    count: int
    array: bool

    def task_of(self, element: str) -> str:
        """Name of the task that the job `12`, or the element `12_3` of an array, carries out."""
        return task_name(self.stage, self.first + (int(element.split("_")[1]) if self.array else 0))

    def element_of(self, number: int) -> str:
        """Slurm's name for the task of this number."""
        return f"{self.id}_{number - self.first}" if self.array else self.id


@dataclass(frozen=True)
class Submission:
    """One submission of a study."""

    folder: Path
    executor: Executor
    jobs: tuple[SlurmJob, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """All tasks by name."""
        return {
            name: Task(name, told["stage"], told["ranks"], told["threads"], tuple(told["runs"]))
            for name, told in read_json(self.folder / TASKS).items()
        }

    @property
    def number(self) -> str:
        """Its name in the study, as `0001`."""
        return self.folder.name

    def task_folder(self, task: str) -> Path:
        """Folder of a task."""
        return self.folder / task

    def elements(self) -> dict[str, str]:
        """Slurm's name for each task, by the task's name."""
        return {
            task_name(job.stage, number): job.element_of(number)
            for job in self.jobs
            for number in range(job.first, job.first + job.count)
        }

    def with_job(self, job: SlurmJob) -> Submission:
        """Return the submission with one more job of Slurm, recorded on disk."""
        grown = Submission(self.folder, self.executor, (*self.jobs, job), self.about)
        grown.write()
        return grown

    def with_end(self) -> Submission:
        """Return the submission with the time of its end, recorded on disk."""
        ended = Submission(self.folder, self.executor, self.jobs, self.about | {"ended": time.time()})
        ended.write()
        return ended

    def write(self) -> None:
        """Record the submission, but for its tasks, which don't change."""
        jobs = [asdict(job) for job in self.jobs]
        write_json(self.folder / RECORD, {"executor": self.executor, "jobs": jobs, **self.about})


def pack(runs: Sequence[str], ranks: int, threads: int, parallel: int, runs_per_job: int) -> list[Task]:
    """Pack runs into training tasks, in their order: `runs_per_job` each; with 0, shared evenly by `parallel` tasks."""
    if not runs:
        return []
    size = runs_per_job or -(-len(runs) // min(parallel, len(runs)))
    groups = [tuple(runs[start : start + size]) for start in range(0, len(runs), size)]
    return [Task(task_name("train", number), "train", ranks, threads, group) for number, group in enumerate(groups)]


def task_name(stage: str, number: int) -> str:
    """Name of a stage's task."""
    return f"{stage}-{number:04d}"


def new_submission(study: StudyFolder, executor: Executor, tasks: Sequence[Task], **about: Any) -> Submission:
    """Make the folder of a new submission; two commands at once get two."""
    while True:
        folder = next_folder(study)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    told = {task.name: {key: value for key, value in asdict(task).items() if key != "name"} for task in tasks}
    write_text(folder / TASKS, json.dumps(told, separators=(",", ":")))  # ten thousand runs: no indentation
    facts = {"id": secrets.token_hex(6), "began": time.time(), "host": platform.node(), "pid": os.getpid()}
    facts["version"] = metadata.version("cellhpc")
    submission = Submission(folder, executor, (), facts | about)
    submission.write()
    return submission


def next_folder(study: StudyFolder) -> Path:
    """Folder that the next submission will have."""
    return study.jobs / f"{1 + max((int(path.name) for path in _folders(study)), default=0):04d}"


def _folders(study: StudyFolder) -> list[Path]:
    return [path for path in study.jobs.glob("[0-9]*") if path.name.isdigit()]


def submissions(study: StudyFolder) -> list[Submission]:
    """List a study's submissions, the newest first."""
    folders = sorted(_folders(study), key=lambda path: int(path.name), reverse=True)
    # Without a record, the command ended before it submitted anything.
    return [read_submission(folder) for folder in folders if (folder / RECORD).exists()]


def read_submission(folder: Path) -> Submission:
    """Read a submission's record."""
    record = read_json(folder / RECORD)
    jobs = tuple(SlurmJob(**job) for job in record.pop("jobs"))
    return Submission(folder, record.pop("executor"), jobs, record)


def history(study: StudyFolder) -> list[dict[str, Any]]:
    """Tell what was submitted for a study, the oldest first, as its results record it.

    Returns
    -------
    list of dict
        Of each submission its `number`, `executor`, `host`, cellhpc's `version`, the times `began` and `ended` (UTC, or
        None where it is not recorded), how many `tasks` of each stage, and the `jobs` of Slurm: id, stage and tasks.
    """
    told = []
    for submission in reversed(submissions(study)):
        about = submission.about
        told.append(
            {
                "number": submission.number,
                "executor": submission.executor,
                "host": about.get("host", ""),
                "version": about.get("version", ""),
                **{name: _utc(about.get(name)) for name in ("began", "ended")},
                "tasks": dict(Counter(task.stage for task in submission.tasks.values())),
                "jobs": [{"id": job.id, "stage": job.stage, "tasks": job.count} for job in submission.jobs],
            }
        )
    return told


def _utc(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def rank_of_slurm(submission: Path, task: str) -> Path:
    """Tell this process which rank of a task it is, as Slurm says it; returns the attempt's folder."""
    environ = os.environ
    attempt = submission / task / f"{environ['SLURM_JOB_ID']}-{environ.get('SLURM_RESTART_COUNT', '0')}"
    environ.update({RANK: environ["SLURM_PROCID"], RANKS: environ["SLURM_NTASKS"], MEETING: str(attempt)})
    return attempt


def mark_attempt_done(attempt: Path, code: int) -> None:
    """Leave the marker of a task that did all that it could, with the exit code that it ends with."""
    write_text(attempt / DONE, f"{code}\n")


@dataclass(frozen=True)
class End:
    """How one attempt of a task ended."""

    when: float
    host: str
    attempt: str
    code: int
    how: str


def ends(task_folder: Path) -> list[End]:
    """Read how often and how a task ended, oldest first."""
    try:
        lines = (task_folder / ENDS).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        words = line.split(maxsplit=4)
        if len(words) == 5:  # a line may be cut off where the disk is full
            found.append(End(float(words[0]), words[1], words[2], int(words[3]), words[4]))
    return found
