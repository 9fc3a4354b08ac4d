"""What is done to a store that is there: its plates are verified, or removed.

Tiles are read here by Zarr itself, not by `tiles`: a fault that our writer and our reader share would be seen.
"""

from __future__ import annotations

import hashlib
import shutil
import tokenize
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import zarr

from cellhpc.convert.tasks import ILLUMINATION
from cellhpc.convert.workers import cores
from cellhpc.correct import PlateStatistics, TileRecipe, cut_tiles
from cellhpc.errors import DataError, UsageError, listing
from cellhpc.illumination import even_out, gains
from cellhpc.ledger import held, read_json
from cellhpc.pixels import BadField, FieldFormat, file_state, read_field
from cellhpc.progress import progress
from cellhpc.record import ARRAYS, FIELDS, LOCK, PLATE, PLATES, TILES, plate_folder, read_identity, read_plate

AGAIN = "Remove the plate (cellhpc remove STORE PLATE) and convert it again."
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError),
    *(SyntaxError, tokenize.TokenError, pa.ArrowException),
)
"""What Zarr, NumPy, pandas and Arrow raise of bytes that are damaged: in a header it may be any of these."""


@dataclass(frozen=True)
class Verdict:
    """What verifying a store has found.

    Attributes
    ----------
    plates, shards, bytes
        What was read again.
    compared
        Fields whose tiles were made anew from the raw pictures.
    without_pictures
        Fields of the sample whose raw pictures are not there any more.
    problems
        What is wrong, a line each.
    """

    plates: int
    shards: int
    bytes: int
    compared: int
    without_pictures: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Plate:
    """What the fields of a plate are made anew with: its record, tables and, if it has one, illumination."""

    record: dict[str, Any]
    fields: pd.DataFrame
    tiles: pd.DataFrame
    light: np.ndarray | None


def verify(store: Path, raw: Path | None = None, sample: int = 20) -> Verdict:
    """Read every shard of a store again and compare its checksum; make some fields anew from the raw pictures.

    Parameters
    ----------
    store
        Its folder.
    raw
        Folder of the raw pictures, if it is not the one that they were converted from.
    sample
        Fields to make anew, drawn over all plates, always the same ones.

    Raises
    ------
    UsageError
        There is no store.
    """
    plates, identity = _plates(store), read_identity(store)
    problems: list[str] = []
    shards: list[tuple[Path, dict[str, Any]]] = []
    sound: list[_Plate] = []
    for plate in plates:
        try:
            record = read_plate(store, plate)
            if not record:
                problems.append(f"plate {plate}: its conversion is not finished. Type: cellhpc convert JOB.toml")
                continue
            markers = [read_json(path) for path in sorted(plate_folder(store, plate).glob("[0-9]*.json"))]
            mine = [(store / ARRAYS / name, told) for marker in markers for name, told in marker["shards"].items()]
            problems += _strangers(store, plate, {path for path, _ in mine})
            shards += mine
            sound.append(_read_tables(store, plate, identity, record))
        except DataError as fault:
            problems.append(f"plate {plate}: {_first_line(fault)}. {AGAIN}")
    read = 0
    with progress("Checksums", len(shards), "shards") as advance, ThreadPoolExecutor(cores()) as pool:
        for (_, told), problem in zip(shards, pool.map(_check_shard, shards), strict=True):
            advance(1, "")
            read += told["bytes"]
            problems += [problem] if problem else []
    compared, without = 0, 0
    for outcome in _compare(store, identity, sound, raw, sample):
        compared += outcome is not None
        without += outcome is None
        problems += [outcome] if outcome else []
    return Verdict(len(plates), len(shards), read, compared, without, tuple(problems))


def remove(store: Path, plates: Sequence[str]) -> None:
    """Remove plates from a store; the others stay as they are.

    Raises
    ------
    UsageError
        There is no store or no such plate, or another process converts into it.
    """
    there = _plates(store)
    if unknown := sorted(set(plates) - set(there)):
        raise UsageError(f"{store} has no plate {listing(unknown)}. Its plates are: {listing(there, 40)}.")
    with held(store / LOCK, f"{store}", f"{store}: another process converts into this store. Wait until it ends."):
        for plate in plates:
            (plate_folder(store, plate) / PLATE).unlink(missing_ok=True)  # first: it is not there any more
            shutil.rmtree(store / ARRAYS / plate, ignore_errors=True)
            shutil.rmtree(plate_folder(store, plate))


def _plates(store: Path) -> list[str]:
    """List the plates of a store, finished or begun."""
    if not read_identity(store):
        raise UsageError(f"{store}: no store of tiles is there.")
    return sorted(path.name for path in (store / PLATES).glob("*") if path.is_dir())


def _strangers(store: Path, plate: str, known: set[Path]) -> Iterator[str]:
    """Tell of shards that no marker knows."""
    for path in sorted((store / ARRAYS / plate).glob("*/c.*")):
        if path not in known:
            yield f"plate {plate}: {path.relative_to(store)} belongs to no task. Remove it."


