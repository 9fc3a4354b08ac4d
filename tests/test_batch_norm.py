from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from cellhpc.batch_norm import set_batch_norm
from cellhpc.ranks import OneRank
from cellhpc.recipe import TrainSettings
from tests.ranks_at_work import start_ranks
from tests.test_train import MOBILENET


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, which sees the whole batch."""
    (seen,) = start_ranks("batch_norm_program.py", 1, tmp_path_factory.mktemp("one"), "batch")
    return seen


def distance(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    """Largest difference of two ranks' arrays, each against the largest value of its array."""
    pairs = zip(one[key], other[key], strict=True)
    return max(np.abs(np.subtract(*pair)).max() / (np.abs(pair[0]).max() + 1e-3) for pair in pairs)


def test_synchronised_two_ranks_are_one_rank_with_their_batch(one: dict[str, Any], tmp_path: Path) -> None:
    """Loss, gradients of all weights and moving statistics: those of the whole batch, and equal on both ranks."""
    first, second = start_ranks("batch_norm_program.py", 2, tmp_path, "synchronised")
    assert first == second
    assert distance(one, first, "loss_and_gradients") < 1e-3
    assert distance(one, first, "statistics") < 1e-5


def test_of_its_own_share_each_rank_has_other_statistics(one: dict[str, Any], tmp_path: Path) -> None:
    first, second = start_ranks("batch_norm_program.py", 2, tmp_path, "batch")
    assert first["statistics"] != second["statistics"]
    assert distance(one, first, "loss_and_gradients") > 1e-2
    assert distance(one, first, "statistics") > 1e-3


def test_two_synchronised_ranks_have_one_network_without_averaging_their_statistics(tmp_path: Path) -> None:
    settings = json.dumps({"batch_norm": "synchronised", "compression": "fp16"})
    first, second = start_ranks("train_program.py", 2, tmp_path, MOBILENET, 32, 16, 2, 4, 0.01, settings)
    assert first["own"] == first["checksums"] == second["own"]


@pytest.mark.parametrize("keys", [{}, {"scale": False, "epsilon": 1e-5}, {"center": False, "momentum": 0.5}])
def test_in_one_operation_it_is_what_keras_computes(keys: dict[str, Any]) -> None:
    """Outputs, gradients and moving statistics after two steps, of one position a tile, of many, and of one in all."""
    random = np.random.default_rng(0)
    for shape in ((8, 1, 1, 5), (8, 6, 6, 5), (1, 1, 1, 5)):
        own, theirs = (keras.layers.BatchNormalization(dtype="float32", **keys) for _ in range(2))
        models = [keras.Sequential([keras.Input(shape[1:]), layer]) for layer in (own, theirs)]
        set_batch_norm(models[0], TrainSettings(batch_norm="batch"), OneRank())
        starts = [random.uniform(0.5, 2, weight.shape) for weight in own.weights]
        steps = [(random.normal(3, 2, shape).astype(np.float32), random.normal(size=shape)) for _ in range(2)]
        seen = []
        for model in models:
            model.set_weights(starts)
            seen.append([])
            for tiles, slope in steps:
                with tf.GradientTape() as tape:
                    inputs = tf.constant(tiles)
                    tape.watch(inputs)
                    outputs = model(inputs, training=True)
                    total = tf.reduce_sum(outputs * slope.astype(np.float32))
                seen[-1] += [outputs, *tape.gradient(total, [inputs, *(v.value for v in model.trainable_variables)])]
            seen[-1] += [*model.get_weights(), model(steps[0][0], training=False)]
        assert "call" in vars(own)
        assert len(seen[0]) == len(seen[1])
        for mine, wanted in zip(*seen, strict=True):
            assert np.allclose(mine, wanted, rtol=1e-4, atol=1e-4)
