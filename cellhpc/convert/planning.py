"""A conversion is planned: from a screen's fields table and the headers of a few pictures to plates and tasks."""

from __future__ import annotations

import collections
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cellhpc.archive import has_field, is_foreign
from cellhpc.convert.plan import ConversionPlan, FieldSource, Plate, Task, size_text, tiled_roles
from cellhpc.errors import DataError, UsageError, listing
from cellhpc.ledger import digest
from cellhpc.pixels import BadField, FieldFormat, file_bytes, probe_field
from cellhpc.record import LOCK, read_identity, read_plate
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
from cellhpc.wells import Place, place

FORMAT = 2
"""Raised when the same settings give other pixels, or when the store is laid out differently."""

FIELD_KEY = ["plate", "well", "field"]


def plan_conversion(
    settings: ConvertSettings, screen: Screen, tile_sizes_px: Sequence[int], store: Path
) -> ConversionPlan:
    """Plan the conversion of a screen's treatment fields.

    Parameters
    ----------
    settings
        The section `[convert]`.
    screen
        The screen; fields of role "treatment" become tiles, those of role "dmso" on the same plates normalise them,
        and become tiles too with `settings.controls`.
    tile_sizes_px
        Sides of the tiles. A store that is there and holds these and further sizes is taken as it is.
    store
        Folder of the store; what it holds of other plates stays as it is.

    Raises
    ------
    DataError
        No field to convert or none that can be read, a plate without DMSO where it is needed, pixels that don't fit the
        settings.
    UsageError
        The folder holds another store or something else; a plate of the store has other fields; the tile grid does not
        divide the field; the tiles may not fit the disk; or so of the archive.
    """
    files = [f"file_{channel}" for channel in screen.channels]
    fields = _fields(settings, screen)
    recorded = recorded_identity(store)
    sizes = sorted(set(tile_sizes_px))
    if recorded and set(sizes) <= set(recorded["tile_sizes_px"]):
        sizes = recorded["tile_sizes_px"]
    # A store that is there needs no raw pixels, which may lie elsewhere by now.
    field_format = FieldFormat(**recorded["field"]) if recorded else _probe(screen.root, fields, files)
    _check_format(settings, field_format)
    identity = {
        "format": FORMAT,
        **_pixel_settings(settings),
        "tile_sizes_px": sizes,
        "channels": list(screen.channels),
        "field": vars(field_format),
    }
    if recorded:
        refuse_other_store(store, recorded, identity)
    plates, tasks = _divide(screen.root, fields, files, settings, digest(identity))
    _refuse_other_plates(store, plates)
    plan = ConversionPlan(
        settings, store, screen.root, screen.channels, tuple(sizes), field_format, plates, tasks, fields, identity
    )
    _check_archive(plan)
    _refuse_full_disk(plan)
    return plan


def _pixel_settings(settings: ConvertSettings) -> dict[str, Any]:
    """Return the keys of `[convert]` that the store's content depends on."""
    keys = {"preprocessing", "tile_grid", "empty_above", "empty_fraction", "shard_fields", "codec", "illumination"}
    if settings.preprocessing != "none":
        keys.add("statistics")
    keys |= {"zscore": {"zscore_range"}, "percentile": {"percentiles"}}.get(settings.preprocessing, set())
    if settings.illumination != "none":
        keys.add("illumination_sigma_px")
    if settings.controls:  # named only where there are some: stores that were made before stay what they are
        keys.add("controls")
    return settings.model_dump(mode="json", include=keys)


def _fields(settings: ConvertSettings, screen: Screen) -> pd.DataFrame:
    """Fields of treatments and, where plates are normalised by them or they become tiles too, their DMSO fields."""
    used = screen.fields[screen.fields["role"] == "treatment"]
    if used.empty:
        raise DataError(
            f"{screen.root}: no labelled field is left to convert.",
            remedy="See what the tables hold with: cellhpc inspect JOB.toml",
        )
    dmso = screen.fields[(screen.fields["role"] == "dmso") & screen.fields["plate"].isin(used["plate"])]
    _refuse_plates_without_dmso(settings, set(used["plate"]), set(dmso["plate"]))
    if settings.preprocessing == "none" and not settings.controls:
        dmso = dmso.iloc[:0]
    return pd.concat([used, dmso]).sort_values(FIELD_KEY, kind="stable", ignore_index=True)


