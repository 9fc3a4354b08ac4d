"""Retrospective illumination correction: how a microscope lights a field, estimated from the pictures of a plate.

As CellProfiler does (CorrectIlluminationCalculate and -Apply; Singh et al., J. Microsc. 256, 231, 2014): the mean or
median of all fields, smoothed, rescaled so that its robust minimum is 1, and divided by. Intensities only become lower,
so nothing overflows. Light changes slowly, so all of this is done on a coarse grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np

BLOCK_PX = 16
"""Side of the squares that a field is averaged over first."""
ROBUST_MINIMUM = 2.0
"""Percentile that counts as the minimum; what is darker is left as it is."""


def shrink(field: np.ndarray) -> np.ndarray:
    """Average a field (y, x, channel) over squares: (channel, y / 16, x / 16) float32."""
    height, width = (max(1, round(size / BLOCK_PX)) for size in field.shape[:2])
    planes = [field[..., channel].astype(np.float32) for channel in range(field.shape[-1])]
    return np.stack([cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA) for plane in planes])


def illumination(shrunk: Sequence[np.ndarray], how: Literal["mean", "median"], sigma_px: float) -> np.ndarray:
    """Estimate the illumination from the shrunk fields of a plate.

    Parameters
    ----------
    shrunk
        From `shrink`.
    how
        What is taken of each square over all fields: a median does not see single bright cells.
    sigma_px
        Deviation of the Gaussian that smooths it, in pixels of a field.

    Returns
    -------
    ndarray
        (channel, y, x) float32 on the coarse grid, 1 where it is darkest.
    """
    centre = np.mean(shrunk, axis=0, dtype=np.float64) if how == "mean" else np.median(shrunk, axis=0)
    smooth = [
        cv2.GaussianBlur(plane, (0, 0), sigma_px / BLOCK_PX, borderType=cv2.BORDER_REFLECT)
        for plane in centre.astype(np.float32)
    ]
    darkest = [max(float(np.percentile(plane, ROBUST_MINIMUM)), np.finfo(np.float32).tiny) for plane in smooth]
    return np.stack([np.maximum(plane / dark, 1.0) for plane, dark in zip(smooth, darkest, strict=True)])


def gains(coarse: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return what each pixel is to be multiplied by: (channel, height, width) float32, at most 1."""
    return np.stack([1.0 / cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in coarse])


def even_out(field: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Multiply a field (y, x, channel) by its gains, rounded to whole counts; same type and layout in memory."""
    kind = {"uint8": cv2.CV_8U, "uint16": cv2.CV_16U}[field.dtype.name]
    planes = [cv2.multiply(field[..., channel], gain, dtype=kind) for channel, gain in enumerate(factors)]
    return np.moveaxis(np.stack(planes), 0, -1)
