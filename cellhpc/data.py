"""What runs learn from: the used tiles of a study, once for all runs of a process and for all its ranks on a host.

In memory, they lie in a file of `/dev/shm` that the ranks of a host share and decode together; with
`train.window_tiles` they stay in their shards (see `cellhpc.feed`), if asked in a copy on the host's scratch.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from cellhpc.errors import UsageError, UserError
from cellhpc.feed import Pixels
from cellhpc.folds import Folds
from cellhpc.memory import Allowed, allowed, held_bytes, too_large
from cellhpc.ranks import OneRank, Ranks
from cellhpc.shards import Shards
from cellhpc.shared import all_well, peers, share
from cellhpc.tiles import Store

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the file there has no name for longer than the ranks need to open it
_COPY_BYTES, _COPY_THREADS = 2**23, 4


@dataclass(frozen=True)
class Data:
    """What a run learns from and is asked: tiles, and which of them are whose.

    Attributes
    ----------
    pixels
        Every used tile of the study, (n, y, x, c): uint8 in memory, or in their shards. Shared by all runs of the
        process.
    tiles
        Table (n rows) of the tiles.
    classes
        Labels in the order of the logits.
    channels
        Names, in the order of the last axis.
    by
        Column of the table that the folds hold out.
    """

    pixels: Pixels
    tiles: pd.DataFrame
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    by: str = "compound"

    @cached_property
    def targets(self) -> np.ndarray:
        """Class number of each tile, int32 (n,)."""
        return np.searchsorted(np.array(self.classes), self.tiles["label"].to_numpy(dtype=str)).astype(np.int32)


def load_data(
    store: Store,
    folds: Folds,
    tile_px: int,
    ranks: Ranks | None = None,
    *,
    window_tiles: int | None = None,
    stage: bool = False,
    limit: Allowed | None = None,
) -> Data:
    """Make all used tiles of a store ready to learn from. All ranks call it.

    Parameters
    ----------
    store, folds, tile_px
        Where the tiles are, which of them are used, and their side.
    ranks
        The processes that train together; by default this is the only one.
    window_tiles
        As `train.window_tiles`: the tiles stay in their shards. None and 0: they are held in memory.
    stage
        As `sweep.stage`: the shards are copied to this host's scratch.
    limit
        Memory that tiles may take on this host.

    Raises
    ------
    UsageError
        The tiles don't fit into the memory that they may take, or the store holds none of this size.
    DataError
        A shard is missing or damaged.
    """
    ranks = ranks or OneRank()
    tiles = store.tiles[folds.used(store.tiles)].reset_index(drop=True)
    shards = store.shards(tiles, tile_px)
    mine = peers(ranks)
    limit = limit or allowed(None)
    pixels: Pixels
    if not window_tiles:
        pixels = _hold(shards, ranks, mine, limit)
    else:
        _stream(shards, ranks, mine, limit, window_tiles, stage)
        pixels = shards
    return Data(pixels, tiles, folds.classes, store.channels, folds.by)


def _hold(shards: Shards, ranks: Ranks, mine: Sequence[int], limit: Allowed) -> np.ndarray:
    """Decode all tiles into memory, which the ranks of a host share where that can be."""
    tile_bytes = int(np.prod(shards.shape[1:]))

    def require(copies: int) -> None:
        said = too_large(shards.nbytes, tile_bytes, limit, None, copies)
        all_well(ranks, UsageError(said) if said else None, "its tiles into memory")

    require(1)
    folders = [SHARED_MEMORY, Path(tempfile.gettempdir())] if len(mine) > 1 else []
    shared = share(ranks, mine, folders, shards.nbytes)
    if shared is None and len(mine) > 1 and ranks.rank == mine[0]:
        print(
            f"cellhpc: {' and '.join(map(str, folders))} of {socket.gethostname()} have no {shards.nbytes / 1e9:,.2f} "
            f"GB that its {len(mine)} ranks can share: each holds the tiles for itself",
            flush=True,
        )
    require(1 if shared else len(mine))
    rows = np.argsort(shards.shard, kind="stable")
    if shared:
        file, _ = shared
        pixels = np.frombuffer(mmap.mmap(file, shards.nbytes), np.uint8).reshape(shards.shape)
        os.close(file)  # the mapping holds it
        rows = np.array_split(rows, len(mine))[mine.index(ranks.rank)]
    else:
        pixels = np.empty(shards.shape, np.uint8)
    fault = None
    try:
        shards.decode(rows, pixels, places=rows)
    except UserError as caught:
        fault = caught
    all_well(ranks, fault, "the store")
    return pixels


def _stream(shards: Shards, ranks: Ranks, mine: Sequence[int], limit: Allowed, window_tiles: int, stage: bool) -> None:
    """See that two windows fit into memory, and copy the shards to scratch if that is asked for."""
    tile_bytes = int(np.prod(shards.shape[1:]))
    held = held_bytes(len(shards.shard), tile_bytes, window_tiles) * len(mine) // ranks.size
    said = too_large(held, tile_bytes, limit, window_tiles)
    all_well(ranks, UsageError(said) if said else None, "its tiles into memory")
    if not stage:
        return
    fault: UserError | None = None
    begins = np.zeros(shards.count + 1, np.int64)
    try:
        begins[1:] = np.cumsum([shards.path(shard).stat().st_size for shard in range(shards.count)])
    except OSError as caught:
        fault = UserError(f"{caught.filename} can't be read: {caught.strerror}.")
    all_well(ranks, fault, "the store")
    size = int(begins[-1])
    shared = share(ranks, mine, [Path(tempfile.gettempdir())], size)
    if shared is None:
        if ranks.rank == mine[0]:
            print(
                f"cellhpc: {tempfile.gettempdir()} of {socket.gethostname()} has no {size / 1e9:,.2f} GB for the "
                "shards: they are read from the store",
                flush=True,
            )
    else:
        fault = _copy(shards, shared[0], begins, range(mine.index(ranks.rank), shards.count, len(mine)))
    all_well(ranks, fault, "the store")
    if shared is not None:
        shards.read_from(shared[0], begins)


def _copy(shards: Shards, file: int, begins: np.ndarray, numbers: Sequence[int]) -> UserError | None:
    """Copy shards to their places in an open file; returns what went wrong."""

    def copy(shard: int) -> None:
        begin, at = int(begins[shard]), 0
        with shards.path(shard).open("rb", buffering=0) as stream:
            while part := os.pread(stream.fileno(), _COPY_BYTES, at):
                at += os.pwrite(file, part, begin + at)
        if begin + at != begins[shard + 1]:
            raise UserError(f"{shards.path(shard)} changed while it was copied.")

    try:
        with ThreadPoolExecutor(_COPY_THREADS, "copy") as pool:
            for _ in pool.map(copy, numbers):
                pass
    except UserError as caught:
        return caught
    except OSError as caught:
        return UserError(f"{caught.filename or tempfile.gettempdir()}: {caught.strerror}.")
    return None
