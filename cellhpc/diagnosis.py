"""What a doctor's findings mean: what was found, whether that is well, and what to change if it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cellhpc.remedies import why_waits, will_never_start
from cellhpc.site import Site
from cellhpc.slurm import JobState
from cellhpc.submission import End

State = Literal["ok", "warning", "failed"]
STATES: tuple[State, ...] = ("ok", "warning", "failed")
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}
MOST_CLOCK_SECONDS = 30.0
LEAST_SCRATCH_GB = 1.0
RESUME = "without it, a training that reaches its time limit goes on only by `cellhpc resume`"


@dataclass(frozen=True)
class Check:
    """A line of the doctor's table; `where` is the partition that it holds for, empty for the whole cluster."""

    check: str
    found: str
    state: State = "ok"
    remedy: str = ""
    where: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; `logs` is the folder of what the jobs said, if it was kept."""

    checks: tuple[Check, ...]
    logs: Path | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing failed."""
        return all(check.state != "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-ready data."""
        logs = None if self.logs is None else str(self.logs)
        return {"ready": self.healthy, "logs": logs, "checks": [asdict(check) for check in self.checks]}


@dataclass
class Probe:
    """One small job of the doctor, and what has become of it.

    Attributes
    ----------
    task, stage, stages, partition
        Name of its task, the stage that it looks like, all those that it stands for, and where they run.
    trains, gpus, nodes
        Whether a training is among these stages, whether it has GPUs, and the nodes of the small job, one rank on each.
    job, refused, remedy
        Slurm's id of it, or why Slurm refused it and what to change.
    state, nodelist, requeue, nodes_now
        What Slurm said last, the nodes of its first start, whether Slurm may queue it again, and if it did not start
        the states of the partition's nodes.
    began, waited_until, started, gone
        When it was submitted, last seen waiting, first seen running, and missed in the queue; seconds since the epoch.
    answers, clock_s, scontrol
        What each rank answered, by how many seconds at least its clock is off, and what the node's scontrol said.
    end, over, error
        How its last start ended, whether it has left the queue for good, and the last error in its logs.
    """

    task: str
    stage: str
    stages: tuple[str, ...]
    partition: str
    trains: bool
    gpus: bool
    nodes: int
    job: str = ""
    refused: str = ""
    remedy: str = ""
    state: JobState | None = None
    nodelist: str = ""
    requeue: bool = True
    nodes_now: str = ""
    began: float = 0.0
    waited_until: float = 0.0
    started: float = 0.0
    gone: float = 0.0
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    clock_s: dict[int, float] = field(default_factory=dict)
    scontrol: str = ""
    end: End | None = None
    over: bool = False
    error: str = ""

    @property
    def where(self) -> str:
        """The partition and the stages that run there."""
        return f"{self.partition} ({', '.join(self.stages)})"

    @property
    def answered(self) -> bool:
        """Whether every rank has told all that it found."""
        return len(self.answers) == self.nodes and all(answer["finished"] for answer in self.answers.values())

    @property
    def hopeless(self) -> bool:
        """Whether it waits for what will not come."""
        return self.state is not None and self.state.state == "PENDING" and will_never_start(self.state.reason)


def judge(probe: Probe, here: dict[str, Any], token: str, site: Site, waited_s: float) -> list[Check]:
    """Judge one small job: its way to the nodes, then what the nodes answered.

    Parameters
    ----------
    probe
        The job.
    here
        `examine.facts()` of the side that submitted it.
    token
        What the nodes were to read.
    site
        Where it ran.
    waited_s
        How long the doctor waited.
    """
    checks = [_start(probe, site, waited_s)]
    for step, look in (
        ("folder", lambda answer: _shared_folder(answer, here, token, site)),
        ("time", lambda answer: _clock(probe.clock_s.get(answer["rank"], 0.0))),
        ("scratch", _scratch),
        ("facts", lambda answer: _python(answer, here, site)),
        ("facts", lambda answer: _cellhpc(answer, here, site)),
        ("facts", lambda answer: _packages(answer, here)),
        ("facts", lambda answer: _container(site)),
        ("TensorFlow", lambda answer: _tensorflow(answer, probe, site)),
        ("Horovod", lambda answer: _horovod(answer, probe)),
        ("rendezvous", _rendezvous),
    ):
        if line := _merged(probe, step, look):
            checks.append(line)
    if probe.trains and probe.nodes == 1 and probe.answers:
        checks.append(Check("rendezvous", "not tried: train.nodes is 1"))
    if line := _requeue(probe):
        checks.append(line)
    return [Check(check.check, check.found, check.state, check.remedy, probe.where) for check in checks]


def _merged(probe: Probe, step: str, look: Callable[[dict[str, Any]], Check | None]) -> Check | None:
    """Judge a step on every node: the worst counts, and nodes that differ are named."""
    lines = [(answer["host"], look(answer)) for _, answer in sorted(probe.answers.items()) if step in answer]
    told = [(host, line) for host, line in lines if line is not None]
    if not told:
        return None
    worst = max((line for _, line in told), key=lambda line: STATES.index(line.state))
    if len({line.found for _, line in told}) == 1:
        return worst
    found = "; ".join(f"{host}: {line.found}" for host, line in told)
    return Check(worst.check, found, worst.state, worst.remedy)


def _start(probe: Probe, site: Site, waited_s: float) -> Check:
    """Judge whether the job came to a node, and to its end."""
    if probe.refused:
        return Check("job", f"refused: {probe.refused}", "failed", probe.remedy)
    hosts = [answer["host"] for _, answer in sorted(probe.answers.items())] or [probe.end.host if probe.end else ""]
    where = f"job {probe.job} on {', '.join(hosts) if any(hosts) else probe.nodelist or 'no node'}"
    if probe.answered:
        return Check("job", f"{where}, {max(0.0, probe.started - probe.began):.0f} s after it was submitted")
    doing = " and ".join(sorted({answer["doing"] for answer in probe.answers.values() if answer["doing"]}))
    if not probe.over:
        return _unfinished(probe, where, doing, waited_s)
    if probe.end is not None and probe.end.how == "setup":
        found = f"{where}: a line before the work ended with exit code {probe.end.code}: {probe.error}"
        return Check("job", found, "failed", "Correct slurm.modules, slurm.setup or scratch.folder.")
    if doing:
        return Check("job", f"{where} ended while it looked at: {doing}: {probe.error}", "failed", _after(doing, site))
    if probe.end is not None and probe.end.how == "crashed":
        found = f"{where}: Python did not begin (exit code {probe.end.code}): {probe.error}"
        other = "No module named 'cellhpc" in probe.error
        return Check("job", found, "failed", _same(site) if other else _python_remedy(site))
    state = probe.state or JobState(probe.job, "ended, Slurm has forgotten how")
    told = state.state.lower() + (f" ({state.reason})" if state.reason not in ("", "None") else "")
    if state.reason == "JobLaunchFailure" or state.exit_code == "0:53":
        remedy = "The nodes don't see the folder of its logs: name one that all nodes share: --folder DIR"
        return Check("job", f"{where}: {told}: it could not begin its log", "failed", remedy)
    remedy = (
        "Somebody cancelled it: ask again." if "cancel" in told else "Name a folder that all nodes share: --folder DIR"
    )
    return Check("job", f"{where} left no answer: {told}: {probe.error}", "failed", remedy)


def _unfinished(probe: Probe, where: str, doing: str, waited_s: float) -> Check:
    """Judge a job that did not start, or did not end, in the time."""
    longer = f"Wait longer: --wait {2 * waited_s:.0f}"
    if probe.state is not None and probe.state.state != "PENDING":
        at = f"; it looks at: {doing}" if doing else ""
        return Check("job", f"{where} has not answered within {waited_s:.0f} s{at}", "failed", longer)
    reason = probe.state.reason if probe.state else ""
    how = "will not start" if probe.hopeless else f"did not start within {waited_s:.0f} s"
    nodes = f" (nodes there: {probe.nodes_now})" if probe.nodes_now else ""
    found = f"job {probe.job} {how}: {reason or 'Slurm gave no reason'}{nodes}"
    return Check("job", found, "failed", why_waits(reason) if reason else longer)


def _after(doing: str, site: Site) -> str:
    """Say what to change when a process ended at a step."""
    if "TensorFlow" in doing or "Horovod" in doing:
        return "The nodes may lack memory (train.memory_gb), or their processors what TensorFlow was built for."
    return _RENDEZVOUS if "rendezvous" in doing else _python_remedy(site)


def _python_remedy(site: Site) -> str:
    if site.container is not None:
        return "Correct container.image, container.runtime (a path, or a module in slurm.modules) or container.python."
    return "Name a Python 3.11 that has cellhpc and that the nodes see, in slurm.python, or load it by slurm.modules."


def _same(site: Site) -> str:
    return "Build the container anew." if site.container else "Install the same cellhpc on both sides."


def _shared_folder(answer: dict[str, Any], here: dict[str, Any], token: str, site: Site) -> Check:
    seen, name = answer["folder"], "shared folder"
    if "error" in seen:
        return Check(name, seen["error"], "failed", "Name a folder that all nodes may write: --folder DIR")
    if seen["token"] != token:
        remedy = "Nodes have another folder of that name: name one of a shared file system: --folder DIR"
        return Check(name, "the node reads another text than was written", "failed", remedy)
    node, open_to = answer["facts"], 0o027 if site.slurm.share == "group" else 0o077
    if node["uid"] != here["uid"] or seen["owner"] != node["uid"]:
        there = f"{node['user']} ({node['uid']}) there, where files are {seen['owner']}'s"
        found = f"you are {here['user']} ({here['uid']}) here, {there}"
        return Check(name, found, "failed", "Ask the administrators: user ids must be the same on all hosts.")
    if seen["mode"] & open_to:
        remedy = "A line of slurm.setup or a module changes umask: take it out."
        return Check(name, f"files of jobs are open to others ({seen['mode']:04o})", "failed", remedy)
    return Check(name, f"read and written, files {seen['mode']:04o} of {node['user']}")


def _clock(off_s: float) -> Check | None:
    if off_s <= MOST_CLOCK_SECONDS:
        return Check("clock", "the same on both sides, to what can be seen")
    return Check(
        "clock", f"{off_s:.0f} s apart at least", "warning", "Times in `status` are off: ask for NTP on the nodes."
    )


def _scratch(answer: dict[str, Any]) -> Check:
    seen = answer["scratch"]
    if "error" in seen:
        return Check("scratch", seen["error"], "failed", "Name a folder that jobs may write in scratch.folder.")
    found = f"{seen['folder']}, {seen['free_gb']:,.1f} GB free"
    if seen["free_gb"] < LEAST_SCRATCH_GB:
        return Check("scratch", found, "warning", "Name a folder with more space in scratch.folder.")
    return Check("scratch", found)


def _python(answer: dict[str, Any], here: dict[str, Any], site: Site) -> Check:
    there = answer["facts"]["python"]
    if there.split(".")[:2] != here["python"].split(".")[:2]:
        remedy = "Jobs are handed over as pickles. " + _python_remedy(site)
        return Check("Python", f"{there} there, {here['python']} here", "failed", remedy)
    return Check("Python", there if there == here["python"] else f"{there} there, {here['python']} here")


def _cellhpc(answer: dict[str, Any], here: dict[str, Any], site: Site) -> Check:
    there, same = answer["facts"], _same(site)
    if there["cellhpc"] != here["cellhpc"]:
        return Check("cellhpc", f"{there['cellhpc']} there, {here['cellhpc']} here", "failed", same)
    if fault := answer.get("cellhpc's own modules", {}).get("error"):
        return Check("cellhpc", f"its modules can't be imported there: {fault}", "failed", f"Complete it. {same}")
    if there["sources"] != here["sources"]:
        return Check("cellhpc", f"{there['cellhpc']} on both sides, but from different commits", "warning", same)
    return Check("cellhpc", f"{there['cellhpc']}, the same on both sides")


def _packages(answer: dict[str, Any], here: dict[str, Any]) -> Check:
    there, ours = answer["facts"]["packages"], here["packages"]
    differing = [name for name in sorted({*there, *ours}) if there.get(name) != ours.get(name)]
    if differing:
        found = ", ".join(
            f"{name} {there.get(name, 'none')} there, {ours.get(name, 'none')} here" for name in differing
        )
        return Check(
            "packages", found, "warning", "Results are those of the nodes' versions; tests ran with uv.lock's."
        )
    return Check("packages", ", ".join(f"{name} {version}" for name, version in there.items()))


def _container(site: Site) -> Check | None:
    return None if site.container is None else Check("container", f"{site.container.image.name} runs")


def _tensorflow(answer: dict[str, Any], probe: Probe, site: Site) -> Check:
    seen = answer["TensorFlow"]
    if "error" in seen:
        remedy = "Build the container anew." if site.container else "Install cellhpc with its extra there: cpu or gpu."
        return Check("TensorFlow", seen["error"], "failed", remedy)
    found = f"{seen['version']}: {', '.join(seen['devices'])}"
    if probe.gpus and not set(seen["devices"]) - {"CPU"}:
        if not seen["cuda"]:
            remedy = "This TensorFlow is built without CUDA: use the extra gpu, or the container for GPUs."
        else:
            remedy = "Does `nvidia-smi` work in a job there? In a container `--nv` is needed: gres or gpus_per_task."
        return Check("TensorFlow", f"{found}; it sees no GPU, and [train] asks for some", "failed", remedy)
    return Check("TensorFlow", found)


def _horovod(answer: dict[str, Any], probe: Probe) -> Check:
    seen, needed = answer["Horovod"], probe.nodes > 1
    install = "Install the extra horovod there, as the README shows, or use the container."
    if "error" in seen:
        found = seen["error"] if needed else f"{seen['error']} (needed only with several ranks)"
        return Check("Horovod", found, "failed" if needed else "warning", install)
    found = f"{seen['version']}, built with {', '.join(seen['built']) or 'nothing'}"
    if "gloo" not in seen["built"]:
        return Check("Horovod", found, "failed" if needed else "warning", f"Ranks meet by Gloo. {install}")
    if probe.gpus and "nccl" not in seen["built"]:
        return Check("Horovod", found, "warning", "Between GPUs NCCL is much faster: use the container for GPUs.")
    return Check("Horovod", found)


_RENDEZVOUS = (
    "Nodes must reach each other on all ports of the interface that leads from one to the other: ask the "
    "administrators, or train on one node: train.nodes = 1."
)


def _rendezvous(answer: dict[str, Any]) -> Check:
    seen = answer["rendezvous"]
    if "error" in seen:
        return Check("rendezvous", seen["error"], "failed", _RENDEZVOUS)
    if seen["mean"] != seen["expected"]:
        found = f"the mean over the ranks is {seen['mean']:g}, not {seen['expected']:g}"
        return Check("rendezvous", found, "failed", "Horovod counts wrong: build it anew, or use the container.")
    found = f"by {seen['interface']} to {seen['address']}, the mean of {seen['ranks']} ranks is right"
    return Check("rendezvous", found)


def _requeue(probe: Probe) -> Check | None:
    """Judge whether a job that asks for it is queued again, and starts again."""
    ask = f"Ask the administrators about it: {RESUME}."
    if not probe.trains or not probe.answered:
        return None
    if not probe.requeue:
        return Check("requeue", f"job {probe.job} may not be queued again (Requeue=0)", "failed", ask)
    if not probe.scontrol.startswith("slurm"):
        return Check("requeue", "the node has no scontrol", "failed", f"Load it by slurm.modules. {ask}")
    if probe.end is not None and probe.end.how == "done":
        return Check("requeue", "queued again and started again")
    if probe.end is None or probe.end.how != "checkpointed":
        return None
    if not probe.over:
        reason = probe.state.reason if probe.state is not None else ""
        found = f"queued again, not started again in the time ({reason or 'no reason given'})"
        return Check(
            "requeue", found, "warning", "Slurm lets a job wait two minutes and more: wait longer, --wait 1200."
        )
    return Check("requeue", f"refused: {probe.error}", "failed", ask)


def render(diagnosis: Diagnosis) -> RenderableType:
    """Draw the table, then what it means."""
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=3)
    table.add_column("state", no_wrap=True)
    if any(check.remedy for check in diagnosis.checks):
        table.add_column("what to change", overflow="fold", ratio=2)
    where = ""
    for check in diagnosis.checks:
        if check.where != where:
            where = check.where
            table.add_row(Text(f"partition {where}", style="bold"), end_section=False)
        words = [Text(check.check), Text(check.found), Text(check.state, COLOURS[check.state]), Text(check.remedy)]
        table.add_row(*words[: len(table.columns)])
    return Group(table, *(Text(line) for line in _closing(diagnosis)))


def _closing(diagnosis: Diagnosis) -> Iterable[str]:
    counts = {state: sum(check.state == state for check in diagnosis.checks) for state in STATES}
    if diagnosis.healthy:
        warned = f", with {counts['warning']} warning(s)" if counts["warning"] else ""
        yield f"This cluster is ready{warned}."
    else:
        yield f"Not ready: {counts['failed']} of {len(diagnosis.checks)} checks failed."
    if diagnosis.logs is not None:
        yield f"What the jobs said: {diagnosis.logs}"
