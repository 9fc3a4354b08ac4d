"""The demo on the local Slurm cluster of three nodes: undisturbed, with a fault in each stage, and inside a container.

Each must come to the scores of `cellhpc run jobs/demo.toml` on this machine without Slurm, to the last digit. Then an
array of 44 packed runs, throttled, and a small study whose jobs reach their time limit again and again. Needs root on
Debian (slurm/README.md), and for the container CELLHPC_IMAGE, the path of an image from containers/build.sh.
`cluster.py PART ...` does only these: slurm, faults, container, array, limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import pandas as pd
import psutil

from cellhpc.ledger import read_json
from slurm.cluster import LocalCluster
from tests.night import Night, here
from tests.small_screen import make_small_screen

ROOT = Path(__file__).parents[2]
PARTS = ("slurm", "faults", "container", "array", "limit")
SECONDS = 3600.0


def cellhpc(environment: dict[str, str], *words: object) -> str:
    """Type a command; it must succeed."""
    command = [sys.executable, "-m", "cellhpc.cli", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def scores(study: Path) -> tuple[Any, pd.DataFrame]:
    """Levels and treatment probabilities: what must not depend on where and how a study was run."""
    return (
        read_json(study / "results" / "scores.json")["models"][0]["levels"],
        pd.read_csv(study / "results" / "treatments.csv"),
    )


class Demo:
    """The demo as jobs of the cluster."""

    def __init__(self, cluster: LocalCluster, folder: Path, raw: Path, site: str) -> None:
        self.cluster, self.study = cluster, folder / "study"
        folder.mkdir()
        (folder / "site.toml").write_text(site)
        settings = [f"study.folder={self.study}", f"screen.path={raw}", "sweep.checkpoint_minutes=0.1"]
        self.words = ["jobs/demo.toml", "--site", folder / "site.toml", *(w for s in settings for w in ("--set", s))]
        self.began = time.monotonic()

    def submit(self) -> None:
        print(cellhpc(self.cluster.env, "run", *self.words).rstrip(), file=sys.stderr)

    def until(self, what: str, test: Callable[[], bool]) -> None:
        """Wait; show what the study does when it does not come."""
        deadline = time.monotonic() + SECONDS
        while not test():
            if time.monotonic() > deadline:
                sys.exit(f"waited in vain until {what}")
            time.sleep(0.5)
        print(f"{time.monotonic() - self.began:6.0f} s  {what}", file=sys.stderr, flush=True)

    def queue(self) -> list[str]:
        return self.cluster.run("squeue", "-h", "-o", "%j %T").stdout.splitlines()

    def runs(self, stage: str) -> bool:
        return f"demo-{stage} RUNNING" in self.queue()

    def done(self) -> int:
        return len(list((self.study / "runs").glob("*/done.json")))

    def finish(self) -> float:
        """Wait for the end, and resume where something is missing; returns the seconds since the submission."""
        for _ in range(5):
            self.until("nothing waits or runs", lambda: not self.queue())
            said = subprocess.run(
                [sys.executable, "-m", "cellhpc.cli", "status", str(self.study)],
                env=self.cluster.env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if said.returncode == 0:
                return time.monotonic() - self.began
            print(said.stdout, file=sys.stderr)
            print(cellhpc(self.cluster.env, "resume", self.study), file=sys.stderr)
        sys.exit("cluster: resumed five times, and still not complete")


def disturb(demo: Demo) -> list[str]:
    """Hurt every stage while it runs."""
    cluster, hurt = demo.cluster, []
    demo.until("the conversion writes", lambda: len(list((demo.study / "store" / "plates").glob("*/0*.json"))) > 3)
    _kill_rank(demo, "convert", "0")
    hurt.append("convert: rank 0 killed -9")
    demo.until("a run is trained", lambda: demo.done() >= 1)
    _kill_rank(demo, "train", "1")
    hurt.append("train: rank 1 killed -9")
    before = demo.done()
    demo.until("another one is trained", lambda: demo.done() > before)
    node = cluster.run("squeue", "-h", "-n", "demo-train", "-o", "%B").stdout.strip()
    cluster.kill_node(node)
    hurt.append(f"train: power of {node} cut")
    before = demo.done()
    demo.until("another one is trained", lambda: demo.done() > before)
    cluster.start_node(node)
    job = cluster.run("squeue", "-h", "-n", "demo-train", "-o", "%i").stdout.strip()
    cluster.run("scancel", "--signal=USR2", job, check=True)
    hurt.append("train: told to stop (USR2)")
    before = demo.done()
    demo.until("another one is trained", lambda: demo.done() > before)
    cluster.kill_daemon("slurmctld")
    cluster.start_daemon("slurmctld")
    hurt.append("slurmctld killed -9 and started")
    cellhpc(cluster.env, "cancel", demo.study)
    hurt.append("train: cancelled, resumed")
    demo.until("nothing waits or runs", lambda: not demo.queue())
    cellhpc(cluster.env, "resume", demo.study)
    demo.until("the scores are made", lambda: demo.runs("aggregate"))
    _kill_rank(demo, "aggregate", "0")
    hurt.append("aggregate: killed -9")
    return hurt


def _kill_rank(demo: Demo, stage: str, rank: str) -> None:
    """Kill a rank of a stage, as soon as its process is there."""

    def found() -> bool:
        for process in psutil.process_iter(["cmdline", "environ"]):
            environment = process.info["environ"] or {}
            if "submitit.core._submit" not in (process.info["cmdline"] or []):
                continue
            mine = any(str(demo.study) in word for word in process.info["cmdline"])
            if mine and environment.get("SLURM_JOB_NAME") == f"demo-{stage}" and environment["SLURM_PROCID"] == rank:
                process.kill()
                return True
        return False

    demo.until(f"rank {rank} of {stage} is killed", found)


def main() -> None:
    parts = sys.argv[1:] or list(PARTS)
    if reason := LocalCluster.can_run():
        sys.exit(f"cluster: {reason}")
    image = os.environ.get("CELLHPC_IMAGE", "")
    rows: list[dict[str, Any]] = []

    def note(part: str, seconds: float, **facts: Any) -> None:
        rows.append({"part": part, "seconds": round(seconds), **facts})
        print(f"{part:<12} {seconds:6.0f} s  {json.dumps(facts)}", flush=True)

    local = (ROOT / "slurm" / "local.toml").read_text()
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        raw = top / "raw"
        cellhpc(dict(os.environ), "synth", "bbbc021", raw, "--preset", "demo")
        began = time.monotonic()
        words = ["--set", f"study.folder={top / 'here'}", "--set", f"screen.path={raw}"]
        cellhpc(dict(os.environ), "run", "jobs/demo.toml", *words)
        expected = scores(top / "here")
        note("here", time.monotonic() - began, treatments=expected[0]["treatment"]["correct"])

        def compare(demo: Demo) -> bool:
            found = scores(demo.study)
            return found[0] == expected[0] and found[1].equals(expected[1])

        with LocalCluster(top / "cluster", nodes=3, cpus=2, slurmd_timeout=5) as cluster:
            if "slurm" in parts:
                demo = Demo(cluster, top / "slurm", raw, local)
                demo.submit()
                note("slurm", demo.finish(), same=compare(demo))
            if "faults" in parts:
                demo = Demo(cluster, top / "faults", raw, local)
                demo.submit()
                hurt = disturb(demo)
                note("faults", demo.finish(), same=compare(demo), faults=hurt)
            if "container" in parts and image:
                demo = Demo(cluster, top / "container", raw, f'{local}\n[container]\nimage = "{image}"\n')
                demo.submit()
                seconds = demo.finish()
                record = next((demo.study / "runs").glob("*/*/run.json"))
                note("container", seconds, same=compare(demo), image=read_json(record).get("image"))
            elif "container" in parts:
                print("container    skipped: CELLHPC_IMAGE names no image; build one: make container")
            if "array" in parts:
                seconds, facts = _array(cluster, top)
                note("array", seconds, **facts)
            if "limit" in parts:
                seconds, facts = _limit(cluster, top)
                note("limit", seconds, **facts)
    print(json.dumps({"bench": "cluster", "cores": os.cpu_count(), "parts": rows}))
    if not all(row.get("same", True) for row in rows):
        sys.exit("cluster: a part did not come to what it should")


def _array(cluster: LocalCluster, top: Path) -> tuple[float, dict[str, Any]]:
    """44 tiny runs in 11 elements of an array, of which at most two run at a time."""
    night = Night(cluster, top / "array", make_small_screen(top / "small"), top / "store", epochs=1)
    began = time.monotonic()
    settings = ["--set", f"sweep.seeds={list(range(11))}", "--set", "sweep.runs_per_job=4"]
    night.submit("run", *settings, train={"throttle": 2})
    most = 0
    while queue := cluster.run("squeue", "-h", "-r", "-o", "%j %T").stdout.splitlines():
        most = max(most, queue.count("night-train RUNNING"))
        time.sleep(0.2)
    status = night.status()
    facts = {"counts": status["counts"], "tasks": 11, "at_most_at_a_time": most}
    return time.monotonic() - began, {"same": status["counts"] == {"done": 44} and most <= 2, **facts}


def _limit(cluster: LocalCluster, top: Path) -> tuple[float, dict[str, Any]]:
    """Four runs in one job with a limit of a minute: stopped, queued again and continued, until all are done."""
    raw, epochs = make_small_screen(top / "small"), 150
    expected = here(top / "limit-here", raw, top / "store", 1, epochs)
    night = Night(cluster, top / "limit", raw, top / "store", epochs=epochs)
    began = time.monotonic()
    night.submit(train={"time": 1, "signal_seconds": 30})
    night.until_done(SECONDS)
    found = night.predictions()
    equal = found.keys() == expected.keys() and all(found[name].equals(expected[name]) for name in found)
    return time.monotonic() - began, {"same": equal, "stopped": night.ends().count("checkpointed")}


if __name__ == "__main__":
    main()
