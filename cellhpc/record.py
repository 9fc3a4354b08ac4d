"""What lies where in a store of tiles, and the records that say what it holds.

A store is a folder::

    store.json                     what it is: settings, channels, size and type of a field; written first
    tiles.zarr/PLATE/tiles_224/    an array for each plate and tile size, a file for each shard
    plates/PLATE/                  markers of the plate's tasks, its tables, and last `plate.json`: it is finished
    performance.html               Dask's report of the last conversion, if it was asked for
    lock

Plates come and go without touching each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cellhpc.ledger import digest, read_json

STORE, ARRAYS, PLATES, PLATE, LOCK = "store.json", "tiles.zarr", "plates", "plate.json", "lock"
TILES, FIELDS, PERFORMANCE = "tiles.parquet", "fields.parquet", "performance.html"


def is_store(folder: Path) -> bool:
    """Tell whether a store lies in a folder, finished or begun."""
    return (folder / STORE).is_file()


def plate_folder(store: Path, plate: str) -> Path:
    """Folder of a plate's records."""
    return store / PLATES / plate


def read_identity(store: Path) -> dict[str, Any]:
    """Read what a store is; empty where there is none."""
    return _read(store / STORE)


def read_plate(store: Path, plate: str) -> dict[str, Any]:
    """Read the record of a finished plate; empty where it is not finished."""
    return _read(plate_folder(store, plate) / PLATE)


def finished_plates(store: Path) -> list[str]:
    """List the plates that are finished, sorted."""
    return sorted(path.parent.name for path in (store / PLATES).glob(f"*/{PLATE}"))


def content_digest(store: Path, plates: Iterable[str]) -> str:
    """Digest of what a store holds of these plates; empty while one of them is not finished."""
    records = {plate: read_plate(store, plate) for plate in plates}
    if not records or not all(records.values()):
        return ""
    known = {name: [one["digest"], one["labels"], one["bad_fields"]] for name, one in records.items()}
    return digest([read_identity(store), known])


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return record
