"""What is found out of a plate before its tiles are made: its illumination, then the statistics of its pixels."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellhpc.convert.plan import ConversionPlan, FieldSource, Plate
from cellhpc.convert.running import Stop, Work, reading, run_jobs
from cellhpc.convert.tasks import (
    ILLUMINATION,
    STATISTICS,
    Basis,
    Light,
    Recipe,
    count_pixels,
    light_path,
    marker_path,
    problem_text,
    read_marker,
    shrink_fields,
)
from cellhpc.correct import PlateStatistics, plate_statistics
from cellhpc.errors import listing
from cellhpc.illumination import illumination
from cellhpc.ledger import replacing, write_json

if TYPE_CHECKING:
    from distributed import Client

BLOCK_FIELDS = 8
"""Fields of a plate that are looked at in one task."""


def find_bases(plan: ConversionPlan, plates: Sequence[Plate], client: Client, stop: Stop) -> list[str]:
    """Find out what is missing of plates' bases, and write it down; returns what is wrong with their fields."""
    problems = _estimate_light(plan, plates, client, stop)
    return problems + _count_plates(plan, plates, client, stop)


def read_basis(plan: ConversionPlan, plate: Plate) -> Basis | None:
    """Read what was found out of a plate already; None while something of it is missing."""
    light = _light(plan, plate)
    if plan.settings.illumination != "none" and light is None:
        return None
    if not plan.normalised:
        return Basis(None, light)
    marker = read_marker(plan.store, plate.name, STATISTICS, plate.reference_digest)
    if marker is None or marker["illumination"] != (light.sha256 if light else "") or not bad_stay_bad(plan, marker):
        return None
    return Basis(PlateStatistics(**{key: tuple(values) for key, values in marker["statistics"].items()}), light)


def _light(plan: ConversionPlan, plate: Plate) -> Light | None:
    marker = read_marker(plan.store, plate.name, ILLUMINATION, plate.reference_digest)
    path = light_path(plan.store, plate)
    if marker is None or not path.exists() or not bad_stay_bad(plan, marker):
        return None
    return Light(path, marker["sha256"])


def bad_stay_bad(plan: ConversionPlan, marker: dict[str, Any]) -> bool:
    """Tell whether all fields that a marker set aside may stay so."""
    return all(plan.still_bad(record) for record in marker["fields"] if record["bad"])


def _estimate_light(plan: ConversionPlan, plates: Sequence[Plate], client: Client, stop: Stop) -> list[str]:
    how, sigma_px = plan.settings.illumination, plan.settings.illumination_sigma_px
    if how == "none":
        return []
    missing = {plate: plate.lit for plate in plates if _light(plan, plate) is None}
    problems: list[str] = []
    jobs = Blocks("Illumination", missing, lambda plate, sources: (shrink_fields, (Recipe.of(plan), sources)))
    for plate, blocks in jobs.run(client, stop):
        records = [record for block in blocks for _, record in block]
        pictures = [picture for block in blocks for picture, _ in block if picture is not None]
        if not pictures:
            problems.append(f"plate {plate.name}: not one field can be read, so its illumination is not known")
        if bad := _refused(plan, plate, records):
            problems += bad
        elif pictures:
            path = light_path(plan.store, plate)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, illumination(pictures, how, sigma_px))
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            marker = {"digest": plate.reference_digest, "sha256": sha256, "fields": records}
            write_json(marker_path(plan.store, plate.name, ILLUMINATION), marker)
    return problems


def _count_plates(plan: ConversionPlan, plates: Sequence[Plate], client: Client, stop: Stop) -> list[str]:
    if not plan.normalised:
        return []
    lights = {plate: _light(plan, plate) for plate in plates}
    lit = {plate: plate.reference for plate in plates if lights[plate] or plan.settings.illumination == "none"}
    title = "DMSO pixels" if plan.settings.statistics == "dmso" else "Plates' pixels"
    problems: list[str] = []
    jobs = Blocks(
        title, lit, lambda plate, sources: (count_pixels, (Recipe.of(plan), plate.name, sources, lights[plate]))
    )
    for plate, blocks in jobs.run(client, stop):
        records = [record for _, block in blocks for record in block]
        counts = [found for found, _ in blocks if found is not None]
        problems += _finish_plate(plan, plate, records, sum(counts) if counts else None, lights[plate])
    return problems


def _finish_plate(
    plan: ConversionPlan, plate: Plate, records: list[dict[str, Any]], counts: np.ndarray | None, light: Light | None
) -> list[str]:
    """Write the marker of a plate's statistics, or tell why it can't be normalised."""
    marker = marker_path(plan.store, plate.name, STATISTICS)
    marker.unlink(missing_ok=True)
    what = "DMSO field" if plan.settings.statistics == "dmso" else "field"
    if counts is None:
        bad = [problem_text(plate.name, record) for record in records if record["bad"]]
        return [f"plate {plate.name}: not one {what} can be read, so it can't be normalised", *bad]
    if bad := _refused(plan, plate, records):
        return bad
    statistics = plate_statistics(counts, plan.settings.percentiles)
    if flat := [plan.channels[channel] for channel in statistics.flat(plan.settings.preprocessing)]:
        where = f"in its {what}s, so it can't be normalised"
        return [f"plate {plate.name}: channel {listing(flat)} is the same everywhere {where}"]
    told = Basis(statistics, light).record()
    write_json(marker, {"digest": plate.reference_digest, **told, "fields": records})
    return []


def _refused(plan: ConversionPlan, plate: Plate, records: list[dict[str, Any]]) -> list[str]:
    """Tell of bad fields, unless they may be set aside."""
    if plan.settings.on_bad_field == "skip":
        return []
    return [problem_text(plate.name, record) for record in records if record["bad"]]


@dataclass(frozen=True)
class Blocks:
    """Fields of plates, a few of which are looked at in one job."""

    title: str
    fields: dict[Plate, tuple[FieldSource, ...]]
    job: Callable[[Plate, tuple[FieldSource, ...]], tuple[Work, tuple[Any, ...]]]

    def run(self, client: Client, stop: Stop) -> Iterator[tuple[Plate, list[Any]]]:
        """Look at all; yields each plate once all of it was seen, with what was found in the order of its fields."""
        blocks = [
            (plate, first, sources[first : first + BLOCK_FIELDS])
            for plate, sources in self.fields.items()
            for first in range(0, len(sources), BLOCK_FIELDS)
        ]
        jobs = ((*self.job(plate, sources), (plate, first, sources)) for plate, first, sources in blocks)
        found: dict[Plate, dict[int, Any]] = collections.defaultdict(dict)
        with reading(self.title, [source for _, _, sources in blocks for source in sources], client) as note:
            for (plate, first, sources), seen in run_jobs(client, jobs, stop):
                note(sources)
                found[plate][first] = seen
                if len(found[plate]) == -(-len(self.fields[plate]) // BLOCK_FIELDS):
                    mine = found.pop(plate)
                    yield plate, [mine[block] for block in sorted(mine)]
