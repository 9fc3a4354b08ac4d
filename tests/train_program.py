"""Trains one small run on as many ranks as the test starts, and prints what this rank ended with as JSON.

Usage: train_program.py NETWORK SIDE_PX BATCH_SIZE EPOCHS TILES_PER_COMPOUND LEARNING_RATE [SETTINGS]

SETTINGS are more keys of `[train]`, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent))

import small
import tensorflow as tf

from cellhpc.ranks import joined
from cellhpc.train import Trainer

network, side_px, batch_size, epochs, per_compound = sys.argv[1], *map(int, sys.argv[2:6])
learning_rate = float(sys.argv[6])
more = json.loads(sys.argv[7]) if len(sys.argv) > 7 else {}
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.experimental.enable_op_determinism()


class WatchedTrainer(Trainer):
    """Notes a checksum of all weights before and after the ranks agree on their statistics, in each epoch."""

    own: list[str]
    checksums: list[str]

    def _agree(self, epoch):
        self.own.append(self._checksum())
        super()._agree(epoch)
        self.checksums.append(self._checksum())

    def _checksum(self):
        return sha256(b"".join(weight.tobytes() for weight in self.model.get_weights())).hexdigest()


data, folds = small.data(side_px, per_compound)
settings = small.SETTINGS.model_copy(
    update={"batch_size": batch_size, "epochs": epochs, "learning_rate": learning_rate, **more}
)
with joined() as ranks:
    trainer = WatchedTrainer(network, data, settings, ranks)
    trainer.own, trainer.checksums = [], []
    history, predictions = trainer.fit(small.run(folds, network, side_px=side_px), folds)
    seen = {
        "own": trainer.own,
        "checksums": trainer.checksums,
        "losses": [epoch["loss"] for epoch in history],
        "steps": [epoch["steps"] for epoch in history],
        "learning_rates": [epoch["learning_rate"] for epoch in history],
        "probabilities": predictions.filter(like="p_").to_numpy().tolist(),
        "tiles": len(predictions),
    }
print("SAW " + json.dumps(seen))
