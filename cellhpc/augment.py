"""Augmentation in the graph: eight rotations and mirrors, channel gain, blur and noise (Kensert et al. 2019).

Every draw is stateless: it depends on the seed that is passed in and on nothing else, so that a step can be repeated
exactly.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from cellhpc.recipe import AUGMENTATIONS, AugmentSettings


def augment(tiles: Any, how: AugmentSettings | str, seed: Any) -> Any:
    """Augment a batch.

    Parameters
    ----------
    tiles
        float32 tensor (n, y, x, c) of grey levels 0..255, y == x.
    how
        Settings of `[train.augment]`, or the name of some.
    seed
        int32 tensor (2,).

    Returns
    -------
    tensor
        float32 (n, y, x, c); grey levels 0..255.
    """
    if isinstance(how, str):
        how = AUGMENTATIONS[how]
    seeds = tf.random.split(seed, 6)  # a draw depends on none of the others
    count, channels = tf.shape(tiles)[0], tf.shape(tiles)[3]
    if how.rotations:
        tiles = orient(tiles, tf.random.stateless_uniform((count,), seeds[0], 0, 8, tf.int32))
    if how.gains:
        which = tf.random.stateless_uniform((count, 1, 1, channels), seeds[1], 0, len(how.gains), tf.int32)
        tiles *= tf.gather(tf.constant(how.gains), which)
    if how.blur:
        tiles = _choose(_some(count, how.blur, seeds[2]), tf.nn.avg_pool2d(tiles, 3, 1, "SAME"), tiles)
    if how.noise:
        noise = tf.random.stateless_normal(tf.shape(tiles), seeds[3], stddev=how.noise_variance**0.5)
        tiles = _choose(_some(count, how.noise, seeds[4]), tiles + noise, tiles)
    return tf.clip_by_value(tiles, 0.0, 255.0) if how.gains or how.noise else tiles


def orient(tiles: Any, orientation: Any) -> Any:
    """Rotate and mirror each tile of a batch (n, y, x, c) by its number 0..7 in `orientation` (n,); 0 is as it was."""

    def bit(position: int) -> Any:
        return tf.bitwise.right_shift(orientation, position) & 1 == 1

    tiles = _choose(bit(0), tf.transpose(tiles, (0, 2, 1, 3)), tiles)
    tiles = _choose(bit(1), tf.reverse(tiles, (1,)), tiles)
    return _choose(bit(2), tf.reverse(tiles, (2,)), tiles)


def _some(count: Any, share: float, seed: Any) -> Any:
    return tf.random.stateless_uniform((count,), seed) < share


def _choose(which: Any, some: Any, others: Any) -> Any:
    """Take the tiles of `some` where `which` (n,) holds; copies whole tiles, where `tf.where` asks for every pixel."""
    return tf.raw_ops.Select(condition=which, x=some, y=others)