def _refuse_plates_without_dmso(settings: ConvertSettings, plates: set[str], with_dmso: set[str]) -> None:
    """Refuse plates that lack the wells by which they are normalised, or of which tiles are wanted."""
    needs, changes = [], []
    if settings.controls:
        needs.append("convert.controls cuts tiles of the DMSO wells, which the features of each plate are whitened on")
        changes.append("convert.controls = false")
    if settings.preprocessing != "none" and settings.statistics == "dmso":
        needs.append(f'convert.preprocessing = "{settings.preprocessing}" normalises each plate by its DMSO wells')
        changes.append(
            'convert.statistics = "plate" to normalise by all fields of a plate or convert.preprocessing = "none" for '
            "8-bit pictures that are normalised already"
        )
    if needs and (bare := sorted(plates - with_dmso)):
        raise DataError(
            f"{', '.join(needs)}, and {len(bare)} of {len(plates)} plates have none.",
            [f"plate {plate}: no DMSO field" for plate in bare],
            f"Set {', and '.join(changes)}; or drop these plates from the screen's table.",
        )


def recorded_identity(store: Path) -> dict[str, Any] | None:
    """Identity of the store in a folder, finished or begun; None when nothing is there.

    Raises
    ------
    UsageError
        The folder holds something else.
    """
    try:
        known = read_identity(store)
    except DataError as fault:
        raise UsageError(f"{str(fault).splitlines()[0]}. Remove the store's folder, or choose another.") from None
    if known:
        if known.get("format") != FORMAT:
            raise UsageError(
                f"{store} was made by another version of cellhpc (format {known.get('format')}, this one writes "
                f"{FORMAT}). Choose another folder with --set convert.store=FOLDER, or remove this one."
            )
        return known
    if store.exists() and (not store.is_dir() or any(path.name != LOCK for path in store.iterdir())):
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
    differing = [key for key in {**wanted, **recorded} if recorded.get(key) != wanted.get(key)]
    if not differing:
        return
    remedy = "Choose another folder with --set convert.store=FOLDER, or remove this one."
    if differing == ["controls"]:
        no_later = "Tiles of controls come only into a new store."
        hint = "Use what is there with --set convert.controls=true." if "controls" in recorded else no_later
        remedy = f"{hint} {remedy}"
    told = [
        f"  - {key}: {_as_toml(recorded, key)} in the store, {_as_toml(wanted, key)} wanted now" for key in differing
    ]
    raise UsageError("\n".join([f"{store} was converted with other settings:", *told, remedy]))


def _as_toml(identity: dict[str, Any], key: str) -> str:
    """Write a value as it is typed in a job file; of what is not recorded, that it is off or not used."""
    if key not in identity:
        return "false" if key == "controls" else "not used"
    return json.dumps(identity[key], ensure_ascii=False)


def _refuse_other_plates(store: Path, plates: Sequence[Plate]) -> None:
    """Refuse to convert a plate anew from other fields, DMSO fields or files than the store has it from."""
    changed = [
        plate.name for plate in plates if (record := read_plate(store, plate.name)) and record["digest"] != plate.digest
    ]
    if changed:
        raise UsageError(
            f"{store} has {listing(changed)} from other fields or files than the screen's tables name now.\n"
            f"Remove what is there with: cellhpc remove {store} {' '.join(changed[:5])}{' ...' * (len(changed) > 5)}\n"
            "Or choose another folder with --set convert.store=FOLDER."
        )


