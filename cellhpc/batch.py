"""Tasks to jobs of Slurm: the text that sbatch gets, and its submission by submitit.

How a task ends is written down and acted on by its batch script, which runs on the node itself (a container has no
scontrol): `done` (it did all that it could), `checkpointed` (it was told to stop; it is queued again), `crashed` (it is
queued again, at most `restarts` times), `cancelled`, or `setup` (a line of the site file failed).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from cellhpc import slurm
from cellhpc.errors import UsageError, UserError
from cellhpc.settings import Job
from cellhpc.site import Site, SlurmSettings, Stage, TrainStage
from cellhpc.study import StudyFolder
from cellhpc.submission import LOGS, SlurmJob, Submission, Task

UMASKS = {"private": "077", "group": "027"}

AT_END = (Path(__file__).parent / "at_end.sh").read_text()
"""What a batch script does when its task ends."""
_ON_EACH_NODE = "timeout 20 srun --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --overlap"


@dataclass(frozen=True)
class Batch:
    """One call of sbatch: a task, or an array of tasks of one stage.

    Attributes
    ----------
    stage, tasks
        The stage, and its tasks in the order of the array.
    first
        Number of the first task in its stage.
    parameters
        What submitit is told: sbatch's options, the lines before the work, srun's options.
    python
        The shell's words that start Python: in a container, those that start it.
    after
        What it waits for: ``afterok:convert``, with stages in the place of ids.
    """

    stage: str
    tasks: tuple[Task, ...]
    first: int
    parameters: dict[str, Any]
    python: str
    after: tuple[str, ...] = ()

    def text(self, folder: Path, dependency: str | None) -> str:
        """Text of the batch script, for a submission in `folder`."""
        executor = self.executor(folder, dependency)
        if len(self.tasks) > 1:
            executor.parameters["map_count"] = len(self.tasks)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self, study: StudyFolder, submission: Submission, dependency: str | None) -> SlurmJob:
        """Hand it to Slurm."""
        from cellhpc import work  # with all that a task needs: half a second that a plan can do without

        executor = self.executor(submission.folder, dependency)
        # A job that submits (a notebook on a node) must not hand its own SLURM_* on.
        arguments = [(str(study.path), str(submission.folder), task.name) for task in self.tasks]
        try:
            with _outside_of_a_job():
                jobs = executor.map_array(work.carry_out, *zip(*arguments, strict=True))
        except submitit.core.utils.FailedJobError as fault:
            said = [line for line in str(fault).splitlines() if line.strip()]
            raise UserError(
                f"Slurm refused the job {self.parameters['job_name']}: {said[-1] if said else 'it did not say why'}\n"
                "Change the site file, or look at the whole text with --dry-run."
            ) from None
        array = len(self.tasks) > 1
        return SlurmJob(jobs[0].job_id.split("_")[0], self.stage, self.first, len(self.tasks), array)

    def test(self, folder: Path) -> str:
        """Ask Slurm whether it would take the job, and when it could start; nothing is queued."""
        return slurm.test(self.text(folder, dependency=None))

    def executor(self, folder: Path, dependency: str | None) -> submitit.SlurmExecutor:
        """Return submitit's executor, told everything about this batch."""
        executor = _Executor(folder / LOGS, python=self.python)
        waits = {"dependency": dependency} if dependency else {}
        executor.update_parameters(**self.parameters, **waits)
        return executor


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide what Slurm told the job that we may run in: the new jobs would take it for theirs."""
    known = dict(os.environ)
    if "SLURM_JOB_ID" in known:
        for name in known:
            if name.startswith("SLURM_") and name != "SLURM_CONF":
                del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(known)


class _Executor(submitit.SlurmExecutor):
    """Submitit's, which can also write a batch script on a machine that has no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def plan_batches(
    study: StudyFolder,
    job: Job,
    site: Site,
    tasks: Sequence[Task],
    folder: Path,
    most: int,
    image: str | None,
    known_as: str = "",
) -> list[Batch]:
    """Divide tasks into calls of sbatch, in the order of the stages.

    Parameters
    ----------
    study, job, site
        Whose tasks, and where they run.
    tasks
        All tasks, numbered from 0 in each stage.
    folder
        The submission's.
    most
        Most elements of one array (Slurm's MaxArraySize).
    image
        Name and digest of the container's image.
    known_as
        Id of the submission, which its jobs carry in their comment.
    """
    batches = []
    present = [stage for stage in ("convert", "train", "aggregate") if any(task.stage == stage for task in tasks)]
    for stage in present:
        own = [task for task in tasks if task.stage == stage]
        python, after = _python(study, job, site, stage), _after(stage, present)
        starts = range(0, len(own), most)
        for number, first in enumerate(starts):
            group = tuple(own[first : first + most])
            parameters = _parameters(job, site, group, folder, first, image, known_as)
            if stage == "train":  # arrays that were split share the throttle
                parameters["array_parallelism"] = max(1, (site.train.throttle + number) // len(starts))
            batches.append(Batch(stage, group, first, parameters, python, after))
    return batches


def submit(
    study: StudyFolder, submission: Submission, batches: Sequence[Batch], running: dict[str, list[str]]
) -> Submission:
    """Submit batches one after the other; each is recorded at once.

    Parameters
    ----------
    study, submission, batches
        What is submitted.
    running
        Ids of earlier submissions' jobs that are still waited for, by stage.
    """
    ids = {stage: list(jobs) for stage, jobs in running.items()}
    for batch in batches:
        job = batch.submit(study, submission, _dependency(batch, ids))
        ids.setdefault(batch.stage, []).append(job.id)
        submission = submission.with_job(job)
    return submission


def _after(stage: str, present: Iterable[str]) -> tuple[str, ...]:
    """Name what a stage waits for: a conversion that went well; scores also for trainings, however they end."""
    waits = {"train": {"convert": "afterok"}, "aggregate": {"convert": "afterok", "train": "afterany"}}
    return tuple(f"{how}:{other}" for other, how in waits.get(stage, {}).items() if other in present)


def _dependency(batch: Batch, ids: dict[str, list[str]]) -> str | None:
    """Put ids in the place of stages."""
    waits = {wait.split(":")[0]: wait.split(":")[1] for wait in _after(batch.stage, ids)}
    return ",".join(":".join([how, *ids[stage]]) for how, stage in waits.items()) or None


def _parameters(
    job: Job,
    site: Site,
    tasks: Sequence[Task],
    folder: Path,
    first: int,
    image: str | None,
    known_as: str,
) -> dict[str, Any]:
    """Tell submitit everything about a batch."""
    stage_name = tasks[0].stage
    stage = site.stage(stage_name)
    placed = site.placement(stage_name)
    ranks = tasks[0].ranks
    parameters: dict[str, Any] = {
        "job_name": f"{job.study.name}-{stage_name}",
        "comment": f"cellhpc:{job.study.name}:{folder.name}:{known_as}",
        "wckey": None,
        "time": stage.time,
        "nodes": stage.nodes,
        "ntasks_per_node": ranks // stage.nodes,
        "cpus_per_task": stage.cpus_per_task,
        "mem": f"{round(stage.memory_gb * 1024)}M",
        **placed.model_dump(include={"account", "partition", "qos", "constraint", "exclude"}),
        "gres": stage.gres,
        "gpus_per_task": stage.gpus_per_task or None,
        "signal_delay_s": stage.signal_seconds if isinstance(stage, TrainStage) else 60,
        "stderr_to_stdout": True,
        "setup": _setup(site, stage, stage_name, folder, first, image),
        "srun_args": [f"--kill-on-bad-exit={int(stage_name == 'train')}", f"--cpus-per-task={stage.cpus_per_task}"],
    }
    others: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    if placed.reservation:
        others["reservation"] = placed.reservation
    # What is false is left out: so a stage takes back what [slurm] says.
    others |= {key.replace("_", "-"): value for key, value in placed.options.items() if value is not False}
    if site.slurm.mail_user:
        parameters |= {"mail_user": site.slurm.mail_user, "mail_type": site.slurm.mail_type}
    given = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    return {**given, "additional_parameters": others}


def _setup(site: Site, stage: Stage, name: str, folder: Path, first: int, image: str | None) -> list[str]:
    """Lines of the batch script before the work."""
    slurm_site: SlurmSettings = site.slurm
    lines = [f"umask {UMASKS[slurm_site.share]}"]
    quoted = shlex.quote(str(folder))
    lines += [f"submission={quoted} stage={name} first={first} restarts={stage.restarts}", *AT_END.splitlines()]
    if slurm_site.modules:
        lines += ["module purge || exit 1", f"module load {shlex.join(slurm_site.modules)} || exit 1"]
    lines += slurm_site.setup
    if site.scratch.folder:
        lines += [
            f'export TMPDIR="{site.scratch.folder}/cellhpc-$attempt"',
            f'each="{_ON_EACH_NODE}"',
            '[ "$SLURM_JOB_NUM_NODES" -gt 1 ] || each=',
            '$each mkdir -p -m 700 "$TMPDIR" || exit 1',
            'remove_scratch() { $each rm -rf "$TMPDIR" || rm -rf "$TMPDIR"; }',
        ]
    if image and site.container:
        lines += [f"export CELLHPC_IMAGE={shlex.quote(image)}", *_same_image(site.container.image)]
    return [*lines, "how=crashed"]


def _python(study: StudyFolder, job: Job, site: Site, stage: str) -> str:
    """Words of the shell that start Python on a node."""
    if site.container is None:
        return shlex.quote(site.slurm.python or sys.executable)
    container, resources = site.container, site.stage(stage)
    words = [container.runtime, "exec"]
    for bind in [*_own_folders(study, job), *container.binds]:
        words += ["--bind", bind]
    if resources.gpus_per_task or "gpu" in (resources.gres or ""):
        words.append("--nv")
    text = shlex.join([*words, *container.options, str(container.image), container.python])
    if site.scratch.folder:
        text = text.replace(" exec ", ' exec --bind "$TMPDIR" ', 1)
    return text


def _own_folders(study: StudyFolder, job: Job) -> list[str]:
    """Folders that a study's jobs read and write: behind links too, and none that lies within another."""
    paths = [study.path, study.store(job), job.screen.path, job.screen.tables_folder]
    paths += [job.convert.archive] if job.convert.archive else []
    paths += [Path(weights).parent for weights in job.sweep.weights if Path(weights).is_absolute()]
    found = sorted({path for given in paths for path in (given, given.resolve())})
    return [str(path) for path in found if not any(other in path.parents for other in found)]


def _same_image(image: Path) -> list[str]:
    """Lines that end a job whose image is no longer the one that was submitted: its digest would name another."""
    path, state = shlex.quote(str(image)), image.stat() if image.is_file() else None
    if state is None:
        return []
    return [
        f'[ "$(stat -L -c "%s %Y" {path})" = "{state.st_size} {int(state.st_mtime)}" ] || '
        '{ echo "cellhpc: the image was changed after this was submitted; type: cellhpc resume STUDY"; exit 1; }'
    ]


def image_digest(site: Site) -> str | None:
    """Name and SHA-256 of the container's image, as ``name.sif sha256:...``; a sandbox folder has none.

    Raises
    ------
    UsageError
        There is no such image.
    """
    if site.container is None:
        return None
    image = site.container.image
    if image.is_dir():
        return f"{image.name} (a folder)"
    if not image.is_file():
        raise UsageError(f"container.image {image}: no such file. Build one: make container; see containers/README.md.")
    with image.open("rb") as file:
        return f"{image.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
