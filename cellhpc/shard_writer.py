"""Shards: written whole, and under their names at once.

The layout of a shard (Zarr 3's `sharding_indexed`) is simple: compressed chunks, in any order, and at the end an index
with a checksum, which says where each of them lies.

Zarr writes a shard where it is to lie, and what is killed meanwhile leaves half of one. Here each chunk is compressed
as soon as it is computed, so that no pixel waits in memory for the rest of its shard; the file is written beside, and
moved when it is on the disk.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import imagecodecs
import numpy as np

METADATA = "zarr.json"
ENTRY = np.dtype("<u8")
"""Of the index, which has two for each chunk: its offset and its length in bytes."""
EMPTY = np.iinfo(ENTRY).max
"""Offset of a chunk that is not stored, as all of it is zero."""
CHECKSUM = 4
"""Bytes of the index's checksum, crc32c."""


class ShardWriter:
    """A shard in the making: of each chunk what it is compressed to, and nothing else.

    Chunks that are not put are not stored: they are the array's fill value. Those that are put are, also when they are
    all zero. The same chunks, put in the same order, give the same bytes.

    Parameters
    ----------
    array
        Folder of the array; its `zarr.json` is there.
    """

    def __init__(self, array: Path) -> None:
        self._array = array
        self._encoding = _Encoding.of((array / METADATA).read_text(encoding="utf-8"))
        self._index = np.full((*self._encoding.grid, 2), EMPTY, ENTRY)
        self._parts: list[bytes] = []
        self._size = 0

    def put(self, block: np.ndarray, at: int = 0) -> None:
        """Compress a block of pixels.

        Parameters
        ----------
        block
            Of the array's number of axes and type. What it lacks to fill its last chunks is zero.
        at
            Where in the shard it begins along the first axis, the start of a chunk.
        """
        chunk = self._encoding.chunk
        first = at // chunk[0]
        counts = [math.ceil(size / side) for size, side in zip(block.shape, chunk, strict=True)]
        for place in np.ndindex(*counts):
            cut = block[tuple(slice(n * side, (n + 1) * side) for n, side in zip(place, chunk, strict=True))]
            if cut.shape != chunk:
                cut = np.pad(cut, [(0, side - size) for size, side in zip(cut.shape, chunk, strict=True)])
            part = self._encoding.encode(cut)
            self._index[(first + place[0], *place[1:])] = self._size, len(part)
            self._parts.append(part)
            self._size += len(part)

    def write(self, name: str, beside: Path, past_cache: bool = False) -> tuple[int, str]:
        """Write the shard in place of what is there under its name.

        Parameters
        ----------
        name
            Its file's name in the array's folder, as `c.3.0.0.0`.
        beside
            Folder on the same file system for the hidden file, `.NAME.*`, which a kill leaves behind.
        past_cache
            Write past the page cache, where the file system can: for what is not read again soon.

        Returns
        -------
        bytes, sha256
            Its size, and its checksum in hexadecimal.

        Raises
        ------
        OSError
            It can't be written.
        """
        index = self._index.tobytes()
        parts = [*self._parts, index, _crc32c(index)]
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        hidden = beside / f".{name}.{secrets.token_hex(4)}"
        try:
            file = _create(hidden, past_cache)
            try:
                _write_all(file, parts, past_cache)
                os.fsync(file)
            finally:
                os.close(file)
            hidden.replace(self._array / name)
        finally:
            hidden.unlink(missing_ok=True)
        return sum(map(len, parts)), checksum.hexdigest()


@dataclass(frozen=True)
class _Encoding:
    """How the chunks of an array are stored."""

    chunk: tuple[int, ...]
    grid: tuple[int, ...]
    """Chunks in a shard, along each axis."""
    dtype: np.dtype
    blosc: tuple[tuple[str, Any], ...] | None
    checksums: bool

    @classmethod
    @functools.lru_cache(maxsize=4)
    def of(cls, metadata: str) -> _Encoding:
        """Take it from what `cellhpc.convert` and `cellhpc.archive` wrote as an array's `zarr.json`."""
        found = json.loads(metadata)
        (sharding,) = found["codecs"]
        shard, chunk = found["chunk_grid"]["configuration"]["chunk_shape"], sharding["configuration"]["chunk_shape"]
        codecs = {codec["name"]: codec.get("configuration", {}) for codec in sharding["configuration"]["codecs"]}
        unknown = codecs.keys() - {"bytes", "blosc", "crc32c"}
        if unknown or found["fill_value"] != 0 or sharding["configuration"]["index_location"] != "end":
            raise ValueError(f"no array that is written here: {metadata}")
        blosc = None
        if given := codecs.get("blosc"):
            keys = {"level": "clevel", "compressor": "cname", "shuffle": "shuffle", "typesize": "typesize"}
            blosc = tuple((ours, given[theirs]) for ours, theirs in keys.items())
        grid = tuple(whole // part for whole, part in zip(shard, chunk, strict=True))
        return cls(tuple(chunk), grid, np.dtype(found["data_type"]).newbyteorder("<"), blosc, "crc32c" in codecs)

    def encode(self, chunk: np.ndarray) -> bytes:
        """Compress a chunk, outside of the lock of Python."""
        plain: Any = np.ascontiguousarray(chunk, self.dtype)
        # numcodecs would do as well, but makes a semaphore, and a process that is killed at that moment leaves it.
        part = imagecodecs.blosc_encode(plain, numthreads=1, **dict(self.blosc)) if self.blosc else plain.tobytes()
        return bytes(part + _crc32c(part) if self.checksums else part)


def _crc32c(content: bytes | bytearray) -> bytes:
    return int(google_crc32c.value(bytes(content))).to_bytes(CHECKSUM, "little")


def _create(path: Path, past_cache: bool) -> int:
    """Create a file to be written, past the page cache if that is wanted and its file system can."""
    how = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if past_cache and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, how | os.O_DIRECT, 0o666)
        except OSError as fault:
            if fault.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some make it all the same
    return os.open(path, how, 0o666)


def _write_all(file: int, parts: Sequence[bytes], aligned: bool) -> None:
    """Write to a new file; `aligned`, in whole pages of memory, as it has to be past the page cache."""
    size = sum(map(len, parts))
    if not aligned:
        with open(file, "wb", closefd=False) as stream:
            stream.writelines(parts)
        return
    pages = math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
    with mmap.mmap(-1, pages) as memory:
        memory.write(b"".join(parts))
        with memoryview(memory) as view:
            written = 0
            while written < pages:
                with view[written:] as rest:
                    written += os.write(file, rest)
    os.ftruncate(file, size)


def remove_leftovers(name: str, beside: Path) -> None:
    """Remove what killed attempts at a file left."""
    for leftover in beside.glob(f".{name}.*"):
        leftover.unlink(missing_ok=True)  # somebody who was taken for dead may clean up as well
