"""Calls to accuracies: intervals, macro means, confusion, spread over seeds, and what is reached without looking.

All of it is of the tables that `cellhpc.levels` makes of predictions; what that module offers is at hand here too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from cellhpc.levels import (
    KEYS,
    LEVELS,
    PREFIX,
    How,
    Ladder,
    average_tables,
    check_probabilities,
    classes_of,
    combine,
)

__all__ = [
    "KEYS", "LEVELS", "PREFIX", "How", "accuracy", "average_tables", "baselines", "bootstrap",
    "bootstrap_over_compounds", "by_compound", "by_label", "check_probabilities", "classes_of", "combine", "confusion",
    "counted", "draws", "entry", "levels", "macro", "per_compound", "percent", "percentiles95", "score", "spread",
]  # fmt: skip

RESAMPLES = 2000
"""Draws of a bootstrap."""
BASELINES = {"majority": "commonest class of training", "batch_only": "commonest class of the batch"}
"""What is reached without looking at a picture, in words."""


def levels(predictions: pd.DataFrame, how: How = "mean") -> dict[str, dict[str, Any]]:
    """Accuracy at each level; the same arithmetic as `combine`, without its tables.

    Returns
    -------
    dict
        For each level what `accuracy` gives.

    Raises
    ------
    DataError
        As `combine`.
    """
    probabilities = check_probabilities(predictions)
    ladder = Ladder(predictions, classes_of(predictions))
    return {
        level: accuracy(
            int((scored.calls() == ladder.truth[ladder.units[level].first]).sum()), len(scored.probabilities)
        )
        for level, scored in ladder.climb(probabilities, how).items()
    }


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
    return {"correct": correct, "total": total, "accuracy": correct / total, "wilson95": _wilson(correct, total)}


def percent(share: float) -> str:
    """Write a share as percent with one digit, without the sign."""
    return f"{100 * share:.1f}"


def counted(accuracy: Mapping[str, Any]) -> tuple[str, str, str]:
    """Write counts, accuracy and Wilson interval."""
    low, high = accuracy["wilson95"]
    return (
        f"{accuracy['correct']}/{accuracy['total']}",
        percent(accuracy["accuracy"]),
        f"{percent(low)} to {percent(high)}",
    )


def _wilson(correct: int, total: int) -> list[float]:
    share, z = correct / total, NormalDist().inv_cdf(0.975)
    middle, weight = share + z**2 / (2 * total), 1 + z**2 / total
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low = (middle - half) / weight if correct else 0.0
    return [low, (middle + half) / weight if correct < total else 1.0]


@lru_cache(maxsize=8)
def draws(compounds: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray:
    """Draw compounds with replacement: how often each is drawn, float64 (resamples, compounds); not to be changed."""
    drawn = np.random.default_rng(seed).multinomial(compounds, np.full(compounds, 1 / compounds), size=resamples)
    counts = drawn.astype(np.float64)
    counts.flags.writeable = False
    return counts


def bootstrap(correct: NDArray, total: NDArray, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """Percentile interval (95 %) of the accuracy when whole compounds are drawn with replacement.

    Treatments of one compound are right or wrong together: the compound can be exchanged for another, its tiles can't.

    Parameters
    ----------
    correct, total
        Right units of each compound, and all of them, (compounds,).
    resamples, seed
        Draws, and the seed of the random generator; the same seed gives the same interval.

    Returns
    -------
    list or None
        [low, high]; None for fewer than two compounds.
    """
    if len(total) < 2:
        return None
    drawn = draws(len(total), resamples, seed)
    return percentiles95((drawn @ correct) / (drawn @ total))


def percentiles95(values: NDArray) -> list[float]:
    """Interval of 95 % of what a bootstrap drew: [2.5th percentile, 97.5th percentile]."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def bootstrap_over_compounds(table: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """Give the interval of `bootstrap` for a table with the columns `compound` and `correct`."""
    correct, total = per_compound(table, "correct")
    return bootstrap(correct, total, resamples, seed)


def per_compound(table: pd.DataFrame, column: str) -> tuple[NDArray, NDArray]:
    """Count the units of each compound, in alphabetical order, for which a column is true: (counts, all units)."""
    compounds, names = pd.factorize(table["compound"].to_numpy(), sort=True)
    true = np.bincount(compounds, weights=table[column].to_numpy(dtype=float), minlength=len(names))
    return true, np.bincount(compounds, minlength=len(names))


def entry(correct: NDArray, total: NDArray, top2: NDArray | None = None) -> dict[str, Any]:
    """Score the units of one level.

    Parameters
    ----------
    correct, total, top2
        For each compound, in alphabetical order: right units, all of them, and those of which the true label is one of
        the first two.

    Returns
    -------
    dict
        What `accuracy` gives, `bootstrap95` over compounds (None for one), and `top2` as `accuracy` gives it.
    """
    found = {**accuracy(int(correct.sum()), int(total.sum())), "bootstrap95": bootstrap(correct, total)}
    return found if top2 is None else {**found, "top2": accuracy(int(top2.sum()), int(total.sum()))}


def score(tables: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """Score each table of `combine`: what `entry` gives; without `top2` where the table has no such column."""
    return {
        level: entry(*per_compound(table, "correct"), per_compound(table, "top2")[0] if "top2" in table else None)
        for level, table in tables.items()
    }


def macro(treatments: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Mean accuracy of treatments over compounds, and over labels: each weighs the same, however many treatments.

    Parameters
    ----------
    treatments
        The treatments of `combine`.

    Returns
    -------
    dict
        For `compound` and `label`: `accuracy`, `of` (how many) and `bootstrap95` over compounds (None for one).
        A label none of whose compounds is drawn takes no part in that draw.
    """
    compounds, names = pd.factorize(treatments["compound"].to_numpy(), sort=True)
    labels, kinds = pd.factorize(treatments["label"].to_numpy(), sort=True)
    shape = (len(names), len(kinds))
    cell = np.ravel_multi_index((compounds, labels), shape)
    correct = np.bincount(cell, treatments["correct"].to_numpy(dtype=float), minlength=np.prod(shape)).reshape(shape)
    total = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
    own = correct.sum(axis=1) / total.sum(axis=1)
    of_labels = correct.sum(axis=0) / total.sum(axis=0)
    over_compounds = over_labels = None
    if len(names) > 1:
        drawn = draws(len(names))
        over_compounds = percentiles95(drawn @ own / len(names))
        right, asked = drawn @ correct, drawn @ total
        shares = np.divide(right, asked, out=np.full(right.shape, np.nan), where=asked > 0)
        over_labels = percentiles95(np.nanmean(shares, axis=1))
    return {
        "compound": {"accuracy": float(own.mean()), "of": len(names), "bootstrap95": over_compounds},
        "label": {"accuracy": float(of_labels.mean()), "of": len(kinds), "bootstrap95": over_labels},
    }


