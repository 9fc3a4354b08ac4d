"""What a worker of a conversion does: look at a plate's fields for its illumination and its statistics, make a shard.

Plain functions of plain data. A shard is written whole: everything is read and computed first, in memory; then what an
earlier, killed attempt may have left is removed, the shards are written and flushed to the disk, and a marker with the
digest of the task and the checksums of the shards comes last.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cellhpc.archive import Archive, write_field
from cellhpc.convert.plan import ConversionPlan, FieldSource, Plate, Task
from cellhpc.correct import PlateStatistics, TileRecipe, cut_tiles, histograms
from cellhpc.errors import UserError
from cellhpc.illumination import even_out, gains, shrink
from cellhpc.ledger import read_json, write_json
from cellhpc.pixels import BadField, FieldFormat, file_state, read_field
from cellhpc.quality import Quality, measure
from cellhpc.record import ARRAYS, plate_folder
from cellhpc.shard_writer import ShardWriter, remove_leftovers

_computing = threading.Lock()
"""One task of a process computes at a time: the others read and write meanwhile, and don't take its cache."""

STATISTICS, ILLUMINATION = "statistics", "illumination"
"""Names of the markers of a plate's own tasks; those of shards are their numbers."""


@dataclass(frozen=True)
class Recipe:
    """What all tasks of a conversion have in common; small, for it travels with each of them."""

    root: Path
    store: Path
    format: FieldFormat
    tiles: TileRecipe
    shard_fields: int
    skip_bad: bool
    controls: bool
    archive: Archive | None

    @classmethod
    def of(cls, plan: ConversionPlan) -> Recipe:
        """Take the recipe out of a plan."""
        made = plan.settings
        skip = made.on_bad_field == "skip"
        return cls(
            plan.root, plan.store, plan.format, plan.recipe, made.shard_fields, skip, made.controls, plan.archive
        )


@dataclass(frozen=True)
class Light:
    """The illumination of a plate: its file, and the checksum that it must have."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Basis:
    """What was found out of a plate before its tiles are made; None where the settings need nothing."""

    statistics: PlateStatistics | None = None
    light: Light | None = None

    def record(self) -> dict[str, Any]:
        """Tell it as a marker keeps it, to know what its tiles were made by."""
        told = (
            {key: list(value) for key, value in dataclasses.asdict(self.statistics).items()} if self.statistics else {}
        )
        return {"statistics": told, "illumination": self.light.sha256 if self.light else ""}


def shrink_fields(recipe: Recipe, sources: Sequence[FieldSource]) -> list[tuple[np.ndarray | None, dict[str, Any]]]:
    """Shrink fields of one plate; for each, in order, its coarse picture (None if it is bad) and its record."""
    found: list[tuple[np.ndarray | None, dict[str, Any]]] = []
    for source in sources:
        try:
            pixels, facts = _read(recipe, source)
        except BadField as fault:
            found.append((None, _bad(source, fault)))
            continue
        found.append((shrink(pixels), facts))
    return found


def count_pixels(
    recipe: Recipe, plate: str, sources: Sequence[FieldSource], light: Light | None
) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    """Count the pixels of fields of one plate; those of no other task go into the archive, if there is one.

    Returns
    -------
    counts
        (channel, 65,536) int64, the sum over the fields that can be read; None when there is none.
    records
        One for each field, in order: its quality, or why it is bad.
    """
    _leave_cores_to_others()
    total, records = None, []
    for source in sources:
        try:
            pixels, facts = _read(recipe, source)
        except BadField as fault:
            records.append(_bad(source, fault))
            continue
        quality = measure(pixels)
        if source.role == "dmso" and not recipe.controls:
            _archive(recipe, plate, source, facts, pixels, quality)
        records.append(facts | dataclasses.asdict(quality))
        counts = histograms(_evened(pixels, light))
        total = counts if total is None else total + counts
    return total, records


def convert_shard(recipe: Recipe, task: Task, basis: Basis | None) -> list[dict[str, Any]]:
    """Turn the fields of a task into its shards and its marker; before these, they go into the archive if there is one.

    Parameters
    ----------
    recipe, task
        How, and which fields.
    basis
        Of the plate. Without one the plate is refused already: its fields are only looked at.

    Returns
    -------
    list of dict
        Records of the bad fields. Unless they may be skipped, nothing was written if there is any.

    Raises
    ------
    UserError
        The store can't be written.
    """
    _leave_cores_to_others()
    how = recipe.tiles
    per_field = how.grid[0] * how.grid[1]
    shards = {px: ShardWriter(_array(recipe, task, px)) for px in how.tile_sizes_px} if basis else {}
    records = []
    for slot, source in enumerate(task.fields):
        try:
            pixels, facts = _read(recipe, source)
        except BadField as fault:
            records.append(_bad(source, fault))
            continue
        if basis is None:
            continue
        with _computing:
            quality = measure(pixels)
            cut = cut_tiles(_evened(pixels, basis.light), how, basis.statistics)
            for px, tiles in cut.tiles.items():
                shards[px].put(tiles, slot * per_field)
        _archive(recipe, task.plate, source, facts, pixels, quality)
        records.append(facts | dataclasses.asdict(quality) | {"signal": cut.signal})
    bad = [record for record in records if record["bad"]]
    if basis is not None and (recipe.skip_bad or not bad):
        try:
            _write(recipe, task, basis, shards, records)
        except OSError as fault:
            raise UserError(
                f"{recipe.store}: the tiles of {task.id} can't be written: {fault.strerror or fault}"
            ) from None
    return bad


def archive_fields(
    recipe: Recipe, plate: str, sources: Sequence[FieldSource], states: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Archive fields of a plate whose tiles are there already.

    Parameters
    ----------
    recipe, plate, sources
        How, and which fields.
    states
        Size and time of each field's files when its tiles were made.

    Returns
    -------
    list of dict
        Records of the fields that can't be read any more, or that were changed since.
    """
    _leave_cores_to_others()
    bad = []
    for source, state in zip(sources, states, strict=True):
        try:
            pixels, facts = _read(recipe, source)
        except BadField as fault:
            bad.append(_bad(source, fault))
            continue
        if (facts["bytes"], facts["modified_ns"]) == state:
            _archive(recipe, plate, source, facts, pixels, measure(pixels))
        else:
            bad.append(_bad(source, BadField(f"{source.files[0]}: changed since it was converted")))
    return bad


