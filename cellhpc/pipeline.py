"""The stages of a study: what each has to do, as data, and conversion and scores carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cellhpc.attempts import finished
from cellhpc.convert import ConversionPlan, convert, plan_conversion
from cellhpc.errors import DataError, UsageError, listing
from cellhpc.folds import Fold, Folds, check_folds, plan_folds, read_folds, write_folds
from cellhpc.inputs import mix
from cellhpc.ledger import done_digest, read_json, write_json
from cellhpc.memory import Allowed, allowed, held_bytes, too_large, window_that_fits
from cellhpc.networks import check
from cellhpc.recipe import TrainSettings
from cellhpc.record import finished_plates
from cellhpc.screens import Screen, read_screen, require_sound
from cellhpc.settings import Job
from cellhpc.study import StudyFolder
from cellhpc.sweep import Run, plan_runs, runs_of, tile_sizes_px
from cellhpc.tiles import Store

STAGES = ("convert", "train", "aggregate")
FILES_OF_A_RUN = 5
"""Who does it, history, predictions, record and marker; its weights, if they are kept, are one more, and so are the
draws of dropout and the attributions."""


@dataclass(frozen=True)
class StudyPlan:
    """All that a study will do, as data: nothing is written to make it.

    Attributes
    ----------
    job, folder, screen
        The settings, in which `train.window_tiles` is settled, where everything goes, and what was imaged.
    conversion, folds, runs
        What is to be converted, split and trained; finished parts included.
    converted
        Whether the store was finished when the plan was made.
    missing
        The runs that were not done when the plan was made.
    memory
        What tiles may take on a host that trains.
    asked
        The settings as they were asked for: `train.window_tiles` is None where nothing has settled it before.
    """

    job: Job
    folder: StudyFolder
    screen: Screen
    conversion: ConversionPlan
    folds: Folds
    runs: tuple[Run, ...]
    converted: bool
    missing: tuple[Run, ...]
    memory: Allowed
    asked: Job

    @cached_property
    def _tiles(self) -> tuple[int, int]:
        return _tiles(self.job, self.screen, self.folds, self.conversion)

    @property
    def tiles(self) -> int:
        """Tiles that the runs use, if none is set aside."""
        return self._tiles[0]

    @property
    def held_bytes(self) -> int:
        """Bytes of tiles that a host holds while it trains."""
        return held_bytes(*self._tiles, self.job.train.window_tiles)

    @property
    def too_large(self) -> str:
        """Why the tiles don't fit into the memory where they will be, and what to type; empty when they do."""
        window, bound = self.job.train.window_tiles, self.folder.job.exists()
        return too_large(self.held_bytes, self._tiles[1], self.memory, window, bound=bound)

    @property
    def plates(self) -> list[str]:
        """Names of the plates that the study uses."""
        return [plate.name for plate in self.conversion.plates]

    @property
    def steps(self) -> int:
        """Training steps of the missing runs and of their searches, if no tile is set aside and all choose the most."""
        return self._work[0]

    @property
    def images(self) -> int:
        """Tiles in these steps."""
        return self._work[1]

    @cached_property
    def _work(self) -> tuple[int, int]:
        """Steps and their tiles."""
        settings = [candidate.settings for candidate in self.job.candidates]

        def work(fold: Fold, ways: Sequence[TrainSettings]) -> np.ndarray:
            tiles = int(self.folds.training(self.screen.fields, fold).sum()) * self.conversion.tiles_per_field
            steps = [max(1, tiles // one.batch_size) * one.epochs for one in ways]
            return np.array([(count, count * one.batch_size) for count, one in zip(steps, ways, strict=True)])

        total = np.zeros(2, int)
        for fold, count in Counter(run.fold for run in self.missing).items():
            total += count * work(fold, settings or [self.job.train]).max(axis=0)
            if settings:
                total += count * work(fold.searching(), settings).sum(axis=0)
        return int(total[0]), int(total[1])

    def facts(self) -> dict[str, Any]:
        """Numbers of the plan, for `--dry-run`: sizes of the conversion, and what is missing of the training."""
        sweep, candidates = self.job.sweep, len(self.job.candidates)
        totals = self.conversion.totals()
        more = sweep.keep_weights + bool(sweep.attributions) + bool(self.job.train.dropout_draws)
        tiles, tile_bytes = self._tiles
        return {
            "study": self.job.study.name,
            "folder": str(self.folder.path),
            "conversion": {"store": str(self.conversion.store), "finished": self.converted, **totals},
            "folds": {"by": self.folds.by, "number": len(self.folds.folds), "sha256": self.folds.sha256},
            "labels": list(self.folds.classes),
            "labels_dropped": list(self.folds.dropped),
            "training": {
                "networks": list(sweep.networks),
                "weights": list(sweep.weights),
                "seeds": list(sweep.seeds),
                "runs": len(self.runs),
                "runs_missing": len(self.missing),
                "candidates": candidates,
                "trainings_missing": len(self.missing) * (1 + candidates),
                "steps_missing": self.steps,
                "tiles": tiles,
                "tiles_bytes": tiles * tile_bytes,
                "window_tiles": self.job.train.window_tiles,
                "tiles_in_memory_bytes": self.held_bytes,
                "memory_for_tiles_bytes": int(self.memory.bytes),
                "memory_for_tiles": self.memory.why,
                "tiles_too_large": self.too_large,
                "ranks": sweep.ranks,
                "files": len(self.runs) * ((FILES_OF_A_RUN + sweep.tensorboard) * (1 + candidates) + more),
            },
        }

    def _render_held_out(self) -> str:
        """Tell what the folds hold out."""
        by, also = self.folds.by, self.folds.also
        if not self.folds.unknown:
            return f"Hold out each {by}" + (f", and train without its {also}" if also else "")
        known = [sum(self.folds.labels[one] != (fold.unknown,) for one in fold.held_out) for fold in self.folds.folds]
        number = " to ".join(map(str, sorted({min(known), max(known)})))
        return f"Hold out each label with all its {by}s (unknown), and {number} {by}(s) of the other labels (known)"

    def _render_search(self) -> list[str]:
        """Tell what each run chooses among, and on what."""
        if not self.job.search:
            return []
        keys = "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in self.job.search.items())
        sizes = sorted({len(fold.inner) for fold in self.folds.folds})
        lacking = Counter(label for fold in self.folds.folds for label in self.folds.cannot_spare(fold))
        number, plural = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1])))), "s" if sizes[-1] > 1 else ""
        lines = [
            f"  search  each run chooses among {len(self.job.candidates)} candidates ({keys}),",
            f"          on {number} inner {self.folds.by}{plural} of its own training set",
        ]
        if lacking:
            spare = listing((f"{label} in {count} fold(s)" for label, count in lacking.items()), 6)
            lines.append(f"          not asked, as none can be spared: {spare}")
        return lines

    def _render_memory(self, training: dict[str, Any]) -> list[str]:
        """Tell where the tiles are while runs learn from them."""
        whole, held = training["tiles_bytes"] / 1e6, training["tiles_in_memory_bytes"] / 1e6
        there = f"{training['memory_for_tiles_bytes'] / 1e6:,.0f} MB are for tiles ({training['memory_for_tiles']})"
        lines = [f"  memory  of all tiles on a host {held:,.0f} MB; {there}"]
        if window := training["window_tiles"]:
            chosen = self.asked.train.window_tiles is None
            why = "don't fit: they come in windows (train.window_tiles)" if chosen else "come in windows, as is settled"
            lines = [
                f"  memory  of two windows of {window:,} tiles on a host {held:,.0f} MB; {there};",
                f"          all tiles, {whole:,.0f} MB, {why}",
            ]
        return lines + ([f"          {training['tiles_too_large']}"] if training["tiles_too_large"] else [])

    def render(self, stages: Sequence[str] = STAGES) -> str:
        """Tell the plan of these stages in a few lines, for `--dry-run`."""
        facts = self.facts()
        training = facts["training"]
        sizes = sorted({one.settings.batch_size for one in self.job.candidates} or {self.job.train.batch_size})
        dropped = f"; dropped: {', '.join(self.folds.dropped)}" if self.folds.dropped else ""
        lines = [f"Plan of {self.job.study.name} in {self.folder.path}. Nothing has been written."]
        if "convert" in stages:
            lines.append(self.conversion.render())
        if "train" in stages:
            lines += [
                self._render_held_out(),
                f"  folds   {len(self.folds.folds)}, of {len(self.folds.classes)} labels{dropped}; "
                f"split {self.folds.sha256[:12]}",
                *(
                    [f"          not scorable, as their label is left in no other: {listing(lacking, 40)}"]
                    if (lacking := self.folds.not_scorable)
                    else []
                ),
                f"Train {' and '.join(training['networks'])} from {' and '.join(training['weights'])}",
                f"  runs    {training['runs']:,}, of which {training['runs_missing']:,} are missing"
                + (f": {training['trainings_missing']:,} trainings" if training["candidates"] else ""),
                *self._render_search(),
                f"  steps   {training['steps_missing']:,} of {' or '.join(map(str, sizes))} tiles at most",
                f"  ranks   {training['ranks']} for each run",
                *self._render_memory(training),
                f"  write   about {training['files']:,} files",
            ]
        return "\n".join(lines)


