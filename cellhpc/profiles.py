"""Profiles of treatments, and what fixed features of tiles tell of compounds that were left out: a baseline in seconds.

Two methods, neither of them tuned:

- Logistic regression (scikit-learn's, C = 1) on the features of tiles, divided by one number, their root mean square on
  the training tiles, so that C means the same for every network; labels weigh the same, as with `train.class_weights`.
  The probabilities of tiles are combined as those of runs are (`cellhpc.scores`, by the mean).
- The nearest neighbour of a treatment's profile, by the cosine distance (Ljosa et al. 2013, J Biomol Screen 18(10)
  1321-1329). The profile of a well is the mean of its tiles, that of a treatment the mean or median of its wells.
  Where there are features of controls, the same of tiles that are whitened on these (`cellhpc.whitening`). Controls
  are no treatments: nothing is learnt from them, nothing is asked about them, and nothing of what is left out is seen.

Each leaves out the compound (of neighbours: NSC, not the same compound), or the compound and all of its batch (NSCB).
With the batch out, a label may be left in no other compound, or alone: such treatments are counted as not scorable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from rich.table import Table
from threadpoolctl import threadpool_limits

from cellhpc.errors import DataError, UsageError
from cellhpc.progress import progress
from cellhpc.scores import BASELINES, KEYS, PREFIX, baselines, combine, counted, percent, score

LeftOut: TypeAlias = Literal["compound", "compound_and_batch"]
How: TypeAlias = Literal["mean", "median"]

LEFT_OUT: dict[LeftOut, str] = {"compound": "compound", "compound_and_batch": "compound and batch"}
METHODS = {
    "logistic_regression": "logistic regression",
    "nearest_neighbour": "nearest neighbour",
    "nearest_neighbour_whitened": "nearest neighbour, whitened",
}
LEVELS = ("treatment", "field")


def baseline(
    tiles: pd.DataFrame, values: np.ndarray, profile: How = "mean", whitened: np.ndarray | None = None
) -> dict[str, Any]:
    """Score features of tiles on compounds, and on compounds and batches, that are left out.

    Parameters
    ----------
    tiles
        Keys of the tiles (n rows), as `Features.tiles`.
    values
        Their features, (n, d).
    profile
        How wells make the profile of a treatment, for neighbours.
    whitened
        The same features whitened on controls, as `Features.read_whitened` gives them; without, that method is left
        out.

    Returns
    -------
    dict
        For each of `METHODS` (the whitened one is missing without `whitened`) and `LEFT_OUT` the levels `treatment`
        (and `field`, where tiles are called) as `scores.score` gives them, and the number of treatments that are
        `not_scorable`; None where nothing is scorable. Besides, `classes`, the number of `treatments`, and `baselines`:
        what is reached without looking at a picture.

    Raises
    ------
    DataError
        There are not two labels, or none has two compounds.
    """
    classes = sorted(tiles["label"].unique())
    compounds = tiles.groupby("label")["compound"].nunique()
    if len(classes) < 2 or (compounds < 2).all():
        raise DataError(
            "A baseline needs two labels, and one with two compounds: the others are what is learnt from.",
            [f"{label}: {count} compound(s)" for label, count in compounds.items()],
        )
    treatments = tiles["treatment"].nunique()
    near = {"nearest_neighbour": values} | ({} if whitened is None else {"nearest_neighbour_whitened": whitened})
    found: dict[str, Any] = {method: {} for method in ("logistic_regression", *near)}
    for left_out in LEFT_OUT:
        predicted = predict(tiles, values, left_out)
        tables = combine(predicted, "mean") if len(predicted) else {"treatment": predicted}
        called = {"logistic_regression": {level: tables[level] for level in LEVELS if level in tables}}
        for method, given in near.items():
            calls = neighbours(tiles, given, left_out, profile)
            called[method] = {"treatment": calls[calls["call"] != ""]}
        for method, mine in called.items():
            scored = len(mine["treatment"])
            found[method][left_out] = {**score(mine), "not_scorable": treatments - scored} if scored else None
        if left_out == "compound":
            found["baselines"] = baselines(tables["well"], classes)
    return {"classes": classes, "treatments": treatments, **found}


def folds(tiles: pd.DataFrame, left_out: LeftOut) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that are asked, and rows that are learnt from, as boolean arrays (n,).

    A compound's tiles are asked together; where batches are left out too, its tiles of each batch.
    """
    compound, batch = tiles["compound"].to_numpy(), tiles["batch"].to_numpy()
    for name in pd.unique(compound):
        mine = compound == name
        if left_out == "compound":
            yield mine, ~mine
            continue
        for week in pd.unique(batch[mine]):
            yield mine & (batch == week), ~mine & (batch != week)


def predict(tiles: pd.DataFrame, values: np.ndarray, left_out: LeftOut) -> pd.DataFrame:
    """Predict what is left out by logistic regression.

    Parameters
    ----------
    tiles, values, left_out
        As of `baseline`; what is left out at a time.

    Returns
    -------
    DataFrame
        Predictions of tiles, as `scores.combine` takes them; without the tiles whose label is in no training set, or
        alone there. A label that a training set lacks has probability 0.
    """
    classes = np.array(sorted(tiles["label"].unique()))
    labels = tiles["label"].to_numpy(dtype=str)
    values = np.asarray(values, np.float64)
    probabilities = np.zeros((len(tiles), len(classes)))
    called = np.zeros(len(tiles), bool)
    every = list(folds(tiles, left_out))
    with progress(f"Leave {LEFT_OUT[left_out]} out", len(every), "folds") as advance:
        for asked, training in every:
            learnt = np.unique(labels[training])
            asked &= np.isin(labels, learnt)
            if len(learnt) > 1 and asked.any():
                scale = np.sqrt(np.mean(values[training] ** 2)) or 1.0
                said = regression(values[training] / scale, labels[training], values[asked] / scale)
                probabilities[np.ix_(asked, np.searchsorted(classes, learnt))] = said
                called |= asked
            advance(1, "")
    table = pd.DataFrame(probabilities[called], columns=[PREFIX + name for name in classes])
    return pd.concat([tiles[called].reset_index(drop=True), table], axis=1)


