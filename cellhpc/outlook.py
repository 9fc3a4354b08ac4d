"""What is missing of a study's trainings, and what that will cost: its plan handed to `cellhpc.estimate`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cellhpc.cost import Cost, Load, Place, Stored
from cellhpc.estimate import estimate
from cellhpc.folds import Fold, Folds
from cellhpc.inputs import mix
from cellhpc.measured import parts_of
from cellhpc.pipeline import StudyPlan
from cellhpc.recipe import TrainSettings
from cellhpc.settings import Job
from cellhpc.site import MeasuredSettings, Site
from cellhpc.submission import Task
from cellhpc.sweep import Run
from cellhpc.tiles import Store
from cellhpc.traffic import count

if TYPE_CHECKING:
    import pandas as pd

Tiles = Mapping[Fold, tuple[int, int]]
"""How many tiles each fold trains on and holds out."""


def outlook(
    plan: StudyPlan,
    arrays: Sequence[tuple[int, Sequence[Task]]],
    place: Place,
    measured: MeasuredSettings | None = None,
) -> Cost:
    """Estimate what tasks of a study's missing runs cost.

    Parameters
    ----------
    plan
        The study.
    arrays
        Training tasks, in groups that run side by side, each with how many of its tasks may run at a time.
    place
        What each of them has.
    measured
        The site file's `[measured]`.

    Raises
    ------
    UserError
        The site file's figures are of what is no network, one can't be built, or a shard is damaged.
    """
    measured = measured or MeasuredSettings()
    tiles, stored = _stored(plan)
    loads = {run.id: trainings(plan.job, run, tiles) for run in plan.missing}
    jobs = [(most, [[load for name in task.runs for load in loads[name]] for task in tasks]) for most, tasks in arrays]
    networks = {(load.network, load.tile_px) for _, of in jobs for job in of for load in job}
    units = ((run.network, plan.folder.runs / run.id) for run in plan.runs)
    parts = parts_of(sorted({name for name, _ in networks}), place.ranks, measured, units)
    ranks = max([place.ranks, *(part.images_per_s.ranks for part in parts.values() if part.images_per_s)])
    sizes = None
    if ranks > 1 and networks:
        inputs = mix(plan.conversion.channels, plan.job.train.inputs).shape[1]
        wanted = [(name, px, inputs) for name, px in sorted(networks)]
        if found := count(wanted, len(plan.folds.classes), plan.job.train):
            sizes = {name: size for (name, _, _), size in zip(wanted, found, strict=True)}
    return estimate(
        jobs, place, plan.job.train, stored, parts, sizes, measured.allreduce_mb_per_s, plan.job.sweep.stage
    )


def place_on(site: Site, ranks: int) -> Place:
    """Say what a job of training has on a cluster."""
    train = site.train
    gres = re.findall(r"gpu(?::[^,:()]*[^,:()\d][^,:()]*)?(?::(\d+))?(?=$|[,(])", train.gres or "")
    gpus = train.gpus_per_task * ranks or train.nodes * sum(int(number or 1) for number in gres)
    return Place(ranks, train.nodes, ranks * train.cpus_per_task, gpus, train.time * 60.0 - train.signal_seconds)


def tiles_by_fold(folds: Folds, table: pd.DataFrame, each: int) -> Tiles:
    """Count the tiles that each fold trains on and holds out, of a table of fields or tiles with so many in a row."""
    return {
        fold: (int(folds.training(table, fold).sum()) * each, int(folds.held_out(table, fold).sum()) * each)
        for own in folds.folds
        for fold in (own, own.searching())
    }


def trainings(job: Job, run: Run, tiles: Tiles) -> list[Load]:
    """List the trainings of a run: its candidates, if it searches, and the longest of them once more."""

    def load(fold: Fold, settings: TrainSettings, searching: bool) -> Load:
        drawing = settings.dropout_draws > 0 and not searching
        return Load(run.network, run.tile_px, *tiles[fold], settings.epochs, settings.batch_size, searching, drawing)

    ways = [candidate.settings for candidate in job.candidates]
    finals = [load(run.fold, settings, searching=False) for settings in ways or [job.train]]
    return [
        *(load(run.fold.searching(), settings, searching=True) for settings in ways),
        max(finals, key=lambda one: one.steps),
    ]


def _stored(plan: StudyPlan) -> tuple[Tiles, Stored]:
    """Count the tiles by folds, and what they take in the store."""
    folds, conversion = plan.folds, plan.conversion
    sides = sorted({run.tile_px for run in plan.missing})
    if not plan.converted:
        tiles = tiles_by_fold(folds, plan.screen.fields, conversion.tiles_per_field)
        plain = {side: float(plan.tiles * side * side * len(conversion.channels)) for side in sides}
        how = "tiles before compression, none set aside: the store is not converted yet"
        return tiles, Stored(plan.tiles, plain, plain, how)
    store = Store.open(conversion.store, plan.plates)
    used = store.tiles[folds.used(store.tiles)]
    shards = {side: store.shards(used, side) for side in sides}
    return tiles_by_fold(folds, used, 1), Stored(
        len(used),
        {side: one.stored_bytes() for side, one in shards.items()},
        {side: float(sum(one.path(n).stat().st_size for n in range(one.count))) for side, one in shards.items()},
        "tiles as they lie in the store",
    )
