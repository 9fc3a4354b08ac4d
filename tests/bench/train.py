"""Speed of the training engine, against what one could write instead, in images of a step a second.

- fit: a plain `model.fit` of Keras on an array in memory, one process of as many threads as there are cores
- engine: this engine, the same network, batches and precision, no augmentation, one rank of as many threads; its
  operations are deterministic, those of `fit` need not be
- augmented: the same with the paper's augmentation
- two ranks: two Horovod ranks of one thread, each with half of every batch
- limit: two processes of one thread that train at the same time and know nothing of each other, each with batches of
  that half; they have a core each, as the ranks have
- two whole, limit whole: the same where each rank has as many tiles of a step as the one process has above

Then what a run costs beside its steps when it is not the first of its process (its weights, its predictions, its
files); what checkpoints cost, which are written far more often than a study does it; and what a run costs of which the
head alone learns, where the backbone runs once for all runs and where it runs in every step. Each line is a process of
its own; they take turns, so that a machine's moods reach all of them alike, and ratios are medians over the turns. The
first epoch, in which graphs are made, is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[2]))

from cellhpc.hosts import MEETING, RANK, RANKS
from cellhpc.launch import rank_cores

CORES = len(os.sched_getaffinity(0))
SMALL = {"network": "MobileNet(alpha=0.25)", "side_px": 128, "batch_size": 32, "steps": 48, "epochs": 3}
LARGE = {"network": "ResNet50", "side_px": 224, "batch_size": 8, "steps": 2, "epochs": 3}
REPEATS = 3
CHECKPOINT_SECONDS = 2.0


# ---- in a process of its own


def prepare(threads: int) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def engine(how: dict[str, Any]) -> dict[str, Any]:
    """Train one run, or several after each other in files; images/s of a rank's steps and what it waited."""
    prepare(how["threads"])
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()  # as the engine's own processes have it
    from cellhpc.ranks import joined
    from cellhpc.train import Trainer, Watch, train_run
    from tests import small

    per_compound = -(-how["batch_size"] * how["steps"] // 8)  # eight of the nine compounds are trained on
    data, folds = small.data(how["side_px"], per_compound)
    update = {key: how[key] for key in ("batch_size", "epochs")} | {"augment": how["augment"]} | how.get("train", {})
    if "anew" in how:
        type(small.SETTINGS).fixed_features = property(lambda _: False)
    settings = type(small.SETTINGS).model_validate({**small.SETTINGS.model_dump(), **update})
    with joined() as ranks, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(how["network"], data, settings, ranks)
        if "beside" in how:  # one that trains alone has the caches and the memory to itself
            Path(how["beside"], str(os.getpid())).touch()
            while len(list(Path(how["beside"]).iterdir())) < 2:
                time.sleep(0.01)
        seconds = []
        for number in range(how.get("runs", 1)):
            fold, seed = (number, 0) if "train" in how else (0, number)  # another seed draws another backbone
            run = small.run(folds, how["network"], fold, seed, side_px=how["side_px"])
            every = how.get("checkpoint_seconds", [600.0])
            began = time.perf_counter()
            train_run(trainer, run, folds, Path(folder), Watch(checkpoint_seconds=every[number % len(every)]))
            whole = time.perf_counter() - began
            if ranks.rank:  # rank 0 has written it all
                continue
            (history,) = Path(folder, run.id).rglob("history.json")
            epochs = json.loads(history.read_text())["epochs"]
            written = sum(epoch["checkpoint_seconds"] for epoch in epochs)
            steps = sum(epoch["seconds"] for epoch in epochs)
            seconds.append({"whole": whole, "steps": steps, "checkpoints": written})
    if ranks.rank:
        return {}
    counted = epochs[1:]
    return {
        "images_per_s": statistics.median(epoch["images_per_s"] for epoch in counted),
        "waiting": sum(epoch["waiting_for_data"] * epoch["seconds"] for epoch in counted)
        / sum(epoch["seconds"] for epoch in counted),
        "runs": seconds,
    }


def plain(how: dict[str, Any]) -> dict[str, Any]:
    """What one writes first, with the engine's threads: with those that TensorFlow takes by itself it is slower."""
    prepare(how["threads"])
    import keras
    import numpy as np

    from cellhpc.networks import build, parse_network

    count, side_px = how["batch_size"] * how["steps"], how["side_px"]
    random = np.random.default_rng(0)
    tiles = random.integers(0, 255, (count, side_px, side_px, 3), np.uint8)
    targets = random.integers(0, 3, count)
    model = build(parse_network(how["network"]), side_px, 3, 3, "xavier")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    began: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            began.append(time.perf_counter())

    model.fit(tiles, targets, batch_size=how["batch_size"], epochs=how["epochs"], verbose=0, callbacks=[Clock()])
    began.append(time.perf_counter())
    spent = [after - before for before, after in itertools.pairwise(began)]
    return {"images_per_s": count / statistics.median(spent[1:])}


# ---- from outside


def start(work: str, how: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, "--work", work, json.dumps(how)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def start_two(how: dict[str, Any], environments: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    """Start two processes, each on the core that the executor of this machine gives to a rank."""
    every = os.sched_getaffinity(0)
    started = []
    for rank, environment in enumerate(environments):
        os.sched_setaffinity(0, rank_cores(0, rank, 2, how["threads"]))  # which the process inherits
        started.append(start("engine", how, OMP_NUM_THREADS="1", **environment))
        os.sched_setaffinity(0, every)
    return started


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args} ended with {process.returncode}: {output}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def together(how: dict[str, Any]) -> dict[str, Any]:
    """Two ranks; each tells the speed of both."""
    with tempfile.TemporaryDirectory() as meeting:
        environments = [{RANK: str(rank), RANKS: "2", MEETING: meeting} for rank in range(2)]
        found = [answer(rank) for rank in start_two(how, environments)]
    return found[0]


def apart(how: dict[str, Any]) -> dict[str, Any]:
    """Two processes, each with half of the batch, that begin to train at the same moment."""
    with tempfile.TemporaryDirectory() as beside:
        half = how | {"batch_size": how["batch_size"] // 2, "beside": beside}
        found = [answer(one) for one in start_two(half, [{}, {}])]
    return {"images_per_s": sum(one["images_per_s"] for one in found)}


def measure(case: dict[str, Any], repeats: int, alone: bool = True, parallel: bool = False) -> dict[str, Any]:
    how = case | {"threads": CORES, "augment": "none"}
    each = how | {"threads": 1, "epochs": 2 * case["epochs"]}
    twice = each | {"batch_size": 2 * case["batch_size"], "steps": case["steps"] // 2}
    kinds: dict[str, Callable[[], dict[str, Any]]] = {}
    if alone:
        kinds |= {
            "fit": lambda: answer(start("plain", how)),
            "augmented": lambda: answer(start("engine", how | {"augment": "kensert2019"})),
        }
    kinds["engine"] = lambda: answer(start("engine", how))
    if parallel:
        kinds |= {
            "two ranks": lambda: together(each),
            "limit": lambda: apart(each),
            "two whole": lambda: together(twice),
            "limit whole": lambda: apart(twice),
        }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, work in kinds.items():
            found[name].append(work())
    print(f"{case['network']} at {case['side_px']} px, batches of {case['batch_size']}, {CORES} cores")
    print(f"{'':11} {'images/s':>9} {'waiting':>8}   all of them")
    speeds = {name: statistics.median(one["images_per_s"] for one in many) for name, many in found.items()}
    waiting = {name: max(one.get("waiting", 0.0) for one in many) for name, many in found.items()}
    for name, speed in speeds.items():
        every = " ".join(f"{one['images_per_s']:.1f}" for one in found[name])
        waited = f"{waiting[name]:8.2%}" if "waiting" in found[name][0] else " " * 8
        print(f"{name:11} {speed:9.1f} {waited}   {every}", flush=True)

    def ratio(one: str, other: str) -> float:
        """Of speeds that were measured right after each other, the median over the repeats."""
        pairs = zip(found[one], found[other], strict=True)
        return statistics.median(a["images_per_s"] / b["images_per_s"] for a, b in pairs)

    ratios = {}
    if alone:
        ratios["engine_of_fit"] = ratio("engine", "fit")
        print(f"the engine has {ratios['engine_of_fit']:.0%} of fit")
    if parallel:
        ratios["two_ranks_of_limit"] = ratio("two ranks", "limit")
        ratios["two_whole_of_limit"] = ratio("two whole", "limit whole")
        ratios["two_ranks_of_one"] = ratio("two ranks", "engine")
        print(f"two ranks have {ratios['two_ranks_of_limit']:.0%} of the limit, {ratios['two_whole_of_limit']:.0%} "
              f"with {case['batch_size']} tiles each, and {ratios['two_ranks_of_one']:.0%} of one rank "
              f"of {CORES} threads")  # fmt: skip
    return {"images_per_s": speeds, "waiting": waiting, **ratios}


def packed() -> dict[str, Any]:
    how = SMALL | {"threads": CORES, "augment": "kensert2019", "runs": 4, "steps": 8, "epochs": 2}
    runs = answer(start("engine", how))["runs"]
    beside = [run["whole"] - run["steps"] for run in runs]
    print(f"a run beside its steps, {how['network']} at {how['side_px']} px: the first of its process takes "
          f"{runs[0]['whole'] - statistics.median(run['steps'] for run in runs[1:]):.2f} s, "
          f"the next ones {', '.join(f'{one:.2f}' for one in beside[1:])} s")  # fmt: skip
    return {"beside_its_steps_s": beside[1:]}


def checkpoints() -> dict[str, Any]:
    """Runs of one process, with checkpoints and without in turn; the first, which makes the graphs, is not counted."""
    how = SMALL | {"threads": CORES, "augment": "none", "runs": 9, "epochs": 2}
    runs = answer(start("engine", how | {"checkpoint_seconds": [600.0, CHECKPOINT_SECONDS]}))["runs"][1:]
    taken = [run["steps"] + run["checkpoints"] for run in runs]
    cost = statistics.median(taken[::2]) / statistics.median(taken[1::2]) - 1
    waited = sum(run["checkpoints"] for run in runs[::2]) / sum(taken[::2])
    print(f"checkpoints every {CHECKPOINT_SECONDS:g} s take {cost:.1%} of the training time, of which steps wait "
          f"{waited:.2%}; every ten minutes, as by default, that is {cost * CHECKPOINT_SECONDS / 600:.3%}")  # fmt: skip
    return {"every_s": CHECKPOINT_SECONDS, "cost": cost, "waited": waited}


def heads() -> dict[str, Any]:
    """Runs of one process, a fold each; the first, which makes graphs and features, apart."""
    train = {
        "preset": "fast",
        "trained": "head",
        "optimizer": "adamw",
        "batch_norm": "frozen",
        "input_scaling": "keras",
    }
    how = SMALL | {"threads": CORES, "augment": "none", "runs": 3, "epochs": 5, "train": train}
    found = {}
    for name, more in (("once", {}), ("anew", {"anew": True})):
        whole = [run["whole"] for run in answer(start("engine", how | more))["runs"]]
        found[name] = {"first_s": whole[0], "next_s": statistics.median(whole[1:])}
    once, anew = found["once"], found["anew"]
    print(f"a head alone, 5 epochs of {how['steps']} steps, {how['network']} at {how['side_px']} px: a run takes "
          f"{once['next_s']:.2f} s where the backbone runs once for all, the first {once['first_s']:.2f} s; "
          f"{anew['next_s']:.2f} s where it runs in every step, the first {anew['first_s']:.2f} s: "
          f"{anew['next_s'] / once['next_s']:.0f} times as long")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--ranks", action="store_true", help="only what one rank and two do, and the limit")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work, how = given.work
        print(json.dumps({"engine": engine, "plain": plain}[work](json.loads(how))))
        return
    small = measure(SMALL, given.repeats, alone=not given.ranks, parallel=True)
    if given.ranks:
        print(json.dumps({"bench": "train", "cores": CORES, "small": small}))
        return
    large = measure(LARGE, 1)
    beside = {"packed": packed(), "checkpoints": checkpoints(), "heads": heads()}
    print(json.dumps({"bench": "train", "cores": CORES, "small": small, "large": large, **beside}))


if __name__ == "__main__":
    main()
