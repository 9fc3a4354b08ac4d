"""Sweeps of 10 to 10,000 runs: what planning, submitting and status cost, and what a run costs in a job of its own.

On the local Slurm cluster (root, Debian; see slurm/README.md). The first table trains nothing: its jobs are held. The
second trains eight tiny runs twice, packed into one job and each in a job of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from cellhpc import drive
from cellhpc.attempts import Attempt, finished
from cellhpc.ledger import read_json
from cellhpc.settings import load_job
from cellhpc.site import parse_site
from cellhpc.study import StudyFolder
from slurm.cluster import LocalCluster
from tests.night import Night
from tests.small_screen import make_small_screen

SIZES = (10, 100, 1_000, 10_000)
RUNS_PER_JOB = 10
FOLDS = 4
STAGE = {"memory_gb": 1, "time": 30}


def planned(cluster: LocalCluster, folder: Path, raw: Path, store: Path, runs: int) -> dict[str, Any]:
    """Plan, submit and look at a sweep of this many runs, half of which are marked as done."""
    night = Night(cluster, folder, raw, store)
    seeds = list(range(-(-runs // FOLDS)))
    settings = [f"sweep.seeds={seeds}", f"sweep.runs_per_job={RUNS_PER_JOB}"]
    job = load_job(night.job, settings)
    held = {"slurm": {"options": {"hold": True}}, "train": STAGE, "convert": STAGE, "aggregate": STAGE}
    site = parse_site(held, "site")
    began = time.perf_counter()
    plan = drive.plan_submission(job, site)
    after_plan = time.perf_counter()
    drive.submit_study(job, site)
    after_submit = time.perf_counter()
    files = sum(len(names) for _, _, names in os.walk(night.study))
    for run in plan.study.runs[::2]:
        attempt = Attempt.claim(StudyFolder(night.study).runs / run.id, run.digest)
        attempt.publish(run.digest)
    looks = []
    for _ in range(3):
        look = time.perf_counter()
        said = night.cellhpc("status", night.study)
        looks.append(time.perf_counter() - look)
        assert said.returncode == 1, said.stderr
        assert f"{len(plan.study.runs):,} runs" in said.stdout
    cluster.run("scancel", "--me", check=True)
    return {
        "runs": len(plan.study.runs),
        "tasks": len(plan.tasks),
        "plan_s": after_plan - began,
        "submit_s": after_submit - after_plan,
        "files": files,
        "status_s": statistics.median(looks),
    }


def overhead(cluster: LocalCluster, folder: Path, raw: Path, store: Path, runs_per_job: int) -> dict[str, float]:
    """Train eight tiny runs; seconds for each that were not its training."""
    night = Night(cluster, folder, raw, store, epochs=1)
    words = ["--set", "sweep.seeds=[0, 1]", "--set", f"sweep.runs_per_job={runs_per_job}"]
    began = time.time()
    night.submit("train", *words)
    night.until_quiet(1200)
    units = [finished(unit) for unit in (night.study / "runs").iterdir()]
    records = [read_json(unit / "run.json") for unit in units if unit]
    assert len(records) == 2 * FOLDS, night.last_words()
    last = max((unit / "run.json").stat().st_mtime for unit in units if unit)
    trained = sum(epoch["seconds"] for unit in units if unit for epoch in read_json(unit / "history.json")["epochs"])
    return {"wall_s": last - began, "overhead_s_a_run": (last - began - trained) / len(records)}


def main() -> None:
    if reason := LocalCluster.can_run():
        sys.exit(f"sweep: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        raw, store = make_small_screen(top / "raw"), top / "store"
        rows = []
        with LocalCluster(top / "cluster", nodes=3, cpus=4) as cluster:
            os.environ.update(cluster.env)
            drive.run_study(load_job(Night(cluster, top / "first", raw, store).job), ("convert",))
            print(f"{'runs':>7} {'tasks':>6} {'plan s':>8} {'submit s':>9} {'files':>7} {'status s':>9}")
            for size in SIZES:
                rows.append(row := planned(cluster, top / f"sweep-{size}", raw, store, size))
                print(
                    f"{row['runs']:7,} {row['tasks']:6,} {row['plan_s']:8.2f} {row['submit_s']:9.2f} "
                    f"{row['files']:7,} {row['status_s']:9.2f}"
                )
            packed = overhead(cluster, top / "packed", raw, store, 2 * FOLDS)
            alone = overhead(cluster, top / "alone", raw, store, 1)
        for title, facts in (("eight runs in one job", packed), ("a job for each run", alone)):
            print(f"{title}: {facts['wall_s']:.0f} s, {facts['overhead_s_a_run']:.1f} s a run besides its training")
    growth = {name: rows[-1][name] / rows[-2][name] for name in ("plan_s", "submit_s", "files", "status_s")}
    print(f"from 1,000 to 10,000 runs: {', '.join(f'{name} x {ratio:.1f}' for name, ratio in growth.items())}")
    figures = {"sweeps": rows, "growth_from_1000_to_10000": growth, "packed": packed, "alone": alone}
    print(json.dumps({"bench": "sweep", "cores": os.cpu_count(), **figures}))


if __name__ == "__main__":
    main()
