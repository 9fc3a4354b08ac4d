"""A montage of tiles by label, as Figure 2 of Kensert, Harrison & Spjuth (SLAS Discovery 2019)."""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cellhpc.errors import DataError
from cellhpc.figures import GREY
from cellhpc.sheet import LETTER_PX, Sheet, in_colour, resize
from cellhpc.tiles import Store

WIDTH_PX, TILE_PX = 1460, 120
"""Width of a montage at most, and side of a tile in it."""

_GAP_PX, _MARGIN_PX, _TITLE_PX, _LINE_PX = 4, 20, 34, 18
_BETWEEN_PX = 28  # labels


def choose_tiles(tiles: pd.DataFrame, labels: Sequence[str], per_label: int) -> pd.DataFrame:
    """Draw a tile of each of up to `per_label` compounds of each label; sorted by label and compound.

    A lot is the digest of names, so that neither the order of the rows nor other labels change what is drawn.
    """
    known = tiles[tiles["label"].isin(labels)]
    one = known.assign(lot=draw_lots(known, "plate", "well", "field", "tile")).sort_values("lot")
    one = one.drop_duplicates(["label", "compound"])
    drawn = one.assign(lot=draw_lots(one, "label", "compound")).sort_values("lot").groupby("label").head(per_label)
    return drawn.sort_values(["label", "compound"], ignore_index=True).drop(columns="lot")


def montage(store: Store, labels: Sequence[str] | None = None, per_label: int = 4) -> Sheet:
    """Draw a tile of each of some compounds of each label, all on one scale; near-empty tiles are not among them.

    Parameters
    ----------
    store
        The store.
    labels
        Those to show, by default all.
    per_label
        Compounds of a label, at most.

    Raises
    ------
    DataError
        There is no tile of these labels, or a shard is missing or damaged.
    """
    drawn = choose_tiles(store.tiles, sorted({*store.tiles["label"]}) if labels is None else labels, per_label)
    if drawn.empty:
        raise DataError(f"{store.folder}: there is no tile to show: all are near-empty.")
    pictures = in_colour(read_resized(store, drawn, TILE_PX), store.channels)
    words = [_describe(*one) for one in zip(drawn["compound"], drawn["concentration"], drawn["unit"], strict=True)]
    height = _TITLE_PX + TILE_PX + _LINE_PX * max(map(len, words)) + _BETWEEN_PX
    corners, width, bottom = _flow(Counter(drawn["label"]), height)
    sheet = Sheet(width, bottom + 68)
    for label, (x, y) in corners.items():
        sheet.write(x, y + _TITLE_PX - 10, label, 9, weight="bold")
        for at in np.flatnonzero(drawn["label"] == label):
            sheet.paste(pictures[at], x, y + _TITLE_PX, TILE_PX)
            for number, line in enumerate(words[at], start=1):
                sheet.write(x, y + _TITLE_PX + TILE_PX + number * _LINE_PX, line, 7)
            x += TILE_PX + _GAP_PX
    sheet.explain(_MARGIN_PX, bottom, store.channels)
    caption = f"One tile of each of up to {per_label} compounds of a label, drawn by lot."
    sheet.write(_MARGIN_PX, bottom + 48, caption, 7.5, color=GREY)
    return sheet


def read_resized(store: Store, tiles: pd.DataFrame, side_px: int) -> list[np.ndarray]:
    """Read tiles and resize them to a side, from the smallest that are not below it where a store has several."""
    stored_px = next((px for px in store.tile_sizes_px if px >= side_px), store.tile_sizes_px[-1])
    return [resize(tile, side_px) for tile in store.read(tiles, stored_px)]


def draw_lots(table: pd.DataFrame, *names: str) -> list[str]:
    """Draw a lot for each row, the digest of what stands in these columns: neither its place nor others change it."""
    rows = table[[*names]].astype(str).agg("/".join, axis=1)
    return [hashlib.sha256(row.encode()).hexdigest() for row in rows]


def _flow(sizes: Mapping[str, int], height: int) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Set labels of so many tiles side by side, in rows of one height.

    Returns
    -------
    corners
        Left and upper edge of each label.
    width, bottom
        Width of the sheet, and where its rows end.
    """
    corners: dict[str, tuple[int, int]] = {}
    x, y, right = _MARGIN_PX, 0, 600
    for label, count in sizes.items():
        width = max(count * (TILE_PX + _GAP_PX), int(len(label) * 9 * LETTER_PX))
        if x > _MARGIN_PX and x + width > WIDTH_PX - _MARGIN_PX:
            x, y = _MARGIN_PX, y + height
        corners[label] = x, y
        x += width + _BETWEEN_PX
        right = max(right, x - _BETWEEN_PX)
    return corners, right + _MARGIN_PX, y + height


def _describe(compound: str, concentration: float, unit: str) -> list[str]:
    """Name and concentration of a compound, in lines as wide as a tile."""
    lines = textwrap.wrap(compound.replace("/", "/ "), int(TILE_PX / 7 / LETTER_PX))
    dose = [] if math.isnan(concentration) else [f"{concentration:g} {unit}"]
    return [line.replace("/ ", "/") for line in lines] + dose
