"""What a network sees: a screen of any channels at the inputs of a network, which are three with ImageNet weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from cellhpc.errors import UsageError, listing
from cellhpc.networks import Network, scale_input


def mix(channels: Sequence[str], inputs: Sequence[str] = ()) -> np.ndarray:
    """How a network's inputs are made of a screen's channels.

    Parameters
    ----------
    channels
        Names of the channels.
    inputs
        As `train.inputs`. Without any, each channel is an input, and there are three at least: the rest sees nothing.

    Returns
    -------
    ndarray
        (channel, input) float32: the share of each channel in each input.

    Raises
    ------
    UsageError
        An input names what is no channel.
    """
    if not inputs:
        return np.eye(len(channels), max(3, len(channels)), dtype=np.float32)
    shares = np.zeros((len(channels), len(inputs)), np.float32)
    for number, wanted in enumerate(inputs):
        names = [wanted] if wanted in channels else [name.strip() for name in wanted.split("+")]
        for name in names if wanted else ():
            if name not in channels:
                raise UsageError(f"train.inputs: {name!r} is no channel of the screen. Allowed: {listing(channels)}")
            shares[channels.index(name), number] += 1 / len(names)
    if not shares.any():
        raise UsageError("train.inputs: no input has a channel")
    return shares


def prepare(
    tiles: Any, channels: Sequence[str], inputs: Sequence[str], network: Network, scaling: Literal["raw", "keras"]
) -> Any:
    """Make of a batch of tiles what a network sees, in the graph.

    Parameters
    ----------
    tiles
        float32 tensor (n, y, x, channel) of grey levels 0..255.
    channels, inputs
        As of `mix`.
    network, scaling
        The network, and `train.input_scaling`.

    Returns
    -------
    tensor
        float32 (n, y, x, input).
    """
    import tensorflow as tf

    shares = mix(channels, inputs)
    if inputs:
        tiles = tf.einsum("nyxc,ci->nyxi", tiles, shares)
    else:
        tiles = tf.pad(tiles, ((0, 0), (0, 0), (0, 0), (0, shares.shape[1] - shares.shape[0])))
    return scale_input(network, tiles) if scaling == "keras" else tiles
