"""The archive's side of a conversion: what no task wrote, as the tiles were there already, and the plates' metadata."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pandas as pd

from cellhpc.archive import claim_plate, has_field, read_record, write_plate
from cellhpc.convert.bases import Blocks
from cellhpc.convert.plan import ConversionPlan, FieldSource, Plate
from cellhpc.convert.running import Stop
from cellhpc.convert.tasks import Recipe, archive_fields, problem_text
from cellhpc.errors import DataError
from cellhpc.ledger import held
from cellhpc.record import FIELDS, LOCK, plate_folder

if TYPE_CHECKING:
    from distributed import Client

Missing = dict[Plate, dict[FieldSource, tuple[int, int]]]
"""Fields that are not in the archive, by plate; of each the size and time that its files had when it was converted."""


def locked(plan: ConversionPlan) -> AbstractContextManager[None]:
    """Keep other conversions out of the archive."""
    if plan.archive is None:
        return contextlib.nullcontext()
    folder = plan.archive.folder
    taken = f"{folder}: another process converts into this archive. Wait until it ends, then type this again."
    return held(folder / LOCK, f"convert.archive {folder}", taken)


def claim_plates(plan: ConversionPlan) -> None:
    """Take the folders of the plates that have none yet."""
    for plate in plan.unarchived():
        if plan.archive and not read_record(plan.archive.plate(plate.name)):
            claim_plate(plan.archive, plate.name, plan.archive.digest(plate.sources_digest))


def missing_fields(plan: ConversionPlan) -> Missing:
    """Find the fields of converted plates that are not in the archive; those that were set aside need not be."""
    missing: Missing = collections.defaultdict(dict)
    for plate in _converted(plan):
        fields = _fields(plan, plate)
        good = fields[fields["bad"] == ""]
        states = dict(
            zip(_keys(good), zip(good["bytes"].tolist(), good["modified_ns"].tolist(), strict=True), strict=True)
        )
        for source in plate.sources:
            state = states.get((source.well, source.field))
            if plan.archive and state and not has_field(plan.archive, plate.name, source.well, source.field):
                missing[plate][source] = state
    return missing


def archive_rest(plan: ConversionPlan, client: Client, stop: Stop) -> dict[str, list[str]]:
    """Archive what is missing; returns by plate what is wrong with fields that can't be."""
    recipe, missing = Recipe.of(plan), missing_fields(plan)
    jobs = Blocks(
        "Archive",
        {plate: tuple(states) for plate, states in missing.items()},
        lambda plate, sources: (
            archive_fields,
            (recipe, plate.name, sources, [missing[plate][source] for source in sources]),
        ),
    )
    lost: dict[str, list[str]] = {}
    for plate, blocks in jobs.run(client, stop):
        if bad := [problem_text(plate.name, record) for block in blocks for record in block]:
            lost[plate.name] = bad
    return lost


def finish_plates(plan: ConversionPlan, lost: Collection[str]) -> None:
    """Write the metadata of the plates that are converted, but for those that have lost fields."""
    for plate in _converted(plan):
        if plan.archive and plate.name not in lost:
            fields = _fields(plan, plate)
            # What can't be read now may have been archived when it could, for another store.
            missing = [
                key for key in _keys(fields[fields["bad"] != ""]) if not has_field(plan.archive, plate.name, *key)
            ]
            there = [key for key in _keys(fields) if key not in missing]
            write_plate(plan.archive, plate.name, plan.archive.digest(plate.sources_digest), there, missing)


def refuse_lost(plan: ConversionPlan, lost: dict[str, list[str]]) -> None:
    """Tell of fields that are converted and can't be archived any more."""
    if lost:
        problems = [problem for plate in sorted(lost) for problem in lost[plate]]
        raise DataError(
            f"{len(problems)} field(s) can't be archived; their tiles are there.",
            problems,
            "Put these pictures back as they were and type the same command, convert their plates anew (cellhpc remove "
            f"{plan.store} PLATE), or take convert.archive out of the job file.",
        )


def _converted(plan: ConversionPlan) -> list[Plate]:
    """List the plates whose tiles are there, and that are not in the archive."""
    unfinished = plan.unfinished()
    return [plate for plate in plan.unarchived() if plate not in unfinished]


def _fields(plan: ConversionPlan, plate: Plate) -> pd.DataFrame:
    return pd.read_parquet(plate_folder(plan.store, plate.name) / FIELDS)


def _keys(fields: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(fields["well"].tolist(), fields["field"].tolist(), strict=True))
