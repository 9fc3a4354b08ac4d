"""A plate at a glance: every well at its place, as a mosaic of its fields, and what is to be known of them.

Tiles are shown as they lie in the store, square, each channel in a colour of its own and on one scale over the plate:
a field that is dark beside the others looks dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle

from cellhpc import wells
from cellhpc.errors import DataError, UsageError, listing
from cellhpc.figures import COLOURS, GREY, INK
from cellhpc.ledger import write_table
from cellhpc.montage import montage
from cellhpc.outliers import outliers
from cellhpc.record import finished_plates, read_identity
from cellhpc.sheet import LETTER_PX, Sheet, in_colour, resize
from cellhpc.tiles import Store

PLATE_PX = 1440
"""Width of all wells together; a well has 120, 60 or 30 pixels."""
LEFT_PX, TOP_PX, BELOW_PX = 52, 112, 60
"""Margins: letters of the rows; title and numbers of the columns; colours and marks."""

_ASIDE, _STANDS_OUT = COLOURS[1], COLOURS[4]
_EMPTY, _NEAR_EMPTY = 0.94, 0.45  # grey levels
_CORNER = [(-1, 1), (1, 1), (-1, -1), (-1, 1)]
_FIELD_GAP_PX = 2

Box = tuple[int, int, int]
"""Left and upper edge and side of a square, in pixels."""


def place(well: str) -> wells.Place | None:
    """Row and column of a well from 0, as (1, 5) of B06 and (26, 0) of AA1; None of what no plate has."""
    try:
        return wells.place(well)
    except ValueError:
        return None


def plate_format(names: Sequence[str]) -> tuple[int, int]:
    """Rows and columns of the smallest plate that holds these wells.

    Raises
    ------
    DataError
        Wells have no place on any.
    """
    places = {name: place(name) for name in names}
    if lost := [name for name, at in places.items() if at is None]:
        raise DataError(f"no plate of 96, 384 or 1,536 wells has {listing(lost)}; wells are named as B06 or AF48")
    return wells.plate_shape([at for at in places.values() if at])


def well_box(row: int, column: int, columns: int) -> Box:
    """Where the picture of a well is, on a plate of so many columns."""
    pitch = PLATE_PX // columns
    return LEFT_PX + column * pitch, TOP_PX + row * pitch, pitch - max(2, pitch // 20)


def plate_overview(store: Store, plate: str) -> Sheet:
    """Draw a plate.

    Fields that were set aside are crossed out, those that stand out (see `cellhpc.outliers`) have a marked corner, and
    near-empty tiles are grey. Controls are dashed frames: around their pictures, if the store has tiles of them
    (`convert.controls`), else around their name.

    Raises
    ------
    DataError
        Wells are not named as those of a plate, or a shard is missing or damaged.
    """
    fields = store.fields[store.fields["plate"] == plate].sort_values(["well", "field"])
    tiles = store.tiles_of(plate)
    rows, columns = plate_format(fields["well"].unique().tolist())
    named = {*outliers(fields)[["well", "field"]].itertuples(index=False, name=None)}
    sheet = _empty_plate(plate, rows, columns)
    pictures: dict[Box, np.ndarray] = {}
    for well, here in fields.groupby("well"):
        box = well_box(*(place(str(well)) or (0, 0)), columns)
        spots = _divide(box, len(here))
        control = (here["role"] == "dmso").all()
        mine = tiles[tiles["well"] == well].sort_values(["field", "tile"])
        if control and mine.empty:
            _draw_control(sheet, box, here["compound"].iloc[0])
        else:
            pictures |= zip(spots, _read_fields(store, mine, spots[0][2]), strict=True)
            if control:
                _frame(sheet, box, lw=1.8, ec="white")
        for spot, field, bad in zip(spots, here["field"], here["bad"], strict=True):
            if bad:
                pictures.pop(spot, None)
                _cross_out(sheet, spot)
            elif (well, field) in named:
                _mark_corner(sheet, spot)
    for spot, colours in zip(pictures, in_colour([*pictures.values()], store.channels), strict=True):
        sheet.paste(np.where(np.isnan(colours), _NEAR_EMPTY, colours), *spot)
    _tell(sheet, fields, tiles, len(named), store.channels)
    return sheet


def write_pictures(store: Path, folder: Path, plates: Sequence[str] = ()) -> Iterator[Path]:
    """Write ``outliers.csv``, ``montage.png`` and ``overview_PLATE.png`` of a store; yields each when it is there.

    Parameters
    ----------
    store
        Its folder.
    folder
        Where the files go.
    plates
        The plates to look at; by default all that are finished.

    Raises
    ------
    UsageError
        There is no store, or it has no such plate.
    DataError
        Plates can't be drawn; the others were.
    """
    finished = finished_plates(store)
    if finished and (unknown := set(plates) - set(finished)):
        raise UsageError(f"{store} has no finished plate {listing(unknown)}. It has: {listing(finished, 40)}.")
    opened = Store.open(store, plates or None)
    write_table(folder / "outliers.csv", outliers(opened.fields))
    yield folder / "outliers.csv"
    montage(opened).save(folder / "montage.png")
    yield folder / "montage.png"
    problems = []
    for plate in opened.plates:
        path = folder / f"overview_{plate}.png"
        try:
            plate_overview(opened, plate).save(path)
        except DataError as fault:
            problems.append(f"plate {plate}: {fault}")
        else:
            yield path
    if problems:
        raise DataError(f"{len(problems)} plate(s) can't be drawn.", problems)


def _empty_plate(plate: str, rows: int, columns: int) -> Sheet:
    """Begin an overview: title, letters of the rows, numbers of the columns, wells without pictures."""
    pitch = PLATE_PX // columns
    points = min(9.0, 4.5 + pitch / 14)
    sheet = Sheet(LEFT_PX + PLATE_PX + 12, TOP_PX + rows * pitch + BELOW_PX)
    sheet.write(LEFT_PX, 40, f"Plate {plate}", 11, weight="bold")
    for row in range(rows):
        sheet.write(
            LEFT_PX - 12, TOP_PX + (row + 0.48) * pitch, wells.ROWS[row], points, ha="right", va="center_baseline"
        )
        for column in range(columns):
            sheet.paste(_EMPTY, *well_box(row, column, columns))
    for column in range(columns):
        sheet.write(LEFT_PX + (column + 0.48) * pitch, TOP_PX - 10, str(column + 1), points, ha="center")
    return sheet


def _divide(box: Box, count: int) -> list[Box]:
    """Divide the square of a well among its fields, in rows."""
    x, y, side = box
    across = math.ceil(math.sqrt(count))
    pitch = (side + _FIELD_GAP_PX) // across
    places = (divmod(number, across) for number in range(count))
    return [(x + column * pitch, y + row * pitch, pitch - _FIELD_GAP_PX) for row, column in places]


def _read_fields(store: Store, tiles: pd.DataFrame, side: int) -> list[np.ndarray]:
    """Put fields together from all of their tiles, (side, side, channel) of 0..255; NaN where a tile is near-empty."""
    down, across = read_identity(store.folder)["tile_grid"]
    px = next((px for px in store.tile_sizes_px if px * max(down, across) >= side), store.tile_sizes_px[-1])
    pixels = store.read(tiles, px).astype(np.float32)
    pixels[~tiles["kept"].to_numpy()] = np.nan
    fields = pixels.reshape(-1, down, across, *pixels.shape[1:]).transpose(0, 1, 3, 2, 4, 5)
    return [resize(field, side) for field in fields.reshape(-1, down * px, across * px, pixels.shape[-1])]


def _draw_control(sheet: Sheet, box: Box, name: str) -> None:
    """Draw a dashed frame with the control's name, or its first letter where the name is too long."""
    x, y, side = box
    sheet.paste(1.0, *box)
    _frame(sheet, box, lw=0.8, ec=GREY)
    points = 8.5 if side > 100 else 6.5
    fits = len(name) * points * LETTER_PX < side
    words = name if fits else name[0]
    sheet.write(x + side / 2, y + side / 2, words, points, ha="center", va="center_baseline", color=GREY)


