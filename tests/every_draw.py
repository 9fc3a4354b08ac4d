"""The bootstrap over compounds without chance: every way to draw them with replacement, by its probability."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd


def exact_interval(table: pd.DataFrame, statistic: Callable[[pd.DataFrame], float]) -> list[float]:
    """Percentiles 2.5 and 97.5 of a statistic of a table, over all draws of its compounds."""
    parts = [rows for _, rows in table.groupby("compound")]
    values, ways = [], []
    for chosen in combinations_with_replacement(range(len(parts)), len(parts)):
        values.append(statistic(pd.concat([parts[one] for one in chosen])))
        ways.append(math.factorial(len(parts)) // math.prod(map(math.factorial, np.bincount(chosen))))
    order = np.argsort(values)
    below = np.cumsum(np.array(ways)[order]) / sum(ways)
    return [float(np.array(values)[order][np.searchsorted(below, share)]) for share in (0.025, 0.975)]
