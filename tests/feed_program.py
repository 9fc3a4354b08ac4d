"""Loads the small study's tiles on as many ranks as the test starts, in each way, and prints what it saw as JSON.

Usage: feed_program.py STORE
"""

from __future__ import annotations

import json
import os
import sys
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf

from cellhpc import data as loading
from cellhpc.data import load_data
from cellhpc.errors import UserError
from cellhpc.folds import plan_folds
from cellhpc.memory import Allowed
from cellhpc.ranks import joined
from cellhpc.settings import FoldsSettings
from cellhpc.shards import Shards
from cellhpc.tiles import Store
from cellhpc.train import Trainer
from tests import small

folder = Path(sys.argv[1])
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.experimental.enable_op_determinism()
store = Store.open(folder)
folds = plan_folds(store.fields, FoldsSettings())
wanted = store.read(store.tiles, 32)
shared_memory, scratch = loading.SHARED_MEMORY, Path(os.environ["TMPDIR"])
seen: dict[str, object] = {}


def names() -> list[str]:
    return [path.name for place in (shared_memory, scratch) for path in place.glob("cellhpc-*")]


with joined() as ranks:
    together = ranks.gather(np.zeros(1))
    before = names()
    data = load_data(store, folds, 32, ranks)
    seen["left"] = sorted(set(names()) - set(before))
    seen["right"] = bool((data.pixels == wanted).all())
    ranks.gather(together)  # the other one has looked
    if ranks.rank == 0:
        data.pixels[5, 0, 0, 0] ^= 255  # the very same memory
    ranks.gather(together)
    seen["differing"] = np.flatnonzero((data.pixels != wanted).any((1, 2, 3))).tolist()

    loading.share = lambda ranks, mine, folders, size: None  # stands for a small /dev/shm and a full scratch
    seen["alone"] = bool((load_data(store, folds, 32, ranks).pixels == wanted).all())
    try:
        load_data(store, folds, 32, ranks, limit=Allowed(1.5 * wanted.nbytes, "a test"))
    except UserError as fault:
        seen["refused"] = str(fault)
    from cellhpc.shared import share

    loading.share = share
    data = load_data(store, folds, 32, ranks, window_tiles=20, stage=True)
    seen["left"] += sorted(set(names()) - set(before))
    ranks.gather(together)
    if ranks.rank == 0:
        for path in folder.rglob("c.*"):  # the copy is read from now on
            path.unlink()
    ranks.gather(together)
    out = np.empty_like(wanted)
    assert isinstance(data.pixels, Shards)
    data.pixels.decode(np.arange(len(wanted)), out)
    seen["staged"] = bool((out == wanted).all())
    settings = small.SETTINGS.model_copy(update={"window_tiles": 20, "epochs": 1})
    trainer = Trainer("MobileNet(alpha=0.25)", data, settings, ranks)
    _, predictions = trainer.fit(small.run(folds, "MobileNet(alpha=0.25)"), folds)
    seen["weights"] = sha256(b"".join(weight.tobytes() for weight in trainer.model.get_weights())).hexdigest()
    seen["predictions"] = predictions.filter(like="p_").to_numpy().tolist()
    try:
        load_data(store, folds, 32, ranks)
    except UserError as fault:
        seen["missing"] = str(fault)
print("SAW " + json.dumps(seen))