def marker_path(store: Path, plate: str, name: str) -> Path:
    """Marker of what was done of a plate: beside the arrays, so that nothing foreign lies in them."""
    return plate_folder(store, plate) / f"{name}.json"


def shard_name(task: Task) -> str:
    """Name of a task's marker."""
    return f"{task.shard:05d}"


def light_path(store: Path, plate: Plate) -> Path:
    """File of a plate's illumination, an array (channel, y, x) of float32."""
    return plate_folder(store, plate.name) / f"{ILLUMINATION}.npy"


def read_marker(store: Path, plate: str, name: str, expected: str) -> dict[str, Any] | None:
    """Marker of what is done with the expected digest, its shards being there in full length; otherwise None."""
    try:
        marker: dict[str, Any] = read_json(marker_path(store, plate, name))
        shards = marker.get("shards", {})
        sizes = [(store / ARRAYS / file).stat().st_size for file in shards]
    except (FileNotFoundError, ValueError):
        return None
    whole = sizes == [shard["bytes"] for shard in shards.values()]
    return marker if whole and marker.get("digest") == expected else None


def problem_text(plate: str, record: dict[str, Any]) -> str:
    """Tell of a bad field, from its record."""
    return f"plate {plate}: well {record['well']} field {record['field']}: {record['bad']}"


def _read(recipe: Recipe, source: FieldSource) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a field that nobody writes meanwhile and that shows something: its pixels, and the begin of its record."""
    before = file_state(recipe.root, source.files)
    pixels = read_field(recipe.root, source.files, recipe.format)
    if file_state(recipe.root, source.files) != before:
        raise BadField(f"{source.files[0]}: changed while it was read")
    black = [name for channel, name in enumerate(source.files) if _is_black(pixels[..., channel])]
    if black:  # no camera gives that
        raise BadField(f"{', '.join(dict.fromkeys(black))}: every pixel of a channel is 0")
    return pixels, {**_record(source), "bytes": before[0], "modified_ns": before[1]}


def _leave_cores_to_others() -> None:
    """Have one thread for each task: there is a worker for each core."""
    cv2.setNumThreads(1)


def _is_black(plane: np.ndarray) -> bool:
    return not plane[::16].any() and not plane.any()  # few rows are enough to see that it is not


def _archive(
    recipe: Recipe, plate: str, source: FieldSource, facts: dict[str, Any], pixels: np.ndarray, quality: Quality
) -> None:
    """Write a field as it is, if there is an archive."""
    if recipe.archive is None:
        return
    made_of = {"files": list(source.files), "bytes": facts["bytes"], "modified_ns": facts["modified_ns"]}
    extremes = list(zip(quality.low, quality.high, strict=True))
    try:
        write_field(recipe.archive, plate, source.well, source.field, pixels, extremes, made_of)
    except OSError as fault:
        raise UserError(
            f"{recipe.archive.folder}: {source} of {plate} can't be written: {fault.strerror or fault}"
        ) from None


def _evened(pixels: np.ndarray, light: Light | None) -> np.ndarray:
    return pixels if light is None else even_out(pixels, _gains(light, *pixels.shape[:2]))


@functools.lru_cache(maxsize=2)
def _gains(light: Light, height: int, width: int) -> np.ndarray:
    content = light.path.read_bytes()
    if hashlib.sha256(content).hexdigest() != light.sha256:
        raise UserError(f"{light.path} was changed. Remove it, and type the same command again.")
    return gains(np.load(light.path), height, width)


def _write(
    recipe: Recipe,
    task: Task,
    basis: Basis,
    made: dict[int, ShardWriter],
    records: list[dict[str, Any]],
) -> None:
    marker = marker_path(recipe.store, task.plate, shard_name(task))
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    remove_leftovers(marker.name, marker.parent)
    name = f"c.{task.shard}.0.0.0"
    remove_leftovers(name, marker.parent)
    shards = {}
    for px, shard in made.items():
        array = _array(recipe, task, px)
        (array / name).unlink(missing_ok=True)
        size, sha256 = shard.write(name, marker.parent)
        shards[f"{task.plate}/{array.name}/{name}"] = {"bytes": size, "sha256": sha256}
    document = {"digest": task.digest, "basis": basis.record(), "shards": shards, "fields": records}
    write_json(marker, document)


def _array(recipe: Recipe, task: Task, px: int) -> Path:
    return recipe.store / ARRAYS / task.plate / f"tiles_{px}"


def _record(source: FieldSource) -> dict[str, Any]:
    return {"well": source.well, "field": source.field, "role": source.role, "bad": ""}


def _bad(source: FieldSource, fault: BadField) -> dict[str, Any]:
    return {**_record(source), "bad": fault.reason, "files": source.files, "bytes": source.bytes}