def _check_shard(shard: tuple[Path, dict[str, Any]]) -> str:
    path, told = shard
    where = "/".join(path.parts[-3:])
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        return f"{where}: {fault.strerror}. {AGAIN}"
    return "" if found == told["sha256"] else f"{where}: its checksum is not the one that was recorded. {AGAIN}"


def _read_tables(store: Path, plate: str, identity: dict[str, Any], record: dict[str, Any]) -> _Plate:
    """Read what the fields of a plate are made anew with.

    Raises
    ------
    DataError
        A file is missing or damaged.
    """
    columns = ["plate", "well", "field", "role", "bad", "bytes", "modified_ns", *_file_columns(identity)]

    def read(name: str, reader: Callable[[Path], Any]) -> Any:
        try:
            return reader(plate_folder(store, plate) / name)
        except UNREADABLE as fault:
            raise DataError(f"{name} can't be read: {_first_line(fault)}") from None

    # Whole tables are read, though few columns are needed: damage to any of them is found.
    fields = read(FIELDS, lambda path: pd.read_parquet(path)[columns])
    tiles = read(TILES, lambda path: pd.read_parquet(path)[["well", "field", "row"]])
    lit = identity.get("illumination", "none") != "none"
    light = read(f"{ILLUMINATION}.npy", lambda path: _light(path, identity)) if lit else None
    return _Plate(record, fields, tiles, light)


def _light(path: Path, identity: dict[str, Any]) -> np.ndarray:
    light: np.ndarray = np.load(path)
    if light.dtype != np.float32 or light.ndim != 3 or len(light) != len(identity["channels"]):
        raise ValueError("it is no float32 array of channel, y, x")
    return light


def _file_columns(identity: dict[str, Any]) -> list[str]:
    return [f"file_{channel}" for channel in identity["channels"]]


def _first_line(fault: BaseException) -> str:
    told = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    return str(told).splitlines()[0].rstrip(".")


def _compare(
    store: Path, identity: dict[str, Any], plates: list[_Plate], raw: Path | None, sample: int
) -> Iterator[str | None]:
    """Make some fields anew; yields for each what is wrong ("" if nothing is), or None without its raw pictures."""
    if not plates or not sample:
        return
    fields = pd.concat([plate.fields.assign(nth=nth) for nth, plate in enumerate(plates)], ignore_index=True)
    tiled = (fields["role"] == "treatment") | ((fields["role"] == "dmso") & identity.get("controls", False))
    fields = fields[tiled & (fields["bad"] == "")]
    drawn = fields.sample(min(sample, len(fields)), random_state=0).sort_index()
    with progress("Sample", len(drawn), "fields") as advance:
        for field in drawn.itertuples():
            advance(1, "")
            plate = plates[field.nth]
            yield _compare_field(store, identity, plate, field, raw or Path(plate.record["root"]))


def _compare_field(store: Path, identity: dict[str, Any], plate: _Plate, field: Any, root: Path) -> str | None:
    where = f"plate {field.plate}: well {field.well} field {field.field}"
    files = [getattr(field, name) for name in _file_columns(identity)]
    size, modified_ns = file_state(root, files)
    if size == 0:
        return None
    if (size, modified_ns) != (field.bytes, field.modified_ns):
        return f"{where}: its raw pictures were changed since it was converted"
    try:
        pixels = read_field(root, files, FieldFormat(**identity["field"]))
    except BadField as fault:
        return f"{where}: {fault.reason}"
    if plate.light is not None:
        pixels = even_out(pixels, gains(plate.light, *pixels.shape[:2]))
    statistics = {key: tuple(values) for key, values in plate.record["statistics"].items()}
    made = cut_tiles(pixels, _recipe(identity), PlateStatistics(**statistics) if statistics else None)
    mine = (plate.tiles["well"] == field.well) & (plate.tiles["field"] == field.field)
    rows = plate.tiles.loc[mine, "row"].to_numpy()
    for px, expected in made.tiles.items():
        try:
            array = zarr.open_array(store / ARRAYS / str(field.plate) / f"tiles_{px}", mode="r")
            found = np.asarray(array[rows[0] : rows[-1] + 1])
        except UNREADABLE as fault:
            return f"{where}: its tiles of {px} pixels can't be read: {_first_line(fault)}. {AGAIN}"
        if not np.array_equal(found, expected):
            return f"{where}: its tiles of {px} pixels are not what its raw pictures give"
    return ""


def _recipe(identity: dict[str, Any]) -> TileRecipe:
    keys = ("preprocessing", "empty_above", "empty_fraction")
    given: dict[str, Any] = {key: identity[key] for key in keys}
    if "zscore_range" in identity:
        given["zscore_range"] = tuple(identity["zscore_range"])
    return TileRecipe(tuple(identity["tile_grid"]), tuple(identity["tile_sizes_px"]), **given)
