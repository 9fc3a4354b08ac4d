"""`[search]` carried out: a run chooses its settings on inner compounds, then is trained with what it chose.

Before a run is trained, each candidate (see `cellhpc.grid`) is trained without the held-out compound and without the
fold's inner ones (see `cellhpc.folds`), and predicts the inner ones. The best has the highest mean log-probability of
the true label: tiles are averaged to fields, the logarithms of fields over each compound, those over all inner
compounds. Of equal ones the earlier is taken, and one that diverged never. The held-out compound is in none of this.

A candidate is a unit of work of its own, ``RUN/search/<candidate>/``, as a run is: interrupted, continued and fenced
like one. Candidates that differ only in what the steps know (epochs, learning rate, size of a batch, ...) share one
compiled network; a process holds at most `KEPT` of these.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellhpc.attempts import FAILED, finished
from cellhpc.errors import DataError
from cellhpc.folds import Folds
from cellhpc.grid import Candidate, describe
from cellhpc.ledger import digest, read_json
from cellhpc.predictor import PREDICTIONS
from cellhpc.ranks import Ranks
from cellhpc.recipe import TrainSettings
from cellhpc.scores import PREFIX, combine
from cellhpc.sweep import SEARCH, Run
from cellhpc.train import NotFinite, RunFailed, Trainer, Watch, train_run

KEPT = 4
"""Compiled networks that a process holds: each has weights, optimiser and graphs."""
FLOOR = 1e-6
"""Probabilities below this count as this: one field can't decide all."""


class Trainers:
    """The compiled networks of a process, one for each kind of graph that its runs need.

    Each is made when it is first asked for. When there are `KEPT`, the one that came last makes room: runs ask for
    all candidates in turn, so that the others still spare their tracing.

    Parameters
    ----------
    make
        Makes one for given settings.
    """

    def __init__(self, make: Callable[[TrainSettings], Trainer]) -> None:
        self._make = make
        self._kept: list[Trainer] = []

    def of(self, settings: TrainSettings) -> Trainer:
        """Give the one that trains with these settings."""
        for trainer in self._kept:
            if trainer.settings.graph() == settings.graph():
                trainer.use(settings)
                return trainer
        if len(self._kept) == KEPT:
            self._kept.pop()
            gc.collect()  # a trainer and its graph refer to each other
        self._kept.append(self._make(settings))
        return self._kept[-1]

    def clear(self) -> None:
        """Let all go."""
        self._kept.clear()