def spread(accuracies: Sequence[float]) -> dict[str, Any] | None:
    """Describe how the accuracies of single seeds differ; None for fewer than two.

    Returns
    -------
    dict or None
        `seeds`, `mean`, `sd` (of a sample: n - 1), `lowest`, `highest`.
    """
    if len(accuracies) < 2:
        return None
    values = np.asarray(accuracies, np.float64)
    extremes = {"lowest": float(values.min()), "highest": float(values.max())}
    return {"seeds": len(values), "mean": float(values.mean()), "sd": float(values.std(ddof=1)), **extremes}


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


def by_label(treatments: pd.DataFrame) -> list[dict[str, Any]]:
    """Score the treatments of each label: `label`, `compounds` (how many), and what `accuracy` gives; by name."""
    return [
        {
            "label": str(label),
            "compounds": int(own["compound"].nunique()),
            **accuracy(int(own["correct"].sum()), len(own)),
        }
        for label, own in treatments.groupby("label", observed=True)
    ]


def baselines(wells: pd.DataFrame, classes: Sequence[str]) -> dict[str, Any]:
    """Say what is reached without looking at a picture, over the same treatments and folds.

    Parameters
    ----------
    wells
        The wells of `combine`, or one row for each `treatment` and `batch`; `fold` says which are held out together
        (without it, compounds are).
    classes
        All classes.

    Returns
    -------
    dict
        `chance`: 1 / classes. `majority`: the label of most training treatments of the fold, for each of its
        treatments. `batch_only`: the commonest label among the training treatments that share a batch with the
        treatment, or the majority where none does. The last two are as `accuracy` gives, or None where the table has
        no training treatments (a single fold) or no batches. Of equally common labels the first in alphabetical order
        is taken. `table`: those that there are as rows: `name`, `words`, what `accuracy` gives, and `not_scorable`.
    """
    units = labelled(wells.assign(fold=wells["fold"] if "fold" in wells else wells["compound"]), ["fold", "treatment"])
    folds = units.index.get_level_values("fold")
    pairs = [(units.loc[[fold]], units[folds != fold]) for fold in folds.unique()] if folds.nunique() > 1 else []
    return blind(pairs, classes)


def labelled(wells: pd.DataFrame, by: Sequence[str] = ("treatment",)) -> pd.DataFrame:
    """Give each treatment its `label` and its `batches`, none where they are not known; of wells or fields."""
    batch = wells["batch"].astype(object).fillna("") if "batch" in wells else ""
    groups = wells.assign(batch=batch).groupby([*by], sort=True, observed=True)
    return groups.agg(label=("label", "first"), batches=("batch", lambda names: frozenset(names) - {""}))


def blind(pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]], classes: Sequence[str]) -> dict[str, Any]:
    """Score calls that look at no picture; gives what `baselines` gives.

    Parameters
    ----------
    pairs
        For each fold the treatments that it asks and those that it trains on, as `labelled` gives them.
    classes
        All classes.
    """
    chance = 1 / len(classes)
    if not pairs:
        return {"chance": chance, "majority": None, "batch_only": None, "table": []}
    total = majority_right = batch_right = 0
    for asked, training in pairs:
        majority = _commonest(training["label"])
        for label, batches in zip(asked["label"], asked["batches"], strict=True):
            together = training["label"][[bool(batches & others) for others in training["batches"]]]
            majority_right += label == majority
            batch_right += label == (_commonest(together) if len(together) else majority)
        total += len(asked)
    batch_only = accuracy(batch_right, total) if any(asked["batches"].any() for asked, _ in pairs) else None
    found = {"majority": accuracy(majority_right, total), "batch_only": batch_only}
    table = [{"name": name, "words": BASELINES[name], **at, "not_scorable": 0} for name, at in found.items() if at]
    return {"chance": chance, **found, "table": table}


def _commonest(labels: pd.Series) -> str:
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))
