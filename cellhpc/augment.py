"""Augmentation in the graph: eight rotations and mirrors, channel gain, blur and noise (Kensert et al. 2019).

Every draw is stateless: it depends on the seed that is passed in and on nothing else, so that a step can be repeated
exactly.
"""

from __future__ import annotations

from typing import Any, Literal

import tensorflow as tf

GAINS = (1.0, 1.0, 0.75, 1.25)
NOISE_VARIANCE = 50.0


def augment(tiles: Any, preset: Literal["none", "rotations", "kensert2019"], seed: Any) -> Any:
    """Augment a batch.

    Parameters
    ----------
    tiles
        float32 tensor (n, y, x, c) of grey levels 0..255, y == x.
    preset
        `none`; `rotations`: one of the eight rotations and mirrors for each tile; `kensert2019`: these, then each
        channel times one of 1, 1, 0.75, 1.25, a 3x3 mean with probability 0.5, and Gaussian noise of variance 50 with
        probability 0.5.
    seed
        int32 tensor (2,).

    Returns
    -------
    tensor
        float32 (n, y, x, c).
    """
    if preset == "none":
        return tiles
    seeds = tf.random.split(seed, 6)
    tiles = orient(tiles, tf.random.stateless_uniform((tf.shape(tiles)[0],), seeds[0], 0, 8, tf.int32))
    if preset == "rotations":
        return tiles
    count, channels = tf.shape(tiles)[0], tf.shape(tiles)[3]
    which = tf.random.stateless_uniform((count, 1, 1, channels), seeds[1], 0, len(GAINS), tf.int32)
    tiles *= tf.gather(tf.constant(GAINS), which)
    blurred = tf.nn.avg_pool2d(tiles, 3, 1, "SAME")
    tiles = tf.where(_half(count, seeds[2]), blurred, tiles)
    noise = tf.random.stateless_normal(tf.shape(tiles), seeds[3], stddev=NOISE_VARIANCE**0.5)
    tiles = tf.where(_half(count, seeds[4]), tiles + noise, tiles)
    return tf.clip_by_value(tiles, 0.0, 255.0)


def orient(tiles: Any, orientation: Any) -> Any:
    """Rotate and mirror each tile of a batch (n, y, x, c) by its number 0..7 in `orientation` (n,); 0 is as it was."""

    def bit(position: int) -> Any:
        return (tf.bitwise.right_shift(orientation, position) & 1 == 1)[:, None, None, None]

    tiles = tf.where(bit(0), tf.transpose(tiles, (0, 2, 1, 3)), tiles)
    tiles = tf.where(bit(1), tf.reverse(tiles, (1,)), tiles)
    return tf.where(bit(2), tf.reverse(tiles, (2,)), tiles)


def _half(count: Any, seed: Any) -> Any:
    return tf.random.stateless_uniform((count, 1, 1, 1), seed) < 0.5
