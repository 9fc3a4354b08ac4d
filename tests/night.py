"""A small study on the local cluster, what may happen to it at night, and what it must come to all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cellhpc.attempts import finished, newest
from cellhpc.ledger import read_json
from slurm.cluster import LocalCluster

JOB = """
[study]
name = "night"
folder = "{folder}/study"
[screen]
layout = "bbbc021"
path = "{raw}"
[convert]
store = "{store}"
[train]
epochs = {epochs}
batch_size = 16
learning_rate = 0.02
augment = "rotations"
[sweep]
networks = ["MobileNet(alpha=0.25)"]
weights = ["xavier"]
tile_px = 32
ranks = {ranks}
checkpoint_minutes = 0.02
"""


class Night:
    """One study, submitted to the cluster; `more` are lines for the end of its job file, in `[sweep]`."""

    def __init__(
        self,
        cluster: LocalCluster,
        folder: Path,
        raw: Path,
        store: Path,
        ranks: int = 1,
        epochs: int = 8,
        more: str = "",
    ):
        self.cluster, self.folder = cluster, folder
        self.study = folder / "study"
        self.job = folder / "job.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self.job.write_text(JOB.format(folder=folder, raw=raw, store=store, ranks=ranks, epochs=epochs) + more)

    def cellhpc(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Type a command of cellhpc on the cluster's login node."""
        return subprocess.run(
            [sys.executable, "-m", "cellhpc.cli", *map(str, words)],
            env={**self.cluster.env, "COLUMNS": "160", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def submit(self, command: str = "train", *words: object, **sections: dict[str, Any]) -> None:
        """Submit the study, with a site file of these sections."""
        site: dict[str, dict[str, Any]] = {"convert": {}, "train": {"throttle": 1}, "aggregate": {}}
        site |= {name: site.get(name, {}) | keys for name, keys in sections.items()}
        for stage in ("convert", "train", "aggregate"):
            site[stage] = {"memory_gb": 2, "time": "00:30:00"} | site[stage]
        lines = [f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
                 for name, keys in site.items()]  # fmt: skip
        (self.folder / "site.toml").write_text("\n".join(lines))
        said = self.cellhpc(command, self.job, "--site", self.folder / "site.toml", *words)
        assert said.returncode == 0, said.stderr

    def status(self) -> dict[str, Any]:
        """What `cellhpc status` says."""
        said = self.cellhpc("status", self.study, "--json")
        assert said.stdout, said.stderr
        facts: dict[str, Any] = json.loads(said.stdout)
        assert (said.returncode == 0) == facts["complete"]
        return facts

    def run_at_work(self, epoch: int = 1, but: str = "", seconds: float = 120) -> tuple[str, dict[str, Any]]:
        """Wait until a run has been trained for some epochs; returns its name and its attempt's record."""
        found: list[tuple[str, dict[str, Any]]] = []

        def reached() -> bool:
            for unit in (self.study / "runs").glob("*"):
                attempt = newest(unit)
                if attempt is None or finished(unit) or str(attempt) == but:
                    continue
                history = attempt / "history.json"
                if history.exists() and len(read_json(history)["epochs"]) >= epoch:
                    found.append((unit.name, {**read_json(attempt / "attempt.json"), "folder": str(attempt)}))
                    return True
            return False

        until("a run is at work", reached, seconds, self.last_words)
        return found[0]

    def until_done(self, seconds: float = 240) -> None:
        """Wait until every run is done and nothing waits or runs."""

        def done() -> bool:
            queue = self.cluster.run("squeue", "-h").stdout.split()
            return not queue and {run["state"] for run in self.status()["runs"]} == {"done"}

        until("every run is done", done, seconds, self.last_words)

    def until_quiet(self, seconds: float = 240) -> dict[str, Any]:
        """Wait until nothing of it waits or runs; returns the status."""
        until("nothing runs", lambda: not self.cluster.run("squeue", "-h").stdout.strip(), seconds, self.last_words)
        return self.status()

    def last_words(self) -> str:
        """What its logs say last, for a test that fails."""
        logs = sorted((self.study / "jobs").glob("*/logs/*.out"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)

    def ends(self) -> list[str]:
        """How its tasks ended, in the order of time."""
        lines = [line for path in (self.study / "jobs").glob("*/*/ends") for line in path.read_text().splitlines()]
        return [line.split()[-1] for line in sorted(lines)]

    def predictions(self) -> dict[str, pd.DataFrame]:
        """Predictions of each finished run."""
        found = {unit.name: finished(unit) for unit in (self.study / "runs").glob("*")}
        return {name: pd.read_parquet(folder / "predictions.parquet") for name, folder in found.items() if folder}


def same(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> None:
    """Check that two studies predict the same, to the last digit."""
    assert one.keys() == other.keys()
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, other[name], check_exact=True)


def until(what: str, test: Callable[[], bool], seconds: float, words: Callable[[], str] = str) -> None:
    """Wait until something holds; fail with `words` if it doesn't."""
    deadline = time.monotonic() + seconds
    while not test():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s in vain until {what}\n{words()}")
        time.sleep(0.3)


def here(
    folder: Path, raw: Path, store: Path, ranks: int, epochs: int, command: str = "run", more: str = ""
) -> dict[str, pd.DataFrame]:
    """Predictions of the same study, undisturbed, on this machine without Slurm."""
    folder.mkdir(parents=True)
    job = folder / "job.toml"
    job.write_text(JOB.format(folder=folder, raw=raw, store=store, ranks=ranks, epochs=epochs) + more)
    words = [sys.executable, "-m", "cellhpc.cli", command, str(job)]
    cores = sorted(os.sched_getaffinity(0))[:ranks]  # a thread for each rank, as the cluster's tasks have
    done = subprocess.run(
        words, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores), check=False
    )
    assert done.returncode == 0, done.stderr
    units = (folder / "study" / "runs").glob("*")
    return {unit.name: pd.read_parquet(finished(unit) / "predictions.parquet") for unit in units}  # type: ignore[operator]
