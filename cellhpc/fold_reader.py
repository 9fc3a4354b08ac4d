"""Predictions of finished runs, read fold by fold.

Runs of a fold predict the same tiles, whose keys are looked at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellhpc.errors import DataError, listing
from cellhpc.folds import Fold, Folds
from cellhpc.levels import KEYS, PREFIX, Ladder, sound
from cellhpc.predictor import DRAWS, PREDICTIONS
from cellhpc.runs import FinishedRun, problems_of_classes, unreadable
from cellhpc.tally import UNKNOWN, Predicted

AHEAD, READERS = 8, 2
"""Files that are read ahead, and threads that read them."""


@dataclass(frozen=True)
class _Keys:
    """The held-out tiles of a fold as runs predict them: columns as read, ladder, values of `by` and of `also`."""

    arrow: pa.Table
    ladder: Ladder
    by: frozenset[str]
    also: frozenset[str]


def _read(path: Path) -> pa.Table:
    """Read a small table in this thread: thousands of them are read."""
    with pq.ParquetFile(pa.py_buffer(path.read_bytes())) as file:
        return file.read(use_threads=False)


def read_ahead(runs: Iterable[FinishedRun]) -> Generator[Future[pa.Table], None, None]:
    """Read the predictions of runs in their order, a few ahead of the one that is asked for, in threads."""
    with ThreadPoolExecutor(READERS) as threads:
        files = (threads.submit(_read, run.folder / PREDICTIONS) for run in runs)
        ahead = deque(islice(files, AHEAD))
        while ahead:
            yield ahead.popleft()
            ahead.extend(islice(files, 1))


class FoldReader:
    """Looks at the predictions of one fold's runs; keys that runs share are checked once.

    Parameters
    ----------
    fold
        The fold.
    classes, folds
        What the runs were trained for.
    """

    def __init__(self, fold: Fold, classes: Sequence[str], folds: Folds) -> None:
        self.fold, self.classes, self.folds = fold, classes, folds
        self._known: list[_Keys] = []
        self._columns = [PREFIX + name for name in classes]

    def read(self, run: FinishedRun, file: Future[pa.Table], problems: list[str]) -> Predicted | None:
        """Give the predictions of a run.

        Parameters
        ----------
        run
            A run of this fold.
        file
            Its file, as `read_ahead` gives it.
        problems
            Gets a line for each thing that is wrong.

        Returns
        -------
        Predicted or None
            None where something is wrong.
        """
        try:
            table = file.result()
            found = [name.removeprefix(PREFIX) for name in table.column_names if name.startswith(PREFIX)]
            wrong = list(problems_of_classes("predictions", found, self.classes))
            keys = None if wrong else self._keys_of(table)
            wrong += self._leaks(run, keys) if keys else []
            if keys and not wrong:
                values = sound(self._values_of(table), keys.ladder.table)
                return Predicted(keys.ladder, values, self._draws_of(run, keys))
        except (OSError, ValueError, pa.ArrowException) as fault:
            wrong = [unreadable(fault)]
        except DataError as fault:
            wrong = [" ".join(str(fault).split())]
        problems += [f"{run.id}: {line}" for line in wrong]
        return None

    def _values_of(self, table: pa.Table) -> NDArray:
        return np.column_stack([table.column(name).to_numpy() for name in self._columns]).astype(np.float64)

    def _draws_of(self, run: FinishedRun, keys: _Keys) -> NDArray | None:
        """Read the draws of dropout, one after the other, float64 (draws, tiles, classes); None where there are none.

        Raises
        ------
        DataError
            They are of other tiles than the predictions, or no probabilities.
        """
        if not (run.folder / DRAWS).exists():
            return None
        table = _read(run.folder / DRAWS)
        draws, rest = divmod(len(table), len(keys.arrow))
        same = not rest and {*keys.arrow.column_names, *self._columns} <= set(table.column_names)
        own = table.select(keys.arrow.column_names) if same else table
        if not same or any(
            not own.slice(n * len(keys.arrow), len(keys.arrow)).equals(keys.arrow) for n in range(draws)
        ):
            raise DataError(f"{DRAWS} holds other tiles than {PREDICTIONS}.")
        parts = self._values_of(table).reshape(draws, len(keys.arrow), -1)
        return np.stack([sound(part, keys.ladder.table) for part in parts])

    def _keys_of(self, table: pa.Table) -> _Keys:
        own = table.select([name for name in table.column_names if not name.startswith(PREFIX)])
        for keys in self._known:
            if own.equals(keys.arrow):
                return keys
        if missing := [name for name in KEYS["tile"] if name not in own.column_names]:
            raise DataError(f"{PREDICTIONS} has no column {listing(missing)}.")
        frame = own.to_pandas().assign(fold=self.fold.name)
        if self.fold.unknown:
            frame[UNKNOWN] = frame["label"] == self.fold.unknown
        by, also = (
            frozenset(frame[name].astype(str)) if name in frame else frozenset()
            for name in (self.folds.by, self.folds.also)
        )
        keys = _Keys(own, Ladder(frame, self.classes), by, also)
        self._known = [keys, *self._known[:3]]
        return keys

    def _leaks(self, run: FinishedRun, keys: _Keys) -> list[str]:
        """List what it predicts and should not, and the other way round."""
        held_out, problems = set(run.held_out), []
        if keys.by and (leaked := keys.by - held_out):
            problems.append(f"predicts {self.folds.by} {listing(leaked)}, which its fold {run.fold} trained on: a leak")
        if keys.by and (unseen := held_out - keys.by):
            problems.append(f"no predictions of {self.folds.by} {listing(unseen)}, which its fold {run.fold} holds out")
        if shared := keys.also & set(run.trained_on_also):
            problems.append(f"predicts {self.folds.also} {listing(shared)}, which it trained on: a leak")
        return problems
