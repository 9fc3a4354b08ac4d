"""Predictions of all finished runs to the scores of each model: read fold by fold, counted, and forgotten."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cellhpc import ledger
from cellhpc.errors import DataError
from cellhpc.fold_reader import FoldReader, read_ahead
from cellhpc.folds import Folds
from cellhpc.levels import How
from cellhpc.results import GrowingTables, Name
from cellhpc.runs import FinishedRun
from cellhpc.tally import UNKNOWN, ModelTally


def count(
    runs: Sequence[FinishedRun],
    problems: Sequence[str],
    folds: Folds,
    classes: Sequence[str],
    how: How,
    results: Path,
) -> tuple[dict[Name, ModelTally], Asked]:
    """Count the predictions of runs, and write the tables of wells and fields.

    Parameters
    ----------
    runs
        What is to be counted.
    problems
        What is wrong with their records. Predictions are looked at all the same, so that one message lists everything.
    folds, classes
        What they were trained for.
    how
        How probabilities are combined.
    results
        Folder of the tables.

    Returns
    -------
    models
        Of each network and initialisation its scores.
    asked
        The treatments that the folds asked.

    Raises
    ------
    DataError
        The runs can't be scored together; every problem is listed.
    """
    problems = list(problems)
    of_folds: dict[str, dict[Name, list[FinishedRun]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        of_folds[run.fold][run.model].append(run)
    models = {name: ModelTally(classes, how, folds.by) for name in dict.fromkeys(run.model for run in runs)}
    asked = Asked()
    files = read_ahead(run for fold in sorted(of_folds) for own in of_folds[fold].values() for run in own)
    with GrowingTables(results) as tables, contextlib.closing(files):
        for fold in sorted(of_folds):
            reader = FoldReader(folds.named(fold), classes, folds)
            for name, own in of_folds[fold].items():
                read = {run.seed: reader.read(run, next(files), problems) for run in own}
                members = {seed: predicted for seed, predicted in read.items() if predicted is not None}
                if members and not problems:
                    ladder, climbed = models[name].add(members)
                    tables.add(name, ladder, climbed)
                    problems += asked.add(fold, ladder.describe("well")[0])
        if problems:
            raise DataError(
                "The finished runs can't be scored together.",
                problems,
                "Remove the run folders that are named, then type: cellhpc run JOB.toml",
            )
        (results / ledger.DONE).unlink(missing_ok=True)  # the tables take their names now
    return models, asked


class Asked:
    """The treatments that were asked, by fold and batch; and that no well was asked in two folds.

    Attributes
    ----------
    columns
        Names of the columns that the wells of any fold had.
    """

    def __init__(self) -> None:
        self.columns: set[str] = set()
        self._rows: dict[tuple[Any, ...], None] = {}
        self._folds: dict[tuple[Any, Any], str] = {}

    def add(self, fold: str, wells: pd.DataFrame) -> list[str]:
        """Add the wells of a fold; give a line for each of them that another fold asked."""
        self.columns.update(wells.columns)
        names = [name for name in ("fold", "treatment", "compound", "label", "batch") if name in wells]
        self._rows.update(dict.fromkeys(zip(*(wells[name] for name in names), strict=True)))
        problems: list[str] = []
        if UNKNOWN in wells:  # what is known may be held out beside several labels
            return problems
        for plate, well in zip(wells["plate"], wells["well"], strict=True):
            if (other := self._folds.setdefault((plate, well), fold)) != fold:
                problems.append(f"plate {plate}, well {well}: is held out by two folds, {other} and {fold}")
        return problems

    def table(self) -> pd.DataFrame:
        """Give them as `scores.baselines` takes them."""
        names = ["fold", "treatment", "compound", "label", *(["batch"] if "batch" in self.columns else [])]
        return pd.DataFrame(list(self._rows), columns=names)
