"""The scores of one model, counted as its folds come.

A fold is added with the probabilities of every seed, and forgotten: what stays are counts of each level and compound,
and the tables of treatments and compounds. So thousands of runs take no more memory than a few.

Rows whose column `unknown` is true are of a label that the networks of their fold never trained on. They can't be
right, and count for nothing here: what they are good for is to ask how uncertain the networks are about them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellhpc import scores
from cellhpc.levels import (
    PREFIX,
    Called,
    How,
    Ladder,
    Scored,
    average_tables,
    called_table,
    called_units,
    check_probabilities,
    in_order,
    names_of,
)
from cellhpc.uncertainty import Assessment, assess

KEPT = ("treatment", "compound")
"""Levels whose tables are kept."""


UNKNOWN = "unknown"
"""Column that marks rows of a label that was never trained on."""


@dataclass(frozen=True)
class Predicted:
    """What one seed predicts of a fold.

    Attributes
    ----------
    ladder
        The units of its rows.
    values
        Probabilities, float64 (rows, classes).
    draws
        Those of each draw of dropout, float64 (draws, rows, classes); none without.
    """

    ladder: Ladder
    values: NDArray
    draws: NDArray | None = None


class Tally:
    """Units of each level and compound: right ones, those whose label is one of the first two, and all of them."""

    def __init__(self) -> None:
        self._row: dict[str, int] = {}
        self._counts: dict[str, NDArray] = {}  # of each level, int64 (compounds, [right, of the first two, all])
        self._added: dict[str, int] = {}

    def add(self, ladder: Ladder, climbed: Mapping[str, Scored]) -> None:
        """Count the units of a fold, as `Ladder.climb` scored them."""
        codes, names = ladder.compounds
        rows = [self._row.setdefault(name, len(self._row)) for name in names]
        scorable = ~ladder.table[UNKNOWN].to_numpy() if UNKNOWN in ladder.table else np.ones(len(codes), bool)
        for level, scored in climbed.items():
            first = ladder.units[level].first
            rank, own, asked = scored.rank(ladder.truth[first]), codes[first], scorable[first]
            before = self._counts.get(level, np.zeros((0, 3), np.int64))
            counts = np.zeros((len(self._row), 3), np.int64)
            counts[: len(before)] = before
            for at, kept in enumerate((asked & (rank == 0), asked & (rank < 2), asked)):
                counts[rows, at] += np.bincount(own[kept], minlength=len(names))
            self._counts[level] = counts
            self._added[level] = self._added.get(level, 0) + 1

    def levels(self) -> dict[str, dict[str, Any]]:
        """Score each level that all folds have: what `scores.entry` gives."""
        folds = max(self._added.values())
        found, rows = {}, [row for _, row in sorted(self._row.items())]
        for level, counts in self._counts.items():
            if self._added[level] == folds:
                known = counts[rows]
                correct, top2, total = known[known[:, 2] > 0].T.astype(np.float64)
                found[level] = scores.entry(correct, total, top2)
        return found


class ModelTally:
    """One model, whose folds come one by one; its tables and what is known of it are asked when all have come.

    Parameters
    ----------
    classes
        Classes, in the order of the probabilities.
    how
        How they are combined.
    by
        What the folds hold out; empty where that is not known.

    Attributes
    ----------
    seeds
        Counts of each seed.
    """

    def __init__(self, classes: Sequence[str], how: How, by: str = "") -> None:
        self.classes, self.how, self.by = tuple(classes), how, by
        self.seeds: dict[int, Tally] = {}
        self._whole = Tally()
        self._kept: dict[str, list[Called]] = {level: [] for level in KEPT}
        self._members: dict[tuple[int, int], list[tuple[list[tuple[Any, ...]], NDArray]]] = defaultdict(list)
        self._drawn = False

    def add(self, members: Mapping[int, Predicted]) -> tuple[Ladder, dict[str, Scored]]:
        """Add a fold.

        Parameters
        ----------
        members
            What each seed predicts of the fold.

        Returns
        -------
        ladder, scored
            The units of the ensemble of the seeds (mean probability of each row), and what is scored of each level.
        """
        climbed = {}
        for seed, one in members.items():
            ladder = one.ladder
            climbed[seed] = ladder.climb(one.values, self.how)
            self.seeds.setdefault(seed, Tally()).add(ladder, climbed[seed])
            kept = [climbed[seed]] if one.draws is None else [ladder.climb(draw, self.how) for draw in one.draws]
            self._drawn |= one.draws is not None
            for draw, of_draw in enumerate(kept):
                self._members[seed, draw].append(
                    (ladder.treatments, of_draw["treatment"].probabilities.astype(np.float32))
                )
        ladder, values = self._ensemble(list(members.values()))
        whole = next(iter(climbed.values())) if len(members) == 1 else ladder.climb(values, self.how)
        self._whole.add(ladder, whole)
        for level in whole.keys() & self._kept.keys():
            self._kept[level].append(called_units(ladder, level, whole[level]))
        return ladder, whole

    def _ensemble(self, members: Sequence[Predicted]) -> tuple[Ladder, NDArray]:
        first = members[0].ladder
        if all(one.ladder is first for one in members):
            return first, np.mean([one.values for one in members], axis=0)
        columns = [PREFIX + name for name in self.classes]
        tables = [pd.concat([one.ladder.table, pd.DataFrame(one.values, columns=columns)], axis=1) for one in members]
        averaged = average_tables(tables)
        return Ladder(averaged.drop(columns=columns), self.classes), check_probabilities(averaged)

    @cached_property
    def compounds(self) -> pd.DataFrame | None:
        """Table of the compounds of all folds; None where a fold has no such level."""
        if "compound" not in self._whole.levels():
            return None
        table = called_table(self._kept["compound"], self.classes)
        return _scorable(in_order(table, "compound").reset_index(drop=True))

    @cached_property
    def asked(self) -> pd.DataFrame:
        """Table of the treatments of all folds, those of unknown labels too."""
        return in_order(called_table(self._kept["treatment"], self.classes), "treatment").reset_index(drop=True)

    @cached_property
    def treatments(self) -> pd.DataFrame:
        """Table of the treatments of all folds that are scored."""
        return _scorable(self.asked)

    def members(self) -> NDArray:
        """Give the probabilities of each member; NaN where it lacks a fold.

        Returns
        -------
        ndarray
            float32 (members, treatments, classes). A member is a seed, or a draw of dropout of a seed where there are
            draws; they are in ascending order, treatments in that of `asked`.
        """
        row = {name: number for number, name in enumerate(names_of(self.asked))}
        found = np.full((len(self._members), len(row), len(self.classes)), np.nan, np.float32)
        for number, member in enumerate(sorted(self._members)):
            for names, values in self._members[member]:
                found[number, [row[name] for name in names]] = values
        return found

    @cached_property
    def assessment(self) -> Assessment:
        """What is known of its uncertainty; members are those of `members` that have all folds."""
        asked, members = self.asked, self.members()
        whole = np.isfinite(members).all(axis=(1, 2))
        of_seeds = {seed for (seed, _), kept in zip(sorted(self._members), whole, strict=True) if kept}
        kind = "seeds" if not self._drawn else "seeds and dropout draws" if len(of_seeds) > 1 else "dropout draws"
        unknown = asked[UNKNOWN].to_numpy(dtype=bool) if UNKNOWN in asked else None
        return assess(asked, self.classes, members[whole], kind, unknown, self.by)

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
            "uncertainty": self.assessment.document,
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


def _scorable(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table[UNKNOWN].astype(bool)].reset_index(drop=True) if UNKNOWN in table else table
