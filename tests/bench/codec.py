"""Which codec, chunk and shard for the tiles: size on disk, and speed of writing and reading.

Tiles of 224 pixels of the synthetic demo's cells, drawn at full size. They are written as a conversion writes them, to
the disk, and read as training does, in a random order; and whole shards are read by Zarr. One thread.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pandas as pd
import tifffile
import zarr
import zarr.codecs

from cellhpc.correct import TileRecipe, cut_tiles, histograms, plate_statistics
from cellhpc.shard_writer import ShardWriter
from cellhpc.shards import Shards
from cellhpc.synth import choose, synth

FIELDS, TILE_PX = 16, 224
CODECS = {
    "zstd 1 bitshuffle": {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle"},
    "zstd 5 bitshuffle": {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle"},
    "lz4 5 bitshuffle": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"},
    "zstd 1 no shuffle": {"cname": "zstd", "clevel": 1, "shuffle": "noshuffle"},
    "none": None,
}
SHARD_FIELDS = (1, 4, 16)


def make_tiles(folder: Path) -> np.ndarray:
    """Tiles of fields of the full preset's size, (64, 224, 224, 3) uint8."""
    settings = {"weeks": 1, "plate_sets": 1, "moas": 2, "compounds_per_moa": 1, "concentrations": 1,
                "labelled_concentrations": 1, "control_wells": 1, "fill": False}  # fmt: skip
    synth(folder, choose("bbbc021", "full", settings))
    by_channel = [sorted(folder.rglob(f"*_w{wave}*.tif")) for wave in (1, 2, 4)]
    fields = [np.stack([tifffile.imread(file) for file in files], -1) for files in zip(*by_channel, strict=True)]
    statistics = plate_statistics(sum(histograms(field) for field in fields[:FIELDS]))
    recipe = TileRecipe((2, 2), (TILE_PX,), empty_fraction=0.0)
    return np.concatenate([cut_tiles(field, recipe, statistics).tiles[TILE_PX] for field in fields[:FIELDS]])


def measure(tiles: np.ndarray, folder: Path, codec: dict[str, Any] | None, shard_fields: int) -> dict[str, float]:
    """Write and read the tiles, each the best of three."""
    tile, shard = tiles.shape[1:], shard_fields * 4
    writes, singles, wholes = [], [], []
    one = np.empty((1, *tile), np.uint8)
    order = np.random.default_rng(0).permutation(len(tiles))
    for number in range(3):
        plate = folder / str(number) / "P" / f"tiles_{TILE_PX}"
        array = zarr.create_array(
            plate, shape=tiles.shape, chunks=(1, *tile), shards=(shard, *tile), dtype="uint8", fill_value=0,
            compressors=zarr.codecs.BloscCodec(**codec) if codec else None,
            chunk_key_encoding={"name": "default", "separator": "."},
        )  # fmt: skip
        began = time.perf_counter()
        for first in range(0, len(tiles), shard):
            writer = ShardWriter(plate)
            for field in range(first, first + shard, 4):
                writer.put(tiles[field : field + 4], field - first)
            writer.write(f"c.{first // shard}.0.0.0", plate)
        writes.append(time.perf_counter() - began)
        shards = Shards(folder / str(number), pd.DataFrame({"plate": "P", "row": order}), tile)
        began = time.perf_counter()
        for row in range(len(order)):
            shards.decode(np.array([row]), one, threads=1)
        singles.append(time.perf_counter() - began)
        began = time.perf_counter()
        for first in range(0, len(tiles), shard):
            array[first : first + shard]
        wholes.append(time.perf_counter() - began)
    files = list((folder / "0").rglob("c.*"))
    return {
        "ratio": tiles.nbytes / sum(path.stat().st_size for path in files),
        "files_a_field": len(files) / (len(tiles) / 4),
        "write_mb_per_s": tiles.nbytes / 1e6 / min(writes),
        "tiles_per_s": len(tiles) / min(singles),
        "read_mb_per_s": tiles.nbytes / 1e6 / min(wholes),
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary, zarr.config.set({"threading.max_workers": 1}):
        top = Path(temporary)
        tiles = make_tiles(top / "raw")
        print(
            f"{'codec':20} {'shard':>9} {'ratio':>6} {'files/field':>12} {'write MB/s':>11} {'tiles/s':>8} {'MB/s':>6}"
        )
        for number, ((name, codec), fields) in enumerate(itertools.product(CODECS.items(), SHARD_FIELDS)):
            found = measure(tiles, top / str(number), codec, fields)
            rows.append({"codec": name, "shard_fields": fields, **found})
            print(
                f"{name:20} {fields:2} fields {found['ratio']:6.2f} {found['files_a_field']:12.2f} "
                f"{found['write_mb_per_s']:11,.0f} {found['tiles_per_s']:8,.0f} {found['read_mb_per_s']:6,.0f}"
            )
    print(json.dumps({"bench": "codec", "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
