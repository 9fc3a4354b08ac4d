"""What one process of a task does: one rank of a conversion, of a training, of the scores.

Every rank is started by itself: here as ``python -m cellhpc.work STUDY SUBMISSION TASK ATTEMPT``, by Slurm through
submitit, which calls `carry_out`. SIGTERM and SIGUSR2 ask it to stop: it leaves what its successor needs and ends.

Rank 0 leaves a marker in the attempt's folder. Without one the task has crashed, and its executor starts it anew.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cellhpc.attempts import ABOUT, FAILED, finished
from cellhpc.backbone import start_tensorflow
from cellhpc.convert.running import ConversionStopped
from cellhpc.convert.workers import release, serve
from cellhpc.errors import UserError
from cellhpc.folds import Folds, check_folds, read_folds
from cellhpc.hosts import RANK, NotMet, place_here
from cellhpc.ledger import Taken, provenance, read_json, write_json
from cellhpc.memory import allowed
from cellhpc.pipeline import aggregate_study, convert_study, plan_study
from cellhpc.ranks import RankLost, Ranks, joined
from cellhpc.search import Trainers, train_chosen
from cellhpc.settings import Job
from cellhpc.study import StudyFolder
from cellhpc.submission import AGAIN, CHECKPOINTED, Submission, Task, mark_attempt_done, rank_of_slurm, read_submission
from cellhpc.sweep import Run, newest_attempt, plan_runs
from cellhpc.tiles import Store
from cellhpc.train import Interrupted, RunFailed, Superseded, Trainer, Watch, load_data, train_run

IDLE_STOPS = 3
"""A conversion that was told to stop so often before it finished anything will never get on: it fails."""
IDLE = "idle"
"""Marker of an attempt that was told to stop before it finished anything."""
TAKEN_SECONDS = 600.0
"""How long a conversion waits for one that was cut off and still holds the store."""


def carry_out(study: str, submission: str, task: str) -> None:
    """Be one rank of a task that Slurm started; all it needs to know is in the study's folder and the environment."""
    attempt = rank_of_slurm(Path(submission), task)
    code = be_rank(StudyFolder(Path(study)), Path(submission), task, attempt)
    sys.stdout.flush()
    if code:
        sys.exit(code)


def be_rank(study: StudyFolder, submission_folder: Path, name: str, attempt: Path) -> int:
    """Do this rank's part of a task; returns the exit code."""
    provenance()  # before the first run: the checkout may change while this process works
    rank = int(os.environ[RANK])
    watch = _watched()
    submission = read_submission(submission_folder)
    task = submission.tasks[name]
    try:
        _check_version(submission)
        failed = STAGES[task.stage](study, submission, task, attempt, watch)
    except Interrupted as stopped:
        if rank == 0:
            print(f"cellhpc: {stopped}", flush=True)
            (attempt / CHECKPOINTED).touch()
        return 0
    except Superseded as fault:
        print(f"cellhpc: {fault}", flush=True)
        failed = []
    except (RankLost, NotMet, Taken) as fault:
        # Horovod can't be used again, not even to leave it; the marker is missing, and all start anew.
        print(f"cellhpc: {fault}", flush=True)
        os._exit(1)
    except Exception as fault:
        said = str(fault) if isinstance(fault, UserError) else traceback.format_exc()
        print(f"cellhpc: {said}", flush=True)
        with contextlib.suppress(OSError):  # a full disk; the reason was said above
            _record(submission.task_folder(name) / FAILED, fault, attempt)
            if rank == 0:  # the others are started anew: they may see a file late
                mark_attempt_done(attempt, 1)
        return 1
    if rank == 0:
        mark_attempt_done(attempt, int(bool(failed)))
    return 0


def _watched() -> Watch:
    """Let signals ask for a stop; a terminal's Ctrl-C is the business of the command that started the ranks."""
    watch = Watch()

    def ask(number: int, _: Any) -> None:
        print(f"cellhpc: {signal.Signals(number).name}: stopping at the next step", flush=True)
        watch.stop_asked = True

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return watch


def _check_version(submission: Submission) -> None:
    here, there = metadata.version("cellhpc"), submission.about["version"]
    if here != there:
        raise UserError(
            f"cellhpc is {here} on {platform.node()}, but {there} submitted this. Give both the same: build the "
            "container anew, or name the same Python in slurm.python of the site file."
        )


