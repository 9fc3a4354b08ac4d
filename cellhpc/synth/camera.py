"""The microscope: stain, illumination, focus and camera between the cells and the picture."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Optics:
    """How one plate was stained and imaged."""

    gain: tuple[float, ...]
    """Stain and exposure of each channel: camera counts of an untreated cell above the background."""
    background: tuple[float, ...]
    """Camera counts of an empty field in each channel."""
    vignette: float
    """How much darker the corners are than the centre of illumination, 0 to 1."""
    centre: tuple[float, float]
    """Centre of illumination, in heights and widths of the field from its middle."""
    blur: float
    """Standard deviation of the focus, in diameters of a nominal cell."""


def plate_optics(rng: np.random.Generator, gain: tuple[float, ...], background: float, spread: float = 0.2) -> Optics:
    """Draw a plate's optics around the screen's usual ones; `spread` is the standard deviation of the logarithms."""
    number = len(gain)
    return Optics(
        gain=tuple(float(g * f) for g, f in zip(gain, np.exp(rng.normal(0, spread, number)), strict=True)),
        background=tuple(float(b) for b in background * np.exp(rng.normal(0, spread, number))),
        vignette=float(rng.uniform(0.05, 0.3)),
        centre=(float(rng.normal(0, 0.1)), float(rng.normal(0, 0.1))),
        blur=float(rng.uniform(0.012, 0.022)),
    )


def expose(
    signal: NDArray[np.float32],
    optics: Optics,
    cell_px: float,
    rng: np.random.Generator,
    highest: int,
    electrons_per_count: float,
) -> NDArray[np.uint16]:
    """Turn drawn channels (c, height, width) into camera counts from 0 to `highest`.

    The noise is shot noise, Gaussian with the variance of the Poisson distributed electrons (`electrons_per_count` for
    each camera count), and a little read-out noise; the field adds its own focus and brightness to the plate's.
    """
    channels, height, width = signal.shape
    light = _illumination(height, width, optics.vignette, optics.centre)
    sigma = max(0.35, optics.blur * cell_px * float(np.exp(rng.normal(0, 0.2))))
    brightness = np.exp(rng.normal(0, 0.05, channels))
    picture = np.empty((channels, height, width), np.uint16)
    for channel in range(channels):
        counts = cv2.GaussianBlur(signal[channel], (0, 0), sigma)
        counts *= np.float32(optics.gain[channel] * brightness[channel])
        counts += np.float32(optics.background[channel])
        counts *= light
        noise = rng.standard_normal((height, width), dtype=np.float32)
        noise *= np.sqrt(counts / np.float32(electrons_per_count) + np.float32(0.0002 * highest) ** 2)
        counts += noise
        picture[channel] = np.clip(counts, 0, highest)
    return picture


@functools.lru_cache(maxsize=8)
def _illumination(height: int, width: int, vignette: float, centre: tuple[float, float]) -> NDArray[np.float32]:
    y = (np.arange(height, dtype=np.float32)[:, None] / height - 0.5 - centre[0]) ** 2
    x = (np.arange(width, dtype=np.float32)[None, :] / width - 0.5 - centre[1]) ** 2
    return (1 - vignette * 2 * (y + x)).astype(np.float32)
