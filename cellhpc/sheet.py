"""What pictures are drawn on: a sheet that is measured in pixels, and channels as colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from cellhpc import ledger
from cellhpc.figures import DPI, GREY, INK

SHOWN = (5.0, 99.7)
"""Percentiles of a channel that become black and its full colour."""
LETTER_PX = 1.22
"""Width of a letter of one point, about."""

_FONT = "DejaVu Sans"
_HUES = {
    (0.0, 0.3, 1.0): "dna dapi hoechst nuclei nucleus",
    (0.0, 1.0, 0.7): "tubulin microtubules gfp fitc nfkb er",
    (1.0, 0.35, 0.0): "actin phalloidin rfp tritc cy3 agp",
    (1.0, 0.4, 0.9): "mito mitochondria cy5",
    (1.0, 0.95, 0.2): "rna",
}
"""As near to the microscopist's blue, green and red as colour-blind readers can still tell apart; after Okabe & Ito."""


class Sheet:
    """A white sheet: pictures are pasted pixel by pixel; letters and marks are drawn over them."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.ones((height, width, 3), np.float32)
        self.figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)  # Agg rounds down
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axes.set_axis_off()

    def paste(self, picture: np.ndarray | float, x: int, y: int, side: int) -> None:
        """Paste a square picture, (side, side, 3) of 0..1, or a grey level."""
        self.pixels[y : y + side, x : x + side] = picture

    def write(self, x: float, y: float, words: str, points: float = 8.5, **how: Any) -> None:
        """Write a line; by default it begins at x, and y is its base line."""
        self.axes.text(x, y, words, fontsize=points, family=_FONT, parse_math=False, **{"color": INK, **how})

    def explain(self, x: float, y: float, channels: Sequence[str], marks: Sequence[Artist] = ()) -> None:
        """Name the colours of the channels, and what marks mean, in a line that begins at x, below y."""
        hues = zip(channel_colours(channels), channels, strict=True)
        self.axes.legend(
            handles=[*(Patch(fc=hue, ec=GREY, lw=0.6, label=name) for hue, name in hues), *marks],
            loc="upper left", bbox_to_anchor=(x, y), bbox_transform=self.axes.transData, ncols=len(channels) + 4,
            borderaxespad=0, borderpad=0, handlelength=1.1, handletextpad=0.5, columnspacing=1.6, frameon=False,
            prop={"family": _FONT, "size": 8.5}, labelcolor=INK,
        )  # fmt: skip

    def save(self, path: Path) -> bytes:
        """Write it as PNG, atomically; give the file's bytes."""
        height, width = self.pixels.shape[:2]
        self.axes.imshow(self.pixels, extent=(0, width, height, 0), interpolation="none", zorder=0)
        self.canvas.draw()
        with ledger.replacing(path) as temporary:
            drawn = Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3])
            drawn.save(temporary, "PNG", dpi=(DPI, DPI), optimize=True)
            return temporary.read_bytes()


def channel_colours(channels: Sequence[str]) -> np.ndarray:
    """Choose a colour for each channel, (channel, 3): by its name, else one that is left; one alone is white."""
    if len(channels) == 1:
        return np.ones((1, 3))
    chosen: dict[str, tuple[float, float, float]] = {}
    for hue, words in _HUES.items():
        known = [name for name in channels if {*re.findall(r"[a-z]+\d*", name.lower())} & {*words.split()}]
        chosen |= {name: hue for name in known[:1] if name not in chosen}
    left = iter(hue for hue in _HUES if hue not in chosen.values())
    return np.array([chosen.get(name) or next(left) for name in channels], float)


def in_colour(pictures: Sequence[np.ndarray], channels: Sequence[str]) -> list[np.ndarray]:
    """Turn pictures (y, x, channel) into colours (y, x, 3) of 0..1, on one scale over all of them; NaN stays NaN.

    Where channels meet, the brightest counts for each of red, green and blue: the sum of five would be white.
    """
    values = np.concatenate([np.empty((0, len(channels))), *(one.reshape(-1, len(channels)) for one in pictures)])
    values = values[~np.isnan(values[:, 0])]
    low, high = np.percentile(values, SHOWN, axis=0) if len(values) else (0, 255)
    hues = channel_colours(channels)
    shares = (np.clip((picture - low) / np.maximum(high - low, 1), 0, 1) for picture in pictures)
    return [(share[..., None] * hues).max(axis=-2) for share in shares]


def resize(picture: np.ndarray, side: int) -> np.ndarray:
    """Resize a picture (y, x, channel) to a square by area averages."""
    planes = [cv2.resize(plane, (side, side), interpolation=cv2.INTER_AREA) for plane in np.moveaxis(picture, -1, 0)]
    return np.stack(planes, -1)
