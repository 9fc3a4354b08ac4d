"""Predictions to calls: tile -> field -> well -> treatment, accuracies with intervals, confusion, baselines.

A table of predictions has one row a held-out tile: the columns `plate`, `well`, `field`, `tile`, `treatment`,
`compound` and `label`, and one column `p_<class>` for each class, whose rows sum to one. Further columns (`batch`,
`concentration`, `replicate`, ...) travel along. A column `fold`, where there is one, keeps apart the treatments of
different folds (a treatment is held out twice when cell lines are held out, and once when compounds are).

Probabilities are combined by one of two rules:

- `mean`: each level is the mean of the level below it.
- `median`: the rule of Kensert, Harrison & Spjuth 2019 (SLAS Discovery 24(4) 466-475): a field and a well are the
  element-wise median of their tiles, a treatment is the median of its wells (its replicates). Medians do not sum to
  one: every level is renormalised for its own table, but the treatment is computed from the medians themselves, so
  that its call is the paper's. Where every median is zero (no class in half of the parts) the mean stands in.

The call is the class of the highest probability; of equal ones, the first in the order of the columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from cellhpc.errors import DataError, listing

How: TypeAlias = Literal["mean", "median"]

LEVELS = ("tile", "field", "well", "treatment")
PREFIX = "p_"
KEYS = {
    "tile": ("plate", "well", "field", "tile"),
    "field": ("plate", "well", "field"),
    "well": ("plate", "well"),
    "treatment": ("fold", "treatment"),
}
_BELOW = {
    "mean": {"field": "tile", "well": "field", "treatment": "well"},
    "median": {"field": "tile", "well": "tile", "treatment": "well"},
}
_CONSTANT = {
    "tile": (),
    "field": ("fold", "treatment", "compound", "label"),
    "well": ("fold", "treatment", "compound", "label"),
    "treatment": ("compound", "label"),
}
_NEEDED = ("plate", "well", "field", "tile", "treatment", "compound", "label")
_NOT_OF_A_LEVEL = {
    "tile": (),
    "field": ("tile",),
    "well": ("tile", "field"),
    "treatment": ("tile", "field", "plate", "well", "batch", "replicate"),
}
_SUM_TOLERANCE = 1e-3


def classes_of(predictions: pd.DataFrame) -> list[str]:
    """Classes of a table of predictions, in the order of its columns."""
    return [name.removeprefix(PREFIX) for name in predictions.columns if str(name).startswith(PREFIX)]


def combine(predictions: pd.DataFrame, how: How = "mean") -> dict[str, pd.DataFrame]:
    """Combine the predictions of tiles to those of fields, wells and treatments.

    Parameters
    ----------
    predictions
        One row a held-out tile (see the module's text).
    how
        `mean` or `median`.

    Returns
    -------
    dict
        For each of `LEVELS` a table with one row a unit: its keys and what describes it, `tiles` (how many it stands
        on), `call`, `correct`, and the probabilities `p_<class>` (float64, rows sum to one). Treatments are sorted by
        label, compound and concentration, the others by their keys.

    Raises
    ------
    DataError
        Columns are missing, probabilities are none, tiles are there twice, or a unit has two labels.
    """
    classes = classes_of(predictions)
    tables = {}
    for level, (first, probabilities, tiles) in _climb(predictions, how).items():
        columns = [PREFIX + name for name in classes]
        table = predictions.drop(columns=[*columns, *_NOT_OF_A_LEVEL[level]], errors="ignore")
        table = table.iloc[first].reset_index(drop=True)
        table["tiles"] = tiles
        table["call"] = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
        table["correct"] = table["call"] == table["label"]
        table = pd.concat([table, pd.DataFrame(probabilities, columns=columns)], axis=1)
        order = ("label", "compound", "concentration", "treatment", "fold") if level == "treatment" else KEYS[level]
        table = table.sort_values([name for name in order if name in table], kind="stable")
        tables[level] = table.reset_index(drop=True)
    return tables


def levels(predictions: pd.DataFrame, how: How = "mean") -> dict[str, dict[str, Any]]:
    """Accuracy at each of `LEVELS`; the same arithmetic as `combine`, without its tables.

    Returns
    -------
    dict
        For each level what `accuracy` gives.

    Raises
    ------
    DataError
        As `combine`.
    """
    combined = _climb(predictions, how)
    truth = _label_codes(predictions, classes_of(predictions))
    return {
        level: accuracy(int((probabilities.argmax(axis=1) == truth[first]).sum()), len(first))
        for level, (first, probabilities, _) in combined.items()
    }


def average_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Average the probabilities of several models for each tile (an ensemble); the other columns are the first table's.

    A tile that only some of the tables hold is the mean of those.
    """
    stacked = pd.concat(tables, ignore_index=True)
    columns = [name for name in stacked.columns if str(name).startswith(PREFIX)]
    codes = _unit_codes(stacked, KEYS["tile"])
    first: NDArray = np.unique(codes, return_index=True)[1]
    averaged = stacked.iloc[first].reset_index(drop=True)
    averaged[columns] = averaged[columns].astype(np.float64)
    averaged[columns] = _group_mean(stacked[columns].to_numpy(dtype=np.float64), codes)
    return averaged


def accuracy(correct: int, total: int) -> dict[str, Any]:
    """Accuracy with its counts and Wilson's 95 % interval (Wilson 1927, without continuity correction).

    Returns
    -------
    dict
        `correct`, `total`, `accuracy` (0 to 1), `wilson95` ([low, high]).
    """
    correct, total = int(correct), int(total)
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is no accuracy")
    return {"correct": correct, "total": total, "accuracy": correct / total, "wilson95": list(_wilson(correct, total))}


@lru_cache(maxsize=4096)
def _wilson(correct: int, total: int) -> tuple[float, float]:
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def check_probabilities(predictions: pd.DataFrame) -> NDArray:
    """Give the probabilities (tiles, classes) as float64, each row summing to one to its precision.

    Raises
    ------
    DataError
        Columns are missing, a label is none of the classes, or a row holds no probabilities: every such row is listed.
    """
    missing = [name for name in _NEEDED if name not in predictions]
    classes = classes_of(predictions)
    if not classes:
        missing.append("p_<class>, one for each class")
    if missing:
        raise DataError(
            "The table of predictions lacks columns.",
            [f"no column {name}" for name in missing],
            f"Found: {listing(predictions.columns, 30)}.",
        )
    if predictions.empty:
        raise DataError("The table of predictions has no rows.")
    _label_codes(predictions, classes)
    values = predictions[[PREFIX + name for name in classes]].to_numpy(dtype=np.float64)
    sums = values.sum(axis=1)
    wrong = ~np.isfinite(values).all(axis=1) | (values < 0).any(axis=1) | ~(np.abs(sums - 1) <= _SUM_TOLERANCE)
    if wrong.any():
        problems = [
            f"{_place(predictions, row)}: sum {sums[row]:.6g}, lowest {values[row].min():.6g}"
            for row in np.flatnonzero(wrong)
        ]
        raise DataError(
            f"{wrong.sum()} of {len(values)} rows of predictions hold no probabilities: each must be finite, none "
            "below zero, and a row must sum to one.",
            problems,
            "Write the softmax of the network, in 32-bit floats, not its logits.",
        )
    return values / sums[:, None]


def bootstrap_over_compounds(table: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> list[float] | None:
    """Percentile interval (95 %) of the accuracy when whole compounds are drawn with replacement.

    Treatments of one compound are right or wrong together: the compound can be exchanged for another, its tiles can't.

    Parameters
    ----------
    table
        One of the tables of `combine`, with the columns `compound` and `correct`.
    resamples, seed
        Draws, and the seed of the random generator; the same seed gives the same interval.

    Returns
    -------
    list or None
        [low, high]; None for fewer than two compounds.
    """
    compounds, names = pd.factorize(table["compound"])
    if len(names) < 2:
        return None
    total = np.bincount(compounds)
    correct = np.bincount(compounds, weights=table["correct"].to_numpy(dtype=float))
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    low, high = np.percentile((draws @ correct) / (draws @ total), [2.5, 97.5])
    return [float(low), float(high)]


def score(tables: dict[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """Accuracy of each table of `combine`: what `accuracy` gives, and `bootstrap95` over compounds (None for one)."""
    return {
        level: {**accuracy(int(table["correct"].sum()), len(table)), "bootstrap95": bootstrap_over_compounds(table)}
        for level, table in tables.items()
    }


def confusion(treatments: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Confusion matrix of hard calls: counts, rows are true labels, columns are calls, in the order of `classes`."""
    counts = confusion_matrix(treatments["label"], treatments["call"], labels=list(classes))
    return pd.DataFrame(counts, index=pd.Index(classes, name="label"), columns=pd.Index(classes, name="call"))


def by_compound(treatments: pd.DataFrame) -> pd.DataFrame:
    """Count right treatments for each compound: `compound`, `label`, `correct`, `total`; the most wrong first."""
    table = treatments.groupby(["compound", "label"], as_index=False, observed=True).agg(
        correct=("correct", "sum"), total=("correct", "size")
    )
    table["wrong"] = table["total"] - table["correct"]
    return (
        table.sort_values(["wrong", "compound"], ascending=[False, True]).drop(columns="wrong").reset_index(drop=True)
    )


def baselines(wells: pd.DataFrame, classes: Sequence[str]) -> dict[str, Any]:
    """Say what is reached without looking at a picture, over the same treatments and folds.

    Parameters
    ----------
    wells
        The wells of `combine`; `fold` says which are held out together (without it, compounds are).
    classes
        All classes.

    Returns
    -------
    dict
        `chance`: 1 / classes. `majority`: the label of most training treatments of the fold, for each of its
        treatments. `batch_only`: the commonest label among the training treatments that share a batch with the
        treatment, or the majority where none does. The last two are as `accuracy` gives, or None where the table has
        no training treatments (a single fold) or no batches. Of equally common labels the first in alphabetical order
        is taken.
    """
    wells = wells.assign(
        fold=wells["fold"] if "fold" in wells else wells["compound"],
        batch=wells["batch"].astype(object).fillna("") if "batch" in wells else "",
    )
    by_treatment = wells.groupby(["fold", "treatment"], sort=True, observed=True)
    units = by_treatment.agg(label=("label", "first"), batches=("batch", lambda names: frozenset(names) - {""}))
    folds = units.index.get_level_values("fold")
    chance = 1 / len(classes)
    if len(units) == 0 or folds.nunique() < 2:
        return {"chance": chance, "majority": None, "batch_only": None}
    majority_right = batch_right = 0
    for fold in folds.unique():
        training = units[folds != fold]
        majority = _commonest(training["label"])
        for label, batches in zip(units.loc[[fold], "label"], units.loc[[fold], "batches"], strict=True):
            together = training["label"][[bool(batches & others) for others in training["batches"]]]
            majority_right += label == majority
            batch_right += label == (_commonest(together) if len(together) else majority)
    batch_only = accuracy(batch_right, len(units)) if units["batches"].any() else None
    return {"chance": chance, "majority": accuracy(majority_right, len(units)), "batch_only": batch_only}


def _commonest(labels: pd.Series) -> str:
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def _climb(predictions: pd.DataFrame, how: How) -> dict[str, tuple[NDArray, NDArray, NDArray]]:
    """For each level: row of one tile of each unit (units,), probabilities (units, classes), tiles (units,)."""
    if how not in _BELOW:
        raise ValueError(f"how is {how!r}; allowed: {listing(_BELOW)}")
    raw = {"tile": check_probabilities(predictions)}
    first = {"tile": np.arange(len(predictions))}
    tiles = {"tile": np.ones(len(predictions), dtype=np.int64)}
    _refuse_duplicates(predictions)
    for level in LEVELS[1:]:
        unit_of_tile = _unit_codes(predictions, KEYS[level])
        _refuse_mixtures(predictions, level, unit_of_tile)
        below = _BELOW[how][level]
        first[level] = np.unique(unit_of_tile, return_index=True)[1]
        tiles[level] = np.bincount(unit_of_tile)
        raw[level] = (_group_mean if how == "mean" else _group_median)(raw[below], unit_of_tile[first[below]])
    return {level: (first[level], raw[level] / raw[level].sum(axis=1, keepdims=True), tiles[level]) for level in LEVELS}


def _unit_codes(table: pd.DataFrame, columns: Sequence[str]) -> NDArray:
    """Give each row the number, 0, 1, 2, ..., of its combination of values in some columns (int64)."""
    codes = np.zeros(len(table), dtype=np.int64)
    for name in columns:
        if name in table:
            part, values = pd.factorize(table[name].to_numpy())
            codes = np.unique(codes * (len(values) + 1) + part + 1, return_inverse=True)[1]
    return codes


def _group_mean(values: NDArray, groups: NDArray) -> NDArray:
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups)
    starts = np.cumsum(counts) - counts
    return np.add.reduceat(values[order], starts, axis=0) / counts[:, None]


def _group_median(values: NDArray, groups: NDArray) -> NDArray:
    """Element-wise median of the rows of each group; where all its elements are zero, the mean."""
    counts = np.bincount(groups)
    starts = np.cumsum(counts) - counts
    medians = np.empty((len(counts), values.shape[1]))
    for column in range(values.shape[1]):
        ordered = values[np.lexsort((values[:, column], groups)), column]
        medians[:, column] = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) / 2
    empty = medians.sum(axis=1) == 0
    if empty.any():
        medians[empty] = _group_mean(values, groups)[empty]
    return medians


def _label_codes(predictions: pd.DataFrame, classes: Sequence[str]) -> NDArray:
    """Position of each row's label among the classes."""
    codes = pd.Index(classes).get_indexer(pd.Index(predictions["label"]))
    if (codes < 0).any():
        unknown = predictions["label"][codes < 0]
        raise DataError(
            "Labels in the table of predictions are not among its classes.",
            [f"{label!r}: {count} rows" for label, count in Counter(unknown).items()],
            f"Classes (columns p_<class>): {listing(classes, 30)}.",
        )
    return codes


def _refuse_duplicates(predictions: pd.DataFrame) -> None:
    codes = _unit_codes(predictions, KEYS["tile"])
    counts = np.bincount(codes)
    if counts.max() > 1:
        first = np.unique(codes, return_index=True)[1][counts > 1]
        times = counts[counts > 1]
        raise DataError(
            f"{len(first)} tiles are predicted more than once.",
            [f"{_place(predictions, row)}: {n} rows" for row, n in zip(first, times, strict=True)],
            "Each tile is held out exactly once: look for a fold that was given twice.",
        )


def _refuse_mixtures(predictions: pd.DataFrame, level: str, unit_of_tile: NDArray) -> None:
    """Every field and well has one treatment, every treatment one compound and one label."""
    first = np.unique(unit_of_tile, return_index=True)[1]
    problems = []
    for name in _CONSTANT[level]:
        if name not in predictions:
            continue
        codes = pd.factorize(predictions[name].to_numpy())[0]
        differs = np.flatnonzero(codes != codes[first][unit_of_tile])
        for unit in np.unique(unit_of_tile[differs]):
            values = predictions[name].to_numpy()[unit_of_tile == unit]
            where = ", ".join(
                f"{key} {predictions[key].iloc[first[unit]]}" for key in KEYS[level] if key in predictions
            )
            problems.append(f"{where}: {name} {listing(set(values))}")
    if problems:
        raise DataError(f"A {level} must be of one kind, but some hold several.", problems)


def _place(predictions: pd.DataFrame, row: int) -> str:
    return ", ".join(f"{key} {predictions[key].iloc[row]}" for key in KEYS["tile"])
