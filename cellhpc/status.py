"""What a study is doing: its stages and its runs, from what they left in the study's folder and from Slurm's queue.

Everything is told without accounting. What could not be asked stands in the notes.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cellhpc import slurm
from cellhpc.attempts import FAILED, finished
from cellhpc.errors import UsageError
from cellhpc.folds import read_folds
from cellhpc.ledger import done_digest, read_json
from cellhpc.record import content_digest
from cellhpc.settings import Job
from cellhpc.slurm import JobState, NotAnswered
from cellhpc.study import StudyFolder
from cellhpc.submission import LOGS, Submission, ends, submissions
from cellhpc.sweep import newest_attempt, plan_runs

STATES = ("done", "running", "waiting", "unknown", "failed", "stopped", "stale", "missing")
"""Of a run: finished; being trained; queued, or later in a task that runs; submitted, and Slurm does not answer what
became of it; ended with a reason; stopped with a checkpoint by `cancel` or Ctrl-C; finished with other settings than
the job file names now; never begun."""
AT_WORK = ("running", "waiting", "unknown")
FINISHED = "done"
FINAL = ("done", "cancelled", "setup")
"""How a task ended that is not queued again."""
ERROR_LINE = re.compile(r"error|killed|cancelled|oom|^cellhpc: |fault|abort", re.IGNORECASE)
EPILOGUE = re.compile(
    r"^srun: (error: .*: task|.*terminating|Terminating|got SIGCONT|Job step aborted)|^slurmstepd.*: error: \*\*\* STEP"
)
"""That srun saw a task fail says less than what the task said itself."""
LOG_TAIL_BYTES = 65536


@dataclass(frozen=True)
class RunStatus:
    """A run: its state, where and how far it is, and why it ended if it did.

    `candidate` says which candidate of its search it is at, as `2 of 6`; `epoch` and `epochs` are of that one.
    """

    run: str
    state: str
    reason: str = ""
    task: str = ""
    job: str = ""
    node: str = ""
    seconds: float | None = None
    epoch: int | None = None
    epochs: int | None = None
    candidate: str = ""
    images_per_s: float | None = None
    waiting_for_data: float | None = None
    memory_mb: float | None = None


@dataclass(frozen=True)
class StageStatus:
    """A stage that is one task: conversion, or the scores."""

    stage: str
    state: str
    reason: str = ""
    job: str = ""
    node: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Status:
    """A study's state at one moment."""

    study: str
    folder: Path
    stages: tuple[StageStatus, ...]
    runs: tuple[RunStatus, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of runs in each state, those with none left out."""
        found = Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES if found[state]}

    @property
    def parts(self) -> tuple[StageStatus | RunStatus, ...]:
        """Stages and runs."""
        return (*self.stages, *self.runs)

    @property
    def complete(self) -> bool:
        """Whether every stage and every run is done."""
        return all(part.state == FINISHED for part in self.parts)

    @property
    def at_work(self) -> bool:
        """Whether anything of it waits or runs."""
        return any(part.state in AT_WORK for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-ready data."""
        return {
            "study": self.study,
            "folder": str(self.folder),
            "complete": self.complete,
            "counts": self.counts,
            "stages": [asdict(stage) for stage in self.stages],
            "runs": [asdict(run) for run in self.runs],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class LiveTask:
    """A task that waits or runs."""

    submission: Submission
    name: str
    job: JobState

    @property
    def stage(self) -> str:
        """Its stage."""
        return self.submission.tasks[self.name].stage

    @property
    def runs(self) -> tuple[str, ...]:
        """Its runs."""
        return self.submission.tasks[self.name].runs

    @property
    def waits(self) -> bool:
        """Whether it waits in the queue."""
        return self.job.state not in ("RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED")


@dataclass(frozen=True)
class Live:
    """All tasks of a study that wait or run, the newest submission's first; not `known` if Slurm did not answer."""

    tasks: tuple[LiveTask, ...] = ()
    known: bool = True

    def jobs(self, stage: str) -> list[str]:
        """Slurm's ids of a stage's live jobs, arrays as a whole."""
        return list(dict.fromkeys(task.job.id.split("_")[0] for task in self.tasks if task.stage == stage))

    def runs(self) -> set[str]:
        """Names of the runs that live tasks will do."""
        return {run for task in self.tasks for run in task.runs}


def open_study(path: Path) -> tuple[StudyFolder, Job]:
    """Open a study that was begun.

    Raises
    ------
    UsageError
        The folder holds none.
    """
    study = StudyFolder(path.expanduser().absolute())
    if not study.job.is_file():
        raise UsageError(f"{path}: no study of cellhpc is there (no job.json). Name a job file's study.folder.")
    return study, study.read_job()


def live_tasks(study: StudyFolder) -> Live:
    """List the tasks of a study that wait or run, on Slurm or here.

    Raises
    ------
    NotAnswered
        The study was submitted to Slurm, which does not answer now.
    """
    newest_here = next((told for told in submissions(study) if told.executor == "here"), None)
    found = []
    if newest_here is not None and "ended" not in newest_here.about and study.is_held():
        about = newest_here.about
        here = JobState("", "RUNNING", nodes=about["host"], seconds=time.time() - about["began"])
        found = [LiveTask(newest_here, name, here) for name in newest_here.tasks]
    return Live((*found, *submitted_tasks(study).tasks))


def submitted_tasks(study: StudyFolder) -> Live:
    """List the tasks of a study that wait or run on Slurm.

    Raises
    ------
    NotAnswered
        There are submissions, and Slurm does not answer now.
    """
    found = []
    told = [submission for submission in submissions(study) if submission.jobs]
    queue = slurm.queue() if told else {}
    arrays = {element.split("_")[0] for element in queue}
    for submission in told:
        if any(job.id in arrays for job in submission.jobs):
            elements = submission.elements().items()
            own = f":{submission.about['id']}"  # a cluster that was set up anew counts its jobs from 1 again
            found += [
                LiveTask(submission, name, queue[element])
                for name, element in elements
                if element in queue and queue[element].comment.endswith(own)
            ]
    return Live(tuple(found))


def look(study: StudyFolder, job: Job) -> Status:
    """Look at a study: every stage, every run."""
    notes: list[str] = []
    told = submissions(study)
    try:
        live = live_tasks(study)
    except NotAnswered as fault:
        live = Live(known=False)
        notes.append(f"Slurm's queue could not be asked ({fault}): what waits or runs is not known.")
    content = content_digest(study.store(job), read_json(study.plates)) if study.plates.exists() else ""
    runs = plan_runs(job, read_folds(study.folds), content) if study.folds.exists() else []
    done = {run.id for run in runs if finished(study.runs / run.id, run.digest)}
    unfinished = [run.id for run in runs if run.id not in done]
    why = _Reasons(study, told, live, unfinished, notes)
    found = []
    for run in runs:
        if run.id in done:
            found.append(RunStatus(run.id, FINISHED))
        else:
            found.append(_look_at_run(study, run.id, why, job.train.epochs))
    stages = (
        _look_at_stage("convert", content != "", live, why),
        _look_at_stage("aggregate", is_aggregated(study, len(runs)), live, why),
    )
    return Status(job.study.name, study.path, stages, tuple(found), tuple(dict.fromkeys(notes)))


@dataclass
class _Reasons:
    """Where each unfinished run's task is, and why a task that left the queue ended."""

    study: StudyFolder
    told: Sequence[Submission]
    live: Live
    unfinished: Sequence[str]
    notes: list[str]
    live_of: dict[str, LiveTask] = field(init=False)
    task_of: dict[str, tuple[Submission, str]] = field(init=False)
    _asked: dict[str, dict[str, JobState]] = field(default_factory=dict)
    _known: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.live_of = {run: task for task in reversed(self.live.tasks) for run in task.runs}
        self.task_of = {}
        wanted = set(self.unfinished)
        for submission in self.told:  # the newest first
            if not wanted:
                break
            for name, task in submission.tasks.items():
                for run in wanted.intersection(task.runs):
                    self.task_of[run] = (submission, name)
            wanted -= self.task_of.keys()

    def task_of_stage(self, stage: str) -> tuple[Submission, str] | None:
        for submission in self.told:
            for name, task in submission.tasks.items():
                if task.stage == stage:
                    return submission, name
        return None

    def of_task(self, submission: Submission, name: str) -> tuple[str, str]:
        """State (`failed` or `stopped`) and reason of a task that neither waits nor runs."""
        key = (submission.number, name)
        if key not in self._known:
            self._known[key] = self._find(submission, name)
        return self._known[key]

    def _find(self, submission: Submission, name: str) -> tuple[str, str]:
        folder = submission.task_folder(name)
        if (folder / FAILED).exists():
            return "failed", read_json(folder / FAILED)["reason"]
        ended = ends(folder)
        if not self.live.known and submission.executor == "slurm" and not (ended and ended[-1].how in FINAL):
            return "unknown", "Slurm does not answer"
        element = submission.elements().get(name, "")
        error = last_error(submission, name)
        if ended and ended[-1].how in ("cancelled", "checkpointed"):
            return "stopped", f"{ended[-1].how}; `cellhpc resume` goes on"
        if ended and ended[-1].how == "setup":
            return "failed", f"a line before the work failed with exit code {ended[-1].code}: {error}"
        if ended and ended[-1].how == "crashed":
            crashes = sum(end.how == "crashed" for end in ended)
            again = f" ({crashes} times)" if crashes > 1 else ""
            return "failed", f"{_code(ended[-1].code)} on {ended[-1].host}{again}: {error}"
        if ended and ended[-1].how == "done":
            return "failed", "its task ended before it"
        if submission.executor == "here":
            return "stopped", "the command that trained it was ended"
        state = self._ask(submission).get(element)
        if state is not None and state.comment and not state.comment.endswith(f":{submission.about['id']}"):
            state = None
        if state is not None and state.state.startswith("CANCELLED"):
            return "stopped", f"cancelled {f'({state.reason})' if state.reason not in ('', 'None') else ''}".strip()
        told = f"{state.state}{f' ({state.reason})' if state.reason not in ('', 'None') else ''}" if state else ""
        return "failed", ": ".join(part for part in (f"job {element}", told or "left the queue", error) if part)

    def _ask(self, submission: Submission) -> dict[str, JobState]:
        if submission.number not in self._asked:
            try:
                states, notes = slurm.remembered(job.id for job in submission.jobs)
            except NotAnswered as fault:
                states, notes = {}, [f"Slurm could not be asked how jobs ended ({fault})."]
            self._asked[submission.number] = states
            self.notes += notes
        return self._asked[submission.number]


def _look_at_run(study: StudyFolder, run: str, why: _Reasons, epochs: int) -> RunStatus:
    unit = study.runs / run
    attempt = newest_attempt(unit)
    about = _read(attempt / "attempt.json") if attempt else {}
    history = _read(attempt / "history.json").get("epochs", []) if attempt else []
    last = history[-1] if history else {}
    far: dict[str, Any] = {"epoch": len(history), "epochs": about.get("epochs", epochs), "node": about.get("host", "")}
    far["candidate"] = " of ".join(map(str, about.get("candidate", ())))
    far |= {name: last.get(name) for name in ("images_per_s", "waiting_for_data", "memory_mb")}
    task = why.live_of.get(run)
    failed = _read(unit / FAILED)
    if task and (failed.get("submission"), failed.get("task")) == (task.submission.number, task.name):
        return RunStatus(run, "failed", failed["reason"], task.name, task.job.id, **far)
    if task:
        begun = (about.get("submission"), about.get("task")) == (task.submission.number, task.name)
        state = "running" if begun and not task.waits else "waiting"
        reason = task.job.reason if task.waits else ""
        since = time.time() - about["began"] if state == "running" and "began" in about else None
        return RunStatus(run, state, reason, task.name, task.job.id, seconds=since, **far)
    if finished(unit):
        return RunStatus(run, "stale", "made with other settings, store, ranks or weights")
    if run not in why.task_of:
        return RunStatus(run, "missing")
    submission, name = why.task_of[run]
    job = submission.elements().get(name, "")
    if failed:
        return RunStatus(run, "failed", failed.get("reason", ""), name, job, **far)
    state, reason = why.of_task(submission, name)
    if attempt is None and state == "failed":
        return RunStatus(run, "missing", f"{name} ended before it: {reason}", name, job)
    return RunStatus(run, state, reason, name, job, **far)


def _look_at_stage(stage: str, done: bool, live: Live, why: _Reasons) -> StageStatus:
    for task in live.tasks:
        if task.stage == stage:
            state = "waiting" if task.waits else "running"
            return StageStatus(stage, state, task.job.reason, task.job.id, task.job.nodes, task.job.seconds)
    if done:
        return StageStatus(stage, FINISHED)
    known = why.task_of_stage(stage)
    if known is None:
        return StageStatus(stage, "missing")
    submission, name = known
    state, reason = why.of_task(submission, name)
    return StageStatus(stage, state, reason, submission.elements().get(name, ""))


def is_aggregated(study: StudyFolder, runs: int) -> bool:
    """Tell whether the scores hold all runs that are planned now."""
    scores = _read(study.results / "scores.json")
    whole = bool(scores.get("complete")) and scores["runs"]["expected"] == runs
    return whole and done_digest(study.results) is not None


def log_files(submission: Submission, task: str) -> list[Path]:
    """List the logs of a task's ranks, rank 0 first."""
    stem = submission.elements().get(task, task)
    found = (submission.folder / LOGS).glob(f"{stem}_*_log.out")
    return sorted(found, key=lambda path: int(path.name.removesuffix("_log.out").rsplit("_", 1)[1]))


def find_logs(study: StudyFolder, name: str) -> list[Path]:
    """List the logs of the newest task that a run, a task or a stage had.

    Raises
    ------
    UsageError
        There is none of that name.
    """
    for submission in submissions(study):
        for task in submission.tasks.values():
            if name in (task.name, *task.runs) or (name == task.stage and task.stage != "train"):
                if files := log_files(submission, task.name):
                    return files
                raise UsageError(f"{name}: {task.name} of submission {submission.number} has not said anything yet.")
    raise UsageError(
        f"{study.path}: no run, task or stage {name!r} was ever started. See their names with: cellhpc status "
        f"{study.path} --json"
    )


def last_error(submission: Submission, task: str) -> str:
    """Return the last line of a task's logs that tells of an error; the last line of all if none does."""
    lines = [line for path in log_files(submission, task) for line in tail(path)]
    lines = [line for line in lines if not EPILOGUE.search(line)] or lines
    errors = [line for line in lines if ERROR_LINE.search(line)]
    said = (errors or lines or ["it said nothing"])[-1].strip()
    return said if len(said) < 300 else said[:297] + "..."


def tail(path: Path) -> list[str]:
    """Read the last lines of a log, those that say something."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]


def _code(code: int) -> str:
    """Say what an exit code means."""
    number = code - 128 if code > 128 else 0
    known = {9: "killed (out of memory?)", 11: "crashed (segmentation fault)", 15: "terminated", 6: "aborted"}
    return known.get(number, f"ended with exit code {code}")


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        document: dict[str, Any] = read_json(path)
        return document
    return {}