def _record(report: Path, fault: BaseException, attempt: Path) -> None:
    """Leave the reason of a failure: one sentence, where it was, and of a bug its last lines."""
    reason = str(fault) if isinstance(fault, UserError) else f"{type(fault).__name__}: {fault}"
    lines = [] if isinstance(fault, UserError) else traceback.format_exc().splitlines()[-12:]
    about = {"host": platform.node(), "rank": int(os.environ[RANK]), "when": time.time()}
    task = attempt.parent
    write_json(
        report,
        {"reason": reason, "traceback": lines, "submission": task.parent.name, "task": task.name, **about},
    )


def _convert(study: StudyFolder, submission: Submission, task: Task, attempt: Path, watch: Watch) -> list[str]:
    """Convert; ranks other than the first lend their cores."""
    if int(os.environ[RANK]):
        try:
            serve(attempt)
        except NotMet as fault:  # rank 0 may do all of it alone
            print(f"cellhpc: {fault}", flush=True)
        return []
    give_up = time.monotonic() + TAKEN_SECONDS
    try:
        while True:
            try:
                convert_study(plan_study(study.read_job()), lambda: watch.stop_asked)
            except Taken:
                if watch.stop_asked or time.monotonic() > give_up:
                    raise
                time.sleep(5)
            else:
                return []
    except ConversionStopped as stopped:
        _require_progress(attempt, stopped)
        raise Interrupted(str(stopped)) from None
    finally:
        release()  # the other ranks wait, also where nothing was to be converted


def _require_progress(attempt: Path, stopped: ConversionStopped) -> None:
    """Count stops before anything was finished; too many of them are a failure, not an endless queue."""
    if stopped.done:
        return
    (attempt / IDLE).touch()
    attempts = sorted(
        (path for path in attempt.parent.iterdir() if path.is_dir()), key=lambda path: _restart(path.name)
    )
    last = attempts[-IDLE_STOPS:]
    if len(last) == IDLE_STOPS and all((one / IDLE).exists() for one in last):
        raise UserError(
            f"The conversion was told to stop {IDLE_STOPS} times before it finished a single shard: give the stage "
            "more time (convert.time of the site file)."
        )


def _aggregate(study: StudyFolder, submission: Submission, task: Task, attempt: Path, watch: Watch) -> list[str]:
    plan = plan_study(study.read_job())
    print("\n".join(aggregate_study(plan)["headline"]), flush=True)
    return []


def _train(study: StudyFolder, submission: Submission, task: Task, attempt: Path, watch: Watch) -> list[str]:
    """Train the runs of a task, one after the other; returns the names of those that failed."""
    start_tensorflow(task.threads, place_here())
    job = study.read_job()
    watch.checkpoint_seconds = job.sweep.checkpoint_minutes * 60
    watch.keep_weights = job.sweep.keep_weights
    watch.attributions = job.sweep.attributions
    watch.tensorboard = job.sweep.tensorboard
    watch.combine = job.aggregate.combine
    folds = read_folds(study.folds)
    store = Store.open(study.store(job), read_json(study.plates))
    check_folds(folds, store.tiles)
    planned = {run.id: run for run in plan_runs(job, folds, store.content_digest, task.ranks)}
    runs = [planned[name] for name in task.runs if name in planned]  # a sweep may have been cut since
    about = {"host": platform.node(), "pid": os.getpid(), "submission": submission.number, "task": task.name}
    about |= {"attempt": attempt.name, "job": _slurm_job(), "started": psutil.Process().create_time()}
    here = submission.executor == "here"  # the tasks of a submission share this host
    limit = allowed(job.sweep.memory_gb, jobs=min(job.sweep.parallel_jobs, len(submission.tasks)) if here else 1)
    with joined() as ranks:
        group = _TrainingGroup(study, job, folds, ranks, watch, attempt, about)
        for tile_px, of_size in groupby(group.to_do(runs), key=lambda run: run.tile_px):
            data = load_data(
                store,
                folds,
                tile_px,
                ranks,
                window_tiles=job.train.window_tiles,
                stage=job.sweep.stage,
                limit=limit,
            )
            for network, own in groupby(of_size, key=lambda run: run.network):
                group.train(Trainers(functools.partial(Trainer, network, data, ranks=ranks)), own)
            del data  # before those of another size are read
            gc.collect()  # a trainer and its graph refer to each other
        if group.failed and ranks.rank == 0:
            print(f"cellhpc: {len(group.failed)} run(s) failed: {', '.join(group.failed)}", flush=True)
        return group.failed


