"""What runs learn from: the used tiles of a study, in memory once for all runs of a process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellhpc.folds import Folds
from cellhpc.tiles import Store


@dataclass(frozen=True)
class Data:
    """What a run learns from and is asked: tiles in memory, and which of them are whose.

    Attributes
    ----------
    pixels
        uint8 (n, y, x, c), every used tile of the study; shared by all runs of the process.
    tiles
        Table (n rows) of the tiles.
    classes
        Labels in the order of the logits.
    channels
        Names, in the order of the last axis.
    by
        Column of the table that the folds hold out.
    """

    pixels: np.ndarray
    tiles: pd.DataFrame
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    by: str = "compound"

    @property
    def targets(self) -> np.ndarray:
        """Class number of each tile, int32 (n,)."""
        return np.searchsorted(np.array(self.classes), self.tiles["label"].to_numpy(dtype=str)).astype(np.int32)


def load_data(store: Store, folds: Folds, tile_px: int) -> Data:
    """Read all used tiles of a store into memory."""
    tiles = store.tiles[folds.used(store.tiles)].reset_index(drop=True)
    return Data(store.read(tiles, tile_px), tiles, folds.classes, store.channels, folds.by)
