from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from cellhpc.codecs import CODECS
from cellhpc.errors import DataError
from cellhpc.shards import Shards

SHAPE = (30, 8, 8, 2)  # the last of its shards of eight is not full


def made(folder: Path, codec: str = "zstd") -> np.ndarray:
    """Two plates' arrays, as Zarr writes them; the second tile is black, and not stored."""
    pixels = np.random.default_rng(0).integers(0, 60, (2, *SHAPE), np.uint8)
    pixels[0, 1] = 0
    for plate, name in enumerate(("A", "B")):
        array = zarr.create_array(
            folder / name / "tiles_8",
            shape=SHAPE,
            chunks=(1, *SHAPE[1:]),
            shards=(8, *SHAPE[1:]),
            dtype="uint8",
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            compressors=CODECS[codec],
        )
        array[:] = pixels[plate]
    return pixels


def table(plates: str, rows: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"plate": list(plates), "row": rows})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_are_those_that_zarr_reads(codec: str, threads: int, tmp_path: Path) -> None:
    pixels = made(tmp_path, codec)
    random = np.random.default_rng(1)
    plate, row = random.integers(0, 2, 50), random.integers(0, len(pixels[0]), 50)
    plate[7], row[7] = 0, 1
    shards = Shards(tmp_path, table("".join("AB"[one] for one in plate), row), SHAPE[1:])
    rows = random.permutation(50)
    out = np.full(shards.shape, 255, np.uint8)
    shards.decode(rows, out, threads=threads)
    read = np.stack([zarr.open_array(tmp_path / "AB"[one] / "tiles_8", mode="r") for one in (0, 1)])
    np.testing.assert_array_equal(read, pixels)
    np.testing.assert_array_equal(out, read[plate, row][rows])
    assert shards.nbytes == out.nbytes
    assert shards.count == 8


def test_tiles_go_where_they_are_wanted(tmp_path: Path) -> None:
    pixels = made(tmp_path)
    shards = Shards(tmp_path, table("A" * 20, np.arange(20)), SHAPE[1:])
    out = np.full((20, *SHAPE[1:]), 7, np.uint8)
    shards.decode(np.array([3, 19]), out, places=np.array([10, 0]))
    np.testing.assert_array_equal(out[[10, 0]], pixels[0, [3, 19]])
    assert (np.delete(out, [0, 10], 0) == 7).all()


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_damage_is_told_and_never_decoded(codec: str, tmp_path: Path) -> None:
    made(tmp_path, codec)
    path = tmp_path / "A/tiles_8/c.0.0.0.0"
    whole = path.read_bytes()
    cases = {
        "the checksum of its index is wrong": whole[:-7] + b"x" + whole[-6:],
        "a tile is cut off": whole[-(8 * 16 + 4) :],
    }
    if codec == "zstd":  # the first tile lies first, and Blosc's header tells its sizes
        cases["a tile has 129 bytes instead of 128"] = whole[:4] + (129).to_bytes(4, "little") + whole[8:]
        cases["a tile is cut off "] = whole[:12] + (1000).to_bytes(4, "little") + whole[16:]
    for said, content in cases.items():
        path.write_bytes(content)
        shards = Shards(tmp_path, table("A" * 8, np.arange(8)), SHAPE[1:])
        with pytest.raises(DataError, match=rf"A/tiles_8: tiles 0 to 7 can't be read: {said.strip()}"):
            shards.decode(np.arange(8), np.empty(shards.shape, np.uint8))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    one = table("A", np.zeros(1))
    with pytest.raises(DataError, match="A/tiles_8 is missing"):
        Shards(tmp_path, one, SHAPE[1:])
    zarr.create_array(tmp_path / "A/tiles_8", shape=SHAPE, chunks=(1, *SHAPE[1:]), dtype="uint8")
    with pytest.raises(DataError, match="A/tiles_8 is no array of tiles in shards"):
        Shards(tmp_path, one, SHAPE[1:])
    (tmp_path / "gzip").mkdir()
    zarr.create_array(
        tmp_path / "gzip/A/tiles_8", shape=SHAPE, chunks=(1, *SHAPE[1:]), shards=(8, *SHAPE[1:]), dtype="uint8",
        compressors=zarr.codecs.GzipCodec(),
    )  # fmt: skip
    with pytest.raises(DataError, match="its tiles are not stored as cellhpc stores them"):
        Shards(tmp_path / "gzip", one, SHAPE[1:])
