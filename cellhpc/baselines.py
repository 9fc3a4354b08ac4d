"""What simple methods reach on what a study holds out: they show how much of an accuracy the networks add.

- Intensity statistics: of each field and channel the logarithms of mean, highest and lowest grey level and of focus,
  and the saturated share, all of raw pixels (`cellhpc.quality`); logistic regression (scikit-learn's, C = 1, labels
  weigh the same) on the study's own folds, each figure scaled by the training fields; fields are combined by the mean.
- The same statistics whitened on controls (`cellhpc.whitening`): from each field its plate's mean DMSO field is
  subtracted; then axes are turned and scaled until all DMSO fields together vary by one along each. The nearest
  neighbour of another compound (`cellhpc.profiles`) gives the call. Controls are no treatments, so nothing of what is
  held out is seen.
- Features of a network that was not trained (`cellhpc features STUDY --network NAME`): the nearest neighbour of another
  compound (NSC), and of another compound and batch (NSCB). Where the store has tiles of controls (`convert.controls`),
  the same of features that are whitened on these.

None of them is tuned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellhpc import ledger
from cellhpc.errors import DataError, UsageError
from cellhpc.features import Features
from cellhpc.folds import Folds
from cellhpc.levels import PREFIX, combine
from cellhpc.profiles import LEFT_OUT, LeftOut, neighbours, regression
from cellhpc.scores import blind, labelled, score
from cellhpc.tiles import Store
from cellhpc.whitening import bare_plates, whiten

FIGURES = ("mean", "high", "low", "focus", "saturated")
"""Columns of the fields table, each with a channel's name behind."""


def statistics(fields: pd.DataFrame, channels: Sequence[str]) -> NDArray:
    """Give the intensity statistics of fields, float64 (fields, figures of all channels)."""
    names = [f"{figure}_{channel}" for figure in FIGURES for channel in channels]
    values = fields[names].to_numpy(dtype=np.float64)
    linear = np.array([name.startswith("saturated") for name in names])
    return np.where(linear, values, np.log(np.maximum(values, 0) + 1e-3))


def blind_baselines(store: Store, folds: Folds, asked: Collection[str]) -> dict[str, Any]:
    """Say what is reached without looking at a picture, where not all that is trained on was asked.

    Parameters
    ----------
    store, folds
        Of the study: its fields say what each fold trains on, also what can't be scored or is missing.
    asked
        Names of the folds that count.

    Returns
    -------
    dict
        As `scores.baselines` gives it; there is no `batch_only` where the batch is left out too.
    """
    fields = store.fields[store.fields["bad"] == ""]
    parts = [(folds.held_out(fields, fold), folds.training(fields, fold)) for fold in folds.folds if fold.name in asked]
    told = fields.drop(columns="batch") if folds.also == "batch" else fields
    pairs = [(labelled(told[own]), labelled(told[others])) for own, others in parts if own.any() and others.any()]
    found = blind(pairs, folds.classes)
    aside = sum(folds.not_scorable.values())
    return {**found, "table": [{**row, "not_scorable": aside} for row in found["table"]]}


def intensity_baselines(store: Store, folds: Folds) -> list[dict[str, Any]]:
    """Score intensity statistics on the folds of a study.

    Returns
    -------
    list
        Rows as `scores.baselines` gives them in `table`; none where a store has no such statistics.
    """
    fields = store.fields[store.fields["bad"] == ""].reset_index(drop=True)
    if not {f"{figure}_{channel}" for figure in FIGURES for channel in store.channels} <= set(fields):
        return []
    values = statistics(fields, store.channels)
    found = _row(
        "intensity", "intensity statistics of fields, logistic regression", _predicted(fields, values, folds), folds
    )
    controls = (fields["role"] == "dmso").to_numpy()
    plates = fields["plate"].to_numpy(dtype=str)
    if folds.by == "compound" and not bare_plates(controls, plates):
        used = folds.used(fields)
        own = fields[used].reset_index(drop=True)
        left_out: LeftOut = "compound_and_batch" if folds.also == "batch" else "compound"
        what = "intensity statistics whitened on DMSO"
        found += _nearest("intensity_neighbour", what, own, whiten(values, controls, plates)[used], left_out, folds)
    return found