def plan_study(job: Job, memory: Allowed | None = None) -> StudyPlan:
    """Plan a study from its job: read the screen's tables, split, and list what is missing.

    Parameters
    ----------
    job
        The settings.
    memory
        What tiles may take on a host that trains; by default what jobs of this machine may use.

    Raises
    ------
    UsageError, DataError
        The job or the screen's tables are wrong.
    """
    sizes = tile_sizes_px(job)
    folder = StudyFolder(job.study.folder)
    store = folder.store(job)
    # Once it is converted, a plate needs its tables and no more: the raw pictures may lie elsewhere by then.
    screen = read_screen(job.screen, converted=finished_plates(store))
    require_sound(screen, allow_missing=job.convert.on_bad_field == "skip")
    folds = plan_folds(screen.fields, job.folds, search=bool(job.search))
    conversion = plan_conversion(job.convert, screen, sizes, store)
    mix(conversion.channels, job.train.inputs)  # what is no channel is told before anything is done
    memory = memory or allowed(job.sweep.memory_gb, jobs=min(job.sweep.parallel_jobs, runs_of(job, folds)))
    asked = _asked(job, folder)
    job = _settled(asked, _tiles(job, screen, folds, conversion), memory)
    runs = plan_runs(job, folds, conversion.content_digest)
    missing = tuple(run for run in runs if not finished(folder.runs / run.id, run.digest))
    done = conversion.is_finished
    return StudyPlan(job, folder, screen, conversion, folds, tuple(runs), done, missing, memory, asked)


