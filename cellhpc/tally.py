"""The scores of one model, counted as its folds come.

A fold is added with the probabilities of every seed, and forgotten: what stays are counts of each level and compound,
and the tables of treatments and compounds. So thousands of runs take no more memory than a few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellhpc import scores
from cellhpc.levels import KEYS, PREFIX, How, Ladder, Scored, average_tables, check_probabilities, in_order, unit_table

KEPT = ("treatment", "compound")
"""Levels whose tables are kept."""


class Tally:
    """Right units of each level and compound, counted fold by fold."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, list[int]]] = {}
        self._added: dict[str, int] = {}

    def add(self, ladder: Ladder, climbed: Mapping[str, Scored]) -> None:
        """Count the units of a fold, as `Ladder.climb` scored them."""
        codes, names = ladder.compounds
        for level, scored in climbed.items():
            first = ladder.units[level].first
            rank, own = scored.rank(ladder.truth[first]), codes[first]
            counts = [np.bincount(own[kept], minlength=len(names)) for kept in (rank == 0, rank < 2, rank >= 0)]
            known = self._counts.setdefault(level, {})
            for name, *new in zip(names, *(count.tolist() for count in counts), strict=True):
                before = known.get(name, (0, 0, 0))
                known[name] = [one + other for one, other in zip(before, new, strict=True)]
            self._added[level] = self._added.get(level, 0) + 1

    def levels(self) -> dict[str, dict[str, Any]]:
        """Score each level that all folds have: what `scores.entry` gives."""
        folds = max(self._added.values())
        found = {}
        for level, known in self._counts.items():
            if self._added[level] == folds:
                correct, top2, total = np.array([known[name] for name in sorted(known)], np.float64).T
                found[level] = scores.entry(correct, total, top2)
        return found


class ModelTally:
    """One model, whose folds come one by one.

    Parameters
    ----------
    classes
        Classes, in the order of the probabilities.
    how
        How they are combined.

    Attributes
    ----------
    seeds
        Counts of each seed.
    """

    def __init__(self, classes: Sequence[str], how: How) -> None:
        self.classes, self.how = tuple(classes), how
        self.seeds: dict[int, Tally] = {}
        self._whole = Tally()
        self._kept: dict[str, list[pd.DataFrame]] = {level: [] for level in KEPT}
        self._members: list[tuple[int, list[tuple[Any, ...]], NDArray]] = []

    def add(self, members: Mapping[int, tuple[Ladder, NDArray]]) -> tuple[Ladder, dict[str, Scored]]:
        """Add a fold.

        Parameters
        ----------
        members
            For each seed the units of the fold, and the probabilities of its rows, float64 (rows, classes).

        Returns
        -------
        ladder, scored
            The units of the ensemble of the seeds (mean probability of each row), and what is scored of each level.
        """
        climbed = {}
        for seed, (ladder, values) in members.items():
            climbed[seed] = ladder.climb(values, self.how)
            self.seeds.setdefault(seed, Tally()).add(ladder, climbed[seed])
            names = _names(ladder.table.iloc[ladder.units["treatment"].first])
            self._members.append((seed, names, climbed[seed]["treatment"].probabilities.astype(np.float32)))
        ladder, values = self._ensemble(list(members.values()))
        whole = next(iter(climbed.values())) if len(members) == 1 else ladder.climb(values, self.how)
        self._whole.add(ladder, whole)
        for level in whole.keys() & self._kept.keys():
            self._kept[level].append(unit_table(ladder, level, whole[level]))
        return ladder, whole

    def _ensemble(self, members: Sequence[tuple[Ladder, NDArray]]) -> tuple[Ladder, NDArray]:
        first = members[0][0]
        if all(ladder is first for ladder, _ in members):
            return first, np.mean([values for _, values in members], axis=0)
        columns = [PREFIX + name for name in self.classes]
        tables = [pd.concat([own.table, pd.DataFrame(values, columns=columns)], axis=1) for own, values in members]
        averaged = average_tables(tables)
        return Ladder(averaged.drop(columns=columns), self.classes), check_probabilities(averaged)

    @property
    def compounds(self) -> pd.DataFrame | None:
        """Table of the compounds of all folds; None where a fold has no such level."""
        if "compound" not in self._whole.levels():
            return None
        return in_order(pd.concat(self._kept["compound"], ignore_index=True), "compound").reset_index(drop=True)

    @property
    def treatments(self) -> pd.DataFrame:
        """Table of the treatments of all folds."""
        return in_order(pd.concat(self._kept["treatment"], ignore_index=True), "treatment").reset_index(drop=True)

    def members(self) -> NDArray:
        """Give the probabilities of each seed, float32 (seeds, treatments, classes); NaN where a seed lacks a fold.

        Seeds are in ascending order, treatments in that of `treatments`.
        """
        row = {name: number for number, name in enumerate(_names(self.treatments))}
        at = {seed: number for number, seed in enumerate(sorted(self.seeds))}
        found = np.full((len(at), len(row), len(self.classes)), np.nan, np.float32)
        for seed, names, values in self._members:
            found[at[seed], [row[name] for name in names]] = values
        return found

    def document(self) -> dict[str, Any]:
        """Score the model: the part of its entry in `scores.json` that is of predictions alone."""
        treatments = self.treatments
        levels = self._whole.levels()
        seeds = sorted(self.seeds)
        of_seeds = {seed: self.seeds[seed].levels() for seed in seeds}
        whole = [entry["treatment"] for entry in of_seeds.values()]
        several = f"ensemble of {len(seeds)} seeds (mean probability of each {next(iter(levels))})"
        wrong = treatments[~treatments["correct"]]
        return {
            "seeds": seeds,
            "levels_of": several if len(seeds) > 1 else f"seed {seeds[0]}",
            "levels": levels,
            "by_seed": {str(seed): {"levels": entry} for seed, entry in of_seeds.items()},
            "macro": scores.macro(treatments),
            "spread": scores.spread([at["accuracy"] for at in whole if at["total"] == len(treatments)]),
            "confusion": scores.confusion(treatments, self.classes).to_numpy().tolist(),
            "by_label": scores.by_label(treatments),
            "by_compound": scores.by_compound(treatments).to_dict("records"),
            "wrong": [
                {
                    **{name: str(row[name]) for name in ("treatment", "compound", "label", "call")},
                    "p_call": float(row[PREFIX + row["call"]]),
                    "p_label": float(row[PREFIX + row["label"]]),
                }
                for row in wrong.to_dict("records")
            ],
        }


def _names(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Give what tells the treatments of a table apart."""
    return list(zip(*(table[name] for name in KEYS["treatment"] if name in table), strict=True))
