"""What climbs: probabilities from level to level, tile -> field -> well -> treatment -> compound.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellhpc.errors import DataError, listing
from cellhpc.settings import How

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
        require_columns(table)
        self.table, self.classes = table, tuple(classes)
        self.truth = label_codes(table["label"], classes)
        start = finest(table.columns)
        codes = {name: pd.factorize(table[name].to_numpy()) for name in _DESCRIBING if name in table}
        self.compounds = codes["compound"]
        self.units: dict[str, Units] = {}
        for level in LEVELS[LEVELS.index(start) :]:
            of_row = number_units([codes[name] for name in KEYS[level] if name in codes], len(table))
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
        self._groups: dict[tuple[str, str], Groups] = {}
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
            order = _order(self.table, level, units.first)
            kept = [name for name in self.table.columns if name not in _NOT_OF_A_LEVEL[level]]
            table = self.table[kept].take(units.first[order]).reset_index(drop=True)
            table["tiles"] = units.rows[order]
            self._described[level] = table, order
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

    def _group(self, level: str, below: str) -> Groups:
        """Group the units of a finer level by those of a coarser one."""
        if (level, below) not in self._groups:
            self._groups[level, below] = Groups(self.units[level].of_row[self.units[below].first])
        return self._groups[level, below]


class Groups:
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


def number_units(parts: Iterable[tuple[NDArray, Any]], rows: int) -> NDArray:
    """Give each row the number, 0, 1, 2, ..., of its combination of values, int64 (rows,).

    Parameters
    ----------
    parts
        For each column what `pandas.factorize` gives: numbers of the values, and the values.
    rows
        How many there are.
    """
    numbers = np.zeros(rows, np.int64)
    for part, values in parts:
        numbers = np.unique(numbers * (len(values) + 1) + part + 1, return_inverse=True)[1]
    return numbers


def names_of(treatments: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Give what tells the treatments of a table apart: fold (where there is one) and treatment."""
    return list(zip(*(treatments[name] for name in KEYS["treatment"] if name in treatments), strict=True))


def in_order(table: pd.DataFrame, level: str) -> pd.DataFrame:
    """Sort the table of a level as `Ladder.describe` does; each row keeps its index."""
    return table.iloc[_order(table, level, np.arange(len(table)))]


def _order(table: pd.DataFrame, level: str, rows: NDArray) -> NDArray:
    """Give the positions among `rows` that sort them as the units of a level, int64; `sort_values` is slow."""
    keys = []
    for name in reversed([name for name in _ORDER.get(level, KEYS[level]) if name in table]):
        column = table[name]
        given = column.array if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy()
        codes, values = pd.factorize(given[rows], sort=True)
        keys.append(np.where(codes < 0, len(values), codes))  # what is not known comes last
    order: NDArray = np.lexsort(keys)
    return order


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


def require_columns(table: pd.DataFrame, missing: Sequence[str] = ()) -> None:
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
            [f"{place(table, row)}: {n} rows" for row, n in zip(units.first[twice], units.rows[twice], strict=True)],
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


def place(table: pd.DataFrame, row: int) -> str:
    """Say where a row comes from."""
    return ", ".join(f"{key} {table[key].iloc[row]}" for key in KEYS[finest(table.columns)] if key in table)
