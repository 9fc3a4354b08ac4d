"""Trains one run whole, and the same run with interruptions, on as many ranks as the test starts.

Usage: resume_program.py FOLDER whole|stopped|interrupted|rest|often... [SETTINGS]

SETTINGS are more keys of `[train]`, as JSON.

- `stopped`: rank 1 stops it after every single step.
- `interrupted`: stopped three times, by a rank each; superseded; the disk is full; then rank 1 is killed between two
  checkpoints.
- `rest`: new processes do the rest.
- `often`: so do these, and a checkpoint is due after every step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent))

import small
import tensorflow as tf

from cellhpc.attempts import Attempt
from cellhpc.errors import UserError
from cellhpc.ranks import RankLost, joined
from cellhpc.recipe import AUGMENTATIONS
from cellhpc.train import Interrupted, Trainer, Watch, train_run

folder, parts = Path(sys.argv[1]), sys.argv[2:]
more = json.loads(parts.pop()) if parts[-1].startswith("{") else {}
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.experimental.enable_op_determinism()
data, folds = small.data()
settings = small.SETTINGS.model_copy(update={"epochs": 3, "augment": AUGMENTATIONS["rotations"], **more})
LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)
NETWORK = "MobileNet(alpha=0.25)"
run = small.run(folds, NETWORK)
seen: dict[str, Any] = {}


def die() -> None:
    (folder / "rank-1.json").write_text(json.dumps(seen))
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def supersede() -> None:
    Attempt.claim(folder / run.id, run.digest)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, LIMIT[1]))  # stands for the disk


with joined() as ranks:
    trainer = Trainer(NETWORK, data, settings, ranks)
    if "whole" in parts:
        train_run(trainer, dataclasses.replace(run, id="whole"), folds, folder, Watch(keep_weights=True))
    if "stopped" in parts:
        seen["stops"] = 0
        while True:
            try:
                train_run(trainer, run, folds, folder, small.After(0) if ranks.rank == 1 else Watch())
                break
            except Interrupted:
                seen["stops"] += 1
    if "interrupted" in parts:
        seen["ends"] = ends = []
        for rank, watch in (
            (1, small.After(2)),
            (0, small.After(1)),
            (1, small.After(3)),
            (0, small.After(1, supersede, 0.0)),
            (0, small.After(1, fill_disk, 0.0)),
        ):
            mine = watch if ranks.rank == rank else Watch()
            try:
                train_run(trainer, run, folds, folder, mine)
            except (Interrupted, UserError) as fault:
                ends.append([type(fault).__name__, mine.steps_done])
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMIT)
        watch = small.After(2, die, 0.0) if ranks.rank == 1 else Watch(checkpoint_seconds=0.0)
        try:
            train_run(trainer, run, folds, folder, watch)
        except RankLost as fault:
            seen |= {
                "rank": ranks.rank,
                "lost": str(fault),
                "seconds": time.time() - (folder / "killed").stat().st_mtime,
            }
            print("SAW " + json.dumps(seen), flush=True)
            os._exit(0)
    if "rest" in parts:
        train_run(trainer, run, folds, folder, Watch(keep_weights=True))
    if "often" in parts:
        train_run(trainer, run, folds, folder, Watch(keep_weights=True, checkpoint_seconds=0.0))
print("SAW " + json.dumps(seen))
