from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
import zarr.codecs

from cellhpc.codecs import CODECS
from cellhpc.shard_writer import ShardWriter, remove_leftovers

RANDOM = np.random.default_rng(0)


def tiles_array(folder: Path, codec: str = "zstd") -> Path:
    """An array of tiles as a conversion makes it: four shards of eight tiles, the last of which is not full."""
    zarr.create_array(
        folder / "tiles",
        shape=(30, 8, 8, 2),
        chunks=(1, 8, 8, 2),
        shards=(8, 8, 8, 2),
        dtype="uint8",
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=CODECS[codec],
    )
    return folder / "tiles"


@pytest.mark.parametrize("codec", CODECS)
def test_zarr_reads_what_was_put(codec: str, tmp_path: Path) -> None:
    array = tiles_array(tmp_path, codec)
    pixels = RANDOM.integers(0, 60, (30, 8, 8, 2), np.uint8)
    pixels[5] = 0  # a tile that is black is stored
    pixels[12:14] = 0  # these are never put, and are black all the same
    for shard in range(4):
        writer = ShardWriter(array)
        for first in (4, 0):  # in any order
            rows = np.arange(8 * shard + first, min(8 * shard + first + 4, 30))
            rows = rows[(rows < 12) | (rows > 13)]
            if len(rows):
                writer.put(pixels[rows], rows[0] - 8 * shard)
        size, sha256 = writer.write(f"c.{shard}.0.0.0", tmp_path)
        content = (array / f"c.{shard}.0.0.0").read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
    np.testing.assert_array_equal(zarr.open_array(array, mode="r")[:], pixels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiles"]


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_a_field_of_16_bits_in_chunks_that_do_not_divide_it(codec: str, past_cache: bool, tmp_path: Path) -> None:
    field = RANDOM.integers(0, 4000, (3, 50, 70)).astype(np.uint16)
    compressor = CODECS[codec]
    array = zarr.create_array(
        tmp_path / "0", shape=field.shape, chunks=(1, 26, 36), shards=(3, 52, 72), dtype="uint16", fill_value=0,
        compressors=[*([compressor] if compressor else []), zarr.codecs.Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
    )  # fmt: skip
    writer = ShardWriter(tmp_path / "0")
    writer.put(np.moveaxis(np.ascontiguousarray(np.moveaxis(field, 0, -1)), -1, 0))  # strides as of a field's pixels
    size, _ = writer.write("c.0.0.0", tmp_path, past_cache)
    assert (tmp_path / "0" / "c.0.0.0").stat().st_size == size
    np.testing.assert_array_equal(array[:], field)
    damaged = bytearray((tmp_path / "0" / "c.0.0.0").read_bytes())
    damaged[7] ^= 1
    (tmp_path / "0" / "c.0.0.0").write_bytes(damaged)
    with pytest.raises(Exception, match=r"(?i)checksum"):
        array[:]


def test_the_same_chunks_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    array = tiles_array(tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_written, [array] * 6, chunksize=1)
    assert len(set(found)) == 1


def _written(array: Path) -> str:
    writer = ShardWriter(array)
    writer.put(np.random.default_rng(1).integers(0, 60, (8, 8, 8, 2), np.uint8))
    return writer.write(f"{os.getpid()}.{os.urandom(4).hex()}", array)[1]


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    array = tiles_array(tmp_path)
    (array / "c.0.0.0.0").write_bytes(b"old")
    writer = ShardWriter(array)
    writer.put(np.ones((1, 8, 8, 2), np.uint8))
    with pytest.raises(FileNotFoundError):
        writer.write("c.0.0.0.0", tmp_path / "missing")
    assert (array / "c.0.0.0.0").read_bytes() == b"old"


def test_leftovers_of_a_killed_attempt_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".c.0.0.0.0.5eaf", ".c.1.0.0.0.5eaf", "c.0.0.0.0"):
        (tmp_path / name).touch()
    remove_leftovers("c.0.0.0.0", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.1.0.0.0.5eaf", "c.0.0.0.0"]
