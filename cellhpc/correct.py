"""From a field's pixels to 8-bit tiles.

The recipe of Kensert, Harrison & Spjuth (SLAS Discovery 2019), in floating point at full resolution: the Anscombe
transform A(x) = 2 sqrt(x + 3/8); of each channel subtract the mean and divide by the standard deviation of all DMSO
pixels of the plate; stretch each field, all channels together, from its minimum and maximum to 0..255; cut tiles; set a
tile aside when hardly any of its values exceeds 50; resize by area averages. Two other recipes differ in the stretch
alone: `zscore` takes the same scores from a fixed range, `percentile` the intensities between two percentiles.

The same is done here mostly in integers. A plate's mean, deviation and percentiles are exact from histograms, which can
be added up. Grey levels rise with the integers, so a field's extremes come from the extremes of its integers, and
"exceeds 50" is "is at least t", an integer t for each channel. What remains, a table look-up and an area resize,
touches only the tiles that are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

VALUES = 65_536

Preprocessing = Literal["kensert2019", "zscore", "percentile", "none"]


@dataclass(frozen=True)
class TileRecipe:
    """How a field becomes tiles.

    Attributes
    ----------
    grid
        Rows and columns of tiles; they divide the field.
    tile_sizes_px
        Sides of the square tiles that are made; where the cut tile is no square, both axes are scaled on their own.
    preprocessing
        How intensities become grey levels; `none` takes 8-bit pixels as they are.
    zscore_range
        The scores that become 0 and 255 with `zscore`.
    empty_above, empty_fraction
        A tile is near-empty when, at full resolution, the fraction of its grey levels above `empty_above` is at most
        `empty_fraction`.
    """

    grid: tuple[int, int]
    tile_sizes_px: tuple[int, ...]
    preprocessing: Preprocessing = "kensert2019"
    zscore_range: tuple[float, float] = (-2.0, 6.0)
    empty_above: int = 50
    empty_fraction: float = 0.002


@dataclass(frozen=True)
class PlateStatistics:
    """What a plate's pixels are normalised by, for each channel.

    Attributes
    ----------
    mean, std
        Of the Anscombe-transformed pixels.
    low, high
        The two percentiles of the pixels themselves.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def flat(self, preprocessing: Preprocessing) -> list[int]:
        """Numbers of the channels that nothing can be normalised by: they are the same everywhere."""
        spans = [b - a for a, b in zip(self.low, self.high, strict=True)] if preprocessing == "percentile" else self.std
        return [channel for channel, span in enumerate(spans) if span == 0]


@dataclass(frozen=True)
class FieldTiles:
    """What a field gives.

    Attributes
    ----------
    tiles
        For each size in pixels, (tile, px, px, channel) uint8; near-empty tiles are zero.
    signal
        For each tile, the fraction of its values, of all channels, that are signal.
    """

    tiles: dict[int, np.ndarray]
    signal: tuple[float, ...]


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


def plate_statistics(counts: np.ndarray, percentiles: tuple[float, float] = (0.1, 99.9)) -> PlateStatistics:
    """Mean and (population) standard deviation of the transformed pixels that were counted, and percentiles.

    Parameters
    ----------
    counts
        (channel, 65,536), the sum of the histograms of a plate's fields.
    percentiles
        The two that are wanted, in 0..100, interpolated linearly between neighbouring pixels as NumPy does.
    """
    values = anscombe(np.arange(VALUES))
    means, stds, lows, highs = [], [], [], []
    for channel in counts:
        mean = float(np.average(values, weights=channel))
        means.append(mean)
        stds.append(math.sqrt(float(np.average((values - mean) ** 2, weights=channel))))
        low, high = (_percentile(channel, percentile) for percentile in percentiles)
        lows.append(low)
        highs.append(high)
    return PlateStatistics(tuple(means), tuple(stds), tuple(lows), tuple(highs))


