"""Raw fields to 8-bit tiles: carries out a plan on Dask's workers, and writes the store's tables.

First the DMSO fields of each plate are counted, then each task turns the fields of one shard into tiles. A task that is
done has a marker in the store's folder `work`; whatever kills the conversion, the same call later does the tasks that
have none, and the store becomes the same, byte for byte. `store.json` comes last: without it there is no store.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
import zarr.codecs
import zarr.storage

from cellhpc.convert.plan import (
    ARRAYS,
    WORK,
    ConversionPlan,
    FieldSource,
    Plate,
    Task,
    recorded_identity,
    refuse_other_store,
)
from cellhpc.convert.tables import write_tables
from cellhpc.convert.tasks import (
    Recipe,
    convert_shard,
    count_dmso,
    dmso_id,
    marker_path,
    read_marker,
    statistics_record,
)
from cellhpc.convert.workers import cluster as _cluster
from cellhpc.convert.workers import cores, present, ranks, release
from cellhpc.correct import PlateStatistics, plate_statistics
from cellhpc.errors import DataError, UserError, listing
from cellhpc.ledger import held, read_json, write_json, write_text
from cellhpc.progress import progress
from cellhpc.record import STORE

if TYPE_CHECKING:
    from distributed import Client

# Dask is imported where a cluster is started: most calls find a store that is finished, and should not wait for it.

DMSO_FIELDS = 8
"""DMSO fields that are counted in one task."""

JOBS_PER_THREAD = 4
"""Tasks that are with the scheduler at a time, for each thread that is there to work."""
POLL_SECONDS = 0.5
IDLE_SECONDS = 180.0
"""How long there may be no worker at all before a conversion gives up; the last ones may just start anew."""
SILENT_SECONDS = 1800.0
"""How long workers may take before any of them ends a task, and the conversion gives up; a task takes seconds."""

Work = Callable[..., Any]


class ConversionStopped(UserError):
    """A stop was asked for; what is done stays done, and the same call does the rest.

    `done` counts the jobs that ended since the call began.
    """

    def __init__(self, done: int) -> None:
        super().__init__("The conversion was stopped. What is done stays done: type the same command again.")
        self.done = done


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: the store's folder, whether it was finished before, and the record `store.json`."""

    folder: Path
    was_finished: bool
    record: dict[str, Any]


def convert(
    plan: ConversionPlan,
    workers: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    dashboard: bool = False,
) -> Conversion:
    """Carry out what is missing of a conversion; a store that is finished is left alone.

    With several ranks in the environment (see `cellhpc.hosts`), rank 0 calls this, and the others call `serve`.

    Parameters
    ----------
    plan
        From `plan_conversion`.
    workers
        Processes of this rank; by default as many as there are cores for us, and never more than tasks.
    stop
        Asked about twice a second; once it says true, the conversion stops.
    dashboard
        Serve Dask's dashboard on the loopback interface, if Bokeh is installed.

    Raises
    ------
    DataError
        With ``on_bad_field = "fail"``, fields are bad: lists those of all plates. With either setting, a plate has no
        DMSO pixels that it can be normalised by.
    UsageError
        The folder holds another store, or another process converts into it.
    UserError
        The store can't be written, a worker died again and again, or no worker is left.
    ConversionStopped
        As `stop` asked for.
    """
    try:
        return _convert(plan, workers, stop, dashboard)
    finally:
        release()


def _convert(plan: ConversionPlan, workers: int | None, stop: Callable[[], bool], dashboard: bool) -> Conversion:
    if plan.is_finished:
        return Conversion(plan.store, True, read_json(plan.store / STORE))
    with _locked(plan.store):
        _claim(plan)
        plates, tasks = _missing_plates(plan), _missing_tasks(plan)
        if plates or tasks:
            (plan.store / STORE).unlink(missing_ok=True)  # readers must not meet a store that changes
            count = max(1, min(workers or cores(), len(tasks) + len(plates)))
            with _cluster(count, dashboard) as client:
                problems = _count_plates(plan, plates, client, stop)
                problems += _convert_tasks(plan, client, stop)
            _refuse(plan, problems)
        record = write_tables(plan)
    return Conversion(plan.store, False, record)


def _missing_plates(plan: ConversionPlan) -> list[Plate]:
    """Plates whose DMSO pixels are to be counted."""
    missing = []
    for plate in plan.plates if plan.normalised else ():
        marker = read_marker(plan.store, dmso_id(plate.name), plate.digest)
        if marker is None or not _bad_stay_bad(plan, marker):
            missing.append(plate)
    return missing