class _TrainingGroup:
    """The ranks of a training task, and what became of its runs."""

    def __init__(
        self,
        study: StudyFolder,
        job: Job,
        folds: Folds,
        ranks: Ranks,
        watch: Watch,
        attempt: Path,
        about: dict[str, Any],
    ) -> None:
        self.study, self.folds, self.ranks, self.watch, self.attempt = study, folds, ranks, watch, attempt
        self.settings, self.candidates = job.train, job.candidates
        self.about = about
        self.failed: list[str] = []

    def to_do(self, runs: list[Run]) -> list[Run]:
        """Leave out runs that are done, and those that failed in this task before it was started anew.

        Rank 0 decides: a shared file system may show files to some ranks later.
        """
        mine = [bool(finished(self.study.runs / run.id, run.digest)) or self._failed_before(run) for run in runs]
        skip = self.ranks.gather(np.array([mine], np.int32).reshape(1, -1))[0]
        return [run for run, done in zip(runs, skip, strict=True) if not done]

    def train(self, trainers: Trainers, runs: Iterator[Run]) -> None:
        """Train runs with one network; a run that fails leaves its reason, and the next one is trained."""
        for run in runs:
            try:
                self._train(trainers, run)
                said = "done"
            except RunFailed as fault:
                said = str(fault)
                self._fail(run, fault)
            except (Interrupted, RankLost, Superseded):
                raise
            except Exception as fault:
                said = str(fault) if isinstance(fault, UserError) else traceback.format_exc()
                self._fail(run, fault, everywhere=True)
                if self.ranks.size > 1:
                    print(f"{run.id}: {said}", flush=True)
                    (self.attempt / AGAIN).touch()
                    os._exit(1)  # the other ranks wait for this one; all start anew with the next run
                trainers.clear()
            if self.ranks.rank == 0:
                print(f"{run.id}: {said}", flush=True)
            self.about.pop("started", None)  # it is the first run that tells how long the process took before it

    def _train(self, trainers: Trainers, run: Run) -> None:
        where = self.study.runs
        if self.candidates:
            train_chosen(trainers, self.candidates, run, self.folds, where, self.ranks, self.watch, self.about)
        else:
            train_run(trainers.of(self.settings), run, self.folds, where, self.watch, self.about)

    def _fail(self, run: Run, fault: Exception, everywhere: bool = False) -> None:
        self.failed.append(run.id)
        unit = self.study.runs / run.id
        if (everywhere or self.ranks.rank == 0) and not self._superseded(unit):
            _record(unit / FAILED, fault, self.attempt)

    def _superseded(self, unit: Path) -> bool:
        """Tell whether a later attempt of this task, or a later submission, has begun with the run."""
        folder = newest_attempt(unit)
        try:
            about = read_json(folder / ABOUT) if folder else {}
        except FileNotFoundError:
            return True
        theirs = (about.get("submission", ""), _restart(about.get("attempt", "")))
        return theirs > (self.about["submission"], _restart(self.attempt.name))

    def _failed_before(self, run: Run) -> bool:
        try:
            known = read_json(self.study.runs / run.id / FAILED)
        except FileNotFoundError:
            return False
        return (known["submission"], known["task"]) == (self.about["submission"], self.about["task"])


def _restart(attempt: str) -> int:
    """Take the number out of the name of a task's attempt: 2 of `17-2`."""
    number = attempt.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _slurm_job() -> str | None:
    """Slurm's name of this job or element, as `12_3`."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


STAGES: dict[str, Callable[[StudyFolder, Submission, Task, Path, Watch], list[str]]] = {
    "convert": _convert,
    "train": _train,
    "aggregate": _aggregate,
}


def main() -> None:
    """Entry point of ``python -m cellhpc.work STUDY SUBMISSION TASK ATTEMPT``."""
    study, submission, task, attempt = sys.argv[1:]
    sys.exit(be_rank(StudyFolder(Path(study)), Path(submission), task, Path(attempt)))


if __name__ == "__main__":
    main()
