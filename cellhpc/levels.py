"""Tables of predictions to tables of calls, one for each level (see `cellhpc.ladder`), and the checks of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellhpc.errors import DataError
from cellhpc.ladder import (
    KEYS,
    LEVELS,
    LOG_FLOOR,
    PREFIX,
    Groups,
    Ladder,
    Scored,
    finest,
    in_order,
    label_codes,
    names_of,
    number_units,
    place,
    require_columns,
)
from cellhpc.settings import How

__all__ = [
    "KEYS", "LEVELS", "LOG_FLOOR", "PREFIX", "Called", "How", "Ladder", "Scored", "average_tables", "called_table",
    "called_units", "check_probabilities", "classes_of", "combine", "in_order", "names_of", "sound", "unit_table",
]  # fmt: skip

_SUM_TOLERANCE = 1e-3


def classes_of(predictions: pd.DataFrame) -> list[str]:
    """Classes of a table of predictions, in the order of its columns."""
    return [name.removeprefix(PREFIX) for name in predictions.columns if str(name).startswith(PREFIX)]


def combine(predictions: pd.DataFrame, how: How = "mean") -> dict[str, pd.DataFrame]:
    """Combine the predictions of tiles to those of fields, wells, treatments and compounds.

    Parameters
    ----------
    predictions
        One row a held-out tile, or a unit of a coarser level (see `cellhpc.ladder`).
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


def average_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Average the probabilities of several models for each row (an ensemble); the other columns are the first table's.

    A row that only some of the tables hold is the mean of those.
    """
    stacked = pd.concat(tables, ignore_index=True)
    columns = [name for name in stacked.columns if str(name).startswith(PREFIX)]
    keys = [name for name in KEYS[finest(stacked.columns)] if name in stacked]
    codes = number_units([pd.factorize(stacked[name].to_numpy()) for name in keys], len(stacked))
    first: NDArray = np.unique(codes, return_index=True)[1]
    averaged = stacked.iloc[first].reset_index(drop=True)
    averaged[columns] = averaged[columns].astype(np.float64)
    averaged[columns] = Groups(codes).mean(stacked[columns].to_numpy(dtype=np.float64))
    return averaged


def check_probabilities(predictions: pd.DataFrame) -> NDArray:
    """Give the probabilities (rows, classes) as float64, each row summing to one to its precision.

    Raises
    ------
    DataError
        Columns are missing, a label is none of the classes, or a row holds no probabilities: every such row is listed.
    """
    classes = classes_of(predictions)
    require_columns(predictions, [] if classes else ["p_<class>, one for each class"])
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
            f"{place(keys, row)}: sum {sums[row]:.6g}, lowest {values[row].min():.6g}" for row in np.flatnonzero(wrong)
        ]
        raise DataError(
            f"{wrong.sum()} of {len(values)} rows of predictions hold no probabilities: each must be finite, none "
            "below zero, and a row must sum to one.",
            problems,
            "Write the softmax of the network, in 32-bit floats, not its logits.",
        )
    return values / sums[:, None]