def _tiles(job: Job, screen: Screen, folds: Folds, conversion: ConversionPlan) -> tuple[int, int]:
    """Count the tiles that the runs use, at most, and the bytes of the largest."""
    tiles = int(folds.used(screen.fields).sum()) * conversion.tiles_per_field
    return tiles, len(conversion.channels) * max(tile_sizes_px(job)) ** 2


def _with_window(job: Job, window_tiles: int | None) -> Job:
    return job.model_copy(update={"train": job.train.model_copy(update={"window_tiles": window_tiles})})


def _asked(job: Job, folder: StudyFolder) -> Job:
    """Take from the study, where it has settled that, whether tiles come in windows; unless the job says so."""
    if job.train.window_tiles is None and folder.job.exists():
        return _with_window(job, folder.read_job().train.window_tiles)
    return job


def _settled(job: Job, tiles: tuple[int, int], memory: Allowed) -> Job:
    """Choose whether tiles come in windows, unless that is settled; not in windows of less than a batch."""
    if job.train.window_tiles is not None:
        return job
    window = 0 if held_bytes(*tiles, None) <= memory.bytes else window_that_fits(tiles[1], memory)
    return _with_window(job, window if window >= job.train.batch_size else 0)


def claim_study(plan: StudyPlan, stages: Sequence[str] = STAGES) -> None:
    """Bind the study's folder to its job file and its split, or check that it is bound to them.

    Whether tiles come in windows is settled with the first training that is asked for, before any job of it begins: the
    order of tiles is part of the runs, whose later ones may be trained where there is more memory, or less.

    Raises
    ------
    UsageError
        The folder belongs to another job file or split, or the tiles of missing runs don't fit into the memory.
    """
    if "train" in stages and plan.missing and (said := plan.too_large):
        raise UsageError(said)
    plan.folder.claim(plan.job if "train" in stages else plan.asked)
    if not plan.folder.plates.exists() or read_json(plan.folder.plates) != plan.plates:
        write_json(plan.folder.plates, plan.plates)
    path = plan.folder.folds
    if not path.exists():
        write_folds(path, plan.folds)
    elif (known := read_folds(path)).sha256 != plan.folds.sha256:
        raise UsageError(
            f"{path} holds another split ({known.sha256[:12]}) than the screen gives now ({plan.folds.sha256[:12]}): "
            "the screen's tables, [folds] or [search] changed. Choose another folder (--set study.folder=...) or "
            "remove this."
        )


