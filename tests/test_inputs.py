from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cellhpc.errors import UsageError
from cellhpc.inputs import mix
from cellhpc.ranks import OneRank
from cellhpc.train import Trainer
from tests import small

FIVE = ("dna", "er", "rna", "actin+golgi", "mito")


def test_channels_are_inputs_in_their_order_and_there_are_three_at_least() -> None:
    assert mix(["dna"]).tolist() == [[1, 0, 0]]
    assert mix(["dna", "gfp"]).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert mix(FIVE).tolist() == np.eye(5).tolist()


def test_an_input_is_a_channel_or_the_mean_of_some_or_nothing() -> None:
    shares = mix(FIVE, ["mito", "er + rna", "actin+golgi"])
    assert shares.T.tolist() == [[0, 0, 0, 0, 1], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 1, 0]]
    assert mix(["phase"], ["phase"] * 3).tolist() == [[1, 1, 1]]
    assert mix(["dna", "gfp"], ["gfp", "", "dna"]).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_what_is_no_channel_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"train\.inputs: 'gfp' is no channel of the screen\. Allowed: dna, er"):
        mix(["dna", "er"], ["dna", "gfp", ""])
    with pytest.raises(UsageError, match="no input has a channel"):
        mix(["dna"], ["", "", ""])


def test_a_network_predicts_from_its_inputs_alone() -> None:
    """Four channels at three inputs: the same as a screen that has these three."""
    data, _ = small.data(per_compound=1)
    spare = np.random.default_rng(1).integers(0, 256, data.pixels.shape[:3], np.uint8)
    four = np.stack([spare, *np.moveaxis(data.pixels, -1, 0)[::-1]], axis=-1)
    four_data = dataclasses.replace(data, pixels=four, channels=("spare", "actin", "tubulin", "dna"))
    settings = small.SETTINGS.model_copy(update={"inputs": ("dna", "tubulin", "actin")})
    predicted = []
    for tiles, how in ((data, small.SETTINGS), (four_data, settings)):
        trainer = Trainer("MobileNet(alpha=0.25)", tiles, how, OneRank())
        for variable, values in zip(trainer.model.weights, weights(trainer), strict=True):
            variable.assign(values)
        predicted.append(np.asarray(trainer.predictor.step(tiles.pixels)))
    assert np.array_equal(*predicted)
    assert not np.array_equal(predicted[0][0], predicted[0][1])


def weights(trainer: Trainer) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    return [np.abs(random.normal(0.1, 0.05, variable.shape)) for variable in trainer.model.weights]
