"""Raw fields to 8-bit tiles: carries out a plan on Dask's workers, and writes the tables of its plates.

First each plate's illumination is estimated, if it is to be corrected, and the pixels of its DMSO fields are counted;
then each task turns the fields of a shard into tiles. A task that is done has a marker in the plate's folder; whatever
kills the conversion, the same call later does what has none, and the store becomes the same, byte for byte.
A plate's `plate.json` comes last: without it the plate is not there.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr
import zarr.storage

from cellhpc.codecs import CODECS
from cellhpc.convert import archiving
from cellhpc.convert.bases import bad_stay_bad, find_bases, read_basis
from cellhpc.convert.plan import ConversionPlan, Plate, Task
from cellhpc.convert.planning import recorded_identity, refuse_other_store
from cellhpc.convert.running import Stop, reading, reported, run_jobs
from cellhpc.convert.tables import write_tables
from cellhpc.convert.tasks import Basis, Recipe, convert_shard, problem_text, read_marker, shard_name
from cellhpc.convert.workers import cluster as _cluster
from cellhpc.convert.workers import cores, release
from cellhpc.errors import DataError, UserError
from cellhpc.ledger import digest, held, write_json, write_text
from cellhpc.record import ARRAYS, LOCK, PERFORMANCE, PLATE, PLATES, STORE, plate_folder

if TYPE_CHECKING:
    from distributed import Client

# Dask is imported where a cluster is started: most calls find a store that is finished, and should not wait for it.


def convert(
    plan: ConversionPlan,
    workers: int | None = None,
    stop: Stop = lambda: False,
) -> None:
    """Carry out what is missing of a conversion; plates that are finished are left alone.

    Plates that are finished and not in the archive, because it was asked for later, are read again, and written into
    it; their tiles stay as they are.

    With several ranks in the environment (see `cellhpc.hosts`), rank 0 calls this, and the others call `serve`.

    Parameters
    ----------
    plan
        From `plan_conversion`.
    workers
        Processes of this rank; by default as many as there are cores for us, and never more than tasks.
    stop
        Asked about twice a second; once it says true, the conversion stops.

    Raises
    ------
    DataError
        With ``on_bad_field = "fail"``, fields are bad: lists those of all plates. With either setting, a plate has no
        DMSO pixels that it can be normalised by, or pictures of a finished plate changed before they were archived.
    UsageError
        The folder holds another store, or another process converts into it or into the archive.
    UserError
        Store or archive can't be written, a worker died again and again, or no worker is left.
    ConversionStopped
        As `stop` asked for.
    """
    try:
        if not plan.is_finished:
            _convert(plan, workers, stop)
    finally:
        release()


def _convert(plan: ConversionPlan, workers: int | None, stop: Stop) -> None:
    with _locked(plan.store), archiving.locked(plan):
        _claim(plan)
        plates = plan.unfinished()
        for plate in plates:  # readers must not meet a plate that changes
            (plate_folder(plan.store, plate.name) / PLATE).unlink(missing_ok=True)
        archiving.claim_plates(plan)
        _write_tables(plan, plates)  # nothing else is to be done where labels changed
        looks = [plate for plate in plates if read_basis(plan, plate) is None]
        jobs = len(looks) + len(_missing_tasks(plan, plates)) + sum(map(len, archiving.missing_fields(plan).values()))
        problems: list[str] = []
        lost: dict[str, list[str]] = {}
        if jobs:
            watched = plan.settings.dashboard, plan.settings.dashboard or plan.settings.performance_report
            with _cluster(min(workers or cores(), jobs), *watched) as client, _reported(plan, client):
                problems = find_bases(plan, looks, client, stop)
                problems += _convert_tasks(plan, plates, client, stop)
                lost = archiving.archive_rest(plan, client, stop)
        archiving.finish_plates(plan, lost)
        _refuse(plan, problems)
        archiving.refuse_lost(plan, lost)


def _reported(plan: ConversionPlan, client: Client) -> AbstractContextManager[None]:
    if not plan.settings.performance_report:
        return contextlib.nullcontext()
    return reported(client, plan.store / PERFORMANCE)


def _write_tables(plan: ConversionPlan, plates: Sequence[Plate]) -> None:
    """Write the tables of those of the plates whose tasks are all done."""
    for plate in plates:
        if not _missing_tasks(plan, [plate]):
            try:
                write_tables(plan, plate)
            except OSError as fault:
                raise UserError(
                    f"{plan.store}: the tables of {plate.name} can't be written: {fault.strerror or fault}"
                ) from None


def _missing_tasks(plan: ConversionPlan, plates: Sequence[Plate]) -> list[tuple[Task, Basis | None]]:
    """Tasks of these plates to be done, each with its plate's basis; one that was done by another is done again."""
    bases = {plate.name: read_basis(plan, plate) for plate in plates}
    missing = []
    for task in plan.tasks:
        if task.plate not in bases:
            continue
        mine = bases[task.plate]
        marker = read_marker(plan.store, task.plate, shard_name(task), task.digest)
        if marker is None or mine is None or marker["basis"] != mine.record() or not bad_stay_bad(plan, marker):
            missing.append((task, mine))
    return missing