def check_networks(plan: StudyPlan) -> None:
    """Build what the missing runs will train, in a process of its own: what can't be trained is known at once.

    Raises
    ------
    UserError
        A network or its weights can't be had.
    """
    inputs = mix(plan.conversion.channels, plan.job.train.inputs).shape[1]
    if plan.missing:
        check(sorted({(run.network, run.tile_px, inputs, run.weights) for run in plan.missing}))


def convert_study(plan: StudyPlan, stop: Callable[[], bool] = lambda: False) -> StudyPlan:
    """Convert what is missing, and check that every fold can be learnt from the tiles that were kept.

    Parameters
    ----------
    plan
        The study.
    stop
        Asked now and then; when it answers yes, conversion ends with `ConversionStopped`.

    Returns
    -------
    plan
        The plan as it is now: the runs depend on the fields that had to be set aside.

    Raises
    ------
    UserError
        Something is wrong or failed; what was done before is kept.
    """
    if not plan.converted:
        check_networks(plan)
        convert(plan.conversion, stop=stop)
        plan = replace(plan_study(plan.job, plan.memory), converted=False)
    check_folds(plan.folds, Store.open(plan.conversion.store, plan.plates).tiles)
    return plan


def aggregate_study(plan: StudyPlan) -> dict[str, Any]:
    """Score the finished runs of a study; returns the document of `results/scores.json`.

    Raises
    ------
    DataError
        Runs were made with other settings, or don't belong together.
    """
    from cellhpc.aggregate import aggregate  # with figures and statistics, which no plan needs

    folders = [plan.folder.runs / run.id for run in plan.runs]
    stale = [
        run.id for run, unit in zip(plan.runs, folders, strict=True) if done_digest(unit) not in (None, run.digest)
    ]
    if stale:
        raise DataError(
            f"{len(stale)} run(s) were made with other settings, store, ranks or weights than the job file names now.",
            stale,
            "Train them again with: cellhpc train JOB.toml",
        )
    job, conversion = plan.job, plan.conversion
    store = Store.open(conversion.store, plan.plates) if conversion.is_finished else None
    how, counts = job.aggregate.combine, conversion.counts()
    return aggregate(plan.folder.path, job.study.name, folders, plan.folds.classes, how, counts, store)
