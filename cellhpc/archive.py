"""The lossless archive of raw fields: OME-Zarr 0.5, an HCS plate for each plate.

An archive is a folder::

    PLATE.zarr/zarr.json            the plate: its rows, columns and wells; written last
    PLATE.zarr/B/2/zarr.json        well B02: its fields
    PLATE.zarr/B/2/1/zarr.json      field 1: axes, channels, what it was read from; written after its pixels
    PLATE.zarr/B/2/1/0/zarr.json    its pixels, an array (c, y, x)
    PLATE.zarr/B/2/1/0/c.0.0.0      all of them, in one shard
    lock

A field is there when its `zarr.json` is. Until all of them are, the plate is a bare group of Zarr, which no viewer
takes for a plate; from then on no field of it is replaced or removed, for it may be the last copy. Beside OME's
metadata, the key `cellhpc` says what a plate and a field were made of.
"""

from __future__ import annotations

import collections
import functools
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
import zarr.storage

from cellhpc.codecs import CODECS
from cellhpc.errors import DataError, UserError
from cellhpc.ledger import digest, read_json, write_json, write_text
from cellhpc.ome import image_metadata, plate_metadata, well_metadata, well_path
from cellhpc.pixels import FieldFormat
from cellhpc.shard_writer import METADATA, ShardWriter, remove_leftovers
from cellhpc.wells import ROWS, Place, place

FORMAT = 1
"""Raised when the same settings give another archive."""
PIXELS, SHARD = "0", "c.0.0.0"

CHUNK_PX = 1024
"""About the side of a chunk: a picture is divided into equal ones. Smaller ones take longer to write."""
RATIO = {"zstd": 1.7, "lz4": 1.5, "none": 1.0}
"""How many times smaller the codecs make noisy fluorescence, about."""


@dataclass(frozen=True)
class Archive:
    """An archive, and how it is written; small, for it travels with each task.

    Attributes
    ----------
    folder
        Where it lies.
    channels, format
        Names of the channels, size and type of a field.
    codec
        A key of `CODECS`.
    pixel_um
        Side of a pixel in micrometres, if it is known.
    """

    folder: Path
    channels: tuple[str, ...]
    format: FieldFormat
    codec: str
    pixel_um: float | None

    def plate(self, name: str) -> Path:
        """Folder of a plate."""
        return self.folder / f"{name}.zarr"

    def field(self, plate: str, well: str, field: int) -> Path:
        """Folder of a field."""
        return self.plate(plate) / well_path(place(well)) / str(field)

    def digest(self, fields_digest: str) -> str:
        """Digest of a plate, from the digest of its fields' names and files."""
        how = [FORMAT, self.channels, vars(self.format), self.codec, self.pixel_um]
        return digest([how, fields_digest])

    @property
    def field_bytes(self) -> int:
        """Bytes of a field before compression."""
        return len(self.channels) * self.format.height * self.format.width * np.dtype(self.format.dtype).itemsize

    @property
    def expected_bytes(self) -> int:
        """Bytes of a field on the disk, about."""
        return round(self.field_bytes / RATIO[self.codec])


def count_files(wells: Sequence[str]) -> int:
    """Count the files of a plate, from the wells of its fields: three a field, one a well and a row, and its own."""
    places = {place(well) for well in wells}
    return 3 * len(wells) + len(places) + len({row for row, _ in places}) + 1


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a plate or a field was made of; empty if it is not there, or not made by cellhpc.

    A plate has its digest and, once it is finished, the fields that are missing, each a well and a number.
    """
    try:
        record: dict[str, Any] = read_json(folder / METADATA)["attributes"]["cellhpc"]
    except (FileNotFoundError, NotADirectoryError, DataError, KeyError):
        return {}
    return record


def is_foreign(archive: Archive, plate: str, plate_digest: str) -> bool:
    """Tell whether a plate's folder holds something else than the plate of this digest."""
    folder = archive.plate(plate)
    there = any(not path.name.startswith(".") for path in folder.glob("*"))
    return there and read_record(folder).get("digest") != plate_digest


def has_field(archive: Archive, plate: str, well: str, field: int) -> bool:
    """Tell whether a field is there in full length."""
    return bool(_read_field(archive.field(plate, well, field)))


