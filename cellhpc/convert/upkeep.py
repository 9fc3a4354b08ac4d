"""What is done to a store that is there: its plates are verified, or removed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellhpc.convert.tasks import ILLUMINATION
from cellhpc.convert.workers import cores
from cellhpc.correct import PlateStatistics, TileRecipe, cut_tiles
from cellhpc.errors import DataError, UsageError, listing
from cellhpc.illumination import even_out, gains
from cellhpc.ledger import held, read_json
from cellhpc.pixels import BadField, FieldFormat, file_state, read_field
from cellhpc.progress import progress
from cellhpc.record import ARRAYS, LOCK, PLATE, PLATES, plate_folder, read_identity, read_plate
from cellhpc.tiles import Store


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
    plates = _plates(store)
    problems: list[str] = []
    shards: list[tuple[Path, dict[str, Any]]] = []
    for plate in plates:
        if not read_plate(store, plate):
            problems.append(f"plate {plate}: its conversion is not finished. Type: cellhpc convert JOB.toml")
            continue
        markers = [read_json(path) for path in sorted(plate_folder(store, plate).glob("[0-9]*.json"))]
        mine = [(store / ARRAYS / name, told) for marker in markers for name, told in marker["shards"].items()]
        problems += _strangers(store, plate, {path for path, _ in mine})
        shards += mine
    read = 0
    with progress("Checksums", len(shards), "shards") as advance, ThreadPoolExecutor(cores()) as pool:
        for (_, told), problem in zip(shards, pool.map(_check_shard, shards), strict=True):
            advance(1, "")
            read += told["bytes"]
            problems += [problem] if problem else []
    finished = [plate for plate in plates if read_plate(store, plate)]
    compared, without = 0, 0
    for outcome in _compare(store, finished, raw, sample):
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
    again = "Remove the plate (cellhpc remove STORE PLATE) and convert it again."
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        return f"{where}: {fault.strerror}. {again}"
    return "" if found == told["sha256"] else f"{where}: its checksum is not the one that was recorded. {again}"


def _compare(store: Path, plates: list[str], raw: Path | None, sample: int) -> Iterator[str | None]:
    """Make some fields anew; yields for each what is wrong ("" if nothing is), or None without its raw pictures."""
    if not plates or not sample:
        return
    identity, opened = read_identity(store), Store.open(store, plates)
    files = [f"file_{channel}" for channel in identity["channels"]]
    fields = opened.fields
    tiled = (fields["role"] == "treatment") | ((fields["role"] == "dmso") & identity.get("controls", False))
    fields = fields[tiled & (fields["bad"] == "")]
    drawn = fields.sample(min(sample, len(fields)), random_state=0).sort_index()
    with progress("Sample", len(drawn), "fields") as advance:
        for field in drawn.itertuples():
            advance(1, "")
            record = read_plate(store, str(field.plate))
            root = raw or Path(record["root"])
            names = [getattr(field, name) for name in files]
            yield _compare_field(opened, identity, record, field, root, names)


def _compare_field(
    store: Store, identity: dict[str, Any], record: dict[str, Any], field: Any, root: Path, files: list[str]
) -> str | None:
    where = f"plate {field.plate}: well {field.well} field {field.field}"
    size, modified_ns = file_state(root, files)
    if size == 0:
        return None
    if (size, modified_ns) != (field.bytes, field.modified_ns):
        return f"{where}: its raw pictures were changed since it was converted"
    try:
        pixels = read_field(root, files, FieldFormat(**identity["field"]))
    except BadField as fault:
        return f"{where}: {fault.reason}"
    light = plate_folder(store.folder, str(field.plate)) / f"{ILLUMINATION}.npy"
    if light.exists():
        pixels = even_out(pixels, gains(np.load(light), *pixels.shape[:2]))
    statistics = {key: tuple(values) for key, values in record["statistics"].items()}
    made = cut_tiles(pixels, _recipe(identity), PlateStatistics(**statistics) if statistics else None)
    tiles = store.tiles_of(str(field.plate))
    mine = tiles[(tiles["well"] == field.well) & (tiles["field"] == field.field)]
    for px, expected in made.tiles.items():
        try:
            found = store.read(mine, px)
        except DataError as fault:
            return f"{where}: {str(fault).splitlines()[0]}"
        if not np.array_equal(found, expected):
            return f"{where}: its tiles of {px} pixels are not what its raw pictures give"
    return ""


def _recipe(identity: dict[str, Any]) -> TileRecipe:
    keys = ("preprocessing", "empty_above", "empty_fraction")
    given: dict[str, Any] = {key: identity[key] for key in keys}
    if "zscore_range" in identity:
        given["zscore_range"] = tuple(identity["zscore_range"])
    return TileRecipe(tuple(identity["tile_grid"]), tuple(identity["tile_sizes_px"]), **given)
