"""Scaling on paper: hours and bytes of a full BBBC021 study, and of one ten thousand times larger.

Three networks, pre-trained and not, five seeds, the 38 folds of the real tables (needs CELLHPC_DATA): what
`cellhpc run --dry-run` tells for a site file, from parts that are measured here and now on this machine's cores: a few
steps of each network, its predictions and its start in a process of its own, and the mean of 94 MB over two ranks. The
larger study has ten thousand times the plates of the same compounds, so the same runs, each on many ranks, and reads
its tiles in windows. With --site, nothing is measured: both are told for that site file's jobs and its [measured].
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[2]))

from cellhpc.cost import Cost, Stored
from cellhpc.estimate import estimate
from cellhpc.folds import plan_folds
from cellhpc.hosts import MEETING, RANK, RANKS
from cellhpc.measured import Parts, parts_of
from cellhpc.networks import parse_network
from cellhpc.outlook import place_on, tiles_by_fold, trainings
from cellhpc.screens import read_screen
from cellhpc.settings import Job, load_job
from cellhpc.site import MeasuredSettings, Site, load_site, parse_site
from cellhpc.submission import pack
from cellhpc.sweep import plan_runs
from cellhpc.traffic import Sizes, count, ring_bytes

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
SEEDS = 5
SHORT = {"batch_size": 8, "epochs": 2, "augment": "kensert2019"}
STEPS, RUNS = 2, 2
MEAN_NUMBERS, MEANS = 23_500_000, 6
HERE = {"train": {"cpus_per_task": CORES, "throttle": 32, "time": "12:00:00"}}


# ---- measured in processes of their own


def train(network: str, folder: str) -> None:
    """Train two short runs as a job does; they leave in files what they took."""
    import psutil
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(CORES)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    from cellhpc.ranks import OneRank
    from cellhpc.train import Trainer, train_run
    from tests import small

    side_px = parse_network(network).side_px
    data, folds = small.data(side_px, SHORT["batch_size"] * STEPS // 8)  # eight of nine compounds are trained on
    settings = type(small.SETTINGS).model_validate({**small.SETTINGS.model_dump(), **SHORT})
    trainer = Trainer(network, data, settings, OneRank())
    about = {"started": psutil.Process().create_time()}
    for seed in range(RUNS):
        run = small.run(folds, network, seed=seed, side_px=side_px)
        train_run(trainer, run, folds, Path(folder), about=about)
        about = {}


def mean(_: str, folder: str) -> None:
    """Average as many numbers as ResNet50 has over two ranks; seconds, and the bytes that went over the loopback."""
    import tensorflow as tf

    from cellhpc.ranks import joined

    tf.config.threading.set_intra_op_parallelism_threads(1)
    with joined() as ranks:
        tensors = [tf.ones((MEAN_NUMBERS // 6,)) for _ in range(6)]
        ranks.mean(tensors)
        seconds = []
        sent = sent_over_loopback()
        for _ in range(MEANS):
            began = time.perf_counter()
            ranks.mean(tensors)
            seconds.append(time.perf_counter() - began)
        sent = sent_over_loopback() - sent
        ranks.gather(tf.zeros((1,)).numpy())
    if ranks.rank == 0:
        found = {"seconds": statistics.median(seconds), "sent": sent / MEANS / 2}
        (Path(folder) / "mean.json").write_text(json.dumps(found))


def sent_over_loopback() -> int:
    lines = [line.split() for line in Path("/proc/net/dev").read_text().replace(":", ": ").splitlines()]
    return next((int(words[9]) for words in lines if words[0] == "lo:"), 0)


# ---- from outside


def start(work: str, what: str, folder: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--work", work, what, folder], env={**os.environ, **environment})


def wait(*processes: subprocess.Popen[bytes]) -> None:
    if any([process.wait() for process in processes]):
        sys.exit("scaling: a measurement failed")


def measure(networks: list[str]) -> tuple[dict[str, Parts], float]:
    """Measure each network, then the mean over ranks."""
    source = f"measured just now on {CORES} cores, in batches of {SHORT['batch_size']}"
    parts = {}
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            wait(start("train", network, folder))
            found = parts_of([network], 1, MeasuredSettings(), [(network, unit) for unit in Path(folder).iterdir()])
        figures = {name: figure and replace(figure, source=source) for name, figure in vars(found[network]).items()}
        parts[network] = Parts(**figures)
        print("  " + ", ".join(f"{key} {figure.value:.2f}" for key, figure in figures.items() if figure)
              + f"  {network}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        wait(*(start("mean", "", folder, **{RANK: str(rank), RANKS: "2", MEETING: folder, "OMP_NUM_THREADS": "1"})
               for rank in range(2)))  # fmt: skip
        found_mean = json.loads((Path(folder) / "mean.json").read_text())
    planned = ring_bytes(4 * MEAN_NUMBERS, 2)
    rate = planned / found_mean["seconds"] / 1e6
    print(f"  a rank of two sent {found_mean['sent'] / 1e6:.1f} MB for a mean, {planned / 1e6:.1f} MB by the formula, "
          f"{rate:.0f} MB/s", flush=True)  # fmt: skip
    return parts, rate


def study(
    job: Job, site: Site, parts: dict[str, Parts], rate: float | None, sizes: dict[str, Sizes] | None, times: int
) -> Cost:
    """Cost of BBBC021 with so many times its plates."""
    screen = read_screen(job.screen)
    folds = plan_folds(screen.fields, job.folds)
    each = job.convert.tile_grid[0] * job.convert.tile_grid[1] * times
    tiles = tiles_by_fold(folds, screen.fields, each)
    runs = {run.id: run for run in plan_runs(job, folds, "")}
    tasks = pack(list(runs), job.sweep.ranks, site.train.cpus_per_task, site.train.throttle, job.sweep.runs_per_job)
    jobs = [[load for name in task.runs for load in trainings(job, runs[name], tiles)] for task in tasks]
    number = int(folds.used(screen.fields).sum()) * each
    plain = {run.tile_px: float(number * run.tile_px**2 * len(screen.channels)) for run in runs.values()}
    print(f"\n{len(screen.fields['plate'].unique()) * times:,} plates, {number:,} tiles, {len(folds.folds)} folds")
    stored = Stored(number, plain, plain, "tiles before compression, none set aside")
    cost = estimate(
        [(site.train.throttle, jobs)], place_on(site, job.sweep.ranks), job.train, stored, parts, sizes, rate
    )
    print(cost.render(), flush=True)
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", help="a site file, in the place of this machine")
    parser.add_argument("--times", type=int, default=10_000, help="plates of the larger study, times BBBC021's")
    parser.add_argument("--ranks", type=int, default=64, help="ranks of each run of the larger study")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        {"train": train, "mean": mean}[given.work[0]](*given.work[1:])
        return
    if not (data := os.environ.get("CELLHPC_DATA")):
        sys.exit("scaling: the environment variable CELLHPC_DATA names no folder of real data")
    began = time.perf_counter()
    tables = Path(data).absolute() / "bbbc021_metadata"
    os.environ["BBBC021"] = str(tables)
    overrides = [f"sweep.seeds={list(range(SEEDS))}"]
    job = load_job(ROOT / "jobs" / "bbbc021.toml", overrides)
    batch = job.train.batch_size * given.ranks
    large = [f"sweep.ranks={given.ranks}", f"train.batch_size={batch}", f"train.window_tiles={128 * batch}"]
    larger = load_job(ROOT / "jobs" / "bbbc021.toml", [*overrides, *large])
    networks = list(job.sweep.networks)
    if given.site:
        site = load_site(given.site)
        parts, rate = parts_of(networks, job.sweep.ranks, site.measured, []), site.measured.allreduce_mb_per_s
    else:
        site = parse_site(HERE, "here")
        print(f"Measured on {CORES} cores", flush=True)
        parts, rate = measure(networks)
    gpus = place_on(site, 1).gpus // site.train.nodes  # of a node; without any, a node for each rank
    train_stage = site.train.model_copy(update={"nodes": max(1, given.ranks // max(1, gpus))})
    many = site.model_copy(update={"train": train_stage})
    found = count([(name, parse_network(name).side_px, 3) for name in networks], 12, job.train)
    sizes = dict(zip(networks, found, strict=True)) if found else None
    costs = {
        "study": study(job, site, parts, rate, sizes, 1),
        "larger": study(larger, many, parts, rate, sizes, given.times),
    }
    figures: dict[str, Any] = {
        network: {key: figure and figure.value for key, figure in vars(one).items()} for network, one in parts.items()
    }
    print()
    if not given.site:
        speeds = {
            key: ", ".join(f"{name} = {one[key]:.2f}" for name, one in figures.items())
            for key in ("images_per_s", "predicted_per_s")
        }
        print("[measured]\n" + "\n".join(f"{key} = {{ {text} }}" for key, text in speeds.items()))
        for key in ("start_seconds", "run_seconds"):
            print(f"{key} = {max(one[key] for one in figures.values()):.2f}")
        print(f"ranks = 1\nallreduce_mb_per_s = {rate:.0f}\n")
    facts = {"bench": "scaling", "cores": CORES, "seconds": time.perf_counter() - began, "times": given.times}
    print(json.dumps(facts | {"measured": figures, "allreduce_mb_per_s": rate}
                     | {name: cost.to_json() for name, cost in costs.items()}))  # fmt: skip


if __name__ == "__main__":
    main()
