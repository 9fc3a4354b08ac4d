"""Features: what the layer before the head of a network says of every tile of a store.

A folder of features::

    features.json      of what they are: network, weights, store, inputs, versions; written first
    plates/PLATE/      the plate's part, and its marker, until all parts are there
    features.zarr      all of them, float32 (n, d); row i is of
    tiles.parquet      row i: plate, well, field, tile, compound, label, ...
    done.json          their number and how fast they came; written last
    baseline.json      what `cellhpc.profiles` makes of them, if it was asked

The unit of work is a plate. What was killed goes on with the next one, and ends with the same bytes: a plate is divided
into the same steps always.

Where the store was made with `convert.controls`, tiles of controls are among the rows, behind the others of their
plate, and ``tiles.parquet`` has a column more: `role`, which is "treatment" or "dmso". `Features` keeps them apart:
controls are there to whiten the others on them (`cellhpc.whitening`), and for nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

from cellhpc import ledger
from cellhpc.backbone import Extractor, Source
from cellhpc.codecs import CODECS
from cellhpc.errors import DataError, UsageError, listing
from cellhpc.predictor import PREDICT_TILES
from cellhpc.progress import progress
from cellhpc.whitening import bare_plates, whiten

ABOUT, ARRAY, TABLE, PLATES, PART = "features.json", "features.zarr", "tiles.parquet", "plates", "features.npy"
READ_TILES = 16 * PREDICT_TILES
"""Tiles in memory at a time."""
CHUNK_BYTES, SHARD_CHUNKS = 2**20, 64


@dataclass(frozen=True)
class Features:
    """Finished features of a folder.

    Attributes
    ----------
    folder
        Where they lie.
    about
        The document of `features.json`.
    facts
        That of `done.json`: `tiles` (all rows), `features` (of a tile), `seconds`, `images_per_s`; with controls also
        `controls`, how many of the rows are theirs.
    """

    folder: Path
    about: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> Features:
        """Open a folder of features; raises `UsageError` if they are not there, or not all of them."""
        folder = Path(folder)
        try:
            about, facts = ledger.read_json(folder / ABOUT), ledger.read_json(folder / ledger.DONE)
        except FileNotFoundError:
            raise UsageError(f"{folder}: no finished features are there. Type: cellhpc features --help") from None
        return cls(folder, about, facts)

    @cached_property
    def tiles(self) -> pd.DataFrame:
        """Keys of the tiles of treatments (m rows)."""
        return self._rows[~self._controls].drop(columns="role", errors="ignore").reset_index(drop=True)

    @property
    def not_whitened(self) -> str:
        """Why the features can't be whitened on controls, and what to do about it; empty if they can."""
        if not self._controls.any():
            return (
                "there are no tiles of controls. They come with convert.controls = true, into a new convert.store, for "
                "which runs are trained anew: set it before training, or convert a second store beside the study's and "
                "type cellhpc features STORE2 --baseline"
            )
        bare = bare_plates(self._controls, self._plates)
        return f"{listing(bare)}: no tile of a control was kept" if bare else ""

    def read(self) -> np.ndarray:
        """Read the features of treatments, float32 (m, d)."""
        return self._of_treatments(self._values())

    def read_whitened(self) -> np.ndarray:
        """Read the features of treatments, whitened on those of controls, float64 (m, d).

        Raises
        ------
        DataError
            They can't be: `not_whitened` says why.
        """
        return self._of_treatments(whiten(self._values(), self._controls, self._plates))

    @cached_property
    def _rows(self) -> pd.DataFrame:
        """Keys of all rows."""
        return pd.read_parquet(self.folder / TABLE)

    @cached_property
    def _controls(self) -> np.ndarray:
        """Which rows are of controls, bool (n,)."""
        rows = self._rows
        return (rows["role"] == "dmso").to_numpy() if "role" in rows else np.zeros(len(rows), bool)

    @property
    def _plates(self) -> np.ndarray:
        return self._rows["plate"].to_numpy(dtype=str)

    def _values(self) -> np.ndarray:
        """Read all rows, float32 (n, d); those of controls too."""
        return np.asarray(zarr.open_array(self.folder / ARRAY, mode="r")[:])

    def _of_treatments(self, values: np.ndarray) -> np.ndarray:
        return values[~self._controls] if self._controls.any() else values


