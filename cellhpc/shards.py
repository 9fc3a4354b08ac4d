"""Shards, read: their tiles decoded by threads outside of the lock of Python.

Training from shards wants many single tiles, in any order. Zarr reads each through an event loop: on 2 cores 140 tiles
of 224 pixels a second by their numbers, and 2,100 in whole shards, however many threads there are. A shard is a file,
though, of a simple layout (`shard_writer`). Read as such, a thread decodes 3,000 tiles a second and two decode 6,000,
each straight into its place in a batch (`tests/bench/feed.py`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd
from numcodecs import blosc

from cellhpc.errors import DataError
from cellhpc.ledger import read_json
from cellhpc.shard_writer import CHECKSUM, EMPTY, ENTRY, METADATA

MOST_THREADS = 8
_INDEX_ROW = 2 * ENTRY.itemsize


@dataclass(frozen=True)
class Layout:
    """How the tiles of an array lie in its shards."""

    folder: Path
    tiles: int
    compressed: bool

    @classmethod
    def of(cls, folder: Path, tile: tuple[int, ...]) -> Layout:
        """Read the layout of an array in shards of tiles of this shape.

        Raises
        ------
        DataError
            There is no array, or one of another layout.
        """
        remedy = "Remove the store's folder, then type: cellhpc convert JOB.toml"
        try:
            found = read_json(folder / METADATA)
            (sharding,) = found["codecs"]
            shard, chunk = found["chunk_grid"]["configuration"]["chunk_shape"], sharding["configuration"]["chunk_shape"]
            codecs = [codec["name"] for codec in sharding["configuration"]["codecs"]]
            where, guard = sharding["configuration"]["index_location"], sharding["configuration"]["index_codecs"]
        except FileNotFoundError:
            raise DataError(f"{folder} is missing", remedy=remedy) from None
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{folder} is no array of tiles in shards", remedy=remedy) from None
        known = (where, [codec["name"] for codec in guard], codecs[:1], codecs[1:]) in [
            ("end", ["bytes", "crc32c"], ["bytes"], compressors) for compressors in ([], ["blosc"])
        ]
        if not known or tuple(chunk) != (1, *tile) or found["data_type"] != "uint8":
            raise DataError(f"{folder}: its tiles are not stored as cellhpc stores them", remedy=remedy)
        return cls(folder, shard[0], len(codecs) > 1)


class Shards:
    """Tiles that stay in their shards until they are asked for.

    Parameters
    ----------
    folder
        Of the arrays: `PLATE/tiles_<px>` below it.
    tiles
        Table of the tiles, (n rows); its columns plate and row are used.
    tile
        Shape of a tile: y, x, channel.

    Attributes
    ----------
    shape
        (n, y, x, channel), as if they were an array.
    shard
        Number of the shard that each tile is in, int64 (n,); in the order of plates and of shards in them.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, tiles: pd.DataFrame, tile: tuple[int, int, int]) -> None:
        self.shape = (len(tiles), *tile)
        plates, plate = np.unique(tiles["plate"].to_numpy(dtype=str), return_inverse=True)
        self._layouts = [Layout.of(folder / name / f"tiles_{tile[0]}", tile) for name in plates]
        per_shard = np.array([layout.tiles for layout in self._layouts], np.int64)[plate]
        rows = tiles["row"].to_numpy(dtype=np.int64)
        self._place = rows % per_shard  # in its shard
        keys, self.shard = np.unique(np.stack([plate, rows // per_shard]), axis=1, return_inverse=True)
        self.shard = self.shard.reshape(-1)
        self._files = [(self._layouts[one], int(number)) for one, number in keys.T]
        self._indices: dict[int, np.ndarray] = {}
        self._copy: tuple[int, np.ndarray] | None = None  # a file that holds all shards, and where each begins

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles when they are decoded."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def count(self) -> int:
        """Number of the shards."""
        return len(self._files)

    def path(self, shard: int) -> Path:
        """Path of a shard."""
        layout, number = self._files[shard]
        return layout.folder / f"c.{number}.0.0.0"

    def stored_bytes(self, most: int = 1000) -> float:
        """Count the bytes that are read to decode each tile once, the indices of the shards included.

        Where there are more than `most` shards, so many are looked at, evenly spread, and the others taken to be alike.

        Raises
        ------
        DataError
            A shard is missing or damaged.
        """
        looked_at = np.unique(np.linspace(0, self.count - 1, min(self.count, most)).astype(int))
        order = np.argsort(self.shard, kind="stable")
        edges = np.searchsorted(self.shard[order], [looked_at, looked_at + 1])
        tiles, size = 0, 0
        for shard, first, end in zip(looked_at.tolist(), *edges.tolist(), strict=True):
            rows = order[first:end]
            with self._whole(shard, rows), self._opened(shard) as (file, begins, ends):
                index = self._index(shard, file, begins, ends)
                own = index[self._place[rows]]
                size += int(own[own[:, 0] != EMPTY, 1].sum()) + index.nbytes + CHECKSUM
                tiles += len(rows)
        return size * len(self.shard) / max(1, tiles)

    def read_from(self, file: int, begins: np.ndarray) -> None:
        """Read from now on from this open file, in which the shards begin at these bytes (shards + 1,).

        The file is closed with the last use of these tiles.
        """
        self._copy = file, begins
        weakref.finalize(self, os.close, file)

    def decode(
        self,
        rows: np.ndarray,
        out: np.ndarray,
        places: np.ndarray | None = None,
        stop: threading.Event | None = None,
        threads: int | None = None,
    ) -> None:
        """Decode tiles into an array.

        Parameters
        ----------
        rows
            Numbers of the tiles, in any order.
        out
            uint8 (m, y, x, channel), contiguous.
        places
            Where in `out` each of them goes; by default one behind the other.
        stop
            When it is set, the rest is left undone.
        threads
            How many decode; by default as many as this process has cores, at most `MOST_THREADS`.

        Raises
        ------
        DataError
            A shard is missing or damaged.
        """
        places = np.arange(len(rows)) if places is None else places
        order = np.lexsort((self._place[rows], self.shard[rows]))
        parts = np.split(order, np.flatnonzero(np.diff(self.shard[rows][order])) + 1) if len(rows) else []

        def work(part: np.ndarray) -> None:
            if stop is None or not stop.is_set():
                self._decode_shard(rows[part], out, places[part], stop)

        threads = threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(max(1, min(threads, len(parts))), "decode") as pool:
            for _ in pool.map(work, parts):
                pass

    def _decode_shard(
        self, rows: np.ndarray, out: np.ndarray, places: np.ndarray, stop: threading.Event | None
    ) -> None:
        """Decode tiles of one shard, in the order in which they lie in it."""
        shard, inside = int(self.shard[rows[0]]), self._place[rows]
        layout, _ = self._files[shard]
        with self._whole(shard, rows), self._opened(shard) as (file, begin, end):
            index = self._index(shard, file, begin, end)
            for (offset, size), place in zip(index[inside].tolist(), places.tolist(), strict=True):
                if stop is not None and stop.is_set():
                    return
                if offset == EMPTY:
                    out[place] = 0
                else:
                    _decode(os.pread(file, size, begin + offset), size, out[place], layout.compressed)

    @contextlib.contextmanager
    def _whole(self, shard: int, rows: np.ndarray) -> Iterator[None]:
        """Say of what goes wrong within that these tiles of a shard can't be read."""
        layout, number = self._files[shard]
        try:
            yield
        except (OSError, ValueError, RuntimeError) as fault:
            first, last = number * layout.tiles + self._place[rows[[0, -1]]]
            raise DataError(
                f"{layout.folder}: tiles {first} to {last} can't be read: {fault}",
                remedy="Remove the store's folder, then type: cellhpc convert JOB.toml",
            ) from None

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[int, int, int]]:
        """Give an open file and where in it the shard begins and ends."""
        if self._copy is not None:
            file, begins = self._copy
            yield file, int(begins[shard]), int(begins[shard + 1])
            return
        path = self.path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path.name} is missing") from None
        try:
            yield file, 0, os.fstat(file).st_size
        finally:
            os.close(file)

    def _index(self, shard: int, file: int, begin: int, end: int) -> np.ndarray:
        """Where each tile of a shard begins and how long it is, uint64 (tiles, 2)."""
        if shard not in self._indices:
            size = self._files[shard][0].tiles * _INDEX_ROW
            raw = os.pread(file, size + CHECKSUM, max(begin, end - size - CHECKSUM))
            if google_crc32c.value(raw[:size]) != int.from_bytes(raw[size:], "little"):
                raise ValueError("the checksum of its index is wrong")
            self._indices[shard] = np.frombuffer(raw[:size], ENTRY).reshape(-1, 2)
        return self._indices[shard]


def _decode(raw: bytes, stored: int, out: np.ndarray, compressed: bool) -> None:
    """Decode a tile from its `stored` bytes; Blosc itself would trust what its header says of them."""
    if len(raw) != stored or (compressed and int.from_bytes(raw[12:16], "little") != stored):
        raise ValueError("a tile is cut off")
    size = int.from_bytes(raw[4:8], "little") if compressed else stored
    if size != out.nbytes:
        raise ValueError(f"a tile has {size} bytes instead of {out.nbytes}")
    if compressed:
        blosc.decompress(raw, out)
    else:
        out.reshape(-1)[:] = np.frombuffer(raw, np.uint8)
