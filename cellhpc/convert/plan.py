"""What a conversion will do, as data: plates, tasks, sizes. Nothing is written to make a plan, and no pixel is decoded.

The unit of work is a task: the fields of one shard. Every field has its fixed place of rows x columns tiles in the
array of its plate, so that a task owns whole shards and tasks never meet in a file. A block that covers a part of a
shard would silently lose what another task wrote into it; a plan in which that can happen is refused when it is made.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from cellhpc.errors import DataError, UsageError, listing
from cellhpc.ledger import digest, read_json
from cellhpc.pixels import BadField, FieldFormat, file_bytes, probe_field
from cellhpc.record import STORE, content_digest
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings

FORMAT = 1
"""Raised when the same settings give other pixels, or when the store is laid out differently."""

ARRAYS = "tiles.zarr"
WORK = "work"

PIXEL_SETTINGS = ("preprocessing", "tile_grid", "empty_above", "empty_fraction", "shard_fields")
"""Keys of `[convert]` that the store's content depends on."""

FIELD_KEY = ["plate", "well", "field"]


@dataclass(frozen=True)
class FieldSource:
    """One field of a plate and its files, one for each channel."""

    well: str
    field: int
    files: tuple[str, ...]
    bytes: int
    """Size of the files; 0 when they are missing."""

    def __str__(self) -> str:
        return f"well {self.well} field {self.field}"


@dataclass(frozen=True)
class Plate:
    """A plate: how many of its fields become tiles, and the DMSO fields that it is normalised by."""

    name: str
    fields: int
    dmso: tuple[FieldSource, ...]
    digest: str
    """Of the DMSO fields and how they are read."""


@dataclass(frozen=True)
class Task:
    """The fields of one shard of one plate, for all tile sizes."""

    id: str
    plate: str
    shard: int
    fields: tuple[FieldSource, ...]
    digest: str


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion.

    Attributes
    ----------
    settings, store, root, channels
        How, where to, where from, and which channels.
    tile_sizes_px
        Sides of the tiles that are made.
    format
        Size and type that every field must have.
    plates, tasks
        All of them, finished or not.
    fields
        The fields table of the fields that become tiles and, if needed, of the DMSO fields, by plate, well and field.
    identity
        What the store is: two conversions with the same identity give the same bytes.
    """

    settings: ConvertSettings
    store: Path
    root: Path
    channels: tuple[str, ...]
    tile_sizes_px: tuple[int, ...]
    format: FieldFormat
    plates: tuple[Plate, ...]
    tasks: tuple[Task, ...]
    fields: pd.DataFrame
    identity: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse a plan in which a task does not own whole shards, with a ValueError that names the task or plate."""
        owned: dict[str, list[Task]] = collections.defaultdict(list)
        for task in self.tasks:
            owned[task.plate].append(task)
        for plate in self.plates:
            left = plate.fields
            for shard, task in enumerate(sorted(owned.pop(plate.name, []), key=lambda task: task.shard)):
                if task.shard != shard or len(task.fields) != min(left, self.settings.shard_fields):
                    raise ValueError(f"task {task.id} does not own exactly the shard {shard} of plate {plate.name}")
                left -= len(task.fields)
            if left:
                raise ValueError(f"{left} fields of plate {plate.name} belong to no task")
        if owned:
            raise ValueError(f"tasks of unknown plates: {listing(owned)}")

    @cached_property
    def digest(self) -> str:
        """Digest of the store that this plan makes."""
        return digest(self.identity)

    @property
    def content_digest(self) -> str:
        """Digest of what the store holds: the plan's own, and with fields set aside, also of these."""
        recorded = _read(self.store / STORE)
        return content_digest(recorded) if recorded.get("digest") == self.digest else self.digest

    def counts(self) -> dict[str, Any]:
        """Tell what a finished conversion kept and set aside; empty when it is not finished."""
        recorded = _read(self.store / STORE)
        if recorded.get("digest") != self.digest:
            return {}
        keys = ("plate", "well", "field", "role", "reason")
        return {**recorded["counts"], "set_aside": [{key: bad[key] for key in keys} for bad in recorded["bad_fields"]]}

    @property
    def normalised(self) -> bool:
        """Whether DMSO fields are read for their statistics."""
        return self.settings.preprocessing != "none"

    @property
    def tiles_per_field(self) -> int:
        """Tiles in a field: rows times columns."""
        return math.prod(self.settings.tile_grid)

    @property
    def is_finished(self) -> bool:
        """Whether the store is there as planned; with fields set aside, only if these are still as they were.

        With `on_bad_field = "fail"`, a store with fields set aside is not finished.
        """
        recorded = _read(self.store / STORE)
        if recorded.get("digest") != self.digest:
            return False
        return all(self.still_bad(bad) for bad in recorded["bad_fields"])

    def still_bad(self, bad: dict[str, Any]) -> bool:
        """Whether a field that was set aside may stay so: that is allowed, and its files have the size they had."""
        return self.settings.on_bad_field == "skip" and file_bytes(self.root, bad["files"]) == bad["bytes"]

    def totals(self) -> dict[str, int]:
        """Count the whole conversion, finished or not; `bytes_out` are those of the tiles before compression."""
        fields = sum(plate.fields for plate in self.plates)
        dmso = [source for plate in self.plates for source in plate.dmso]
        tile_bytes = sum(px * px for px in self.tile_sizes_px) * len(self.channels)
        arrays = len(self.plates) * len(self.tile_sizes_px)
        return {
            "plates": len(self.plates),
            "fields": fields,
            "dmso_fields": len(dmso),
            "tiles": fields * self.tiles_per_field,
            "tasks": len(self.tasks),
            "bytes_in": sum(source.bytes for task in self.tasks for source in task.fields)
            + sum(source.bytes for source in dmso),
            "bytes_out": fields * self.tiles_per_field * tile_bytes,
            # shards and markers of tasks; metadata of arrays, plates and root; markers of plates; tables, records, lock
            "files": len(self.tasks) * (len(self.tile_sizes_px) + 1)
            + arrays + len(self.plates) + 1
            + (len(self.plates) if self.normalised else 0) + 5,
        }  # fmt: skip

    def render(self) -> str:
        """Tell the plan in a few lines, for `--dry-run`."""
        totals = self.totals()
        sizes = " and ".join(str(px) for px in self.tile_sizes_px)
        lines = [
            f"Convert into {self.store}" + (" (already converted)" if self.is_finished else ""),
            f"  read    {totals['fields']:,} fields of {totals['plates']:,} plates, {self.format}, "
            f"{len(self.channels)} channels ({', '.join(self.channels)})",
            f"          {totals['dmso_fields']:,} DMSO fields for the statistics; {_size(totals['bytes_in'])} in all",
            f"  write   {totals['tiles']:,} tiles of {sizes} pixels, at most {_size(totals['bytes_out'])}, "
            f"in about {totals['files']:,} files",
            f"  tasks   {totals['tasks']:,}, each of up to {self.settings.shard_fields} fields",
        ]
        return "\n".join(lines)


