"""Metadata of OME-Zarr 0.5 (https://ngff.openmicroscopy.org/0.5/): of a plate, its wells and their fields, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cellhpc.wells import ROWS, Place, plate_shape

VERSION = "0.5"

COLOURS = {"dna": "0000FF", "tubulin": "00FF00", "actin": "FF0000"}
OTHER_COLOURS = ("E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7")
"""For the colour-blind too (Okabe & Ito, Color Universal Design, 2008)."""


def well_path(at: Place) -> str:
    """Path of a well in its plate: B/6 of B06."""
    return f"{ROWS[at[0]]}/{at[1] + 1}"


def plate_metadata(name: str, places: Sequence[Place], fields: Mapping[Place, Sequence[int]]) -> dict[str, Any]:
    """Describe a plate, the smallest that has wells at all these `places`; `fields` are those of the wells in it."""
    height, width = plate_shape(places)
    plate = {
        "version": VERSION,
        "name": name,
        "rows": [{"name": row} for row in ROWS[:height]],
        "columns": [{"name": str(column + 1)} for column in range(width)],
        "wells": [{"path": well_path(at), "rowIndex": at[0], "columnIndex": at[1]} for at in sorted(fields)],
        "field_count": max(len(numbers) for numbers in fields.values()),
    }
    return {"version": VERSION, "plate": plate}


def well_metadata(fields: Sequence[int]) -> dict[str, Any]:
    """Describe a well that has these fields."""
    images = [{"path": str(field)} for field in sorted(fields)]
    return {"version": VERSION, "well": {"version": VERSION, "images": images}}


def image_metadata(
    name: str, channels: Sequence[str], extremes: Sequence[tuple[int, int]], highest: int, pixel_um: float | None
) -> dict[str, Any]:
    """Describe a field whose pixels are an array "0" with the axes c, y and x.

    Parameters
    ----------
    name, channels
        What it and its channels are called.
    extremes
        Lowest and highest value of each channel: the window in which viewers show it.
    highest
        Highest value of its type.
    pixel_um
        Side of a pixel in micrometres; without it, lengths have no unit.
    """
    unit = {"unit": "micrometer"} if pixel_um else {}
    axes = [{"name": "c", "type": "channel"}, *({"name": axis, "type": "space", **unit} for axis in "yx")]
    scale = {"type": "scale", "scale": [1.0, pixel_um or 1.0, pixel_um or 1.0]}
    others = iter(OTHER_COLOURS)
    shown = [
        {
            "label": channel,
            "color": COLOURS.get(channel.lower()) or next(others),
            "active": True,
            # Viewers refuse a window of no width.
            "window": {"min": 0, "max": highest, "start": low, "end": max(high, low + 1)},
        }
        for channel, (low, high) in zip(channels, extremes, strict=True)
    ]
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    return {
        "version": VERSION,
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets}],
        "omero": {"name": name, "channels": shown, "rdefs": {"defaultT": 0, "defaultZ": 0, "model": "color"}},
    }
