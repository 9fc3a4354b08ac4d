"""Is one model better than another? A paired comparison over compounds; and ensembles of networks.

Both models are asked about the same treatments. The treatments of one compound are right or wrong together, so that the
compound is what a test may exchange: under the null hypothesis that the models are equally good, the difference of
right treatments of each compound could as well have the other sign (a permutation test for paired samples; Good 2005,
Permutation, Parametric and Bootstrap Tests of Hypotheses, 3rd ed.). All sign patterns are counted, however many
compounds there are: differences are small whole numbers, whose sum's distribution is built up compound by compound.
Beside it, the exact test of McNemar 1947 (Psychometrika 12(2) 153-157) takes treatments as independent, which they are
not: its p is too small where compounds have several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from cellhpc.levels import KEYS, average_tables, combine
from cellhpc.scores import confusion, draws, percentiles95, score

TEST = "exact sign-flip permutation test over compounds, two-sided"
_OF_CALLS = ["tiles", "call", "correct", "top2"]


def compare(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any] | None:
    """Compare two models on the treatments that both were asked.

    Parameters
    ----------
    first, second
        Treatments of `levels.combine`, of one model each.

    Returns
    -------
    dict or None
        None where they share no treatment. Else `units` ("compounds"), `compounds` (how many), `treatments` (how many),
        of which only the first (`a_only`), only the second (`b_only`), `both` and `neither` are right; `difference` of
        the accuracies (first minus second), `bootstrap95` of it over compounds (None for one compound), `p_value` of
        `test`, and `mcnemar_p`.
    """
    keys = [name for name in ("fold", "treatment") if name in first and name in second]
    both = first[[*keys, "compound", "correct"]].merge(second[[*keys, "correct"]], on=keys, suffixes=("_a", "_b"))
    if both.empty:
        return None
    a, b = both["correct_a"].to_numpy(dtype=bool), both["correct_b"].to_numpy(dtype=bool)
    compounds, names = pd.factorize(both["compound"].to_numpy(), sort=True)
    differences = np.rint(np.bincount(compounds, weights=a.astype(float) - b)).astype(np.int64)
    only = int((a & ~b).sum()), int((b & ~a).sum())
    interval = None
    if len(names) > 1:
        drawn = draws(len(names))
        interval = percentiles95((drawn @ differences) / (drawn @ np.bincount(compounds)))
    return {
        "units": "compounds",
        "compounds": len(names),
        "treatments": len(both),
        "a_only": only[0],
        "b_only": only[1],
        "both": int((a & b).sum()),
        "neither": int((~a & ~b).sum()),
        "difference": float(a.mean() - b.mean()),
        "bootstrap95": interval,
        "p_value": sign_flip_p(differences),
        "test": TEST,
        "mcnemar_p": float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0,
    }


def sign_flip_p(differences: NDArray) -> float:
    """Two-sided p of the sum of paired differences, when the sign of each is a fair coin.

    Parameters
    ----------
    differences
        Whole numbers, int64 (n,).

    Returns
    -------
    float
        Share of the 2 ** n sign patterns whose sum is at least as far from zero as the one that was found.
    """
    sizes = np.abs(differences[differences != 0])
    reach = int(sizes.sum())
    shares = np.zeros(2 * reach + 1)  # of the sums -reach .. reach
    shares[reach] = 1.0
    for size in sizes:
        shares = (np.roll(shares, size) + np.roll(shares, -size)) / 2  # never reaches the ends before the last size
    return float(min(1.0, shares[np.abs(np.arange(-reach, reach + 1)) >= abs(int(differences.sum()))].sum()))


def comparisons(models: Mapping[tuple[str, str], pd.DataFrame]) -> list[dict[str, Any]]:
    """Compare all pairs of models that differ in one thing alone: the network, or where it starts.

    Parameters
    ----------
    models
        Treatments of each model, by network and initialisation.

    Returns
    -------
    list
        For each pair the two names, `a` and `b`, and what `compare` gives.
    """
    found = []
    for (one, first), (other, second) in combinations(models.items(), 2):
        if sum(mine != theirs for mine, theirs in zip(one, other, strict=True)) == 1:
            result = compare(first, second)
            found += [{"a": _name(one), "b": _name(other), **result}] if result else []
    return found


def ensembles(models: Mapping[tuple[str, str], pd.DataFrame], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Score the mean of all networks that start from the same weights: the mean probability of each treatment.

    Parameters
    ----------
    models
        Treatments of each model, by network and initialisation.
    classes
        All classes.

    Returns
    -------
    list
        For each initialisation of two networks or more: `name`, `networks`, `initialisation`, `treatment` as
        `scores.entry` gives it, `confusion` as `scores.confusion` gives it, in rows, and `wrong`, the names of the
        treatments that are wrong. Treatments that a network was not asked are left out.
    """
    found = []
    for start in dict.fromkeys(start for _, start in models):
        tables = {network: table for (network, own), table in models.items() if own == start}
        if len(tables) < 2:
            continue
        keys = [name for name in KEYS["treatment"] if all(name in table for table in tables.values())]
        counts = pd.concat([table[keys] for table in tables.values()]).value_counts()
        common = counts[counts == len(tables)].reset_index()[keys]
        if len(common):
            asked = [common.merge(table.drop(columns=_OF_CALLS), on=keys) for table in tables.values()]
            treatments = combine(average_tables(asked))["treatment"]
            about = {"networks": list(tables), "initialisation": start}
            wrong = treatments.loc[~treatments["correct"], "treatment"].tolist()
            of = score({"treatment": treatments})
            matrix = confusion(treatments, classes).to_numpy().tolist()
            name = f"mean of {len(tables)} networks, {start}"
            found.append({"name": name, **about, **of, "confusion": matrix, "wrong": wrong})
    return found


def _name(model: Sequence[str]) -> str:
    return ", ".join(model)
