"""Predictions to calls, level by level: tile -> field -> well -> treatment -> compound.

A table of predictions has one row a held-out tile: the columns `plate`, `well`, `field`, `tile`, `treatment`,
`compound` and `label`, and one column `p_<class>` for each class, whose rows sum to one. Further columns (`batch`,
`concentration`, `replicate`, ...) travel along. A column `fold`, where there is one, keeps apart the treatments of
different folds (a treatment is held out twice when cell lines are held out, and once when compounds are). A table may
begin at a coarser level: without a column `tile` a row is a field, without `field` a well, without `well` a treatment.

Probabilities are combined by one of four rules:

- `mean`: each level is the mean of the level below it.
- `median`: the rule of Kensert, Harrison & Spjuth 2019 (SLAS Discovery 24(4) 466-475): a field and a well are the
  element-wise median of their tiles, a treatment is the median of its wells (its replicates). Medians do not sum to
  one: every level is renormalised for its own table, but the treatment is computed from the medians themselves, so
  that its call is the paper's. Where every median is zero (no class in half of the parts) the mean stands in.
- `log`: each level is the mean of the logarithms of the level below it: the geometric mean of the probabilities,
  normalised. A probability below `LOG_FLOOR` counts as this, so that one tile can't rule a class out.
- `vote`: each level is the share of the votes of the level below it, each part for its call. Of classes with equally
  many votes, the one with the higher mean (as of `mean`) is called.

The call is the class of the highest probability; of equal ones, the first in the order of the columns. Where a compound
has several labels (its doses do different things) there is no level `compound`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellhpc.errors import DataError, listing

How: TypeAlias = Literal["mean", "median", "log", "vote"]

LEVELS = ("tile", "field", "well", "treatment", "compound")
PREFIX = "p_"
KEYS = {
    "tile": ("plate", "well", "field", "tile"),
    "field": ("plate", "well", "field"),
    "well": ("plate", "well"),
    "treatment": ("fold", "treatment"),
    "compound": ("fold", "compound"),
}
LOG_FLOOR = 1e-6
"""Smallest probability whose logarithm `log` takes."""
_CONSTANT = {
    "field": ("fold", "treatment", "compound", "label"),
    "well": ("fold", "treatment", "compound", "label"),
    "treatment": ("compound", "label"),
    "compound": ("label",),
}
_DESCRIBING = ("plate", "well", "field", "tile", "fold", "treatment", "compound", "label")
_ORDER = {
    "treatment": ("label", "compound", "concentration", "treatment", "fold"),
    "compound": ("label", "compound", "fold"),
}
_OF_WELLS = ("plate", "well", "batch", "replicate")
_NOT_OF_A_LEVEL = {
    "tile": (),
    "field": ("tile",),
    "well": ("tile", "field"),
    "treatment": ("tile", "field", *_OF_WELLS),
    "compound": ("tile", "field", *_OF_WELLS, "treatment", "concentration", "unit"),
}
_SUM_TOLERANCE = 1e-3


def classes_of(predictions: pd.DataFrame) -> list[str]:
    """Classes of a table of predictions, in the order of its columns."""
    return [name.removeprefix(PREFIX) for name in predictions.columns if str(name).startswith(PREFIX)]


def finest(columns: Sequence[str] | pd.Index) -> str:
    """Level at which a table with these columns begins."""
    return next((level for level in ("tile", "field", "well") if level in columns), "treatment")


@dataclass(frozen=True)
class Scored:
    """Probabilities of the units of one level, and how they are ranked.

    Attributes
    ----------
    probabilities
        float64 (units, classes); rows sum to one.
    ranking
        float64 (units, classes): the probabilities, or what orders the classes where these are equal votes.
    """

    probabilities: NDArray
    ranking: NDArray

    def calls(self) -> NDArray:
        """Give the number of the class that is called, int64 (units,)."""
        return self.ranking.argmax(axis=1)

    def rank(self, truth: NDArray) -> NDArray:
        """How many classes come before the true one, int64 (units,); 0 where the call is right.

        Parameters
        ----------
        truth
            Number of the true class, int64 (units,).
        """
        own = self.ranking[np.arange(len(truth)), truth][:, None]
        earlier = np.arange(self.ranking.shape[1]) < truth[:, None]
        return ((self.ranking > own) | ((self.ranking == own) & earlier)).sum(axis=1)


@dataclass(frozen=True)
class Units:
    """The units of one level: `first` row of each (units,), and the unit of each row, `of_row` (rows,)."""

    first: NDArray
    of_row: NDArray

    @cached_property
    def rows(self) -> NDArray:
        """Rows that each unit stands on, int64 (units,)."""
        return np.bincount(self.of_row)


class Ladder:
    """The units of a table at each of its levels: found once, climbed by every model that predicts the same rows.

    Parameters
    ----------
    table
        Keys and labels of the rows (see the module's text), without probabilities.
    classes
        Classes, in the order of the probabilities.

    Attributes
    ----------
    table, classes
        As given.
    units
        `Units` of each level that the table has, from the finest to the coarsest.
    truth
        Number of each row's label among the classes, int64 (rows,).
    compounds
        Number of each row's compound, int64 (rows,), and the names of the compounds.

    Raises
    ------
    DataError
        Columns are missing, there are no rows, a label is unknown, rows are there twice, or a unit has two labels.
    """

    def __init__(self, table: pd.DataFrame, classes: Sequence[str]) -> None:
        _require_columns(table)
        self.table, self.classes = table, tuple(classes)
        self.truth = label_codes(table["label"], classes)
        start = finest(table.columns)
        codes = {name: pd.factorize(table[name].to_numpy()) for name in _DESCRIBING if name in table}
        self.compounds = codes["compound"]
        self.units: dict[str, Units] = {}
        for level in LEVELS[LEVELS.index(start) :]:
            of_row = np.zeros(len(table), np.int64)
            for name in KEYS[level]:
                if name in codes:
                    part, values = codes[name]
                    of_row = np.unique(of_row * (len(values) + 1) + part + 1, return_inverse=True)[1]
            units = Units(np.unique(of_row, return_index=True)[1], of_row)
            if level == start:
                _refuse_duplicates(table, level, units)
                of_row = np.arange(len(table))  # in the order of the rows
                units = Units(of_row, of_row)
            differs = {
                name: codes[name][0] != codes[name][0][units.first][of_row]
                for name in _CONSTANT.get(level, ())
                if name in codes
            }
            if any(rows.any() for rows in differs.values()):
                if level == "compound":
                    break
                _refuse_mixtures(table, level, units, differs)
            self.units[level] = units
        self._groups: dict[tuple[str, str], _Groups] = {}
        self._described: dict[str, tuple[pd.DataFrame, NDArray]] = {}

    def describe(self, level: str) -> tuple[pd.DataFrame, NDArray]:
        """Describe the units of a level: their keys and what else is known of them, and `tiles`.

        Returns
        -------
        table
            One row a unit: treatments and compounds sorted by label, compound and concentration, the others by their
            keys.
        order
            Number of the unit of each row, int64 (units,).
        """
        if level not in self._described:
            units = self.units[level]
            table = self.table.drop(columns=list(_NOT_OF_A_LEVEL[level]), errors="ignore").iloc[units.first]
            table = in_order(table.assign(tiles=units.rows).set_axis(range(len(table))), level)
            self._described[level] = table.reset_index(drop=True), table.index.to_numpy()
        return self._described[level]

    @cached_property
    def treatments(self) -> list[tuple[Any, ...]]:
        """What tells the treatments apart, in the order of the units."""
        return names_of(self.table.iloc[self.units["treatment"].first])

    def climb(self, probabilities: NDArray, how: How = "mean") -> dict[str, Scored]:
        """Combine probabilities of the rows to those of the units of each level.

        Parameters
        ----------
        probabilities
            float64 (rows, classes); rows sum to one.
        how
            One of the rules of the module's text.
        """
        if how not in get_args(How):
            raise ValueError(f"how is {how!r}; allowed: {listing(get_args(How))}")
        start, *above = self.units
        values = {start: np.log(np.maximum(probabilities, LOG_FLOOR)) if how == "log" else probabilities}
        found = {start: Scored(probabilities, probabilities)}
        below = start
        for level in above:
            if how == "median":
                source = start if level in ("field", "well") else below
                values[level] = self._group(level, source).median(values[source])
                shares = values[level]
            else:
                groups = self._group(level, below)
                values[level] = shares = groups.mean(values[below])
            if how == "log":
                shares = np.exp(shares - shares.max(axis=1, keepdims=True))
            if how == "vote":
                shares = groups.mean(np.eye(probabilities.shape[1])[found[below].calls()])
            shares = shares / shares.sum(axis=1, keepdims=True)
            if not np.allclose(shares.sum(axis=1), 1, rtol=0, atol=1e-9):
                raise AssertionError(f"probabilities of the level {level} do not sum to one")
            # Shares of votes differ by one vote at least, so half of one vote orders those that are equal.
            ranking = shares + values[level] * (0.5 / groups.counts[:, None]) if how == "vote" else shares
            found[level] = Scored(shares, ranking)
            below = level
        return found

    def _group(self, level: str, below: str) -> _Groups:
        """Group the units of a finer level by those of a coarser one."""
        if (level, below) not in self._groups:
            self._groups[level, below] = _Groups(self.units[level].of_row[self.units[below].first])
        return self._groups[level, below]


class _Groups:
    """Rows in groups 0, 1, 2, ..., none of them empty."""

    def __init__(self, groups: NDArray) -> None:
        self._of_row = groups
        self.counts = np.bincount(groups)
        self._starts = np.cumsum(self.counts) - self.counts
        self._order = np.argsort(groups, kind="stable")

    def mean(self, values: NDArray) -> NDArray:
        """Mean of the rows of each group."""
        return np.add.reduceat(values[self._order], self._starts, axis=0) / self.counts[:, None]

    def median(self, values: NDArray) -> NDArray:
        """Element-wise median of the rows of each group; where all its elements are zero, the mean."""
        medians = np.empty((len(self.counts), values.shape[1]))
        low, high = self._starts + (self.counts - 1) // 2, self._starts + self.counts // 2
        for column in range(values.shape[1]):
            ordered = values[np.lexsort((values[:, column], self._of_row)), column]
            medians[:, column] = (ordered[low] + ordered[high]) / 2
        empty = medians.sum(axis=1) == 0
        if empty.any():
            medians[empty] = self.mean(values)[empty]
        return medians


def combine(predictions: pd.DataFrame, how: How = "mean") -> dict[str, pd.DataFrame]:
    """Combine the predictions of tiles to those of fields, wells, treatments and compounds.

    Parameters
    ----------
    predictions
        One row a held-out tile, or a unit of a coarser level (see the module's text).
    how
        `mean`, `median`, `log` or `vote`.

    Returns
    -------
    dict
        For each level that there is a table as `unit_table` gives it.

    Raises
    ------
    DataError
        Columns are missing, probabilities are none, rows are there twice, or a unit has two labels.
    """
    probabilities = check_probabilities(predictions)
    classes = classes_of(predictions)
    keys = predictions.drop(columns=[PREFIX + name for name in classes])
    ladder = Ladder(keys, classes)
    return {level: unit_table(ladder, level, scored) for level, scored in ladder.climb(probabilities, how).items()}


def unit_table(ladder: Ladder, level: str, scored: Scored) -> pd.DataFrame:
    """Make the table of one level.

    Parameters
    ----------
    ladder, level, scored
        The units; the level; what `Ladder.climb` gave for it.

    Returns
    -------
    DataFrame
        One row a unit: its keys and what describes it, `tiles` (how many rows it stands on), `call`, `correct`, `top2`
        (whether the true label is one of the first two), and the probabilities `p_<class>` (float64, rows sum to one).
        Treatments and compounds are sorted by label, compound and concentration, the others by their keys.
    """
    return called_table([called_units(ladder, level, scored)], ladder.classes)


Called: TypeAlias = tuple[pd.DataFrame, NDArray, NDArray, NDArray]
"""Of the units of a level: what describes them, number of the call, rank of the true label, probabilities."""


def called_units(ladder: Ladder, level: str, scored: Scored) -> Called:
    """Give the parts of the table of one level; parameters as of `unit_table`."""
    described, order = ladder.describe(level)
    rank = scored.rank(ladder.truth[ladder.units[level].first])
    return described, scored.calls()[order], rank[order], scored.probabilities[order]


def called_table(parts: Sequence[Called], classes: Sequence[str]) -> pd.DataFrame:
    """Make one table of parts, one below the other: the columns are those of `unit_table`."""
    described, calls, ranks, probabilities = zip(*parts, strict=True)
    rank = np.concatenate(ranks)
    called = {"call": np.array(classes, dtype=object)[np.concatenate(calls)], "correct": rank == 0, "top2": rank < 2}
    values = pd.DataFrame(np.concatenate(probabilities), columns=[PREFIX + name for name in classes])
    return pd.concat([pd.concat(described, ignore_index=True), pd.DataFrame(called), values], axis=1)


def names_of(treatments: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Give what tells the treatments of a table apart: fold (where there is one) and treatment."""
    return list(zip(*(treatments[name] for name in KEYS["treatment"] if name in treatments), strict=True))


def in_order(table: pd.DataFrame, level: str) -> pd.DataFrame:
    """Sort the table of a level as `Ladder.describe` does; each row keeps its index."""
    return table.sort_values([name for name in _ORDER.get(level, KEYS[level]) if name in table], kind="stable")


def average_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Average the probabilities of several models for each row (an ensemble); the other columns are the first table's.

    A row that only some of the tables hold is the mean of those.
    """
    stacked = pd.concat(tables, ignore_index=True)
    columns = [name for name in stacked.columns if str(name).startswith(PREFIX)]
    codes = np.zeros(len(stacked), np.int64)
    for name in KEYS[finest(stacked.columns)]:
        if name in stacked:
            part, values = pd.factorize(stacked[name].to_numpy())
            codes = np.unique(codes * (len(values) + 1) + part + 1, return_inverse=True)[1]
    first: NDArray = np.unique(codes, return_index=True)[1]
    averaged = stacked.iloc[first].reset_index(drop=True)
    averaged[columns] = averaged[columns].astype(np.float64)
    averaged[columns] = _Groups(codes).mean(stacked[columns].to_numpy(dtype=np.float64))
    return averaged


def check_probabilities(predictions: pd.DataFrame) -> NDArray:
    """Give the probabilities (rows, classes) as float64, each row summing to one to its precision.

    Raises
    ------
    DataError
        Columns are missing, a label is none of the classes, or a row holds no probabilities: every such row is listed.
    """
    classes = classes_of(predictions)
    _require_columns(predictions, [] if classes else ["p_<class>, one for each class"])
    label_codes(predictions["label"], classes)
    return sound(predictions[[PREFIX + name for name in classes]].to_numpy(dtype=np.float64), predictions)


def sound(values: NDArray, keys: pd.DataFrame) -> NDArray:
    """Give probabilities float64 (rows, classes), each row summing to one to its precision.

    Parameters
    ----------
    values
        What is said to be probabilities.
    keys
        Where each row comes from, for the message.

    Raises
    ------
    DataError
        A row holds no probabilities: every such row is listed.
    """
    sums = values.sum(axis=1)
    wrong = ~np.isfinite(values).all(axis=1) | (values < 0).any(axis=1) | ~(np.abs(sums - 1) <= _SUM_TOLERANCE)
    if wrong.any():
        problems = [
            f"{_place(keys, row)}: sum {sums[row]:.6g}, lowest {values[row].min():.6g}" for row in np.flatnonzero(wrong)
        ]
        raise DataError(
            f"{wrong.sum()} of {len(values)} rows of predictions hold no probabilities: each must be finite, none "
            "below zero, and a row must sum to one.",
            problems,
            "Write the softmax of the network, in 32-bit floats, not its logits.",
        )
    return values / sums[:, None]


def label_codes(labels: pd.Series, classes: Sequence[str]) -> NDArray:
    """Position of each row's label among the classes, int64 (rows,).

    Raises
    ------
    DataError
        A label is none of the classes.
    """
    codes = pd.Index(classes).get_indexer(pd.Index(labels))
    if (codes < 0).any():
        raise DataError(
            "Labels in the table of predictions are not among its classes.",
            [f"{label!r}: {count} rows" for label, count in Counter(labels[codes < 0]).items()],
            f"Classes (columns p_<class>): {listing(classes, 30)}.",
        )
    return codes


def _require_columns(table: pd.DataFrame, missing: Sequence[str] = ()) -> None:
    """Refuse a table that lacks columns, or rows; a finer key needs the coarser ones."""
    start = finest(table.columns)
    keys = [name for name in ("field", "well") if LEVELS.index(name) > LEVELS.index(start)]
    missing = [*(name for name in (*keys, "treatment", "compound", "label") if name not in table), *missing]
    if missing:
        raise DataError(
            "The table of predictions lacks columns.",
            [f"no column {name}" for name in missing],
            f"Found: {listing(table.columns, 30)}.",
        )
    if table.empty:
        raise DataError("The table of predictions has no rows.")


def _refuse_duplicates(table: pd.DataFrame, level: str, units: Units) -> None:
    if units.rows.max() > 1:
        twice = units.rows > 1
        raise DataError(
            f"{twice.sum()} {level}s are predicted more than once.",
            [f"{_place(table, row)}: {n} rows" for row, n in zip(units.first[twice], units.rows[twice], strict=True)],
            f"Each {level} is held out exactly once: look for a fold that was given twice.",
        )


def _refuse_mixtures(table: pd.DataFrame, level: str, units: Units, differs: dict[str, NDArray]) -> None:
    """Every field and well has one treatment, every treatment one compound and one label."""
    problems = []
    for name, rows in differs.items():
        for unit in np.unique(units.of_row[rows]):
            values = table[name].to_numpy()[units.of_row == unit]
            where = ", ".join(f"{key} {table[key].iloc[units.first[unit]]}" for key in KEYS[level] if key in table)
            problems.append(f"{where}: {name} {listing(set(values))}")
    raise DataError(f"A {level} must be of one kind, but some hold several.", problems)


def _place(table: pd.DataFrame, row: int) -> str:
    return ", ".join(f"{key} {table[key].iloc[row]}" for key in KEYS[finest(table.columns)] if key in table)
