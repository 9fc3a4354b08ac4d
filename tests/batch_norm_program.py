"""One step of a small network with batch normalisation on as many ranks as the test starts, each with its share.

Usage: batch_norm_program.py batch|synchronised
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import tensorflow as tf

from cellhpc.batch_norm import set_batch_norm
from cellhpc.ranks import joined
from cellhpc.recipe import TrainSettings

keras.utils.set_random_seed(0)
layers = keras.layers
model = keras.Sequential(
    [layers.Input((6, 6, 2))]
    + [layer for _ in range(2) for layer in (layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU())]
    + [layers.GlobalAveragePooling2D(), layers.Dense(3)]
)
random = np.random.default_rng(0)
# Means far from zero and unlike on the ranks: what cancels shows.
tiles = (random.normal(size=(16, 6, 6, 2)) * np.linspace(0.5, 2, 16)[:, None, None, None] + 5).astype(np.float32)
targets = random.integers(0, 3, 16)

with joined() as ranks:
    set_batch_norm(model, TrainSettings(batch_norm=sys.argv[1]), ranks)
    mine = slice(ranks.rank * 16 // ranks.size, (ranks.rank + 1) * 16 // ranks.size)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = model(tf.constant(tiles[mine]), training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets[mine], logits))
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        return ranks.mean([loss, *gradients])

    seen = {
        "loss_and_gradients": [value.numpy().tolist() for value in step()],
        "statistics": [variable.numpy().tolist() for variable in model.non_trainable_variables],
    }
print("SAW " + json.dumps(seen))