def regression(learnt: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Learn labels by logistic regression, and ask.

    Parameters
    ----------
    learnt, labels
        Features (n, d), and their labels (n,), of two kinds or more.
    asked
        Features (m, d).

    Returns
    -------
    ndarray
        Probabilities (m, labels) of the labels in their order; rows sum to 1.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(class_weight="balanced", max_iter=2000)
    # In one thread: each of a thousand steps is small, and threads that wait for each other take many times as long.
    with threadpool_limits(1):
        found: np.ndarray = model.fit(learnt, labels).predict_proba(asked)
    return found


def treatment_profiles(tiles: pd.DataFrame, values: np.ndarray, how: How = "mean") -> tuple[pd.DataFrame, np.ndarray]:
    """Profiles of treatments.

    Returns
    -------
    table
        A row for each treatment, sorted: `treatment`, `compound`, `label`, and `batches`, a frozenset.
    profiles
        float64 (treatments, d).
    """
    keys = [*KEYS["well"], "treatment"]
    names = [tiles[key].to_numpy() for key in keys]
    wells = pd.DataFrame(np.asarray(values, np.float64)).groupby(names).mean()
    by_treatment = wells.groupby(level=len(keys) - 1)
    profiles = by_treatment.mean() if how == "mean" else by_treatment.median()
    table = tiles.groupby("treatment", as_index=False).agg(
        compound=("compound", "first"), label=("label", "first"), batches=("batch", frozenset)
    )
    return table, profiles.to_numpy()


def neighbours(tiles: pd.DataFrame, values: np.ndarray, left_out: LeftOut, how: How = "mean") -> pd.DataFrame:
    """Call each treatment by the nearest profile of another compound, and if asked of none of its batches.

    Returns
    -------
    DataFrame
        A row for each treatment: `treatment`, `compound`, `label`, `call`, `correct`, the `nearest` treatment and the
        cosine `distance` to it; the call is empty where no other compound that may be asked has the label, or none
        another.
    """
    table, profiles = treatment_profiles(tiles, values, how)
    norms = np.linalg.norm(profiles, axis=1)
    profiles = profiles / np.where(norms > 0, norms, 1)[:, None]
    distances = 1 - profiles @ profiles.T
    compounds, labels = table["compound"].to_numpy(), table["label"].to_numpy(dtype=str)
    rows = []
    for number, batches in enumerate(table["batches"]):
        may = compounds != compounds[number]
        if left_out == "compound_and_batch":
            may &= [not batches & others for others in table["batches"]]
        nearest = int(np.where(may, distances[number], np.inf).argmin()) if may.any() else -1
        known = set(labels[may])
        scorable = labels[number] in known and len(known) > 1
        rows.append(
            {
                "call": labels[nearest] if scorable else "",
                "nearest": table["treatment"].iloc[nearest] if may.any() else "",
                "distance": float(distances[number, nearest]) if may.any() else np.nan,
            }
        )
    found = pd.concat([table.drop(columns="batches"), pd.DataFrame(rows)], axis=1)
    return found.assign(correct=found["call"] == found["label"])


def require_untaught(about: Mapping[str, Any]) -> None:
    """Refuse features of a run: it has learnt from the compounds that a baseline leaves out.

    Raises
    ------
    UsageError
        They are of a run; `about` is the document of `features.json`.
    """
    if run := about.get("run"):
        others = len(run["trained_on"])
        raise UsageError(
            f"the features are of {run['id']}, which has learnt from {others} of the compounds that a baseline would "
            "leave out: that would be no held-out accuracy. What the run itself held out is scored by: "
            "cellhpc aggregate JOB.toml. For a baseline leave out --run."
        )


def render_baseline(found: Mapping[str, Any], title: str) -> Table:
    """Make the table of a baseline for the terminal; `found` is what `baseline` gives."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for heading in ("Method", "Left out", "Level"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Right", "%", "95 % interval", "Not scorable"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, method_words in ((method, words) for method, words in METHODS.items() if method in found):
        for left_out, words in LEFT_OUT.items():
            levels = found[method][left_out]
            if levels is None:
                table.add_row(method_words, words, "treatment", "none", "", "", f"{found['treatments']}")
                continue
            for level in (level for level in LEVELS if level in levels):
                aside = f"{levels['not_scorable']}" if level == "treatment" else ""
                table.add_row(method_words, words, level, *counted(levels[level]), aside)
        table.add_section()
    for key, words in BASELINES.items():
        if known := found["baselines"][key]:
            table.add_row(words, LEFT_OUT["compound"], "treatment", *counted(known), "", style="dim")
    chance = percent(found["baselines"]["chance"])
    table.add_row(f"chance, 1 of {len(found['classes'])} classes", "", "", "", chance, "", "", style="dim")
    return table