def _frame(sheet: Sheet, box: Box, **how: Any) -> None:
    """Draw the dashed frame of a control."""
    x, y, side = box
    sheet.axes.add_patch(Rectangle((x + 1, y + 1), side - 2, side - 2, fill=False, ls="--", **how))


def _cross_out(sheet: Sheet, box: Box) -> None:
    x, y, side = box
    sheet.paste(_EMPTY, *box)
    sheet.axes.add_patch(Rectangle((x + 1, y + 1), side - 2, side - 2, fill=False, lw=1.0, ec=_ASIDE))
    for ends in ((y + 1, y + side - 1), (y + side - 1, y + 1)):
        sheet.axes.plot((x + 1, x + side - 1), ends, color=_ASIDE, lw=1.2)


def _mark_corner(sheet: Sheet, box: Box) -> None:
    x, y, side = box
    leg = max(side // 4, min(side, 12))
    sheet.axes.add_patch(Polygon([(x, y), (x + leg, y), (x, y + leg)], fc=_STANDS_OUT, ec=INK, lw=0.6))


def _tell(sheet: Sheet, fields: pd.DataFrame, tiles: pd.DataFrame, stand_out: int, channels: Sequence[str]) -> None:
    """Write the counts below the title, and explain colours and those marks that occur."""
    controls = fields[fields["role"] == "dmso"]
    pictured = fields[fields["role"] != "dmso"]
    aside, near_empty = int((fields["bad"] != "").sum()), int(fields["near_empty"].sum())
    tiled = tiles["role"] == "dmso"
    counts = {
        "wells": pictured["well"].nunique(), "fields": len(pictured), "tiles": int((~tiled).sum()),
        "control wells": controls["well"].nunique(), "tiles of controls": int(tiled.sum()),
        "fields set aside": aside, "fields that stand out": stand_out, "near-empty tiles": near_empty,
    }  # fmt: skip
    words = "   ".join(f"{what}: {count:,}" for what, count in counts.items() if count)
    sheet.write(LEFT_PX, 68, words, color=GREY)
    control = f"{listing(controls['compound'].unique(), 3)}: control{'' if tiled.any() else ', without tiles'}"
    marks: list[tuple[int, Artist]] = [
        (len(controls), Patch(fill=False, ls="--", ec=GREY, label=control)),
        (aside, Line2D([], [], ls="", marker="x", ms=7, mew=2, c=_ASIDE, label="set aside: can't be read")),
        (stand_out, Line2D([], [], ls="", marker=_CORNER, ms=7, mec=INK, c=_STANDS_OUT, label="stands out")),
        (near_empty, Patch(fc=str(_NEAR_EMPTY), label="near-empty tile")),
    ]
    below = sheet.pixels.shape[0] - BELOW_PX + 20
    sheet.explain(LEFT_PX, below, channels, [mark for count, mark in marks if count])
