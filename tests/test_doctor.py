"""The doctor on a real cluster, healthy and not; then what single answers of a node mean."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cellhpc.cli import cli
from cellhpc.diagnosis import Check, Diagnosis, Probe, judge
from cellhpc.doctor import diagnose, plan_probes, small
from cellhpc.examine import facts
from cellhpc.site import Site, parse_site
from cellhpc.slurm import JobState
from cellhpc.submission import End
from slurm.cluster import LocalCluster
from tests.conftest import Cellhpc
from tests.slurm_cluster import wait_for

Examine = Callable[..., Diagnosis]
LITTLE = {stage: {"memory_gb": 1} for stage in ("convert", "train", "aggregate")}


def site_of(**sections: Any) -> Site:
    return parse_site(
        {name: {**LITTLE.get(name, {}), **sections.get(name, {})} for name in {**LITTLE, **sections}}, "s"
    )


def lines_of(found: Diagnosis) -> dict[str, Check]:
    return {line.check: line for line in found.checks}


def queue(cluster: LocalCluster) -> list[str]:
    return cluster.run("squeue", "-h", "-o", "%T %j").stdout.splitlines()


@pytest.fixture
def examine(cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Examine]:
    """Examine the shared cluster; nothing of the doctor's is in the queue afterwards."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)

    def look(wait_s: float = 60, **sections: Any) -> Diagnosis:
        return diagnose(site_of(**sections), tmp_path, wait_s)

    yield look
    wait_for("the doctor's jobs are gone", lambda: not queue(cluster), 30)


# ---- on a real cluster