def _percentile(counts: np.ndarray, percentile: float) -> float:
    """Percentile of pixels that were counted: between the two whose ranks enclose it."""
    seen = np.cumsum(counts)
    rank = percentile / 100 * (int(seen[-1]) - 1)
    below = math.floor(rank)
    first, second = np.searchsorted(seen, [below, min(below + 1, int(seen[-1]) - 1)], side="right")
    return float(first + (second - first) * (rank - below))


def cut_tiles(field: np.ndarray, recipe: TileRecipe, statistics: PlateStatistics | None = None) -> FieldTiles:
    """Normalise a field and cut it into tiles.

    Parameters
    ----------
    field
        (y, x, channel), uint8 or uint16; with the preprocessing `none`, uint8.
    recipe
        How.
    statistics
        What the plate's pixels are normalised by; not needed with the preprocessing `none`.
    """
    channels = range(field.shape[-1])
    high = [int(field[..., channel].max()) for channel in channels]
    scales = _scales(field, recipe, statistics)
    rows, columns = recipe.grid
    height, width = field.shape[0] // rows, field.shape[1] // columns
    corners = [(row * height, column * width) for row in range(rows) for column in range(columns)]
    tiles = {px: np.zeros((len(corners), px, px, len(channels)), np.uint8) for px in recipe.tile_sizes_px}
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
        if signal[-1] <= recipe.empty_fraction:
            continue
        for channel in channels:
            grey = _grey(cut[..., channel], scales[channel])
            for px in recipe.tile_sizes_px:
                tiles[px][number, :, :, channel] = _resize(grey, px)
    return FieldTiles(tiles, tuple(signal))


def _scales(field: np.ndarray, recipe: TileRecipe, statistics: PlateStatistics | None) -> list[_GreyScale]:
    """Tell for each channel of a field which grey level each of its integers becomes."""
    channels = range(field.shape[-1])
    if recipe.preprocessing == "none":
        return [_GreyScale(None, recipe.empty_above + 1) for _ in channels]
    if statistics is None:
        raise ValueError(f"{recipe.preprocessing} needs the plate's statistics")
    extremes = [(int(field[..., channel].min()), int(field[..., channel].max())) for channel in channels]
    integers = [np.arange(first, last + 1) for first, last in extremes]
    if recipe.preprocessing == "percentile":
        spans = zip(integers, statistics.low, statistics.high, strict=True)
        greys = [(values - low) / (high - low) * 255.0 for values, low, high in spans]
    else:
        spans = zip(integers, statistics.mean, statistics.std, strict=True)
        scores = [(anscombe(values) - mean) / std for values, mean, std in spans]
        low, high = recipe.zscore_range
        if recipe.preprocessing == "kensert2019":  # the field's own range, of all channels together
            low = min(float(channel[0]) for channel in scores)
            high = max(float(channel[-1]) for channel in scores)
        # A field that is the same everywhere is all zero.
        greys = [(channel - low) / (high - low) * 255.0 if high > low else np.zeros(len(channel)) for channel in scores]
    scales = []
    for (first, last), grey in zip(extremes, greys, strict=True):
        grey = np.clip(grey, 0.0, 255.0)
        table = np.zeros(VALUES, np.float32)
        table[first : last + 1] = grey
        scales.append(_GreyScale(table, first + int(np.searchsorted(grey, recipe.empty_above, side="right"))))
    return scales


def _grey(plane: np.ndarray, scale: _GreyScale) -> np.ndarray:
    # "clip" spares NumPy a check of every index; all indices are valid.
    return plane if scale.table is None else np.take(scale.table, plane, mode="clip")


def _resize(grey: np.ndarray, px: int) -> np.ndarray:
    if grey.shape != (px, px):
        grey = cv2.resize(grey, (px, px), interpolation=cv2.INTER_AREA)
    return grey if grey.dtype == np.uint8 else np.rint(grey)
