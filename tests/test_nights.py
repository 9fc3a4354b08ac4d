"""Nights that go wrong, on a real Slurm cluster: whatever happens, the study comes to the same predictions.

Each test is a line of the table in slurm/README.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from cellhpc.attempts import finished
from cellhpc.ledger import read_json
from slurm.cluster import LocalCluster
from tests.conftest import Cellhpc
from tests.night import JOB, Night, here, same, until
from tests.slurm_cluster import require_slurm, submit, wait_for_job, wait_until_saved
from tests.small_screen import make_small_screen

EPOCHS = 20


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic screen of four compounds."""
    require_slurm()
    return make_small_screen(tmp_path_factory.mktemp("screen") / "raw")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, raw: Path, cellhpc: Cellhpc) -> Path:
    """The converted screen, which all studies share."""
    folder = tmp_path_factory.mktemp("shared")
    job = folder / "job.toml"
    job.write_text(JOB.format(folder=folder, raw=raw, store=folder / "store", ranks=1, epochs=1))
    converted = cellhpc("convert", job)
    assert converted.returncode == 0, converted.stderr
    return folder / "store"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, raw: Path, store: Path) -> dict[int, dict[str, pd.DataFrame]]:
    """Predictions of the study on one and on two ranks, without Slurm and without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {ranks: here(folder / str(ranks), raw, store, ranks, EPOCHS, "train") for ranks in (1, 2)}


def test_a_training_that_is_told_to_stop_goes_on_where_it_was(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    """Time limit, preemption and `scancel --signal` are this signal; `scontrol requeue` is SIGTERM."""
    night = Night(whole_cluster, tmp_path, raw, store, epochs=EPOCHS)
    night.submit()
    name, first = night.run_at_work(epoch=2)
    whole_cluster.run("scancel", "--signal=USR2", first["job"], check=True)
    name, second = night.run_at_work(epoch=3, but=first["folder"])
    whole_cluster.run("scontrol", "requeue", second["job"], check=True)
    night.until_done()
    same(night.predictions(), undisturbed[1])
    record = read_json(finished(night.study / "runs" / name) / "run.json")
    assert record["attempts"] >= 2
    assert night.ends().count("checkpointed") >= 1


def test_a_job_of_a_higher_partition_goes_first_and_nothing_is_lost(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    night = Night(whole_cluster, tmp_path, raw, store, epochs=EPOCHS)
    night.submit()
    night.run_at_work(epoch=2)
    other = submit(whole_cluster, "sleep 1", "--partition=high", "--nodes=3", "--exclusive")
    wait_for_job(whole_cluster, other, "COMPLETED")
    night.until_done()
    same(night.predictions(), undisturbed[1])
    assert "checkpointed" in night.ends()


def test_a_rank_that_is_killed_ends_its_run_within_a_minute_and_it_is_started_anew(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    night = Night(whole_cluster, tmp_path, raw, store, ranks=2, epochs=EPOCHS)
    night.submit(train={"nodes": 2})
    night.run_at_work(epoch=2)
    killed_at = time.monotonic()
    ranks = [process for process in psutil.process_iter(["cmdline", "environ"]) if _is_rank(process, night, "1")]
    assert len(ranks) == 1
    ranks[0].kill()
    until("it crashed", lambda: "crashed" in night.ends(), 60, night.last_words)
    assert time.monotonic() - killed_at < 60
    night.until_done()
    same(night.predictions(), undisturbed[2])


def test_tiles_that_do_not_fit_into_a_node_are_staged_and_come_in_windows_after_a_kill_too(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path
) -> None:
    small = "memory_gb = 0.0003\nstage = true\n"
    night = Night(whole_cluster, tmp_path / "night", raw, store, ranks=2, epochs=EPOCHS, more=small)
    night.submit(train={"nodes": 2})
    assert read_json(night.study / "job.json")["train"]["window_tiles"] == 32
    night.run_at_work(epoch=2)
    (rank,) = [process for process in psutil.process_iter(["cmdline", "environ"]) if _is_rank(process, night, "1")]
    rank.kill()
    night.until_done()
    assert "crashed" in night.ends()
    same(night.predictions(), here(tmp_path / "here", raw, store, 2, EPOCHS, "train", small))


def test_a_node_without_power_is_replaced(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    """Two ranks on two of three nodes: the third takes over."""
    night = Night(whole_cluster, tmp_path, raw, store, ranks=2, epochs=EPOCHS)
    night.submit(train={"nodes": 2})
    _, attempt = night.run_at_work(epoch=2)
    whole_cluster.kill_node(attempt["host"])
    _, after = night.run_at_work(epoch=2, but=attempt["folder"], seconds=180)
    assert after["attempt"] != attempt["attempt"]
    night.until_done()
    same(night.predictions(), undisturbed[2])


def test_a_node_that_is_cut_off_can_not_overwrite_what_its_successor_writes(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    """The rank behind the cut has the study's folder in sight; it wakes up when all has been done elsewhere."""
    night = Night(whole_cluster, tmp_path, raw, store, epochs=EPOCHS)
    night.submit()
    name, attempt = night.run_at_work(epoch=2)
    zombie = psutil.Process(_pid(night, attempt))
    zombie.suspend()
    whole_cluster.cut(attempt["host"])
    night.until_done()
    same(night.predictions(), undisturbed[1])
    assert not Path(attempt["folder"]).exists()
    before = _files(night.study / "runs")
    assert read_json(night.study / "runs" / name / "done.json")["attempt"] != Path(attempt["folder"]).name
    zombie.resume()
    until("the one that was cut off ended", lambda: not _alive(zombie), 60, night.last_words)
    assert _files(night.study / "runs") == before
    whole_cluster.mend(attempt["host"])
    night.until_done()


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file below a folder, with its number and the time when it was written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_slurmctld_may_die_and_come_back(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    night = Night(whole_cluster, tmp_path, raw, store, epochs=EPOCHS)
    night.submit()
    at_work = psutil.Process(_pid(night, night.run_at_work(epoch=1)[1]))
    at_work.suspend()  # so that it is not done before it is asked for
    wait_until_saved(whole_cluster)
    whole_cluster.kill_daemon("slurmctld")
    facts = night.status()
    at_work.resume()
    assert "Slurm's queue could not be asked" in facts["notes"][0]
    assert "unknown" in facts["counts"]
    assert set(facts["counts"]) <= {"done", "unknown"}  # and not failed
    whole_cluster.start_daemon("slurmctld")
    night.until_done()
    same(night.predictions(), undisturbed[1])


def test_a_study_that_is_cancelled_is_resumed_with_what_is_missing(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    night = Night(whole_cluster, tmp_path, raw, store, epochs=EPOCHS)
    night.submit("run", "--set", "sweep.runs_per_job=1")
    until("a run is done", lambda: len(night.predictions()) >= 1, 120, night.last_words)
    # The job of the run that is done may be just ending, which is another answer.
    until("nothing is missing", lambda: "Nothing is to be" in night.cellhpc("resume", night.study).stdout, 60)
    at_work = psutil.Process(_pid(night, night.run_at_work()[1]))
    at_work.suspend()  # so that it is not done before the command is
    said = night.cellhpc("cancel", night.study)
    at_work.resume()
    assert said.returncode == 0, said.stderr
    status = stays_quiet(night)
    assert "cancelled" in night.ends()
    states = {run["run"]: run["state"] for run in status["runs"]}
    done = [name for name, state in states.items() if state == "done"]
    assert 1 <= len(done) < 4
    assert set(states.values()) <= {"done", "stopped", "missing"}
    assert "stopped" in states.values()
    kept = {name: read_json(night.study / "runs" / name / "done.json") for name in done}
    resumed = night.cellhpc("resume", night.study)
    assert resumed.returncode == 0, resumed.stderr
    tasks = read_json(night.study / "jobs" / "0002" / "tasks.json")
    assert sum(len(task["runs"]) for task in tasks.values()) == 4 - len(done)
    night.run_at_work()
    whole_cluster.run("scancel", "--me", check=True)  # and by Slurm's own command
    stays_quiet(night)
    assert night.cellhpc("resume", night.study).returncode == 0
    night.until_done()
    assert {name: read_json(night.study / "runs" / name / "done.json") for name in done} == kept
    same(night.predictions(), undisturbed[1])
    assert "Nothing is to be submitted" in night.cellhpc("resume", night.study).stdout


def stays_quiet(night: Night, seconds: float = 12) -> dict[str, Any]:
    """Wait until nothing waits or runs, and see that nothing comes back, which takes Slurm 5 to 7 seconds."""
    status = night.until_quiet()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert not night.cluster.run("squeue", "-h").stdout
        time.sleep(0.5)
    return status


def test_a_bug_in_one_run_fails_that_run_with_its_reason_and_no_other(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path
) -> None:
    """The weights of one initialisation are damaged; the other runs of the task are done on two ranks all the same."""
    night = Night(whole_cluster, tmp_path, raw, store, ranks=2, epochs=EPOCHS)
    (tmp_path / "damaged.h5").write_bytes(b"not weights")
    weights = f'sweep.weights=["{tmp_path}/damaged.h5", "xavier"]'
    night.submit("train", "--set", weights, "--set", "train.epochs=1", train={"nodes": 2, "restarts": 0})
    status = night.until_quiet()
    assert status["counts"] == {"done": 4, "failed": 4}, night.last_words()
    failed = [run for run in status["runs"] if run["state"] == "failed"]
    assert all("damaged" in run["run"] for run in failed)
    assert all("damaged.h5" in run["reason"] for run in failed), failed
    assert night.ends() == [*["again"] * 4, "done"]
    assert not status["complete"]
    assert "damaged.h5" in night.cellhpc("status", night.study).stdout


def test_a_job_that_needs_more_memory_than_it_has_fails_with_that_reason(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, raw: Path, store: Path
) -> None:
    with LocalCluster(tmp_path_factory.mktemp("strict"), nodes=1, cpus=2, memory_limit=True) as cluster:
        night = Night(cluster, tmp_path, raw, store, epochs=EPOCHS)
        night.submit(train={"memory_gb": 0.3, "restarts": 0})
        status = night.until_quiet()
        reasons = {run["reason"] for run in status["runs"] if run["state"] in ("failed", "missing")}
        assert reasons
        assert all("memory" in reason.lower() for reason in reasons), (reasons, night.last_words())
        night.submit(train={"memory_gb": 4})
        night.until_done()


def test_what_is_just_ending_is_not_submitted_a_second_time(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, raw: Path, store: Path
) -> None:
    with LocalCluster(tmp_path_factory.mktemp("slow"), nodes=1, cpus=2, slurmd_timeout=300) as cluster:
        night = Night(cluster, tmp_path, raw, store, epochs=EPOCHS)
        night.submit()
        night.run_at_work()
        node = psutil.Process(cluster.processes()["n1"])
        slurmd = next(process for process in (node, *node.children(recursive=True)) if process.name() == "slurmd")
        slurmd.suspend()  # the node does not hear of the end
        try:
            assert night.cellhpc("cancel", night.study).returncode == 0
            hasty = night.cellhpc("resume", night.study)
            assert hasty.returncode == 1
            assert "just ending" in hasty.stderr
            assert not (night.study / "jobs" / "0002").exists()
        finally:
            slurmd.resume()
        night.until_quiet()
        assert night.cellhpc("resume", night.study).returncode == 0
        assert night.cellhpc("cancel", night.study).returncode == 0


def test_a_full_disk_fails_the_run_with_that_reason_and_leaves_what_was_good(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, raw: Path, store: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(disk)], check=True)
    try:
        with LocalCluster(tmp_path_factory.mktemp("full"), nodes=1, cpus=2) as cluster:
            night = Night(cluster, disk, raw, store, epochs=EPOCHS)
            night.submit(train={"restarts": 0})
            status = night.until_quiet()
            states = {run["state"] for run in status["runs"]}
            assert states <= {"failed", "missing"}
            assert "No space left on device" in json.dumps(status), (status, night.last_words())
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            subprocess.run(["nsenter", "-t", str(cluster.processes()["n1"]), "-m", "mount", "-o", "remount,size=200m",
                            str(disk)], check=True)  # fmt: skip
            assert night.cellhpc("resume", night.study).returncode == 0
            night.until_done()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_in_a_container_too_a_training_that_is_told_to_stop_goes_on(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path, store: Path, undisturbed: dict[int, dict[str, pd.DataFrame]]
) -> None:
    """It is queued again by its batch script, outside: the image needs no scontrol."""
    image, apptainer = os.environ.get("CELLHPC_IMAGE"), shutil.which("apptainer") or "/opt/apptainer/usr/bin/apptainer"
    if not image or not Path(apptainer).exists():
        pytest.skip("CELLHPC_IMAGE names no image, or there is no Apptainer; build one: make container")
    night = Night(whole_cluster, tmp_path, raw, store, ranks=2, epochs=EPOCHS)
    night.submit(train={"nodes": 2}, container={"image": image, "runtime": apptainer})
    _, attempt = night.run_at_work(epoch=2)
    whole_cluster.run("scancel", "--signal=USR2", attempt["job"], check=True)
    night.until_done()
    assert "checkpointed" in night.ends()
    same(night.predictions(), undisturbed[2])
    records = [read_json(path) for path in (night.study / "runs").glob("*/*/run.json")]
    assert all(record["image"].startswith(f"{Path(image).name} sha256:") for record in records)


def _is_rank(process: psutil.Process, night: Night, rank: str) -> bool:
    """Tell whether a process is this rank of a study's training."""
    words = process.info["cmdline"] or []
    if "python" not in "".join(words[:1]) or not any(str(night.study) in word for word in words):
        return False
    environment = process.info["environ"] or {}
    return environment.get("SLURM_PROCID") == rank and environment.get("SLURM_JOB_NAME") == "night-train"


def _pid(night: Night, attempt: dict[str, str]) -> int:
    """Process id, as this machine sees it, of the rank that made an attempt."""
    restart = attempt["attempt"].split("-")[1]
    for process in psutil.process_iter(["cmdline", "environ"]):
        environment = process.info["environ"] or {}
        if _is_rank(process, night, "0") and environment.get("SLURM_RESTART_COUNT", "0") == restart:
            return process.pid
    return 2**22 + 1  # it has ended