def plan_conversion(
    settings: ConvertSettings, screen: Screen, tile_sizes_px: Sequence[int], store: Path
) -> ConversionPlan:
    """Plan the conversion of a screen's treatment fields.

    Parameters
    ----------
    settings
        The section `[convert]`.
    screen
        The screen; fields of role "treatment" become tiles, those of role "dmso" on the same plates normalise them.
    tile_sizes_px
        Sides of the tiles. A store that is there and holds these and further sizes is taken as it is.
    store
        Folder of the store.

    Raises
    ------
    DataError
        No field to convert or none that can be read, a plate without DMSO where it is needed, pixels that don't fit the
        settings.
    UsageError
        The folder holds another store or something else; the tile grid does not divide the field.
    """
    files = [f"file_{channel}" for channel in screen.channels]
    used = screen.fields[screen.fields["role"] == "treatment"]
    if used.empty:
        raise DataError(
            f"{screen.root}: no labelled field is left to convert.",
            remedy="See what the tables hold with: cellhpc inspect JOB.toml",
        )
    dmso = screen.fields[(screen.fields["role"] == "dmso") & screen.fields["plate"].isin(used["plate"])]
    if settings.preprocessing == "none":
        dmso = dmso.iloc[:0]
    elif missing := sorted(set(used["plate"]) - set(dmso["plate"])):
        raise DataError(
            f'convert.preprocessing = "{settings.preprocessing}" normalises each plate by its DMSO wells, and '
            f"{len(missing)} of {used['plate'].nunique()} plates have none.",
            [f"plate {plate}: no DMSO field" for plate in missing],
            'Set convert.preprocessing = "none" for 8-bit pictures that are normalised already, '
            "or drop these plates from the screen's table.",
        )
    fields = pd.concat([used, dmso]).sort_values(FIELD_KEY, kind="stable", ignore_index=True)
    recorded = recorded_identity(store)
    sizes = sorted(set(tile_sizes_px))
    if recorded and set(sizes) <= set(recorded["tile_sizes_px"]):
        sizes = recorded["tile_sizes_px"]
    identity = {
        "format": FORMAT,
        **settings.model_dump(mode="json", include=set(PIXEL_SETTINGS)),
        "tile_sizes_px": sizes,
        "channels": list(screen.channels),
        "fields": len(used),
        "dmso_fields": len(dmso),
        "files_digest": _table_digest(fields[[*FIELD_KEY, "role", *files]]),
        "labels_digest": _table_digest(fields.drop(columns=files)),
    }
    if recorded:
        refuse_other_store(store, recorded, identity)
    # A finished store needs no raw pixels, which may lie elsewhere by now.
    finished = _read(store / STORE)
    field_format = FieldFormat(**finished["field_format"]) if finished else _probe(screen.root, fields, files)
    _check_format(settings, field_format)
    how = {key: identity[key] for key in ("format", *PIXEL_SETTINGS, "tile_sizes_px", "channels")}
    plates, tasks = _divide(screen.root, fields, files, {**how, "field_format": str(field_format)})
    return ConversionPlan(
        settings, store, screen.root, screen.channels, tuple(sizes), field_format, plates, tasks, fields, identity
    )


