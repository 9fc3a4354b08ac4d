"""What a conversion will do, as data: plates, tasks, sizes. Nothing is written to make a plan, and no pixel is decoded.

The unit of work is a task: the fields of one shard. Every field has its fixed place of rows x columns tiles in the
array of its plate, so that a task owns whole shards and tasks never meet in a file. A block that covers a part of a
shard would silently lose what another task wrote into it; a plan in which that can happen is refused when it is made.

A plate is converted for itself, with a digest of its own: others are added to a store and removed without touching it.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellhpc.archive import Archive, count_files, read_record
from cellhpc.correct import TileRecipe
from cellhpc.errors import listing
from cellhpc.pixels import FieldFormat, file_bytes
from cellhpc.record import content_digest, read_plate

if TYPE_CHECKING:
    import pandas as pd

    from cellhpc.settings import ConvertSettings

THREADS = 2
"""Tasks that a worker process has in hand: while one waits for the disk, another one works."""
WORKER_BYTES = 300e6
"""What a worker process needs besides its blocks: interpreter and libraries, measured by tests/bench/convert.py."""


def tiled_roles(settings: ConvertSettings) -> tuple[str, ...]:
    """Roles of the fields that become tiles, in the order of their places in a plate's array.

    Controls come after the treatments: these lie as they do in a store without controls, and together.
    """
    return ("treatment", "dmso") if settings.controls else ("treatment",)


@dataclass(frozen=True)
class FieldSource:
    """One field of a plate and its files, one for each channel."""

    well: str
    field: int
    files: tuple[str, ...]
    bytes: int
    """Size of the files; 0 when they are missing."""
    role: str

    def __str__(self) -> str:
        return f"well {self.well} field {self.field}"


@dataclass(frozen=True)
class Plate:
    """A plate of a conversion.

    Attributes
    ----------
    name
        Its name, and that of its folders.
    fields
        Count of the fields that become tiles, with `convert.controls` of the DMSO fields too.
    reference
        The fields that its pixels are normalised by; none if they are taken as they are.
    lit
        The fields that its illumination is estimated from; none without correction.
    reference_digest
        Of these, and of how they are read.
    digest
        Of everything that its tiles depend on.
    labels_digest
        Of its part of the fields table.
    sources, sources_digest
        All its fields that are read, and the digest of their names and files.
    """

    name: str
    fields: int
    reference: tuple[FieldSource, ...]
    lit: tuple[FieldSource, ...]
    reference_digest: str
    digest: str
    labels_digest: str
    sources: tuple[FieldSource, ...] = field(compare=False)
    sources_digest: str


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
        The fields table of the treatments' fields and, if needed, of the DMSO fields, by plate, well and field.
    identity
        What the store is; all its plates are made alike.
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

    @property
    def recipe(self) -> TileRecipe:
        """How a field becomes tiles."""
        return TileRecipe(
            grid=self.settings.tile_grid,
            tile_sizes_px=self.tile_sizes_px,
            preprocessing=self.settings.preprocessing,
            zscore_range=self.settings.zscore_range,
            empty_above=self.settings.empty_above,
            empty_fraction=self.settings.empty_fraction,
        )

    @property
    def archive(self) -> Archive | None:
        """Where the fields are written as they are; None if they are not."""
        made = self.settings
        if made.archive is None:
            return None
        return Archive(made.archive, self.channels, self.format, made.archive_codec, made.archive_pixel_um)

    @property
    def content_digest(self) -> str:
        """Digest of what the store holds of the plan's plates; empty while one is not finished."""
        return content_digest(self.store, [plate.name for plate in self.plates])

    @property
    def normalised(self) -> bool:
        """Whether a plate's pixels are normalised by statistics."""
        return self.settings.preprocessing != "none"

    @property
    def tiles_per_field(self) -> int:
        """Tiles in a field: rows times columns."""
        return math.prod(self.settings.tile_grid)

    @property
    def is_finished(self) -> bool:
        """Whether all plates are there as planned, and in the archive if there is one."""
        return not self.unfinished() and not self.unarchived()

    def unfinished(self) -> list[Plate]:
        """List the plates that are not there as planned; one with fields set aside is, if these are as they were."""
        return [plate for plate in self.plates if not self._is_finished(plate)]

    def _is_finished(self, plate: Plate) -> bool:
        record = read_plate(self.store, plate.name)
        known = (record.get("digest"), record.get("labels")) == (plate.digest, plate.labels_digest)
        return known and all(self.still_bad(bad) for bad in record["bad_fields"])

    def unarchived(self) -> list[Plate]:
        """List the plates that are not whole in the archive; fields that were set aside need not be there."""
        return [plate for plate in self.plates if self.archive and not self._is_archived(self.archive, plate)]

    def _is_archived(self, archive: Archive, plate: Plate) -> bool:
        record = read_record(archive.plate(plate.name))
        if record.get("digest") != archive.digest(plate.sources_digest) or "missing" not in record:
            return False
        bad = [[one["well"], one["field"]] for one in read_plate(self.store, plate.name).get("bad_fields", [])]
        return all(missing in bad for missing in record["missing"])

    def still_bad(self, bad: dict[str, Any]) -> bool:
        """Whether a field that was set aside may stay so: that is allowed, and its files have the size they had."""
        return self.settings.on_bad_field == "skip" and file_bytes(self.root, bad["files"]) == bad["bytes"]

    def counts(self) -> dict[str, Any]:
        """Tell what a finished conversion kept and set aside of the plan's plates; empty when it is not finished."""
        records = {plate.name: read_plate(self.store, plate.name) for plate in self.plates}
        if not all(records.values()):
            return {}
        totals: collections.Counter[str] = collections.Counter(plates=len(records))
        for record in records.values():
            totals.update(record["counts"])
        keys = ("well", "field", "role", "reason")
        aside = [
            {"plate": name, **{key: bad[key] for key in keys}}
            for name, record in records.items()
            for bad in record["bad_fields"]
        ]
        return {**totals, "set_aside": aside}

    def totals(self) -> dict[str, int]:
        """Count the whole conversion, finished or not; `bytes_out` are those of the tiles before compression.

        `worker_bytes` is about what a worker process holds at most; the others count pictures, bytes and files. Those
        of the archive are counted for themselves, `archive_bytes` before compression. `fields` and `tiles` are those of
        treatments; `control_tiles` come besides.
        """
        dmso_fields = int((self.fields["role"] == "dmso").sum())
        controls = dmso_fields if self.settings.controls else 0
        fields = sum(plate.fields for plate in self.plates) - controls
        reference = [source for plate in self.plates for source in plate.reference]
        lit = [source for plate in self.plates for source in plate.lit]
        read = [*(source for task in self.tasks for source in task.fields), *reference, *lit]
        arrays = len(self.plates) * len(self.tile_sizes_px)
        archive = self.archive
        archived = [[source.well for source in plate.sources] for plate in self.plates if archive]
        return {
            "plates": len(self.plates),
            "fields": fields,
            "dmso_fields": dmso_fields,
            "tiles": fields * self.tiles_per_field,
            "control_tiles": controls * self.tiles_per_field,
            "tasks": len(self.tasks),
            "bytes_in": sum(source.bytes for source in read),
            "bytes_out": (fields + controls) * self.field_bytes_out,
            # shards and markers of tasks; metadata of arrays, plates and root; of each plate its record, two tables,
            # statistics and illumination; the store's own record and lock
            "files": len(self.tasks) * (len(self.tile_sizes_px) + 1)
            + arrays + len(self.plates) + 1
            + len(self.plates) * (3 + self.normalised + 2 * (self.settings.illumination != "none")) + 2,
            "archive_bytes": sum(len(wells) for wells in archived) * archive.field_bytes if archive else 0,
            "archive_files": sum(count_files(wells) for wells in archived) + 1 if archive else 0,  # and its lock
            "worker_bytes": self.worker_bytes,
        }  # fmt: skip

    @property
    def field_bytes_out(self) -> int:
        """Bytes of a field's tiles before compression."""
        return self.tiles_per_field * sum(px * px for px in self.tile_sizes_px) * len(self.channels)

    @property
    def worker_bytes(self) -> int:
        """About what a worker process holds at most: itself; of each task a field in grey levels, its shards twice."""
        pixels = self.format.height * self.format.width
        field = pixels * len(self.channels) * (2 if self.format.dtype == "uint8" else 4)
        gains = 2 * pixels * len(self.channels) * 4 if self.settings.illumination != "none" else 0
        archived = 2 * self.archive.field_bytes if self.archive else 0
        task = field + gains + archived + 2 * self.settings.shard_fields * self.field_bytes_out
        return int(WORKER_BYTES + THREADS * task)

    def render(self) -> str:
        """Tell the plan in a few lines, for `--dry-run`."""
        totals, done = self.totals(), len(self.plates) - len(self.unfinished())
        sizes = " and ".join(str(px) for px in self.tile_sizes_px)
        reference = sum(len(plate.reference) for plate in self.plates)
        tiled = f", {totals['dmso_fields']:,} DMSO fields for tiles of controls" if self.settings.controls else ""
        cut = f"{totals['tiles']:,} tiles" + (f" and {totals['control_tiles']:,} of controls," if tiled else "")
        already = (
            " (already converted)" if done == len(self.plates) else f" ({done:,} plates are there)" if done else ""
        )
        lines = [
            f"Convert into {self.store}{already}",
            f"  read    {totals['fields']:,} fields of {totals['plates']:,} plates, {self.format}, "
            f"{len(self.channels)} channels ({', '.join(self.channels)})",
            f"          {reference:,} {'DMSO fields' if self.settings.statistics == 'dmso' else 'of these'} for the "
            f"statistics{', all for the illumination' if self.settings.illumination != 'none' else ''}{tiled}; "
            f"{size_text(totals['bytes_in'])} in all",
            f"  write   {cut} of {sizes} pixels, at most {size_text(totals['bytes_out'])}, "
            f"in about {totals['files']:,} files",
            f"  tasks   {totals['tasks']:,}, each of up to {self.settings.shard_fields} fields; "
            f"a worker holds about {size_text(totals['worker_bytes'])}",
        ]
        if archive := self.archive:
            count, there = sum(len(plate.sources) for plate in self.plates), len(self.plates) - len(self.unarchived())
            lines += [
                f"  archive {count:,} fields as they are in {archive.folder}"
                + (f" ({there:,} plates are there)" if there else ""),
                f"          about {size_text(count * archive.expected_bytes)}, at most "
                f"{size_text(totals['archive_bytes'])}, in {totals['archive_files']:,} files",
            ]
        return "\n".join(lines)


def size_text(count: float) -> str:
    """Tell a number of bytes in the unit that suits it."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.3g} {unit}"