def _predicted(fields: pd.DataFrame, values: NDArray, folds: Folds) -> pd.DataFrame:
    """Call the treatments of each fold by logistic regression on the others."""
    from sklearn.preprocessing import StandardScaler

    labels, parts = fields["label"].to_numpy(dtype=str), []
    for fold in folds.folds:
        asked, training = folds.held_out(fields, fold), folds.training(fields, fold)
        learnt = np.unique(labels[training])
        if not asked.any() or len(learnt) < 2:
            continue
        scale = StandardScaler().fit(values[training])
        said = regression(scale.transform(values[training]), labels[training], scale.transform(values[asked]))
        found = np.zeros((asked.sum(), len(folds.classes)))
        found[:, [folds.classes.index(name) for name in learnt]] = said
        names = ["plate", "well", "field", "treatment", "compound", "label"]
        keys = fields.loc[asked, names].reset_index(drop=True).assign(fold=fold.name)
        table = pd.concat([keys, pd.DataFrame(found, columns=[PREFIX + name for name in folds.classes])], axis=1)
        parts.append(combine(table)["treatment"])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def feature_baselines(study: Path, store: Store, folds: Folds) -> list[dict[str, Any]]:
    """Score the features of untrained networks that lie in the study's folder and are of its store.

    Returns
    -------
    list
        Rows as `scores.baselines` gives them in `table`, two for each network (NSC and NSCB), and two more where they
        can be whitened.
    """
    found = []
    for features in _features_of(study, store) if folds.by == "compound" else ():
        name = features.folder.name
        tiles = features.tiles
        kept = tiles["label"].isin(folds.classes).to_numpy()
        tiles = tiles[kept].reset_index(drop=True)
        given = [(name, f"features {name}", features.read)]
        if not features.not_whitened:
            given.append((f"whitened_{name}", f"features {name} whitened on DMSO", features.read_whitened))
        for key, what, read in given:
            values = read()[kept]
            for left_out, short in zip(LEFT_OUT, ("nsc", "nscb"), strict=True):
                found += _nearest(f"{short}_{key}", what, tiles, values, left_out, folds)
    return found


def feature_digests(study: Path, store: Store) -> list[str]:
    """Give the digests of the features that `feature_baselines` scores."""
    return [features.about["digest"] for features in _features_of(study, store)]


def _features_of(study: Path, store: Store) -> list[Features]:
    found = []
    for folder in sorted((study / "features").glob("*/")):
        try:
            features = Features.open(folder)
        except (UsageError, DataError):  # begun, or something else
            continue
        about = features.about
        same = about.get("store_digest") == store.content_digest and ledger.is_done(folder, about["digest"])
        if same and not about.get("run"):  # a run has learnt from what is held out
            found.append(features)
    return found


def _nearest(
    name: str, what: str, rows: pd.DataFrame, values: NDArray, left_out: LeftOut, folds: Folds
) -> list[dict[str, Any]]:
    """Score the nearest neighbours of treatments; those without any are not scorable."""
    calls = neighbours(rows, values, left_out)
    scorable = calls["call"] != ""
    words = f"{what}, nearest neighbour of another {LEFT_OUT[left_out]}"
    return _row(name, words, calls[scorable], folds, int((~scorable).sum()))


def _row(
    name: str, words: str, treatments: pd.DataFrame, folds: Folds, not_scorable: int | None = None
) -> list[dict[str, Any]]:
    if treatments.empty:
        return []
    aside = sum(folds.not_scorable.values()) if not_scorable is None else not_scorable
    at: Mapping[str, Any] = score({"treatment": treatments})["treatment"]
    kept = {key: value for key, value in at.items() if key != "top2"}
    return [{"name": name, "words": words, **kept, "not_scorable": aside}]