def train_chosen(
    trainers: Trainers,
    candidates: Sequence[Candidate],
    run: Run,
    folds: Folds,
    folder: Path,
    ranks: Ranks,
    watch: Watch | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Choose the settings of a run among candidates, and train it with them, as `train_run` does.

    Raises
    ------
    RunFailed
        Every candidate diverged, or the run can't be trained.
    Interrupted, Superseded, RankLost, UserError
        As `train_run`.
    """
    unit = folder / run.id

    def begin() -> bool:
        done = _is_done(folder, run)
        if not done:
            (unit / FAILED).unlink(missing_ok=True)  # as an attempt at the run itself does, which comes much later
        return done

    if _told_by_rank_0(ranks, unit, begin):
        return
    diverged: dict[str, str] = {}
    searched = [_run_of(run, candidate) for candidate in candidates]
    for number, (candidate, one) in enumerate(zip(candidates, searched, strict=True), 1):
        if _told_by_rank_0(ranks, unit, partial(_is_done, folder, one)):
            continue  # without making a network for it
        place = {"candidate": [number, len(candidates)], "epochs": candidate.settings.epochs}
        try:
            train_run(trainers.of(candidate.settings), one, folds, folder, watch, {**(about or {}), **place})
        except NotFinite as fault:
            diverged[candidate.name] = str(fault)
            if ranks.rank == 0:
                print(f"{one.id}: {fault}", flush=True)
    found: list[dict[str, Any]] = []

    def choose() -> int:
        found.extend(
            {"name": candidate.name, "values": candidate.values}
            | ({"diverged": True} if candidate.name in diverged else _asked(folder / one.id, one, folds.by))
            for candidate, one in zip(candidates, searched, strict=True)
        )
        return best(found)

    chosen = _told_by_rank_0(ranks, unit, choose)
    if chosen < 0:
        reasons = "; ".join(f"{candidate.name}: {diverged[candidate.name]}" for candidate in candidates)
        raise RunFailed(f"every candidate of the search diverged: {reasons}")
    candidate = candidates[chosen]
    facts = {SEARCH: record(run, found, chosen)} if ranks.rank == 0 else None
    place = {"epochs": candidate.settings.epochs}
    if ranks.rank == 0:
        print(f"{run.id}: chose {describe(candidate.values)}", flush=True)
    train_run(trainers.of(candidate.settings), run, folds, folder, watch, {**(about or {}), **place}, facts)


def _run_of(run: Run, candidate: Candidate) -> Run:
    """Make the inner training of a candidate."""
    return replace(
        run,
        id=f"{run.id}/{SEARCH}/{candidate.name}",
        fold=run.fold.searching(),
        digest=digest({"search_of": run.digest, "train": candidate.settings.identity()}),
    )


def _is_done(folder: Path, run: Run) -> bool:
    return finished(folder / run.id, run.digest) is not None


def _told_by_rank_0(ranks: Ranks, unit: Path, ask: Callable[[], int]) -> int:
    """Give rank 0's answer on all ranks: a shared file system may show files to some of them later."""
    fault: Exception | None = None
    answer = np.zeros((0, 2), np.int32)
    if ranks.rank == 0:
        try:
            answer = np.array([[int(ask()), 1]], np.int32)
        except (OSError, ValueError, KeyError, DataError) as caught:
            fault, answer = caught, np.array([[0, 0]], np.int32)
    told, well = ranks.gather(answer)[0]
    if not well:
        raise RunFailed(
            f"{unit / SEARCH} can't be read: {fault or 'rank 0 says why'}. Remove it, then type: cellhpc resume STUDY"
        ) from fault
    return int(told)


def _asked(unit: Path, run: Run, by: str) -> dict[str, Any]:
    """Read what came of a candidate: its figures on the inner values, and what it had to do with which values."""
    folder = finished(unit, run.digest)
    if folder is None:
        raise DataError(f"{unit} is not done any more")
    facts = read_json(folder / "run.json")
    predictions = pd.read_parquet(folder / PREDICTIONS)
    fields = combine(predictions, "mean")["field"]
    by_epoch = [epoch["held_out"]["field"]["correct"] for epoch in read_json(folder / "history.json")["epochs"]]
    return {
        "log_probability": log_probability(predictions, by),
        "fields": {"correct": int(fields["correct"].sum()), "total": len(fields), "by_epoch": by_epoch},
        "trained_on": facts["trained_on"],
        "asked": sorted(set(predictions[by].astype(str))),
        "seconds": facts["seconds"],
    }


def log_probability(predictions: pd.DataFrame, by: str) -> float:
    """Average over the values of `by`, each the mean over its fields of the natural logarithm of the true label's p."""
    fields = combine(predictions, "mean")["field"]
    true = np.array([row[PREFIX + row["label"]] for row in fields.to_dict("records")])
    logarithms = pd.Series(np.log(np.maximum(true, FLOOR)))
    return float(logarithms.groupby(fields[by].astype(str).to_numpy()).mean().mean())


def best(found: Sequence[Mapping[str, Any]]) -> int:
    """Give the number of the candidate with the best log-probability, the first of equals; -1 if all diverged."""
    able = [number for number, one in enumerate(found) if "diverged" not in one]
    return max(able, key=lambda number: found[number]["log_probability"], default=-1)


def record(run: Run, found: Sequence[Mapping[str, Any]], chosen: int) -> dict[str, Any]:
    """Say what a run chose and on what, for its `run.json`."""
    apart = ("trained_on", "asked", "seconds")  # the same for all, or told as a sum
    able = [one for one in found if "diverged" not in one]
    return {
        "chosen": found[chosen]["name"],
        "values": found[chosen]["values"],
        "inner": list(run.fold.inner),
        "asked": sorted({value for one in able for value in one["asked"]}),
        "trained_on": sorted({value for one in able for value in one["trained_on"]}),
        "seconds": sum(one["seconds"] for one in able),
        "candidates": [{key: value for key, value in one.items() if key not in apart} for one in found],
    }