def recorded_identity(store: Path) -> dict[str, Any] | None:
    """Identity of the store in a folder, finished or begun; None when nothing is there.

    Raises
    ------
    UsageError
        The folder holds something else.
    """
    for record in (store / STORE, store / WORK / "plan.json"):
        if known := _read(record):
            return known["identity"]
    if store.exists() and (not store.is_dir() or any(path.name != WORK for path in store.iterdir())):
        raise UsageError(
            f"{store} is there and is no store of tiles. Choose another folder with --set convert.store=FOLDER, "
            "or remove what is in it."
        )
    return None


def refuse_other_store(store: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix two conversions in one folder.

    Raises
    ------
    UsageError
        Names what differs.
    """
    words = {
        "files_digest": "names of fields and files",
        "labels_digest": "labels or other columns of the fields",
    }
    differences = [
        f"  - {words[key]} differ"
        if key in words
        else f"  - {key}: {recorded.get(key)!r} in the store, {wanted[key]!r} wanted now"
        for key in wanted
        if recorded.get(key) != wanted[key]
    ]
    if differences:
        raise UsageError(
            "\n".join([f"{store} was converted from other settings or tables:", *differences])
            + "\nChoose another folder with --set convert.store=FOLDER, or remove this one."
        )


def _probe(root: Path, fields: pd.DataFrame, files: list[str]) -> FieldFormat:
    """Find the most common size and type among the first, middle and last readable field of each plate.

    Several are asked, so that one odd field does not make all others wrong.
    """
    votes: collections.Counter[FieldFormat] = collections.Counter()
    reasons: list[str] = []
    for plate, rows in fields.groupby("plate", sort=True):
        names = list(rows[files].itertuples(index=False, name=None))
        found = 0
        for position in dict.fromkeys([0, len(names) // 2, len(names) - 1, *range(len(names))]):
            try:
                votes[probe_field(root, names[position])] += 1
                found += 1
            except BadField as fault:
                reasons.append(f"plate {plate}: {fault.reason}")
            if found == 3 or len(reasons) >= 1000:
                break
    if not votes:
        raise DataError(
            f"{root}: not one field can be read.", reasons, "Mend the pictures, or set screen.path to their folder."
        )
    return votes.most_common(1)[0][0]


def _check_format(settings: ConvertSettings, field_format: FieldFormat) -> None:
    rows, columns = settings.tile_grid
    if min(rows, columns) < 1 or field_format.height % rows or field_format.width % columns:
        raise UsageError(
            f"convert.tile_grid: {rows} rows x {columns} columns of tiles do not divide a field of "
            f"{field_format.height} x {field_format.width} pixels. Choose divisors of these, for example "
            f"{_nearest_divisor(field_format.height, rows)} x {_nearest_divisor(field_format.width, columns)}."
        )
    if settings.preprocessing == "none" and field_format.dtype != "uint8":
        raise DataError(
            f'convert.preprocessing = "none" takes 8-bit pixels as they are; the fields are {field_format.dtype}.',
            remedy='Set convert.preprocessing = "kensert2019" to normalise them, or convert the pictures to 8 bits.',
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: (abs(n - wanted), n))


def _divide(
    root: Path, fields: pd.DataFrame, files: list[str], how: dict[str, Any]
) -> tuple[tuple[Plate, ...], tuple[Task, ...]]:
    """Cut each plate into tasks of whole shards."""
    per_shard = how["shard_fields"]
    plates, tasks = [], []
    for name, rows in fields.groupby("plate", sort=True):
        dmso = tuple(_sources(root, rows[rows["role"] == "dmso"], files))
        used = list(_sources(root, rows[rows["role"] == "treatment"], files))
        plates.append(Plate(str(name), len(used), dmso, digest({"how": how, "dmso": _names(dmso)})))
        for shard in range(math.ceil(len(used) / per_shard)):
            part = tuple(used[shard * per_shard : (shard + 1) * per_shard])
            document = {"how": how, "plate": plates[-1].digest, "shard": shard, "fields": _names(part)}
            tasks.append(Task(f"{name}-{shard:05d}", str(name), shard, part, digest(document)))
    return tuple(plates), tuple(tasks)


def _sources(root: Path, rows: pd.DataFrame, files: list[str]) -> Iterator[FieldSource]:
    for well, field, *names in rows[["well", "field", *files]].itertuples(index=False, name=None):
        yield FieldSource(well, int(field), tuple(names), file_bytes(root, names))


def _names(sources: Sequence[FieldSource]) -> list[list[Any]]:
    return [[source.well, source.field, *source.files] for source in sources]


def _table_digest(table: pd.DataFrame) -> str:
    columns = [str(column) for column in table.columns]
    return digest({"columns": columns, "rows": table.astype(str).to_numpy().tolist()})


def _read(path: Path) -> dict[str, Any]:
    """Read a record of the store; empty when it is not there."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as fault:
        raise UsageError(
            f"{path}: no record of a store: {fault}. Remove the store's folder, or choose another."
        ) from None


def _size(count: int) -> str:
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.3g} {unit}"
