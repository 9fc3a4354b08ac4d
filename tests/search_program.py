"""Trains a run with a search whole, and the same run stopped again and again, on as many ranks as the test starts.

Usage: search_program.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent))

import small
import tensorflow as tf

from cellhpc.folds import plan_folds
from cellhpc.grid import candidates
from cellhpc.ranks import joined
from cellhpc.search import Trainers, train_chosen
from cellhpc.settings import FoldsSettings
from cellhpc.train import Interrupted, Trainer, Watch

folder = Path(sys.argv[1])
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.experimental.enable_op_determinism()
data, _ = small.data()
folds = plan_folds(small.tiles(), FoldsSettings(), search=True)
NETWORK = "MobileNet(alpha=0.25)"
settings = small.SETTINGS.model_copy(update={"batch_norm_momentum": 0.5})
grid = candidates(settings, {"learning_rate": (0.002, 0.02, 1e38)})
run = small.run(folds, NETWORK)
stops = 0
with joined() as ranks:
    trainers = Trainers(lambda settings: Trainer(NETWORK, data, settings, ranks))
    train_chosen(trainers, grid, dataclasses.replace(run, id="whole"), folds, folder, ranks, Watch())
    while True:
        watch = small.After(3) if ranks.rank == 1 else Watch()
        try:
            train_chosen(trainers, grid, dataclasses.replace(run, id="stopped"), folds, folder, ranks, watch)
            break
        except Interrupted:
            stops += 1
print("SAW " + json.dumps({"stops": stops}))
