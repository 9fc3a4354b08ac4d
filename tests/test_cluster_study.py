"""A study on the local Slurm cluster, undisturbed: the same result as here, and nothing of it open to others."""

from __future__ import annotations

import json
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest

from cellhpc.ledger import read_json
from slurm.cluster import LocalCluster
from tests.night import Night, here, same
from tests.slurm_cluster import require_slurm
from tests.small_screen import make_small_screen


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic screen of four compounds."""
    require_slurm()
    return make_small_screen(tmp_path_factory.mktemp("screen") / "raw")


class Watcher:
    """Looks at a cluster while a study runs: who listens where, what command lines say, and keys on disk."""

    def __init__(self, night: Night) -> None:
        self.night = night
        self.listening: set[str] = set()
        self.commands: set[str] = set()
        self.secrets: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, stop: threading.Event) -> None:
        nodes = [pid for name, pid in self.night.cluster.processes().items() if name in self.night.cluster.nodes]
        while not stop.wait(0.3):
            for pid in nodes:
                sockets = ["nsenter", "-t", str(pid), "-n", "ss", "-ltnpH"]
                said = subprocess.run(sockets, capture_output=True, text=True, check=False).stdout
                self.listening |= {line.split()[3] for line in said.splitlines() if "python" in line}
            for process in psutil.process_iter(["cmdline"]):
                self.commands.add(" ".join(process.info["cmdline"] or []))
            for path in (self.night.study / "jobs").glob("*/convert-*/*/*"):
                if path.is_file() and "PRIVATE KEY" in (text := path.read_text(errors="replace")):
                    self.secrets |= {line for line in json.dumps(text).split("\\n") if len(line) > 40}


def test_a_study_on_two_hosts_is_the_study_on_one_and_closed_to_others(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path
) -> None:
    night = Night(whole_cluster, tmp_path, raw, tmp_path / "store", ranks=2, epochs=3)
    watcher = Watcher(night)
    with watcher.watching():
        night.submit("run", convert={"nodes": 2, "tasks_per_node": 1}, train={"nodes": 2})
        night.until_done()
    hosts = {read_json(path)["host"] for path in (night.study / "jobs").glob("*/train-0000/*/rank-*.json")}
    assert len(hosts) == 2
    same(night.predictions(), here(tmp_path / "here", raw, tmp_path / "store", 2, 3))
    treatments = [folder / "results" / "treatments.csv" for folder in (night.study, tmp_path / "here" / "study")]
    one, other = map(pd.read_csv, treatments)
    pd.testing.assert_frame_equal(one, other, check_exact=True)

    assert watcher.listening  # the scheduler's and Gloo's sockets
    everywhere = [address for address in watcher.listening if address.startswith(("0.0.0.0:", "*:", "[::]:"))]
    assert everywhere == []
    assert any("submitit" in command for command in watcher.commands)
    assert watcher.secrets
    assert not [secret for secret in watcher.secrets if any(secret in command for command in watcher.commands)]
    for path in [night.study, *night.study.rglob("*"), tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0 or path.is_symlink(), path


def test_a_group_may_read_a_study_whose_site_file_says_so(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path
) -> None:
    night = Night(whole_cluster, tmp_path, raw, tmp_path / "store", epochs=1)
    night.submit("convert", slurm={"share": "group"})
    night.until_quiet()
    for path in [night.study / "job.json", tmp_path / "store" / "store.json", *(night.study / "jobs").rglob("*.out")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    assert stat.S_IMODE(night.study.stat().st_mode) == 0o750


def test_the_plan_is_told_and_slurm_is_asked_without_submitting(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path
) -> None:
    night = Night(whole_cluster, tmp_path, raw, tmp_path / "store", ranks=2)
    site = tmp_path / "site.toml"
    site.write_text("[train]\nnodes = 2\nthrottle = 1\n[measured]\nimages_per_s = 10\n")
    told = night.cellhpc("run", night.job, "--site", site, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("#!/bin/bash") == 3
    assert "Submit 3 job(s) of 3 task(s), 4 processes in all" in told.stdout
    assert "10.0 images/s in a job with 2 rank(s) (the site file)" in told.stdout
    cost = json.loads(night.cellhpc("run", night.job, "--site", site, "--dry-run", "--json").stdout)["cost"]
    images = 4 * 8 * 16 * (36 * 4 // 16)  # folds, epochs, batch, batches of what is left
    predicted = 4 * 8 * 12 * 4  # what each fold holds out, after every epoch; no faster than training, as not measured
    assert cost["wall_seconds"] == pytest.approx((images + predicted) / 10)
    small = site.read_text().replace("nodes = 2", "nodes = 2\nmemory_gb = 0.0005")
    (tmp_path / "small.toml").write_text(small)
    told = night.cellhpc("run", night.job, "--site", tmp_path / "small.toml", "--dry-run")
    assert "0 MB are for tiles (60% of the 0.0 GB of train.memory_gb of the site file)" in told.stdout
    assert "don't fit: they come in windows" in told.stdout
    asked = night.cellhpc("run", night.job, "--site", site, "--test-only")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.count("to start at") == 3
    site.write_text('[train]\npartition = "none"\n')
    refused = night.cellhpc("run", night.job, "--site", site, "--test-only")
    assert refused.returncode == 1
    assert "invalid partition" in refused.stderr.lower()
    assert not night.study.exists()
    assert whole_cluster.run("squeue", "-h").stdout == ""


def test_ranks_that_nodes_can_not_share_evenly_are_refused(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path
) -> None:
    night = Night(whole_cluster, tmp_path, raw, tmp_path / "store", ranks=2)
    (tmp_path / "site.toml").write_text("[train]\nnodes = 3\n")
    refused = night.cellhpc("run", night.job, "--site", tmp_path / "site.toml")
    assert refused.returncode == 2
    assert "sweep.ranks = 2 can't be spread evenly over train.nodes = 3 of the site file." in refused.stderr
    assert not (night.study / "job.json").exists()


def test_a_job_that_slurm_refuses_takes_back_those_before_it(
    whole_cluster: LocalCluster, tmp_path: Path, raw: Path
) -> None:
    night = Night(whole_cluster, tmp_path, raw, tmp_path / "store")
    (tmp_path / "site.toml").write_text('[slurm]\noptions = { hold = true }\n[aggregate]\npartition = "none"\n')
    refused = night.cellhpc("run", night.job, "--site", tmp_path / "site.toml")
    assert refused.returncode == 1
    assert "Slurm refused the job night-aggregate" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert whole_cluster.run("squeue", "-h").stdout == ""
