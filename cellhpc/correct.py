"""From a field's pixels to 8-bit tiles, by the preprocessing of Kensert, Harrison & Spjuth (SLAS Discovery 2019).

Their recipe, in floating point at full resolution: the Anscombe transform A(x) = 2 sqrt(x + 3/8); of each channel
subtract the mean and divide by the standard deviation of all DMSO pixels of the plate; stretch each field, all channels
together, from its minimum and maximum to 0..255; cut tiles; set a tile aside when hardly any of its values exceeds 50;
resize.

The same is done here mostly in integers. A plate's mean and deviation are exact from histograms, which can be added up.
A(x) rises with x, so a field's extremes come from the extremes of its integers, and "exceeds 50" is "is at least t",
an integer t for each channel. What remains, a table look-up and an area resize, touches only the tiles that are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

VALUES = 65_536


@dataclass(frozen=True)
class PlateStatistics:
    """Mean and standard deviation of the Anscombe-transformed DMSO pixels of a plate, for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class FieldTiles:
    """What a field gives.

    Attributes
    ----------
    tiles
        For each size in pixels, (tile, px, px, channel) uint8; near-empty tiles are zero.
    signal
        For each tile, the fraction of its values, of all channels, that are signal.
    low, high, mean
        For each channel, of the raw pixels.
    """

    tiles: dict[int, np.ndarray]
    signal: tuple[float, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True)
class _GreyScale:
    """How the integers of one channel of a field become grey levels 0..255."""

    table: np.ndarray | None
    """(65,536) float32, filled between the channel's extremes; None: the integers are the grey levels."""
    signal_from: int
    """The smallest integer that is signal."""


def anscombe(values: np.ndarray) -> np.ndarray:
    """Stabilise the variance of photon counts: 2 sqrt(x + 3/8), float64 (Anscombe, Biometrika 35, 246, 1948)."""
    return 2.0 * np.sqrt(np.asarray(values, np.float64) + 0.375)


def histograms(field: np.ndarray) -> np.ndarray:
    """Count the values of each channel.

    Parameters
    ----------
    field
        (y, x, channel), uint8 or uint16.

    Returns
    -------
    ndarray
        (channel, 65,536) int64; those of several fields are added up.
    """
    channels = range(field.shape[-1])
    return np.stack([np.bincount(field[..., channel].ravel(), minlength=VALUES) for channel in channels])


def plate_statistics(counts: np.ndarray) -> PlateStatistics:
    """Mean and (population) standard deviation of the Anscombe-transformed pixels that were counted.

    Parameters
    ----------
    counts
        (channel, 65,536), the sum of the histograms of a plate's DMSO fields. A channel that is the same everywhere has
        the deviation 0, and nothing can be normalised by it.
    """
    values = anscombe(np.arange(VALUES))
    means, stds = [], []
    for channel in counts:
        mean = float(np.average(values, weights=channel))
        means.append(mean)
        stds.append(math.sqrt(float(np.average((values - mean) ** 2, weights=channel))))
    return PlateStatistics(tuple(means), tuple(stds))


def cut_tiles(
    field: np.ndarray,
    grid: tuple[int, int],
    tile_sizes_px: tuple[int, ...],
    statistics: PlateStatistics | None,
    empty_above: int = 50,
    empty_fraction: float = 0.002,
) -> FieldTiles:
    """Normalise a field and cut it into tiles.

    Parameters
    ----------
    field
        (y, x, channel), uint8 or uint16 (without statistics, uint8).
    grid
        Rows and columns of tiles; they divide the field.
    tile_sizes_px
        Sides of the square tiles that are made; where the cut tile is no square, both axes are scaled on their own.
    statistics
        The plate's DMSO pixels; None takes the pixels as they are.
    empty_above, empty_fraction
        A tile is near-empty when, at full resolution, the fraction of its grey levels above `empty_above` is at most
        `empty_fraction`.
    """
    channels = range(field.shape[-1])
    low = tuple(int(field[..., channel].min()) for channel in channels)
    high = tuple(int(field[..., channel].max()) for channel in channels)
    mean = tuple(float(field[..., channel].mean()) for channel in channels)
    scales = (
        [_GreyScale(None, empty_above + 1) for _ in channels]
        if statistics is None
        else _stretch(low, high, statistics, empty_above)
    )
    height, width = field.shape[0] // grid[0], field.shape[1] // grid[1]
    corners = [(row * height, column * width) for row in range(grid[0]) for column in range(grid[1])]
    tiles = {px: np.zeros((len(corners), px, px, len(channels)), np.uint8) for px in tile_sizes_px}
    signal = []
    for number, (top, left) in enumerate(corners):
        cut = field[top : top + height, left : left + width]
        # A threshold above the maximum may be no number of the pixels' type, which NumPy 2.0 answers with a crash.
        count = sum(
            np.count_nonzero(cut[..., channel] >= scales[channel].signal_from)
            for channel in channels
            if scales[channel].signal_from <= high[channel]
        )
        signal.append(count / cut.size)
        if signal[-1] <= empty_fraction:
            continue
        for channel in channels:
            grey = _grey(cut[..., channel], scales[channel])
            for px in tile_sizes_px:
                tiles[px][number, :, :, channel] = _resize(grey, px)
    return FieldTiles(tiles, tuple(signal), low, high, mean)


def _stretch(
    low: tuple[int, ...], high: tuple[int, ...], statistics: PlateStatistics, empty_above: int
) -> list[_GreyScale]:
    """Z-score each channel, then stretch the field from its joint extremes to 0..255; a constant field is all zero."""
    scores = []
    for first, last, mean, std in zip(low, high, statistics.mean, statistics.std, strict=True):
        scores.append((anscombe(np.arange(first, last + 1)) - mean) / std)
    darkest = min(channel[0] for channel in scores)
    brightest = max(channel[-1] for channel in scores)
    scales = []
    for first, last, channel in zip(low, high, scores, strict=True):
        table = np.zeros(VALUES, np.float32)
        signal_from = VALUES  # an integer that no pixel reaches
        if brightest > darkest:
            grey = (channel - darkest) / (brightest - darkest) * 255.0
            table[first : last + 1] = grey
            signal_from = first + int(np.searchsorted(grey, empty_above, side="right"))
        scales.append(_GreyScale(table, signal_from))
    return scales


def _grey(plane: np.ndarray, scale: _GreyScale) -> np.ndarray:
    # "clip" spares NumPy a check of every index; all indices are valid.
    return plane if scale.table is None else np.take(scale.table, plane, mode="clip")


def _resize(grey: np.ndarray, px: int) -> np.ndarray:
    if grey.shape != (px, px):
        grey = cv2.resize(grey, (px, px), interpolation=cv2.INTER_AREA)
    return grey if grey.dtype == np.uint8 else np.rint(grey)
