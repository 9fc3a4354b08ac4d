"""Drive a study: run it here, submit it to Slurm, resume it, cancel it."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cellhpc import slurm
from cellhpc.attempts import finished, newest
from cellhpc.batch import UMASKS, Batch, image_digest, plan_batches, submit
from cellhpc.cost import Cost, Place
from cellhpc.errors import UsageError, UserError, listing
from cellhpc.launch import run_here
from cellhpc.ledger import read_json, write_json
from cellhpc.memory import allowed
from cellhpc.outlook import outlook, place_on
from cellhpc.pipeline import STAGES, StudyPlan, aggregate_study, check_networks, claim_study, convert_study, plan_study
from cellhpc.progress import progress
from cellhpc.settings import Job
from cellhpc.site import Site
from cellhpc.status import is_aggregated, live_tasks, open_study, submitted_tasks
from cellhpc.study import StudyFolder
from cellhpc.submission import (
    CANCELLED,
    Submission,
    Task,
    new_submission,
    next_folder,
    pack,
    read_submission,
    task_name,
)
from cellhpc.sweep import SEARCH

DEFAULT_ARRAY_SIZE = 1001
"""Slurm's own MaxArraySize, where it can't be asked."""


def run_study(job: Job, stages: Sequence[str] = STAGES) -> tuple[StudyPlan, dict[str, Any] | None]:
    """Do what is missing of a study's stages, on this machine.

    Parameters
    ----------
    job
        The settings.
    stages
        Which of `convert`, `train` and `aggregate`; a stage needs the ones before it to be done.

    Returns
    -------
    plan
        What was missing when the call began.
    scores
        The document of `results/scores.json`; None unless `aggregate` is among the stages.

    Raises
    ------
    UserError
        Something is wrong or failed; what was finished before is kept.
    """
    folder = StudyFolder(job.study.folder)
    with folder.locked():
        plan = plan_study(job)
        _require_store(plan, stages)
        _refuse_if_submitted(folder)
        claim_study(plan, stages)
        if "convert" in stages:
            plan = convert_study(plan)
        if "train" in stages and plan.missing:
            check_networks(plan)
            _train_here(plan)
        scores = aggregate_study(plan) if "aggregate" in stages else None
    return plan, scores


def _require_store(plan: StudyPlan, stages: Sequence[str]) -> None:
    """Refuse to go on without a store that none of the stages will make."""
    if "convert" not in stages and not plan.converted:
        raise UsageError(f"{plan.conversion.store} is not converted yet. Type: cellhpc convert JOB.toml")


def _refuse_if_submitted(folder: StudyFolder) -> None:
    """Leave a study alone whose jobs wait or run on Slurm."""
    if busy := submitted_tasks(folder).tasks:
        where = folder.path
        raise UsageError(
            f"{where}: {len(busy)} task(s) of this study wait or run on Slurm. See them with: cellhpc status {where}\n"
            f"End them with: cellhpc cancel {where}"
        )


def _train_here(plan: StudyPlan) -> None:
    """Train the missing runs and show how far they are: each rank 0 leaves the history of its run after every epoch."""
    sweep, candidates = plan.job.sweep, [candidate.settings.epochs for candidate in plan.job.candidates]
    epochs = sum(candidates) + max(candidates, default=plan.job.train.epochs)
    parallel, tasks = _tasks_here(plan)
    submission = new_submission(plan.folder, "here", tasks)
    running = {task.name: [plan.folder.runs / run for run in task.runs] for task in tasks}
    began = time.time()
    seen: dict[Path, int] = {}
    title = f"Training {len(plan.missing)} run(s) on {sweep.ranks} rank(s)"
    title += f", tiles in windows of {window:,}" if (window := plan.job.train.window_tiles) else ""
    with progress(title, len(plan.missing) * epochs, "epochs") as advance:

        def watch() -> None:
            for units in running.values():
                while units:
                    done, note = _epochs_done(units[0], began, epochs)
                    advance(done - seen.get(units[0], 0), note)
                    seen[units[0]] = done
                    if done < epochs and not (len(units) > 1 and _epochs_done(units[1], began, epochs)[0]):
                        break
                    units.pop(0)

        try:
            run_here(plan.folder, submission, parallel, watch)
        finally:
            submission.with_end()
            watch()


def _tasks_here(plan: StudyPlan) -> tuple[int, list[Task]]:
    """Pack the missing runs for this machine; the first number is how many tasks run at a time."""
    sweep, names = plan.job.sweep, [run.id for run in plan.missing]
    parallel = max(1, min(sweep.parallel_jobs, len(names)))
    threads = max(1, len(os.sched_getaffinity(0)) // (parallel * sweep.ranks))
    return parallel, pack(names, sweep.ranks, threads, parallel, sweep.runs_per_job)


def cost_here(plan: StudyPlan) -> Cost:
    """Estimate what the missing runs cost on this machine."""
    parallel, tasks = _tasks_here(plan)
    ranks = plan.job.sweep.ranks
    return outlook(
        plan, [(parallel, tasks)], Place(ranks, cores=ranks * max((task.threads for task in tasks), default=1))
    )


def _epochs_done(unit: Path, began: float, most: int) -> tuple[int, str]:
    """Count the epochs that a run and its search have behind them, and `most` when it is done: it may need fewer.

    What an earlier attempt left does not count until it is continued.
    """
    done, note = 0, ""
    for one in (*unit.glob(f"{SEARCH}/*"), unit):
        attempt = newest(one)
        if attempt is None:
            continue
        try:
            history = attempt / "history.json"
            if history.stat().st_mtime < began:
                continue
            epochs = read_json(history)["epochs"]
        except FileNotFoundError:  # before the first epoch, or the attempt was cleared away by its successor
            continue
        done = most if one == unit and finished(unit) else done + len(epochs)
        where = one.relative_to(unit.parent)
        note = f"{where}: loss {epochs[-1]['loss']:.3f}, {epochs[-1]['images_per_s']:.0f} images/s"
    return done, note


@dataclass(frozen=True)
class SubmissionPlan:
    """What would be submitted to Slurm, as data.

    Attributes
    ----------
    study
        The plan of the study.
    site
        Where the jobs run.
    tasks
        All tasks, numbered from 0 in each stage.
    folder
        The submission's, if no other is made before it.
    most, image
        Most elements of an array, and the container's image with its digest.
    running
        Ids of jobs that still wait or run and that the new ones wait for, by stage.
    superseded
        Ids of waiting jobs that the new ones replace.
    notes
        What could not be asked.
    """

    study: StudyPlan
    site: Site
    tasks: tuple[Task, ...]
    folder: Path
    most: int
    image: str | None
    running: dict[str, list[str]]
    superseded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def batches(self, folder: Path | None = None, known_as: str = "") -> list[Batch]:
        """List the calls of sbatch that carry out the tasks, for the submission in `folder` of this id."""
        study = self.study
        return plan_batches(
            study.folder, study.job, self.site, self.tasks, folder or self.folder, self.most, self.image, known_as
        )

    @property
    def trains(self) -> bool:
        """Whether something is to be trained."""
        return any(task.stage == "train" for task in self.tasks)

    @cached_property
    def cost(self) -> Cost:
        """What its trainings cost."""
        arrays = [
            (batch.parameters.get("array_parallelism", 1), batch.tasks)
            for batch in self.batches()
            if batch.stage == "train"
        ]
        return outlook(self.study, arrays, place_on(self.site, self.study.job.sweep.ranks), self.site.measured)

    def facts(self) -> dict[str, Any]:
        """Numbers of the plan, for `--dry-run`."""
        scripts = self.scripts()
        tasks, jobs = len(self.tasks), len(scripts)
        ranks = sum(task.ranks for task in self.tasks)
        return {
            **self.study.facts(),
            "slurm": {
                "jobs": jobs,
                "tasks": tasks,
                "processes": ranks,
                # submitit: script, pickles, log and result of each rank; ours: folder, marker and end of each task
                "files": 3 + jobs + 4 * tasks + 2 * ranks,
                "scripts": scripts,
            },
            **({"cost": self.cost.to_json()} if self.trains else {}),
            "notes": list(self.notes),
        }

    def scripts(self) -> list[str]:
        """Text of every batch script; what a job waits for stands there by stage, as ids are not known yet."""
        return [batch.text(self.folder, ",".join(batch.after) or None) for batch in self.batches()]

    def test(self) -> list[str]:
        """Ask Slurm of every job whether it would be taken, and when it could start.

        Raises
        ------
        NotAnswered
            Slurm refuses a job; the reason is Slurm's.
        """
        return [f"{batch.stage}, task {batch.first}: {batch.test(self.folder)}" for batch in self.batches()]

    def render(self) -> str:
        """Tell the plan: every batch script, then the numbers."""
        facts = self.facts()["slurm"]
        lines = []
        for batch, script in zip(self.batches(), facts["scripts"], strict=True):
            last = batch.first + len(batch.tasks) - 1
            lines += [f"---- {batch.stage}: task {batch.first}" + (f" to {last}" if last > batch.first else ""), script]
        lines += [
            f"Submit {facts['jobs']:,} job(s) of {facts['tasks']:,} task(s), {facts['processes']:,} processes in all",
            f"  write   about {facts['files']:,} files besides the runs' own",
        ]
        if self.trains:
            lines.append(self.cost.render())
        return "\n".join([*lines, *self.notes])


def plan_submission(job: Job, site: Site, stages: Sequence[str] = STAGES) -> SubmissionPlan:
    """Plan what is missing of a study as jobs of Slurm; nothing is written.

    Raises
    ------
    UserError
        The job, the screen or the site is wrong, or Slurm does not answer what the study's jobs are doing.
    """
    on_a_node = (site.train.memory_gb * 1e9, "train.memory_gb of the site file")
    study = plan_study(job, allowed(job.sweep.memory_gb, on_a_node))
    folder = study.folder
    _require_store(study, stages)
    ranks, nodes = job.sweep.ranks, site.train.nodes
    if ranks % nodes:
        raise UsageError(f"sweep.ranks = {ranks} can't be spread evenly over train.nodes = {nodes} of the site file.")
    live = submitted_tasks(folder)
    if ending := [task.name for task in live.tasks if task.job.state == "COMPLETING"]:
        raise UserError(f"{len(ending)} task(s) are just ending ({listing(ending)}). Type the same in a minute.")
    tasks: list[Task] = []
    if "convert" in stages and not study.converted and not live.jobs("convert"):
        size = site.convert.nodes * site.convert.tasks_per_node
        tasks.append(Task(task_name("convert", 0), "convert", size, site.convert.cpus_per_task))
    if "train" in stages:
        names = [run.id for run in study.missing if run.id not in live.runs()]
        tasks += pack(names, ranks, site.train.cpus_per_task, site.train.throttle, job.sweep.runs_per_job)
    if "aggregate" in stages and (tasks or (not live.tasks and not is_aggregated(folder, len(study.runs)))):
        tasks.append(Task(task_name("aggregate", 0), "aggregate", 1, site.aggregate.cpus_per_task))
    notes = []
    try:
        most = slurm.max_array_size()
    except slurm.NotAnswered as fault:
        most = DEFAULT_ARRAY_SIZE
        notes.append(f"Slurm could not be asked for MaxArraySize ({fault}); {most} is taken.")
    running = {stage: ids for stage in ("convert", "train") if (ids := live.jobs(stage))}
    superseded = tuple(live.jobs("aggregate")) if tasks else ()
    return SubmissionPlan(
        study, site, tuple(tasks), next_folder(folder), most, image_digest(site), running, superseded, tuple(notes)
    )


def submit_study(job: Job, site: Site, stages: Sequence[str] = STAGES) -> tuple[SubmissionPlan, Submission | None]:
    """Submit what is missing of a study and return at once; None when nothing is.

    Raises
    ------
    UserError
        Something is wrong, or Slurm refused a job: then those that it had taken are cancelled.
    """
    folder = StudyFolder(job.study.folder)
    with folder.locked():
        plan = plan_submission(job, site, stages)
        if not plan.tasks:
            return plan, None
        if plan.notes:
            raise UserError("\n".join(["Nothing was submitted. Type the same again where Slurm answers.", *plan.notes]))
        os.umask(int(UMASKS[site.slurm.share], 8))
        claim_study(plan.study, stages)
        folder.open_to(site.slurm.share)
        write_json(folder.site, site.model_dump(mode="json"))
        submission = new_submission(folder, "slurm", plan.tasks)
        slurm.cancel(plan.superseded)
        try:
            submission = submit(
                folder, submission, plan.batches(submission.folder, submission.about["id"]), plan.running
            )
        except UserError:
            slurm.cancel([job.id for job in read_submission(submission.folder).jobs])
            raise
    return plan, submission


def cancel_study(path: Path) -> list[str]:
    """End everything of a study that waits or runs; returns what was ended.

    Runs leave checkpoints where the time allows, and `cellhpc resume` goes on.
    """
    study, _ = open_study(path)
    live = live_tasks(study)
    submissions = {task.submission.folder: task.submission for task in live.tasks}.values()
    for submission in submissions:
        (submission.folder / CANCELLED).touch()  # their batch scripts don't queue them again
    jobs = [task.job.id for task in live.tasks if task.submission.executor == "slurm"]
    slurm.cancel(list(dict.fromkeys(job.split("_")[0] for job in jobs)))
    ended = [f"{task.name} (job {task.job.id})" for task in live.tasks if task.job.id]
    for submission in submissions:
        if submission.executor == "here":
            if submission.about["host"] != platform.node():
                raise UsageError(f"The command runs on {submission.about['host']}. Type the same there.")
            os.kill(submission.about["pid"], signal.SIGTERM)
            ended.append(f"the command with process id {submission.about['pid']}")
    return ended
