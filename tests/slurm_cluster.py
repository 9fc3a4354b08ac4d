"""The real Slurm cluster that tests share, and what they ask it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm.cluster import LocalCluster
from tests.installing import install, may_install

INSTALL = Path(__file__).parents[1] / "slurm" / "install.sh"


def require_slurm(accounting: bool = False, root: bool = True) -> None:
    """Skip the test, with the reason, where no local cluster can run; in CI on Debian, install Slurm instead."""
    if root and os.geteuid() != 0:
        pytest.skip("nodes that are hosts of their own need root")
    if LocalCluster.can_run(accounting) and may_install():
        install(INSTALL, *["--accounting"] * accounting)
    if reason := LocalCluster.can_run(accounting):
        (pytest.fail if may_install() else pytest.skip)(reason)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of 3 nodes with 4 CPUs each, every node a host of its own; `whole_cluster` after a fault."""
    require_slurm()
    folder = tmp_path_factory.mktemp("slurm")
    with LocalCluster(folder, nodes=3, cpus=4, slurmd_timeout=5, kill_wait=3) as cluster:
        yield cluster


@pytest.fixture
def whole_cluster(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """Give the shared cluster to a test that breaks it: healed before the test and after it."""
    cluster.heal()
    yield cluster
    cluster.heal()


def submit(cluster: LocalCluster, script: str, *options: object) -> str:
    """Submit a shell script with options of sbatch; returns the job's id."""
    words = ["sbatch", "--parsable", "--chdir", cluster.folder, *options, "--wrap", script]
    return cluster.run(*words, check=True).stdout.strip()


def job_facts(cluster: LocalCluster, job: str) -> dict[str, str]:
    """What Slurm says of a job (JobState, Restarts, NodeList, ...); empty if slurmctld does not answer."""
    said = cluster.run("scontrol", "-o", "show", "job", job).stdout
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def wait_for(what: str, test: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something holds; fail the test if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.1)


def wait_for_job(cluster: LocalCluster, job: str, *states: str, seconds: float = 60.0) -> dict[str, str]:
    """Wait until a job is in one of these states; returns what Slurm says of it."""
    facts: dict[str, str] = {}

    def reached() -> bool:
        facts.clear()
        facts.update(job_facts(cluster, job))
        return facts.get("JobState") in states

    wait_for(f"job {job} is {' or '.join(states)}", reached, seconds)
    return facts


def wait_until_saved(cluster: LocalCluster) -> None:
    """Wait until slurmctld has saved what its jobs do now, which it does every five seconds or later.

    Killed before, it would take a job that has begun since for one that waits. It saves all jobs at once: a job that
    was submitted after the others came to their states is in the file only with these.
    """
    name = f"saved-{time.monotonic_ns()}"
    submit(cluster, "true", f"--job-name={name}")
    states = cluster.folder / "state" / "slurmctld" / "job_state"
    wait_for("slurmctld saves its jobs", lambda: states.exists() and name.encode() in states.read_bytes())