def write_features(source: Source, folder: Path) -> Features:
    """Write the features of all kept tiles of a store, and of its controls; what is there is not made again.

    Parameters
    ----------
    source
        What they are made from.
    folder
        Where they go: a new or empty one, or one in which features of this very source were begun.

    Raises
    ------
    UsageError
        The folder holds something else, or is being written.
    DataError
        Weights don't fit, a shard is damaged.
    """
    with ledger.held(folder / ".lock", str(folder), f"another command is writing {folder}. Wait for it, or stop it."):
        _claim(source, folder)
        digest = source.about["digest"]
        if not ledger.is_done(folder, digest):
            tiles, controls = source.store.tiles, source.store.controls
            if tiles.empty:
                raise DataError(f"{source.store.folder} holds no tile that was kept.")
            if len(controls):
                tiles = pd.concat([tiles, controls]).sort_values("plate", kind="stable", ignore_index=True)
            parts = _write_parts(source, tiles, folder / PLATES)
            width = _join(parts, folder)
            ledger.write_table(folder / TABLE, tiles.drop(columns=["kept"] if len(controls) else ["role", "kept"]))
            seconds = sum(ledger.read_json(part / ledger.DONE)["seconds"] for part in parts)
            facts = {"seconds": seconds, "images_per_s": len(tiles) / seconds}
            facts |= {"controls": len(controls)} if len(controls) else {}
            ledger.mark_done(folder, digest, tiles=len(tiles), features=width, **facts)
        shutil.rmtree(folder / PLATES, ignore_errors=True)
    return Features.open(folder)


def _claim(source: Source, folder: Path) -> None:
    """Bind the folder to its source, or check that it is bound to this one."""
    another = "Choose another folder with --out, or remove this one."
    if (folder / ABOUT).is_file():
        known = ledger.read_json(folder / ABOUT)
        differing = [
            f"{key} is {_told(now)}, there {_told(known.get(key))}"
            for key, now in source.about.items()
            if key != "digest" and known.get(key) != now
        ]
        if differing:
            raise UsageError("\n  - ".join([f"{folder} holds other features:", *differing]) + f"\n{another}")
    elif any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no features. {another}")
    if ledger.is_done(folder, source.about["digest"]):
        return
    about = {"weights": source.weights, "store": str(source.store.folder), "channels": list(source.store.channels)}
    run = {"run": source.run} if source.run else {}
    ledger.write_json(folder / ABOUT, {**source.about, **about, **run, **ledger.provenance()})


def _told(value: Any) -> str:
    return listing(value) or "empty" if isinstance(value, list) else str(value)


def _write_parts(source: Source, tiles: pd.DataFrame, folder: Path) -> list[Path]:
    """Make the features of each plate that has none yet; gives the folders of all parts, in the order of the tiles."""
    rows = {str(plate): mine for plate, mine in tiles.groupby("plate", sort=False)}
    made_by = ledger.provenance()["versions"]  # other versions may round in other ways: their parts are made again
    wanted = {plate: ledger.digest([source.about["digest"], plate, made_by]) for plate in rows}
    missing = [plate for plate in rows if not ledger.is_done(folder / plate, wanted[plate])]
    extractor = Extractor(source) if missing else None
    with progress("Features", sum(len(rows[plate]) for plate in missing), "tiles") as advance:
        for plate in missing:
            assert extractor is not None  # noqa: S101 - some are missing
            began = time.perf_counter()
            values = np.empty((len(rows[plate]), extractor.width), np.float32)
            for start in range(0, len(values), READ_TILES):
                part = slice(start, start + READ_TILES)
                values[part] = extractor(source.store.read(rows[plate].iloc[part], source.tile_px))
                seconds = time.perf_counter() - began
                now = len(values[part])
                advance(now, f"{plate}: {(start + now) / seconds:,.0f} images/s")
            with ledger.replacing(folder / plate / PART) as temporary:
                np.save(temporary, values)
            ledger.mark_done(folder / plate, wanted[plate], seconds=time.perf_counter() - began)
    return [folder / plate for plate in rows]


def _join(parts: Sequence[Path], folder: Path) -> int:
    """Write the array of all parts, shard by shard; gives the number of features of a tile."""
    rows = [np.load(part / PART, mmap_mode="r") for part in parts]
    count, width = sum(map(len, rows)), int(rows[0].shape[1])
    chunk = max(1, CHUNK_BYTES // (4 * width))
    shard = chunk * min(SHARD_CHUNKS, -(-count // chunk))
    temporary = folder / f".{ARRAY}"
    array = zarr.create_array(
        temporary,
        shape=(count, width),
        chunks=(chunk, width),
        shards=(shard, width),
        dtype="float32",
        compressors=CODECS["zstd"],
        dimension_names=("tile", "feature"),
        overwrite=True,
    )
    for number, block in enumerate(_blocks(rows, shard)):
        array[number * shard : number * shard + len(block)] = block
    shutil.rmtree(folder / ARRAY, ignore_errors=True)
    temporary.rename(folder / ARRAY)
    return width


def _blocks(parts: Sequence[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Divide the rows of arrays that follow each other into blocks of so many rows."""
    held = parts[0][:0]
    for part in parts:
        while len(part):
            taken = part[: rows - len(held)]
            held, part = np.concatenate([held, taken]), part[len(taken) :]
            if len(held) == rows:
                yield held
                held = part[:0]
    if len(held):
        yield held