def _convert_tasks(plan: ConversionPlan, plates: Sequence[Plate], client: Client, stop: Stop) -> list[str]:
    """Do the missing tasks, and write a plate's tables when its last one is done.

    Returns what is wrong with fields that may not be set aside.
    """
    recipe = Recipe.of(plan)
    # What lacks a basis now was refused and its reason told; its other fields are looked at for what else is wrong.
    missing = [(task, mine) for task, mine in _missing_tasks(plan, plates) if mine or not recipe.skip_bad]
    problems: list[str] = []
    to_do = collections.Counter(task.plate for task, _ in missing)
    _write_tables(plan, [plate for plate in plates if plate.name not in to_do])  # nothing but their basis was missing
    jobs = ((convert_shard, (recipe, task, mine), task) for task, mine in missing)
    with reading("Converting", [source for task, _ in missing for source in task.fields], client) as note:
        for task, bad in run_jobs(client, jobs, stop):
            note(task.fields)
            to_do[task.plate] -= 1
            if not to_do[task.plate]:
                _write_tables(plan, [plate for plate in plates if plate.name == task.plate])
            if not recipe.skip_bad:
                problems += [problem_text(task.plate, record) for record in bad]
    return problems


def _refuse(plan: ConversionPlan, problems: list[str]) -> None:
    if not problems:
        return
    remedy = "Mend these or take them out of the screen's table, then type the same command: what is done stays done."
    if plan.settings.on_bad_field == "fail":
        remedy += '\nOr set convert.on_bad_field = "skip" to set bad fields aside and list them.'
    problems = sorted(set(problems))  # a field may be looked at more than once
    raise DataError(f"{len(problems)} problem(s) in the pixels; their plates are refused.", problems, remedy)


def _locked(store: Path) -> AbstractContextManager[None]:
    """Keep other conversions out of the store."""
    taken = f"{store}: another process converts into this store. Wait until it ends, then type this again."
    return held(store / LOCK, f"convert.store {store}", taken)


def _claim(plan: ConversionPlan) -> None:
    """Make the folder this plan's: identity, arrays' metadata; what a killed conversion left half-written goes."""
    if known := recorded_identity(plan.store):
        refuse_other_store(plan.store, known, plan.identity)
    else:
        write_json(plan.store / STORE, plan.identity)
    for leftovers in (".store.json.*", f"{PLATES}/*/.*.parquet.*", f"{PLATES}/*/.*.json.*", f"{PLATES}/*/.*.npy.*",
                      f"{ARRAYS}/**/.zarr.json.*"):  # fmt: skip
        for leftover in plan.store.glob(leftovers):
            leftover.unlink()
    for name, text in _metadata(plan).items():
        path = plan.store / ARRAYS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _metadata(plan: ConversionPlan) -> dict[str, str]:
    """Make the `zarr.json` of every group and array, by path; in memory, so that they can be written atomically."""
    memory: dict[str, Any] = {}
    store = zarr.storage.MemoryStore(memory)
    about = {"store": digest(plan.identity), "channels": list(plan.channels)}
    root = zarr.create_group(store=store, attributes=about)
    for plate in plan.plates:
        group = root.create_group(plate.name, attributes=about)
        for px in plan.tile_sizes_px:
            tile = (px, px, len(plan.channels))
            group.create_array(
                f"tiles_{px}",
                shape=(plate.fields * plan.tiles_per_field, *tile),
                chunks=(1, *tile),
                shards=(plan.settings.shard_fields * plan.tiles_per_field, *tile),
                dtype="uint8",
                fill_value=0,
                compressors=CODECS[plan.settings.codec],
                chunk_key_encoding={"name": "default", "separator": "."},  # one file a shard, and no folder for each
                dimension_names=("tile", "y", "x", "channel"),
                attributes={**about, "tile_px": px, "tiles_per_field": plan.tiles_per_field},
            )
    return {name: buffer.to_bytes().decode() for name, buffer in memory.items()}
