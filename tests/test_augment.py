from __future__ import annotations

import numpy as np
import tensorflow as tf

from cellhpc.augment import augment, orient
from cellhpc.recipe import AUGMENTATIONS, AugmentSettings

PAPER = AUGMENTATIONS["kensert2019"]
TILE = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
SEED = tf.constant([3, 4], tf.int32)


def test_the_eight_orientations_are_all_rotations_and_mirrors() -> None:
    made = {orient(tf.constant(TILE), tf.constant([k])).numpy().tobytes() for k in range(8)}
    square = TILE[0, :, :, 0]
    wanted = [np.rot90(side, turns) for side in (square, square.T) for turns in range(4)]
    assert made == {np.ascontiguousarray(tile).tobytes() for tile in wanted}
    assert np.array_equal(orient(tf.constant(TILE), tf.constant([0])), TILE)


def test_each_tile_of_a_batch_gets_its_own_orientation() -> None:
    batch = np.repeat(TILE, 2, axis=0)
    turned = orient(tf.constant(batch), tf.constant([0, 2])).numpy()
    assert np.array_equal(turned[0], TILE[0])
    assert np.array_equal(turned[1], TILE[0, ::-1])


def test_none_changes_nothing_and_the_same_seed_gives_the_same_draw() -> None:
    batch = np.random.default_rng(0).uniform(0, 255, (16, 8, 8, 3)).astype(np.float32)
    assert np.array_equal(augment(tf.constant(batch), "none", SEED), batch)
    first = augment(tf.constant(batch), "kensert2019", SEED).numpy()
    assert np.array_equal(first, augment(tf.constant(batch), "kensert2019", SEED))
    assert not np.array_equal(first, augment(tf.constant(batch), "kensert2019", SEED + 1))
    rotated = augment(tf.constant(batch), "rotations", SEED).numpy()
    assert np.array_equal(np.sort(rotated.reshape(16, -1, 3), axis=1), np.sort(batch.reshape(16, -1, 3), axis=1))
    assert not np.array_equal(rotated, batch)


def test_gain_and_noise_of_the_paper() -> None:
    """On flat tiles a rotation and a mean change nothing: what is left is gain and noise."""
    batch = np.full((400, 8, 8, 3), 100, np.float32)
    made = augment(tf.constant(batch), "kensert2019", SEED).numpy()
    gains = made.mean((1, 2)) / 100
    nearest = np.array(PAPER.gains)[np.abs(gains[..., None] - np.array(PAPER.gains)).argmin(-1)]
    assert np.abs(gains - nearest).max() < 0.06
    shares = [(nearest == gain).mean() for gain in (1.0, 0.75, 1.25)]
    assert np.allclose(shares, [0.5, 0.25, 0.25], atol=0.06)
    noisy = made.var((1, 2)).mean(-1) > 1
    assert 0.4 < noisy.mean() < 0.6
    assert np.isclose(made[noisy].var((1, 2)).mean(), PAPER.noise_variance, rtol=0.05)


def test_blur_is_a_mean_of_three_by_three_on_half_of_the_tiles() -> None:
    batch = np.zeros((200, 9, 9, 1), np.float32)
    batch[:, 4, 4] = 90
    made = augment(tf.constant(batch), "kensert2019", SEED).numpy()
    centre = made[:, 4, 4, 0]
    blurred = centre < 45
    assert 0.4 < blurred.mean() < 0.6
    assert np.isclose(np.median(centre[blurred]), 10, atol=3)


def test_a_table_does_only_what_it_says() -> None:
    flat = np.full((200, 6, 6, 2), 100, np.float32)
    doubled = augment(tf.constant(flat), AugmentSettings(gains=(2.0,)), SEED).numpy()
    assert np.array_equal(doubled, flat * 2)
    noisy = augment(tf.constant(flat), AugmentSettings(noise=1.0, noise_variance=9.0), SEED).numpy()
    assert np.isclose(noisy.std(), 3, rtol=0.05)
    point = np.zeros((2, 9, 9, 1), np.float32)
    point[:, 4, 4] = 90
    blurred = augment(tf.constant(point), AugmentSettings(blur=1.0), SEED).numpy()
    assert np.allclose(blurred[:, 3:6, 3:6], 10)


def test_the_draws_of_the_paper_are_those_of_its_parts() -> None:
    """Each part has draws of its own: a table of some parts draws for them what the paper's preset does."""
    batch = np.random.default_rng(0).uniform(60, 190, (16, 8, 8, 3)).astype(np.float32)
    made = tf.constant(batch)
    for part in ({"rotations": True}, {"gains": PAPER.gains}, {"blur": 0.5}, {"noise": 0.5}):
        made = augment(made, AugmentSettings(**part), SEED)
    assert np.array_equal(made, augment(tf.constant(batch), "kensert2019", SEED))