def write_field(
    archive: Archive,
    plate: str,
    well: str,
    field: int,
    pixels: np.ndarray,
    extremes: Sequence[tuple[int, int]],
    source: dict[str, Any],
) -> None:
    """Write a field, unless it is there.

    Parameters
    ----------
    archive, plate, well, field
        How, and which one.
    pixels
        (y, x, channel), of the archive's size and type.
    extremes
        Lowest and highest value of each channel.
    source
        What it was read from: names, size and time of its files.

    Raises
    ------
    OSError
        The archive can't be written.
    UserError
        The plate is finished, and has the field from something else.
    """
    folder = archive.field(plate, well, field)
    if known := _read_field(folder):
        if known["source"] == source:
            return
        if "missing" in read_record(archive.plate(plate)):
            raise UserError(
                f"{folder} was archived from files that were changed since. Remove {archive.plate(plate)} if it is not "
                "needed, choose another folder with --set convert.archive=FOLDER, or leave convert.archive out."
            )
    (folder / METADATA).unlink(missing_ok=True)
    array = folder / PIXELS
    for name in (METADATA, SHARD):
        remove_leftovers(name, folder)
        remove_leftovers(name, array)
    write_text(array / METADATA, _array_metadata(archive))
    shard = ShardWriter(array)
    shard.put(np.moveaxis(pixels, -1, 0))
    shard_bytes, _ = shard.write(SHARD, folder, past_cache=True)
    highest = int(np.iinfo(archive.format.dtype).max)
    image = image_metadata(f"{plate} {well} field {field}", archive.channels, extremes, highest, archive.pixel_um)
    _write_group(folder, {"ome": image, "cellhpc": {"source": source, "shard_bytes": shard_bytes}})


def claim_plate(archive: Archive, name: str, plate_digest: str) -> None:
    """Take a new plate's folder for the plate of this digest."""
    _write_group(archive.plate(name), {"cellhpc": {"digest": plate_digest}})


def write_plate(
    archive: Archive,
    name: str,
    plate_digest: str,
    fields: Sequence[tuple[str, int]],
    missing: Sequence[tuple[str, int]],
) -> None:
    """Finish a plate: write the metadata of its rows and wells, and then its own.

    Parameters
    ----------
    archive, name, plate_digest
        Which plate, and what it is made of.
    fields, missing
        Well and number of the fields that are there, and of those that could not be read.
    """
    wells: dict[Place, list[int]] = collections.defaultdict(list)
    for well, field in fields:
        wells[place(well)].append(field)
    for well, field in missing:
        leftover = archive.field(name, well, field)
        if leftover.exists() and not (leftover / METADATA).exists():  # of a killed attempt, when it could be read
            shutil.rmtree(leftover)
    folder = archive.plate(name)
    for row in sorted({row for row, _ in wells}):
        _write_group(folder / ROWS[row], {})
    for at, numbers in wells.items():
        _write_group(folder / well_path(at), {"ome": well_metadata(numbers)})
    places = [place(well) for well, _ in (*fields, *missing)]
    plate = {"ome": plate_metadata(name, places, wells)} if wells else {}
    _write_group(folder, {**plate, "cellhpc": {"digest": plate_digest, "missing": sorted(missing)}})


def _read_field(folder: Path) -> dict[str, Any]:
    """Read the record of a field; empty if it is not there in full length."""
    try:
        record = read_record(folder)
        whole = bool(record) and (folder / PIXELS / SHARD).stat().st_size == record["shard_bytes"]
    except FileNotFoundError:
        return {}
    return record if whole else {}


@functools.lru_cache(maxsize=1)
def _array_metadata(archive: Archive) -> str:
    """Make the `zarr.json` of a field's array (c, y, x), the same for all fields."""
    memory: dict[str, Any] = {}
    shape = len(archive.channels), archive.format.height, archive.format.width
    counts = [max(1, round(size / CHUNK_PX)) for size in shape[1:]]
    chunk = [math.ceil(size / count) for size, count in zip(shape[1:], counts, strict=True)]
    compressor = CODECS[archive.codec]
    zarr.create_array(
        zarr.storage.MemoryStore(memory),
        shape=shape,
        chunks=(1, *chunk),
        shards=(shape[0], *(count * size for count, size in zip(counts, chunk, strict=True))),
        dtype=archive.format.dtype,
        fill_value=0,
        compressors=[*([compressor] if compressor else []), zarr.codecs.Crc32cCodec()],  # every reader checks it
        chunk_key_encoding={"name": "default", "separator": "."},  # one file, and no folder for each axis
        dimension_names=("c", "y", "x"),
    )
    return str(memory[METADATA].to_bytes().decode())


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    for leftover in folder.glob(f".{METADATA}.*"):
        leftover.unlink()
    write_json(folder / METADATA, {"zarr_format": 3, "node_type": "group", "attributes": attributes})
