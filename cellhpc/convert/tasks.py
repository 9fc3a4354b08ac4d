"""What a worker of a conversion does: count the pixels of DMSO fields, or turn the fields of one shard into tiles.

Plain functions of plain data. A shard is written whole: everything is read and computed first, in memory; then what an
earlier, killed attempt may have left is removed, the shards are written and flushed to the disk, and a marker with the
digest of the task and the checksums of the shards comes last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zarr

from cellhpc.convert.plan import ARRAYS, WORK, ConversionPlan, FieldSource, Task
from cellhpc.correct import FieldTiles, PlateStatistics, cut_tiles, histograms
from cellhpc.errors import UserError
from cellhpc.ledger import read_json, write_json
from cellhpc.pixels import BadField, FieldFormat, read_field


@dataclass(frozen=True)
class Recipe:
    """What all tasks of a conversion have in common; small, for it travels with each of them."""

    root: Path
    store: Path
    format: FieldFormat
    grid: tuple[int, int]
    tile_sizes_px: tuple[int, ...]
    shard_fields: int
    empty_above: int
    empty_fraction: float
    normalised: bool
    skip_bad: bool

    @classmethod
    def of(cls, plan: ConversionPlan) -> Recipe:
        """Take the recipe out of a plan."""
        settings = plan.settings
        return cls(
            root=plan.root,
            store=plan.store,
            format=plan.format,
            grid=settings.tile_grid,
            tile_sizes_px=plan.tile_sizes_px,
            shard_fields=settings.shard_fields,
            empty_above=settings.empty_above,
            empty_fraction=settings.empty_fraction,
            normalised=plan.normalised,
            skip_bad=settings.on_bad_field == "skip",
        )


def count_dmso(recipe: Recipe, sources: Sequence[FieldSource]) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    """Count the pixels of DMSO fields of one plate.

    Returns
    -------
    counts
        (channel, 65,536) int64, the sum over the fields that can be read; None when there is none.
    facts
        A record for each field, in order: extremes and mean of each channel, or why it is bad.
    """
    total, facts = None, []
    values = np.arange(65_536)
    for source in sources:
        try:
            counts = histograms(read_field(recipe.root, source.files, recipe.format))
        except BadField as fault:
            facts.append(_bad(source, fault))
            continue
        there = [np.flatnonzero(channel) for channel in counts]
        facts.append(
            _facts(
                source,
                low=[int(found[0]) for found in there],
                high=[int(found[-1]) for found in there],
                mean=[float(channel @ values / channel.sum()) for channel in counts],
            )
        )
        total = counts if total is None else total + counts
    return total, facts


def convert_shard(recipe: Recipe, task: Task, statistics: PlateStatistics | None) -> list[dict[str, Any]]:
    """Turn the fields of a task into its shards and its marker.

    Parameters
    ----------
    recipe, task
        How, and which fields.
    statistics
        Of the plate's DMSO pixels. When the recipe normalises and there is none, the plate is refused already: its
        fields are only looked at.

    Returns
    -------
    list of dict
        Records of the bad fields. Unless they may be skipped, nothing was written if there is any.

    Raises
    ------
    UserError
        The store can't be written.
    """
    cv2.setNumThreads(1)  # the workers share the cores among them
    per_field = recipe.grid[0] * recipe.grid[1]
    channels = len(task.fields[0].files)
    tiles = {px: np.zeros((len(task.fields) * per_field, px, px, channels), np.uint8) for px in recipe.tile_sizes_px}
    facts = []
    for slot, source in enumerate(task.fields):
        try:
            pixels = read_field(recipe.root, source.files, recipe.format)
        except BadField as fault:
            facts.append(_bad(source, fault))
            continue
        if recipe.normalised and statistics is None:
            continue
        cut = cut_tiles(
            pixels, recipe.grid, recipe.tile_sizes_px, statistics, recipe.empty_above, recipe.empty_fraction
        )
        for px, made in cut.tiles.items():
            tiles[px][slot * per_field : (slot + 1) * per_field] = made
        facts.append(_field_facts(source, cut))
    bad = [record for record in facts if record["bad"]]
    refused = (recipe.normalised and statistics is None) or (bad and not recipe.skip_bad)
    if not refused:
        try:
            _write(recipe, task, statistics, tiles, facts)
        except OSError as fault:
            raise UserError(
                f"{recipe.store}: the tiles of {task.id} can't be written: {fault.strerror or fault}"
            ) from None
    return bad


def marker_path(store: Path, task_id: str) -> Path:
    """Marker of a task: beside the arrays, so that nothing foreign lies in them."""
    return store / WORK / f"{task_id}.json"


def statistics_record(statistics: PlateStatistics | None) -> dict[str, list[float]] | None:
    """Write statistics as a marker keeps them, to tell what its tiles were normalised by."""
    return {"mean": list(statistics.mean), "std": list(statistics.std)} if statistics else None


def dmso_id(plate: str) -> str:
    """Name of the marker with the statistics of a plate."""
    return f"{plate}-dmso"


def read_marker(store: Path, name: str, expected: str) -> dict[str, Any] | None:
    """Marker of what is done with the expected digest, its shards being there in full length; otherwise None."""
    try:
        marker: dict[str, Any] = read_json(marker_path(store, name))
        shards = marker.get("shards", {})
        sizes = [(store / ARRAYS / file).stat().st_size for file in shards]
    except (FileNotFoundError, ValueError):
        return None
    whole = sizes == [shard["bytes"] for shard in shards.values()]
    return marker if whole and marker.get("digest") == expected else None


def _write(
    recipe: Recipe,
    task: Task,
    statistics: PlateStatistics | None,
    tiles: dict[int, np.ndarray],
    facts: list[dict[str, Any]],
) -> None:
    marker = marker_path(recipe.store, task.id)
    marker.unlink(missing_ok=True)
    for leftover in marker.parent.glob(f".{_literal(marker.name)}.*"):
        leftover.unlink()
    shards = {}
    for px, block in tiles.items():
        folder = recipe.store / ARRAYS / task.plate / f"tiles_{px}"
        for leftover in folder.glob(f"c.{task.shard}.*"):
            leftover.unlink()
        # Zeros are written too: a shard that is not there is lost, and is not taken for one of zeros.
        with zarr.config.set({"threading.max_workers": 1, "array.write_empty_chunks": True}):
            array = zarr.open_array(folder, mode="r+")
            first = task.shard * recipe.shard_fields * recipe.grid[0] * recipe.grid[1]
            array[first : first + len(block)] = block
        shard = folder / f"c.{task.shard}.0.0.0"
        shards[str(shard.relative_to(recipe.store / ARRAYS))] = _flush(shard)
    document = {"digest": task.digest, "statistics": statistics_record(statistics), "shards": shards, "fields": facts}
    write_json(marker, document)


def _flush(shard: Path) -> dict[str, Any]:
    """Have a file on the disk before its marker says so, and take its checksum."""
    with shard.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": shard.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _literal(name: str) -> str:
    """Escape what `glob` would take for a pattern; names of plates are free text."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _facts(source: FieldSource, **found: Any) -> dict[str, Any]:
    return {"well": source.well, "field": source.field, "bad": "", "bytes": source.bytes, **found}


def _field_facts(source: FieldSource, cut: FieldTiles) -> dict[str, Any]:
    return _facts(source, low=cut.low, high=cut.high, mean=cut.mean, signal=cut.signal)


def _bad(source: FieldSource, fault: BadField) -> dict[str, Any]:
    return {**_facts(source), "bad": fault.reason, "files": source.files}