def _missing_tasks(plan: ConversionPlan) -> list[tuple[Task, PlateStatistics | None]]:
    """Tasks to be done, each with its plate's statistics; one that was done with other statistics is done again."""
    statistics = {plate.name: _statistics(plan, plate) for plate in plan.plates}
    missing = []
    for task in plan.tasks:
        marker = read_marker(plan.store, task.id, task.digest)
        mine = statistics[task.plate]
        if marker is None or marker["statistics"] != statistics_record(mine) or not _bad_stay_bad(plan, marker):
            missing.append((task, mine))
    return missing


def _statistics(plan: ConversionPlan, plate: Plate) -> PlateStatistics | None:
    marker = read_marker(plan.store, dmso_id(plate.name), plate.digest) if plan.normalised else None
    return PlateStatistics(tuple(marker["mean"]), tuple(marker["std"])) if marker else None


def _bad_stay_bad(plan: ConversionPlan, marker: dict[str, Any]) -> bool:
    return all(plan.still_bad(record) for record in marker["fields"] if record["bad"])


@dataclass
class _PlateCount:
    """What was counted of a plate so far: the sum of the histograms, and the fields' records by block."""

    counts: np.ndarray | None = None
    records: dict[int, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def add(self, block: int, counts: np.ndarray | None, records: list[dict[str, Any]]) -> None:
        self.records[block] = records
        if counts is not None:
            self.counts = counts if self.counts is None else self.counts + counts

    def in_order(self) -> list[dict[str, Any]]:
        return [record for block in sorted(self.records) for record in self.records[block]]


def _count_plates(plan: ConversionPlan, plates: list[Plate], client: Client, stop: Callable[[], bool]) -> list[str]:
    """Make the statistics of plates; returns what is wrong with their DMSO fields."""
    recipe = Recipe.of(plan)
    blocks = [
        ((plate, first), plate.dmso[first : first + DMSO_FIELDS])
        for plate in plates
        for first in range(0, len(plate.dmso), DMSO_FIELDS)
    ]
    found: dict[str, _PlateCount] = collections.defaultdict(_PlateCount)
    problems: list[str] = []
    jobs = ((count_dmso, (recipe, sources), (*name, sources)) for name, sources in blocks)
    with _reading("DMSO pixels", [source for _, sources in blocks for source in sources], client) as note:
        for (plate, first, sources), (counts, records) in _run(client, jobs, stop):
            note(sources)
            mine = found[plate.name]
            mine.add(first, counts, records)
            if len(mine.in_order()) == len(plate.dmso):
                problems += _finish_plate(plan, plate, mine)
                del found[plate.name]
    return problems


def _finish_plate(plan: ConversionPlan, plate: Plate, found: _PlateCount) -> list[str]:
    """Write the marker of a plate's statistics, or tell why it can't be normalised."""
    marker, records = marker_path(plan.store, dmso_id(plate.name)), found.in_order()
    marker.unlink(missing_ok=True)
    bad = [_problem(plate.name, record) for record in records if record["bad"]]
    if found.counts is None:
        return [f"plate {plate.name}: not one DMSO field can be read, so it can't be normalised", *bad]
    if bad and plan.settings.on_bad_field == "fail":
        return bad
    statistics = plate_statistics(found.counts)
    flat = [channel for channel, std in zip(plan.channels, statistics.std, strict=True) if std == 0]
    if flat:
        where = "in its DMSO fields, so it can't be normalised"
        return [f"plate {plate.name}: channel {listing(flat)} is the same everywhere {where}"]
    write_json(marker, {"digest": plate.digest, **dataclasses.asdict(statistics), "fields": records})
    return []


def _convert_tasks(plan: ConversionPlan, client: Client, stop: Callable[[], bool]) -> list[str]:
    """Do the missing tasks; returns what is wrong with fields that may not be set aside."""
    recipe = Recipe.of(plan)
    refused = plan.normalised and recipe.skip_bad  # what lacks statistics now was refused, and its reason told
    missing = [(task, mine) for task, mine in _missing_tasks(plan) if mine or not refused]
    problems: list[str] = []
    jobs = ((convert_shard, (recipe, task, mine), task) for task, mine in missing)
    with _reading("Converting", [source for task, _ in missing for source in task.fields], client) as note:
        for task, bad in _run(client, jobs, stop):
            note(task.fields)
            if not recipe.skip_bad:
                problems += [_problem(task.plate, record) for record in bad]
    return problems


def _refuse(plan: ConversionPlan, problems: list[str]) -> None:
    if not problems:
        return
    remedy = "Mend these or take them out of the screen's table, then type the same command: what is done stays done."
    if plan.settings.on_bad_field == "fail":
        remedy += '\nOr set convert.on_bad_field = "skip" to set bad fields aside and list them.'
    raise DataError(f"{len(problems)} problem(s) in the pixels; their plates are refused.", sorted(problems), remedy)


def _problem(plate: str, record: dict[str, Any]) -> str:
    return f"plate {plate}: well {record['well']} field {record['field']}: {record['bad']}"


def _run(
    client: Client, jobs: Iterator[tuple[Work, tuple[Any, ...], Any]], stop: Callable[[], bool]
) -> Iterator[tuple[Any, Any]]:
    """Run jobs, of which a few for each thread are with the scheduler at a time; yields (name, result) as they end."""
    # The client's loop fetches the results: a worker that falls silent over one must not keep us from the others.
    waiting: dict[Any, tuple[Any, Any]] = {}
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    manned = heard = time.monotonic()
    done = 0
    while True:
        if stop():
            client.cancel([future for future, _ in waiting.values()], force=True)
            raise ConversionStopped(done)
        now, threads = time.monotonic(), present(client)[0]
        manned = now if threads else manned
        for function, arguments, name in itertools.islice(
            jobs, max(0, JOBS_PER_THREAD * max(1, threads) - len(waiting))
        ):
            future = client.submit(function, *arguments, pure=False)
            fetched = asyncio.run_coroutine_threadsafe(_fetch(future), client.loop.asyncio_loop)
            waiting[fetched] = future, name
            fetched.add_done_callback(ended.put)
        if not waiting:
            return
        try:
            fetched = ended.get(timeout=POLL_SECONDS)
        except queue.Empty:
            _give_up(now - manned, now - heard)
            continue
        heard = now
        future, name = waiting.pop(fetched)
        result = _result(fetched)
        future.release()
        done += 1
        yield name, result


def _give_up(unmanned_s: float, silent_s: float) -> None:
    """End a conversion that nobody works on, or of which nothing is heard any more."""
    again = "Type the same command again: what is done stays done."
    if unmanned_s > IDLE_SECONDS:
        raise UserError(
            f"No worker process could be kept alive for {IDLE_SECONDS:.0f} s, most likely for want of memory. {again}"
        )
    if silent_s > SILENT_SECONDS:
        raise UserError(
            f"No worker has ended a task for {SILENT_SECONDS:.0f} s; the raw pictures or the store may lie on a file "
            f"system that does not answer. {again}"
        )


async def _fetch(future: Any) -> Any:
    return await future


def _result(fetched: Any) -> Any:
    from distributed.scheduler import KilledWorker

    try:
        return fetched.result()
    except KilledWorker:
        raise UserError(
            "A worker process died four times on the same task, most likely for want of memory. "
            "Give them more memory and type the same command: what is done stays done. Or begin a new study.folder "
            "with a smaller convert.shard_fields."
        ) from None


def _locked(store: Path) -> AbstractContextManager[None]:
    """Keep other conversions out of the store."""
    taken = f"{store}: another process converts into this store. Wait until it ends, then type this again."
    return held(store / WORK / "lock", f"convert.store {store}", taken)


def _claim(plan: ConversionPlan) -> None:
    """Make the folder this plan's: identity, arrays' metadata; what a killed conversion left half-written goes."""
    record, about_fields = plan.store / WORK / "plan.json", {"field_format": vars(plan.format)}
    if known := recorded_identity(plan.store):
        begun = read_json(record) if record.exists() else about_fields
        refuse_other_store(
            plan.store, {**known, "field_format": begun["field_format"]}, {**plan.identity, **about_fields}
        )
    if not record.exists():
        write_json(record, {"identity": plan.identity, **about_fields})
    for leftovers in (".store.json.*", ".*.parquet.*", f"{WORK}/.*.json.*", f"{ARRAYS}/**/.zarr.json.*"):
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
    about = {"digest": plan.digest, "channels": list(plan.channels)}
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
                compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
                chunk_key_encoding={"name": "default", "separator": "."},  # one file a shard, and no folder for each
                dimension_names=("tile", "y", "x", "channel"),
                attributes={**about, "tile_px": px, "tiles_per_field": plan.tiles_per_field},
            )
    return {name: buffer.to_bytes().decode() for name, buffer in memory.items()}


@contextlib.contextmanager
def _reading(
    title: str, sources: list[FieldSource], client: Client
) -> Iterator[Callable[[Iterable[FieldSource]], None]]:
    """Show the progress over fields, with the megabytes of raw files read in a second; nothing if there are none."""
    if not sources:
        yield lambda _: None
        return
    began, read = time.monotonic(), 0
    with progress(title, len(sources), "fields") as advance:

        def note(done: Iterable[FieldSource]) -> None:
            nonlocal read
            done = list(done)
            read += sum(source.bytes for source in done)
            speed = f"{read / 1e6 / max(time.monotonic() - began, 1e-3):,.0f} MB/s"
            advance(len(done), f"{speed}, {present(client)[1]} of {ranks()} ranks" if ranks() > 1 else speed)

        yield note