@pytest.fixture
def scratch(cluster: LocalCluster, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """Give each node a disk of its own at `scratch`; what can be asked is what lies there, on any of them."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    pids = [cluster.processes()[name] for name in cluster.nodes]
    within = [["nsenter", "-t", str(pid), "-m"] for pid in pids]
    for node in within:
        subprocess.run([*node, "mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)

    def left() -> list[str]:
        return [subprocess.check_output([*node, "ls", str(folder)], text=True) for node in within]

    yield left
    for node in within:
        subprocess.run([*node, "umount", str(folder)], check=True)


def test_a_healthy_cluster_is_ready_and_two_of_its_nodes_meet(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: Callable[[], list[str]]
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        f"""
        slurm = {{partition = "debug"}}
        convert = {{memory_gb = 2}}
        train = {{nodes = 3, memory_gb = 2}}
        aggregate = {{memory_gb = 2}}
        scratch = {{folder = "{tmp_path}/scratch"}}
        """
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env=cluster.env).invoke(cli, ["doctor", "--site", str(site), "--json", "--wait", "300"])
    found = json.loads(done.stdout)
    troubled = [line for line in found["checks"] if line["state"] == "failed"]
    assert (done.exit_code, found["ready"], troubled) == (0, True, []), done.stdout + done.stderr
    of = {(line["where"], line["check"]): line["found"] for line in found["checks"]}
    there = "debug (convert, train, aggregate)"
    assert {where for where, _ in of} == {"", there}
    version = cluster.run("sinfo", "--version").stdout.split()[1]
    assert of["", "Slurm"] == version
    assert of["", "accounting"].startswith("none: status and resume work without it; how jobs ended is known for 300 s")
    assert of["", "MaxArraySize"].startswith("1,001")
    assert "nodes n[1-3]" in of["", "train's jobs"]
    assert " on n1, n2, " in of[there, "job"]
    assert of[there, "rendezvous"].endswith(f"to {cluster.addresses['n1']}, the mean of 2 ranks is right")
    assert of[there, "requeue"] == "queued again and started again"
    assert of[there, "TensorFlow"].endswith("CPU")
    assert "gloo" in of[there, "Horovod"]
    assert of[there, "shared folder"].startswith("read and written, files 0600")
    assert of[there, "scratch"].startswith(f"{tmp_path}/scratch/")
    assert of[there, "Python"] == ".".join(map(str, sys.version_info[:3]))
    assert scratch() == [""] * 3
    assert found["logs"] is None
    assert not list(tmp_path.glob("cellhpc-doctor-*"))
    assert queue(cluster) == []


def test_a_partition_that_is_not_there_is_named_with_those_that_are(examine: Examine, tmp_path: Path) -> None:
    found = examine(slurm={"partition": "nope"})
    assert not found.healthy
    lines = lines_of(found)
    for name in ("convert's jobs", "train's jobs", "aggregate's jobs", "job"):
        assert lines[name].state == "failed"
        assert "nvalid partition" in lines[name].found
        assert "Partitions here: debug, high." in lines[name].remedy
    assert found.logs is not None
    assert found.logs.parents[2].parent == tmp_path
    assert found.logs.parents[2].stat().st_mode & 0o777 == 0o700


def test_a_python_that_nodes_do_not_have_is_told_with_what_the_node_said(examine: Examine) -> None:
    began = time.monotonic()
    found = examine(slurm={"python": "/absent/python"}, train={"nodes": 2, "partition": "high"})
    jobs = [line for line in found.checks if line.check == "job"]
    assert [line.where for line in jobs] == ["debug (convert, aggregate)", "high (train)"]
    for line in jobs:
        assert line.state == "failed"
        assert "Python did not begin" in line.found
        assert "/absent/python: No such file or directory" in line.found
        assert "slurm.python" in line.remedy
    assert time.monotonic() - began < 30


def test_a_python_without_cellhpc_is_told_with_its_last_error(examine: Examine, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    line = lines_of(examine(slurm={"python": str(python)}))["job"]
    assert line.state == "failed"
    assert "No module named 'submitit'" in line.found
    assert "slurm.python" in line.remedy


def test_a_scratch_folder_that_can_not_be_made_is_told(examine: Examine) -> None:
    line = lines_of(examine(scratch={"folder": "/proc/scratch/$SLURM_JOB_ID"}))["job"]
    assert line.state == "failed"
    assert "a line before the work ended with exit code 1: mkdir: " in line.found
    assert "/proc/scratch" in line.found
    assert "scratch.folder" in line.remedy


def test_more_than_the_cluster_has_is_refused_by_slurm_before_a_job_is(examine: Examine, tmp_path: Path) -> None:
    # The small job asks for less; Python is absent so that it ends at once.
    lines = lines_of(examine(slurm={"python": "/absent/python"}, convert={"memory_gb": 900}, train={"nodes": 2}))
    assert lines["convert's jobs"].state == "failed"
    assert "Requested node configuration is not available (nodes there: 3 idle)" in lines["convert's jobs"].found
    assert "memory_gb" in lines["convert's jobs"].remedy
    assert lines["train's jobs"].found == "would be taken, on nodes n[1-2] in partition debug"


def test_nodes_that_can_not_be_used_are_told_in_time_and_the_job_is_cancelled(
    examine: Examine, whole_cluster: LocalCluster
) -> None:
    whole_cluster.run("scontrol", "update", "nodename=n[1-3]", "state=drain", "reason=test", check=True)
    try:
        began = time.monotonic()
        line = lines_of(examine(wait_s=4))["job"]
        assert time.monotonic() - began < 15
    finally:
        whole_cluster.run("scontrol", "update", "nodename=n[1-3]", "state=resume", check=True)
    assert line.state == "failed"
    assert "did not start within 4 s: Nodes required for job are DOWN, DRAINED" in line.found
    assert "(nodes there: 3 drained)" in line.found
    assert "sinfo -R" in line.remedy


def test_a_job_that_slurm_would_never_start_is_not_waited_for(examine: Examine, whole_cluster: LocalCluster) -> None:
    whole_cluster.run("scontrol", "update", "partitionname=debug", "maxnodes=1", check=True)
    try:
        began = time.monotonic()
        line = lines_of(examine(wait_s=60, train={"nodes": 2}))["job"]
        assert time.monotonic() - began < 30
    finally:
        whole_cluster.run("scontrol", "update", "partitionname=debug", "maxnodes=unlimited", check=True)
    assert line.state == "failed"
    assert "will not start: PartitionNodeLimit" in line.found
    assert "nodes" in line.remedy


def test_a_folder_that_nodes_do_not_see_is_told(examine: Examine, cluster: LocalCluster, tmp_path: Path) -> None:
    # Each node gets a file system of its own in the place of the folder.
    hosts = [["nsenter", "--mount", "--target", str(cluster.processes()[name])] for name in cluster.nodes]
    for inside in hosts:
        subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    try:
        line = lines_of(examine())["job"]
    finally:
        for inside in hosts:
            subprocess.run([*inside, "umount", str(tmp_path)], check=True)
    assert line.state == "failed"
    assert "it could not begin its log" in line.found
    assert "--folder DIR" in line.remedy


def test_a_doctor_that_is_stopped_cancels_its_jobs(examine: Examine, cluster: LocalCluster, tmp_path: Path) -> None:
    said: list[str] = []

    def stop(news: str) -> None:
        said.append(news)
        if " runs on " in news:
            assert queue(cluster) == ["RUNNING doctor-train"]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        diagnose(site_of(slurm={"setup": ["sleep 600"]}), tmp_path, 60, stop)
    wait_for("its job is cancelled", lambda: not queue(cluster), 30)
    assert said[-1].startswith(f"What the jobs said: {tmp_path}/cellhpc-doctor-")


def test_without_slurm_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("")
    words = ["doctor", "--site", str(tmp_path / "site.toml"), "--folder", str(tmp_path)]
    done = CliRunner(env={"PATH": ""}).invoke(cli, words)
    assert done.exit_code == 1
    assert "scontrol is not on PATH here" in done.stdout
    assert "login node" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "site.toml"]


def test_a_wrong_site_file_is_a_usage_error(cellhpc: Cellhpc, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("[slurm]\npartitoin = 'x'\n")
    done = cellhpc("doctor", "--site", tmp_path / "site.toml")
    assert done.returncode == 2
    assert "slurm.partitoin: unknown key. Valid here: account, partition" in done.stderr


# ---- what is submitted


def test_there_is_one_small_job_for_each_place() -> None:
    site = site_of(slurm={"partition": "cpu"}, train={"partition": "gpu", "nodes": 4, "gres": "gpu:a100:4,nvme:1"})
    first, second = plan_probes(site)
    assert (first.stages, first.partition, first.nodes, first.trains) == (("convert", "aggregate"), "cpu", 1, False)
    assert (second.stages, second.partition, second.nodes, second.gpus) == (("train",), "gpu", 2, True)
    assert [probe.stages for probe in plan_probes(site_of())] == [("convert", "train", "aggregate")]
    assert plan_probes(site_of(), "debug")[0].where == "debug (convert, train, aggregate)"


def test_the_small_job_asks_for_little_and_writes_no_mail() -> None:
    asked = {"nodes": 8, "cpus_per_task": 64, "memory_gb": 500, "time": "2-00:00:00", "gres": "gpu:a100:4,nvme:1"}
    site = small(site_of(slurm={"mail_user": "me@example.org", "setup": ["true"]}, train=asked))
    train = site.train
    assert (train.nodes, train.cpus_per_task, train.memory_gb, train.time) == (2, 2, 4.0, 10)
    assert train.gres == "gpu:a100:1,nvme:1"
    assert site.slurm.mail_user is None
    assert site.slurm.setup[0] == "true"


# ---- what answers mean


HERE = facts()


def probe_of(**changes: Any) -> Probe:
    """A job of two nodes that answered that all is well; `changes` are made to node n2's answer."""
    answers = {}
    for rank in (0, 1):
        answers[rank] = {
            "rank": rank,
            "host": f"n{rank + 1}",
            "doing": "",
            "finished": True,
            "time": time.time(),
            "facts": copy.deepcopy(HERE),
            "folder": {"token": "t", "owner": HERE["uid"], "mode": 0o600},
            "scratch": {"folder": "/local", "free_gb": 100.0},
            "TensorFlow": {"version": "2.18.1", "devices": ["CPU"], "cuda": False},
            "Horovod": {"version": "0.28.1", "built": ["gloo"]},
            "rendezvous": {
                "mean": 0.5, "expected": 0.5, "ranks": 2, "interface": "ib0", "address": "10.0.0.1"
            },
        }  # fmt: skip
    for step, change in changes.items():
        answers[1][step] = {**answers[1][step], **change}
    probe = Probe("train-0000", "train", ("train",), "gpu", trains=True, gpus=False, nodes=2, job="7")
    probe.answers, probe.scontrol, probe.over = answers, "slurm 23.11", True
    probe.end = End(time.time(), "n1", "7-1", 0, "done")
    return probe


def judged(probe: Probe, **sections: Any) -> dict[str, Check]:
    return {line.check: line for line in judge(probe, HERE, "t", parse_site(sections, "site"), 60)}


def test_answers_of_a_healthy_cluster_are_all_ok() -> None:
    lines = judged(probe_of())
    assert {line.state for line in lines.values()} == {"ok"}
    assert not any(line.remedy for line in lines.values())


@pytest.mark.parametrize(
    ("changes", "check", "state", "found", "remedy"),
    [
        ({"facts": {"python": "3.9.2"}}, "Python", "failed", "n2: 3.9.2 there", "slurm.python"),
        ({"facts": {"cellhpc": "0.0.9"}}, "cellhpc", "failed", "0.0.9 there", "Install the same"),
        ({"facts": {"sources": "other"}}, "cellhpc", "warning", "different commits", "Install the same"),
        ({"facts": {"packages": {**HERE["packages"], "numpy": "9"}}}, "packages", "warning", "numpy 9 there", "lock"),
        ({"folder": {"token": "another"}}, "shared folder", "failed", "another text", "--folder"),
        ({"folder": {"owner": 65534}}, "shared folder", "failed", "65534", "user ids"),
        ({"folder": {"mode": 0o644}}, "shared folder", "failed", "0644", "umask"),
        ({"folder": {"error": "PermissionError"}}, "shared folder", "failed", "PermissionError", "--folder"),
        ({"scratch": {"free_gb": 0.2}}, "scratch", "warning", "0.2 GB free", "scratch.folder"),
        ({"scratch": {"error": "full"}}, "scratch", "failed", "full", "scratch.folder"),
        ({"TensorFlow": {"error": "ImportError"}}, "TensorFlow", "failed", "ImportError", "extra"),
        ({"Horovod": {"error": "ImportError"}}, "Horovod", "failed", "ImportError", "extra horovod"),
        ({"Horovod": {"built": ["mpi"]}}, "Horovod", "failed", "mpi", "Gloo"),
        ({"rendezvous": {"error": "UserError: rank 0 did not come"}}, "rendezvous", "failed", "rank 0", "all ports"),
        ({"rendezvous": {"mean": 0.0}}, "rendezvous", "failed", "is 0, not 0.5", "Horovod"),
    ],
)  # fmt: skip
def test_one_node_that_is_not_well_is_named_with_what_to_change(
    changes: dict[str, dict[str, Any]], check: str, state: str, found: str, remedy: str
) -> None:
    lines = judged(probe_of(**changes))
    assert lines[check].state == state
    assert found in lines[check].found
    assert remedy in lines[check].remedy
    assert {line.state for name, line in lines.items() if name != check} == {"ok"}


def test_gpus_that_tensorflow_does_not_see_fail() -> None:
    probe = probe_of()
    probe.gpus = True
    line = judged(probe)["TensorFlow"]
    assert (line.state, "sees no GPU" in line.found, "without CUDA" in line.remedy) == ("failed", True, True)
    probe.answers[0]["TensorFlow"]["devices"] = probe.answers[1]["TensorFlow"]["devices"] = ["CPU", "NVIDIA A100"]
    assert judged(probe)["TensorFlow"].state == "ok"
    assert (judged(probe)["Horovod"].state, "NCCL" in judged(probe)["Horovod"].remedy) == ("warning", True)


def test_a_clock_that_is_off_is_a_warning() -> None:
    probe = probe_of()
    probe.clock_s = {0: 0.0, 1: 90.0}
    line = judged(probe)["clock"]
    assert (line.state, "n2: 90 s apart" in line.found) == ("warning", True)


@pytest.mark.parametrize(
    ("changes", "state", "found"),
    [
        ({"requeue": False}, "failed", "Requeue=0"),
        ({"scontrol": "bash: scontrol: command not found"}, "failed", "no scontrol"),
        ({"end": End(0.0, "n1", "7-0", 0, "checkpointed"), "error": "slurm_requeue error: denied"}, "failed", "denied"),
        ({"end": End(0.0, "n1", "7-0", 0, "checkpointed"), "over": False,
          "state": JobState("7", "PENDING", "BeginTime")},
         "warning", "BeginTime"),
    ],
)  # fmt: skip
def test_a_job_that_is_not_queued_again_is_told(changes: dict[str, Any], state: str, found: str) -> None:
    probe = probe_of()
    for name, value in changes.items():
        setattr(probe, name, value)
    line = judged(probe)["requeue"]
    assert (line.state, found in line.found, line.remedy != "") == (state, True, True)


def test_a_process_that_died_is_told_with_what_it_was_at() -> None:
    probe = probe_of()
    for answer in probe.answers.values():
        answer |= {"doing": "TensorFlow", "finished": False}
        for step in ("TensorFlow", "Horovod", "rendezvous"):
            del answer[step]
    probe.end, probe.error = End(time.time(), "n1", "7-0", 132, "crashed"), "Illegal instruction"
    lines = judged(probe)
    assert lines["job"].state == "failed"
    assert "ended while it looked at: TensorFlow: Illegal instruction" in lines["job"].found
    assert lines["scratch"].state == "ok"
    assert "requeue" not in lines
