"""What a network sees: a screen of any channels at the inputs of a network, which are three with ImageNet weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellhpc.errors import UsageError, listing


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
