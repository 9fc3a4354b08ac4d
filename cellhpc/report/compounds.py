"""What the page tells of each compound: its treatments, and what every model said of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cellhpc.gallery import Gallery, Shown
from cellhpc.names import model_name, told_apart
from cellhpc.scores import PREFIX

SHOWN_FROM = 0.005
"""Probabilities below this are left blank on the page, as zeros are in the confusion matrix."""
SET_AT = 0.1
"""The alpha whose conformal sets `repeat` of `scores.json` names."""


@dataclass(frozen=True)
class Saying:
    """What one model says of a treatment.

    Attributes
    ----------
    model
        Network and initialisation.
    call, correct
        What it is called, and whether that is its label.
    probabilities
        One for each class, in the order of the classes.
    labels
        The conformal set, or None where there is none.
    """

    model: str
    call: str
    correct: bool
    probabilities: tuple[float, ...]
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class Treatment:
    """A treatment of a compound: what the models say, and tiles if one of them, or a single run, is wrong."""

    name: str
    fold: str
    sayings: tuple[Saying, ...]
    tiles: tuple[Shown, ...]

    @property
    def wrong(self) -> list[Saying]:
        """What is wrong of what is said."""
        return [saying for saying in self.sayings if not saying.correct]


@dataclass(frozen=True)
class Compound:
    """A compound on the page.

    Attributes
    ----------
    anchor
        Its name in links of the page.
    counts
        Of each model, in their order: right treatments and all; None where the model has none of it.
    treatments
        None of them where the page was made without tables of treatments.
    """

    name: str
    label: str
    anchor: str
    counts: tuple[tuple[int, int] | None, ...]
    treatments: tuple[Treatment, ...]

    @property
    def correct(self) -> int:
        """Right calls of all models."""
        return sum(count[0] for count in self.counts if count)

    @property
    def total(self) -> int:
        """Calls of all models."""
        return sum(count[1] for count in self.counts if count)


def compounds_of(
    scores: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    p_values: Mapping[str, pd.DataFrame],
    gallery: Gallery,
) -> tuple[Compound, ...]:
    """List the compounds of a study, those with the largest share of wrong calls first.

    Parameters
    ----------
    scores
        The document of `scores.json`.
    tables
        Tables of treatments (`scores.combine(...)["treatment"]`) by the slug of the model; may be empty.
    p_values
        Of each treatment and class the conformal p-values `marginal_<class>`, by the slug of the model; may be empty:
        then the sets are those that the document names.
    gallery
        Tiles of treatments.
    """
    counts: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for model in scores["models"]:
        for row in model["by_compound"]:
            of = counts.setdefault((row["compound"], row["label"]), {})
            of[model["slug"]] = row["correct"], row["total"]
    treatments = _treatments(scores, tables, p_values, gallery)
    slugs = [model["slug"] for model in scores["models"]]
    names = anchors([compound for compound, _ in counts])
    found = [
        Compound(key[0], key[1], anchor, tuple(map(of.get, slugs)), tuple(treatments.get(key, ())))
        for (key, of), anchor in zip(counts.items(), names, strict=True)
    ]
    return tuple(sorted(found, key=lambda one: (one.correct / one.total, one.label, one.name)))


def anchors(names: Sequence[str]) -> list[str]:
    """Make names for links: letters, digits and hyphens, each used once."""
    return told_apart(["compound-" + (re.sub(r"[^\w]+", "-", name).strip("-") or "x") for name in names])


def _treatments(
    scores: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    p_values: Mapping[str, pd.DataFrame],
    gallery: Gallery,
) -> dict[tuple[str, str], list[Treatment]]:
    """Treatments by compound and label; in the order of their concentration where it is known, else as they come."""
    said: dict[tuple[str, ...], list[Saying]] = {}
    doses: dict[tuple[str, ...], float] = {}
    for model in scores["models"]:
        if model["slug"] not in tables:
            continue
        sets = _sets(model, p_values.get(model["slug"]), scores["classes"])
        columns = [PREFIX + name for name in scores["classes"]]
        for row in tables[model["slug"]].to_dict("records"):
            key = tuple(str(row.get(name, "")) for name in ("compound", "label", "treatment", "fold"))
            doses.setdefault(key, _dose(row.get("concentration")))
            said.setdefault(key, []).append(
                Saying(
                    model_name(model),
                    str(row["call"]),
                    bool(row["correct"]),
                    tuple(float(row[column]) for column in columns),
                    sets.get((key[2], key[3]), sets.get((key[2], None))),
                )
            )
    found: dict[tuple[str, str], list[Treatment]] = {}
    for key in sorted(said, key=lambda key: (key[:2], doses[key])):
        compound, label, treatment, fold = key
        wrong = any(not saying.correct for saying in said[key])
        shown = [one for one in gallery.by_treatment.get(treatment, ()) if one.fold in ("", fold)]
        tiles = [one for one in shown if wrong or one.map_jpeg]
        found.setdefault((compound, label), []).append(Treatment(treatment, fold, tuple(said[key]), tuple(tiles)))
    return found


def _dose(concentration: Any) -> float:
    """Give a concentration to sort by; words and gaps come first."""
    dose = pd.to_numeric(concentration, errors="coerce")
    return -1.0 if pd.isna(dose) else float(dose)


def _sets(
    model: Mapping[str, Any], p_values: pd.DataFrame | None, classes: Sequence[str]
) -> dict[tuple[str, str | None], tuple[str, ...]]:
    """Conformal sets by treatment and fold: from p-values, else as the document names them, without the fold."""
    if p_values is None:
        ranked = (model.get("uncertainty") or {}).get("repeat") or []
        return {(row["treatment"], None): tuple(row["set"]) for row in ranked if row["set"] is not None}
    within = p_values[[f"marginal_{name}" for name in classes]].to_numpy() > SET_AT
    folds = p_values["fold"].astype(str) if "fold" in p_values else [None] * len(p_values)
    return {
        (treatment, fold): tuple(name for name, inside in zip(classes, row, strict=True) if inside)
        for treatment, fold, row in zip(p_values["treatment"], folds, within, strict=True)
    }


def wrong_treatments(scores: Mapping[str, Any]) -> list[str]:
    """Name the treatments that a model calls wrong, those that most of them do first; then as they come."""
    times: dict[str, int] = {}
    for model in scores["models"]:
        for row in model["wrong"]:
            times[row["treatment"]] = times.get(row["treatment"], 0) + 1
    return sorted(times, key=lambda name: -times[name])
