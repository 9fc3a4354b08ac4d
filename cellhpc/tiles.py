"""The converted store, for those who read it: an index of tiles, and their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from cellhpc.errors import UsageError, listing
from cellhpc.record import ARRAYS, FIELDS, TILES, content_digest, finished_plates, plate_folder, read_identity
from cellhpc.shards import Shards


@dataclass(frozen=True)
class Store:
    """Finished plates of a store of tiles.

    Attributes
    ----------
    folder
        Where it lies.
    plates
        The plates that are looked at; it may hold others.
    channels
        Names, in the order of the last axis.
    tile_sizes_px
        Sides of the tiles that it holds.
    content_digest
        Of what it holds of these plates.
    """

    folder: Path
    plates: tuple[str, ...]
    channels: tuple[str, ...]
    tile_sizes_px: tuple[int, ...]
    content_digest: str

    @classmethod
    def open(cls, folder: Path | str, plates: Sequence[str] | None = None) -> Store:
        """Open a store.

        Parameters
        ----------
        folder
            Where it lies.
        plates
            The plates to look at; by default all that are finished.

        Raises
        ------
        UsageError
            There is none, or the conversion of a plate is not finished.
        """
        folder = Path(folder)
        finished = finished_plates(folder)
        wanted = tuple(finished if plates is None else sorted(plates))
        if not wanted or (missing := sorted(set(wanted) - set(finished))):
            there = (folder / ARRAYS).exists()
            state = "its conversion is not finished" if there else "no store of tiles is there"
            if finished and missing:
                state = f"the conversion of {listing(missing)} is not finished"
            raise UsageError(f"{folder}: {state}. Type: cellhpc convert JOB.toml")
        identity = read_identity(folder)
        channels, sizes = tuple(identity["channels"]), tuple(identity["tile_sizes_px"])
        return cls(folder, wanted, channels, sizes, content_digest(folder, wanted))

    @cached_property
    def tiles(self) -> pd.DataFrame:
        """The tiles of treatments that are kept, by plate, well, field and tile; columns as in ``tiles.parquet``."""
        return self._kept("treatment")

    @cached_property
    def controls(self) -> pd.DataFrame:
        """The tiles of controls that are kept, in the same order, with the same columns and labelled nothing.

        There are none unless the store was made with `convert.controls`.
        """
        return self._kept("dmso")

    def _kept(self, role: str) -> pd.DataFrame:
        tiles = self._tables(TILES)
        used = tiles[tiles["kept"] & (tiles["role"] == role)]
        return used.sort_values(["plate", "well", "field", "tile"], ignore_index=True)

    def tiles_of(self, plate: str) -> pd.DataFrame:
        """All tiles of a plate in the order of its array, also those that are black: near-empty ones, of bad fields."""
        return pd.read_parquet(plate_folder(self.folder, plate) / TILES)

    @cached_property
    def fields(self) -> pd.DataFrame:
        """The fields that were read, with their quality figures; columns as in ``fields.parquet``."""
        return self._tables(FIELDS)

    def _tables(self, name: str) -> pd.DataFrame:
        tables = [pd.read_parquet(plate_folder(self.folder, plate) / name) for plate in self.plates]
        return pd.concat(tables, ignore_index=True)

    def read(self, tiles: pd.DataFrame, tile_px: int) -> np.ndarray:
        """Read tiles.

        Parameters
        ----------
        tiles
            Rows of `tiles` or `controls`, in any order; the columns plate and row are used.
        tile_px
            Side of the tiles, one of `tile_sizes_px`.

        Returns
        -------
        ndarray
            (n, tile_px, tile_px, channel) uint8, in the order of the given rows.

        Raises
        ------
        UsageError
            The store holds no tiles of this size.
        DataError
            A shard is missing or damaged.
        """
        shards = self.shards(tiles, tile_px)
        pixels = np.empty(shards.shape, np.uint8)
        shards.decode(np.arange(len(tiles)), pixels)
        return pixels

    def shards(self, tiles: pd.DataFrame, tile_px: int) -> Shards:
        """Find tiles in their shards, to decode them later: parameters and errors as those of `read`."""
        if tile_px not in self.tile_sizes_px:
            raise UsageError(
                f"{self.folder} holds tiles of {listing(self.tile_sizes_px)} pixels, none of {tile_px}. "
                "Choose another folder with --set convert.store=FOLDER, then type: cellhpc convert JOB.toml"
            )
        return Shards(self.folder / ARRAYS, tiles, (tile_px, tile_px, len(self.channels)))