def _check_archive(plan: ConversionPlan) -> None:
    """Refuse an archive that can't hold the screen's wells, or that has other plates of the same names."""
    archive = plan.archive
    if archive is None:
        return
    if plan.store in (archive.folder, *archive.folder.parents):
        raise UsageError(f"convert.archive {archive.folder} lies in the store. Choose a folder beside it.")
    wells: dict[tuple[str, Place], set[str]] = collections.defaultdict(set)
    for name, well in sorted({(plate.name, source.well) for plate in plan.plates for source in plate.sources}):
        try:
            wells[name, place(well)].add(well)
        except ValueError as fault:
            raise UsageError(f"convert.archive: plate {name}: {fault}. Others have no place in OME-Zarr.") from None
    for (name, _), spellings in wells.items():
        if len(spellings) > 1:
            raise UsageError(f"convert.archive: plate {name}: {listing(spellings)} are one well. Write it in one way.")
    foreign = [
        plate.name for plate in plan.plates if is_foreign(archive, plate.name, archive.digest(plate.sources_digest))
    ]
    if foreign:
        raise UsageError(
            f"{archive.folder} has {listing(foreign)} from other fields or files than are converted now, or made with "
            "other settings.\nRemove what is there by these names, or choose another folder with "
            "--set convert.archive=FOLDER."
        )


def _refuse_full_disk(plan: ConversionPlan) -> None:
    missing = sum(plate.fields for plate in plan.unfinished()) * plan.field_bytes_out
    needs = [("store", plan.store, "tiles need up to", missing)]
    if archive := plan.archive:
        fields = [(plate.name, source) for plate in plan.unarchived() for source in plate.sources]
        count = sum(not has_field(archive, plate, source.well, source.field) for plate, source in fields)
        needs.append(("archive", archive.folder, "archive needs about", count * archive.expected_bytes))
    taken: collections.Counter[int] = collections.Counter()
    for key, where, what, size in needs:
        folder = next(path for path in (where, *where.parents) if path.exists())
        disk = folder.stat().st_dev
        free = shutil.disk_usage(folder).free - taken[disk]
        taken[disk] += size
        if size > free:
            raise UsageError(
                f"{where}: the {what} {size_text(size)}, and its disk has {size_text(max(0, free))} free. "
                f"Choose another folder with --set convert.{key}=FOLDER, or make room."
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
    root: Path, fields: pd.DataFrame, files: list[str], settings: ConvertSettings, how: str
) -> tuple[tuple[Plate, ...], tuple[Task, ...]]:
    """Cut each plate into tasks of whole shards; `how` is the digest of all that its tiles have in common."""
    per_shard = settings.shard_fields
    plates, tasks = [], []
    for key, rows in fields.groupby("plate", sort=True):
        name, every = str(key), tuple(_sources(root, rows, files))
        tiled = [source for role in tiled_roles(settings) for source in every if source.role == role]
        lit = every if settings.illumination != "none" else ()
        reference: tuple[FieldSource, ...] = ()
        if settings.preprocessing != "none":
            reference = tuple(source for source in every if source.role == "dmso" or settings.statistics == "plate")
        by = digest({"how": how, "reference": _names(reference), "lit": _names(lit)})
        content, labels = digest([by, _names(tiled)]), _table_digest(rows.drop(columns=files))
        plates.append(Plate(name, len(tiled), reference, lit, by, content, labels, every, digest(_names(every))))
        for shard in range(math.ceil(len(tiled) / per_shard)):
            part = tuple(tiled[shard * per_shard : (shard + 1) * per_shard])
            document = {"plate": by, "shard": shard, "fields": _names(part)}
            tasks.append(Task(f"{name}-{shard:05d}", name, shard, part, digest(document)))
    return tuple(plates), tuple(tasks)


def _sources(root: Path, rows: pd.DataFrame, files: list[str]) -> Iterator[FieldSource]:
    for well, field, role, *names in rows[["well", "field", "role", *files]].itertuples(index=False, name=None):
        yield FieldSource(well, int(field), tuple(names), file_bytes(root, names), role)


def _names(sources: Sequence[FieldSource]) -> list[list[Any]]:
    return [[source.well, source.field, *source.files] for source in sources]


def _table_digest(table: pd.DataFrame) -> str:
    columns = [str(column) for column in table.columns]
    return digest({"columns": columns, "rows": table.astype(str).to_numpy().tolist()})
