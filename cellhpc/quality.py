"""Figures of a field's quality, from its raw pixels: what an out-of-focus, blank or saturated picture stands out by."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Quality:
    """Figures of a field, each with a value for each channel.

    Attributes
    ----------
    low, high, mean
        Of the raw pixels.
    saturated
        Fraction of the pixels that have the highest value of the picture: next to nothing unless the camera was at its
        limit, whatever its number of bits (PercentMaximal of CellProfiler's MeasureImageQuality).
    focus
        Brenner's gradient (Brenner et al., J. Histochem. Cytochem. 24, 100, 1976): the mean squared difference of
        pixels two apart along x, divided by the squared mean, so that brightness does not count. Blur lowers it.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    mean: tuple[float, ...]
    saturated: tuple[float, ...]
    focus: tuple[float, ...]


def measure(field: np.ndarray) -> Quality:
    """Measure a field (y, x, channel) of uint8 or uint16."""
    figures = [_measure_plane(field[..., channel]) for channel in range(field.shape[-1])]
    return Quality(*zip(*figures, strict=True))


def _measure_plane(plane: np.ndarray) -> tuple[int, int, float, float, float]:
    low, high, _, _ = cv2.minMaxLoc(plane)
    mean = cv2.mean(plane)[0]
    saturated = np.count_nonzero(plane == int(high)) / plane.size
    focus = 0.0
    if mean and plane.shape[1] > 2:
        squares = cv2.norm(plane[:, 2:], plane[:, :-2], cv2.NORM_L2SQR)
        focus = squares / (plane.shape[0] * (plane.shape[1] - 2)) / mean**2
    return int(low), int(high), mean, saturated, focus
