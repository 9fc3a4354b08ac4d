"""What is asked of Slurm, and told it: the queue, what is known of jobs that ended, limits, cancel.

Everything works without accounting. A question that Slurm can't answer raises `NotAnswered`, which says why; whoever
asks goes on without, and says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cellhpc.errors import UserError

ANSWER_SECONDS = 60.0
"""How long a client of Slurm may take; a controller that is down makes them wait for less."""


class NotAnswered(UserError):
    """Slurm did not answer a question."""


@dataclass(frozen=True)
class JobState:
    """A job, or one element of an array, as Slurm has it; `seconds` is the time since its last start."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    seconds: float = 0.0
    exit_code: str = ""
    comment: str = ""


def ask(*words: str) -> str:
    """Run a client of Slurm and return what it printed.

    Raises
    ------
    NotAnswered
        It is not installed here, failed, or took too long.
    """
    done = _run(words)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise NotAnswered(f"{words[0]}: {said[-1].removeprefix(words[0] + ': ')}")
    return done.stdout


def test(script: str) -> str:
    """Ask Slurm whether it would take a batch script, and when it could start; nothing is queued."""
    done = _run(("sbatch", "--test-only"), script)
    said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    if done.returncode:
        raise NotAnswered(said)
    return said.removeprefix("sbatch: ")


def queue() -> dict[str, JobState]:
    """List this user's jobs that wait or run, each element of an array for itself, by id (`12` or `12_3`)."""
    found = {}
    for line in ask("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r|%N|%M|%k").splitlines():
        job, state, reason, nodes, elapsed, comment = line.split("|", 5)
        reason = "" if reason == "None" else reason
        found[job] = JobState(job, state, reason, nodes, _seconds(elapsed), comment=comment)
    return found


def remembered(jobs: Iterable[str]) -> tuple[dict[str, JobState], list[str]]:
    """Ask what became of jobs that left the queue.

    Returns
    -------
    states
        By id; from the controller, which forgets after minutes, and from the accounting where there is one.
    notes
        What could not be asked, a sentence each.
    """
    wanted = sorted(set(jobs), key=int)
    states: dict[str, JobState] = {}
    notes: list[str] = []
    if not wanted:
        return states, notes
    try:
        asked = ask("sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode,NodeList", "-j", ",".join(wanted))
    except NotAnswered as fault:
        notes.append(f"Without accounting ({fault}), how a job ended is known from its own records.")
    else:
        for line in asked.splitlines():
            job, state, code, nodes = line.split("|")
            states[job] = JobState(job, state.split()[0], nodes=nodes, exit_code=code)
    for job in wanted:
        try:
            told = ask("scontrol", "show", "job", "-o", job)
        except NotAnswered:
            continue  # forgotten: the controller keeps a job for MinJobAge
        for line in told.splitlines():
            facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
            array = facts.get("ArrayJobId")
            names = [f"{array}_{index}" for index in _indices(facts["ArrayTaskId"])] if array else [facts["JobId"]]
            for name in names:
                states[name] = JobState(
                    name,
                    facts["JobState"],
                    facts.get("Reason", ""),
                    facts.get("NodeList", ""),
                    exit_code=facts["ExitCode"],
                    comment=facts.get("Comment", ""),
                )
    return states, notes


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs, those that wait included."""
    if jobs:
        ask("scancel", *jobs)


def configuration() -> dict[str, str]:
    """Read the cluster's configuration, by key."""
    pairs = re.findall(r"^(\w+)\s*= (.*)$", ask("scontrol", "show", "config"), re.MULTILINE)
    return {key: value.strip() for key, value in pairs}


def max_array_size() -> int:
    """Most elements of one array: its largest index is below Slurm's MaxArraySize."""
    return int(configuration()["MaxArraySize"])


def _run(words: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a client of Slurm; `text` is its input."""
    if shutil.which(words[0]) is None:
        raise NotAnswered(f"{words[0]} is not on PATH here. Type this on a login node of the cluster.")
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotAnswered(f"{words[0]} did not answer within {ANSWER_SECONDS:.0f} s") from None


def _indices(text: str) -> list[int]:
    """Expand Slurm's ``2,5-7%4``: elements that never ran are told together."""
    found = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += list(range(int(first), int(last or first) + 1)) if first.isdigit() else []
    return found


def _seconds(text: str) -> float:
    """Read Slurm's ``[D-][HH:]MM:SS``."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":") if part.isdigit()]
    total = 0
    for part in parts:
        total = total * 60 + part
    return total + 86400.0 * int(days or 0)
