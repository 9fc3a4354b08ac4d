"""Is this cluster ready? One small job for each partition of a site file, and what the answers mean.

The jobs go the way of a study's: the same text for sbatch, the same lines of setup, the same Python or container.
Only what they ask for is small, so that they start soon. Nothing waits longer than it is told to, with or without
accounting.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit

from cellhpc import slurm
from cellhpc.batch import Batch, image_digest, plan_batches
from cellhpc.diagnosis import Check, Diagnosis, Probe, judge
from cellhpc.errors import UsageError
from cellhpc.examine import SCONTROL, TOKEN, carry_out, facts
from cellhpc.ledger import read_json, write_text
from cellhpc.remedies import refusal
from cellhpc.settings import Job, parse_job
from cellhpc.site import Site, Stage, TrainStage
from cellhpc.slurm import JobState, NotAnswered
from cellhpc.status import last_error
from cellhpc.study import StudyFolder
from cellhpc.submission import CHECKPOINTED, LOGS, SlurmJob, Task, ends, new_submission, task_name

STAGES = ("convert", "train", "aggregate")
TIME_MIN, SIGNAL_SECONDS, MOST_CPUS, MOST_MEMORY_GB, MOST_NODES = 10, 30, 2, 4.0, 2
"""What a small job asks for at most."""
LATE_SECONDS = 5.0
"""How long what a job left may take to be seen here; network file systems are late."""
LATE_AFTER_SUCCESS_SECONDS = 60.0

Say = Callable[[str], None]


def diagnose(site: Site, folder: Path, wait_s: float, say: Say = lambda _: None) -> Diagnosis:
    """Examine a cluster.

    Parameters
    ----------
    site
        The site file.
    folder
        Where the folder of the doctor's jobs is made; it is removed if nothing failed.
    wait_s
        How long the jobs are waited for; those that have not ended then are cancelled.
    say
        Is told what happens meanwhile.

    Returns
    -------
    Diagnosis
        What was found, line by line.

    Raises
    ------
    UsageError
        The folder can't be written, or the container's image is not there.
    """
    image = image_digest(site)
    try:
        checks = _cluster()
    except NotAnswered as fault:
        remedy = "Type this on a login node, where `sinfo` answers."
        return Diagnosis((Check("Slurm", str(fault).partition(". ")[0], "failed", remedy),))
    visit = _Visit(site, _work_folder(folder), image)
    try:
        checks += visit.tests()
        visit.submit()
        visit.wait(time.time() + wait_s, say)
    except BaseException:
        say(f"What the jobs said: {visit.submission.folder / LOGS}")
        raise
    finally:
        checks += visit.cancel()
    for probe in visit.probes:
        checks += judge(probe, visit.here, visit.token, site, wait_s)
    found = Diagnosis(tuple(checks))
    if found.healthy:
        shutil.rmtree(visit.study.path, ignore_errors=True)
        return found
    return Diagnosis(found.checks, visit.submission.folder / LOGS)


def _cluster() -> list[Check]:
    """Ask what holds for the whole cluster."""
    told = slurm.configuration()
    checks = [Check("Slurm", told.get("SLURM_VERSION", "unknown"))]
    try:
        slurm.ask("sacct", "-X", "-n", "-j", "1")
        checks.append(Check("accounting", told.get("AccountingStorageType", "").removeprefix("accounting_storage/")))
    except NotAnswered:
        known = told.get("MinJobAge", "minutes").replace(" sec", " s")
        found = (
            f"none: status and resume work without it; how jobs ended is known for {known} and from their own records"
        )
        checks.append(Check("accounting", found))
    most = int(told.get("MaxArraySize", "1001"))
    if most > 1:
        checks.append(Check("MaxArraySize", f"{most:,}; larger arrays are split"))
    else:
        checks.append(Check("MaxArraySize", f"{most}", "failed", "Ask the administrators to allow arrays."))
    by_default = "yes" if told.get("JobRequeue") == "1" else "no; every job asks for it"
    checks.append(Check("requeue by default", by_default))
    return checks


def _work_folder(parent: Path) -> Path:
    """Make a new folder that only its owner can open."""
    try:
        return Path(tempfile.mkdtemp(prefix="cellhpc-doctor-", dir=parent.expanduser().absolute()))
    except OSError as fault:
        raise UsageError(
            f"{parent} can't be written: {fault.strerror}. Name a folder that all nodes share: --folder DIR"
        ) from None


class _Visit:
    """The doctor's jobs on one cluster."""

    def __init__(self, site: Site, folder: Path, image: str | None) -> None:
        self.site, self.image, self.here = site, image, facts()
        self.study = StudyFolder(folder)
        self.job = _job(folder)
        self.partitions = _partitions()
        self.probes = plan_probes(site, next(iter(self.partitions), ""))
        tasks = [Task(probe.task, probe.stage, probe.nodes) for probe in self.probes]
        self.submission = new_submission(self.study, "slurm", tasks)
        self.token = secrets.token_hex()
        write_text(self.submission.folder / TOKEN, self.token)

    def tests(self) -> list[Check]:
        """Ask Slurm whether it would take each stage's real job."""
        checks = []
        for stage in STAGES:
            name = f"{stage}'s jobs"
            try:
                said = self._batch(self.site, _task(self.site, stage)).test(self.submission.folder)
                checks.append(Check(name, f"would be taken, {_place(said)}"))
            except NotAnswered as fault:
                reason = _reason(str(fault))
                nodes = _nodes(self.site.placement(stage).partition) if "configuration" in reason else ""
                found = f"would be refused: {reason}" + (f" (nodes there: {nodes})" if nodes else "")
                checks.append(Check(name, found, "failed", refusal(reason, self.partitions)))
        return checks

    def submit(self) -> None:
        """Hand the small jobs to Slurm."""
        site = small(self.site)
        for probe, task in zip(self.probes, self.submission.tasks.values(), strict=True):
            executor = self._batch(site, task).executor(self.submission.folder, dependency=None)
            probe.began = probe.waited_until = time.time()
            try:
                job = executor.submit(carry_out, str(self.submission.folder), task.name, probe.trains)
            except submitit.core.utils.FailedJobError as fault:
                said = [line for line in str(fault).splitlines() if line.strip()]
                probe.refused, probe.over = _reason(said[-1]) if said else "Slurm did not say why", True
                probe.remedy = refusal(probe.refused, self.partitions)
                continue
            probe.job = job.job_id
            self.submission = self.submission.with_job(SlurmJob(probe.job, task.stage, 0, 1, False))

    def wait(self, deadline: float, say: Say) -> None:
        """Follow the jobs until all have ended, or the time is over."""
        began, said = time.time(), {probe.task: "" for probe in self.probes}
        while waited_for := [probe for probe in self.probes if not probe.over and not probe.hopeless]:
            with contextlib.suppress(NotAnswered):  # a controller that is down now may come back
                queue = slurm.queue()
                for probe in waited_for:
                    self._look(probe, queue.get(probe.job))
            for probe in waited_for:
                if (news := _news(probe)) != said[probe.task]:
                    said[probe.task] = news
                    say(f"{probe.where}: {news}")
            if time.time() >= deadline:
                break
            time.sleep(max(0.0, min(5.0, 0.5 + (time.time() - began) / 30, deadline - time.time())))
        for probe in self.probes:
            if probe.job:
                probe.error = last_error(self.submission, probe.task)
            if not probe.started:
                probe.nodes_now = _nodes(self.site.placement(probe.stage).partition)

    def cancel(self) -> list[Check]:
        """End what still waits or runs."""
        jobs = [probe.job for probe in self.probes if probe.job and not probe.over]
        try:
            slurm.cancel(jobs)
        except NotAnswered as fault:
            return [Check("cancel", str(fault), "failed", f"Type: scancel {' '.join(jobs)}")]
        return []

    def _look(self, probe: Probe, state: JobState | None) -> None:
        """See where a job is, and what it has left."""
        now = time.time()
        if state is not None:
            probe.state, probe.gone = state, 0.0
            if state.state in ("PENDING", "CONFIGURING"):
                probe.waited_until = now if not probe.answers else probe.waited_until
            else:
                probe.started = probe.started or now
            if state.nodes and not probe.nodelist:
                probe.nodelist = state.nodes
                probe.requeue = "Requeue=0" not in slurm.ask("scontrol", "show", "job", "-o", probe.job).split()
        self._read(probe, now)
        final = probe.end is not None and probe.end.how != CHECKPOINTED
        if state is not None:
            probe.over = final and state.state == "COMPLETING"
            return
        probe.gone = probe.gone or now
        if not final and (ended := slurm.remembered([probe.job])[0].get(probe.job)):
            probe.state, probe.nodelist = ended, probe.nodelist or ended.nodes
        went_well = probe.state is not None and probe.state.state == "COMPLETED" and not probe.answered
        probe.over = final or now - probe.gone > (LATE_AFTER_SUCCESS_SECONDS if went_well else LATE_SECONDS)

    def _read(self, probe: Probe, now: float) -> None:
        """Read what a job has left: of its starts, the last one that answered counts."""
        folder = self.submission.task_folder(probe.task)
        attempts = sorted(folder.glob(f"{probe.job}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        answers = [found for attempt in attempts if (found := sorted(attempt.glob("answer-*.json")))]
        for path in answers[-1] if answers else ():
            answer = read_json(path)
            if answer["rank"] not in probe.answers:
                early, late = probe.waited_until - answer["time"], answer["time"] - now
                probe.clock_s[answer["rank"]] = max(0.0, early, late)
            probe.answers[answer["rank"]] = answer
        if answers:
            probe.started = probe.started or now
            with contextlib.suppress(FileNotFoundError):
                probe.scontrol = (answers[-1][0].parent / SCONTROL).read_text().strip()
        probe.end = next(reversed(ends(folder)), None)

    def _batch(self, site: Site, task: Task) -> Batch:
        (batch,) = plan_batches(self.study, self.job, site, [task], self.submission.folder, 1, self.image)
        return batch


def plan_probes(site: Site, default: str = "") -> list[Probe]:
    """Plan one small job for all stages that run in the same place; `default` names the default partition."""
    places: dict[str, list[str]] = {}
    for stage in STAGES:
        places.setdefault(site.placement(stage).model_dump_json(), []).append(stage)
    probes = []
    for stages in places.values():
        trains = "train" in stages
        stage = "train" if trains else stages[0]
        asked = site.stage(stage)
        partition = site.placement(stage).partition or default or "(default)"
        gpus = bool(asked.gpus_per_task or _gpus(asked))
        nodes = small(site).stage(stage).nodes
        probes.append(Probe(task_name(stage, 0), stage, tuple(stages), partition, trains, gpus, nodes))
    return probes


def small(site: Site) -> Site:
    """Return the site with stages that ask for little, and the lines of setup that the doctor adds."""
    note = f'scontrol --version > "$task/$attempt/{SCONTROL}" 2>&1'
    stages: dict[str, Any] = {}
    for name in STAGES:
        stage = site.stage(name)
        little: dict[str, Any] = {
            "nodes": min(stage.nodes, MOST_NODES) if isinstance(stage, TrainStage) else 1,
            "cpus_per_task": min(stage.cpus_per_task, MOST_CPUS),
            "memory_gb": min(stage.memory_gb, MOST_MEMORY_GB),
            "time": min(stage.time, TIME_MIN),
            "gres": stage.gres and _GPUS.sub(r"\1:1", stage.gres),
            "gpus_per_task": min(stage.gpus_per_task, 1),
            "restarts": 0,
        }
        if isinstance(stage, TrainStage):
            little["signal_seconds"] = SIGNAL_SECONDS
        stages[name] = stage.model_copy(update=little)
    told = site.slurm.model_copy(update={"mail_user": None, "setup": (*site.slurm.setup, note)})
    return site.model_copy(update={**stages, "slurm": told})


_GPUS = re.compile(r"(\bgpu(?::[A-Za-z]\w*)?):(\d+)")


def _gpus(stage: Stage) -> int:
    """Count the GPUs of each node that a stage asks for by gres."""
    counts = [int(count) for _, count in _GPUS.findall(stage.gres or "")]
    return sum(counts) or int("gpu" in (stage.gres or ""))


def _task(site: Site, name: str) -> Task:
    """Plan a stage's real task; the ranks of a training are a job file's to say: here one for each GPU or node."""
    stage = site.stage(name)
    each = {"convert": site.convert.tasks_per_node, "train": max(1, _gpus(stage))}.get(name, 1)
    return Task(task_name(name, 0), name, stage.nodes * each, stage.cpus_per_task)


def _job(folder: Path) -> Job:
    """Make up a job file for what batches want to know of one."""
    return parse_job(
        {"study": {"name": "doctor", "folder": str(folder)}, "screen": {"layout": "bbbc021", "path": str(folder)}},
        "doctor",
    )


def _partitions() -> list[str]:
    """List the cluster's partitions, the default one first; empty if Slurm does not say."""
    with contextlib.suppress(NotAnswered):
        names = slurm.ask("sinfo", "-h", "-o", "%P").split()
        return [name.rstrip("*") for name in sorted(names, key=lambda name: not name.endswith("*"))]
    return []


def _nodes(partition: str | None) -> str:
    """Count the nodes of a partition by their states, as ``3 drained``; empty if Slurm does not say."""
    with contextlib.suppress(NotAnswered):
        words = ["-p", partition] if partition else []
        return ", ".join(dict.fromkeys(slurm.ask("sinfo", "-h", *words, "-o", "%D %T").splitlines()))
    return ""


def _news(probe: Probe) -> str:
    """Say what a job does, in a line for the waiting user."""
    state = probe.state
    if probe.over or state is None:
        return f"job {probe.job} has ended" if probe.over else f"job {probe.job} is submitted"
    if state.state == "PENDING":
        again = " again, for the test of requeue" if probe.answered else ""
        return f"job {probe.job} waits{again}" + (f" ({state.reason})" if state.reason else "")
    return f"job {probe.job} runs on {state.nodes}"


def _reason(said: str) -> str:
    """Leave out who says why a job is refused."""
    return re.sub(r"^(sbatch: |error: |allocation failure: |Batch job submission failed: )*", "", said.strip())


def _place(said: str) -> str:
    """Leave out the number of a job that will not be, and when it would start."""
    return re.sub(r"^Job .* processors ", "", said)
