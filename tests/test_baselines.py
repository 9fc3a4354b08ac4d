"""Baselines against plain loops over the folds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from sklearn.linear_model import LogisticRegression

from cellhpc import baselines, ledger, scores
from cellhpc.folds import Folds, plan_folds
from cellhpc.profiles import LEFT_OUT, neighbours
from cellhpc.settings import FoldsSettings
from cellhpc.tiles import Store
from cellhpc.whitening import whiten
from tests.made_up import predictions

CHANNELS = ("dna", "actin")


def make_store(folder: Path, controls: bool = True) -> tuple[Store, Folds]:
    """A store of made-up fields, whose brightness tells the label with some noise."""
    random = np.random.default_rng(0)
    fields = predictions().drop_duplicates(["plate", "well", "field"]).reset_index(drop=True)
    fields = fields.loc[:, ~fields.columns.str.startswith("p_")].drop(columns="tile").assign(role="treatment", bad="")
    if controls:
        dmso = fields.drop_duplicates(["plate", "field"]).assign(role="dmso", label="", compound="DMSO", well="A01")
        more = [dmso.assign(well=f"A{number:02d}", treatment="DMSO") for number in range(1, 7)]
        fields = pd.concat([fields, *more], ignore_index=True)
    level = fields["label"].map({"Actin disruptors": 0.0, "DNA damage": 0.6, "Epithelial": 1.2, "": 0.5})
    shift = fields["plate"].map({plate: 0.3 * number for number, plate in enumerate(sorted(set(fields["plate"])))})
    for channel in CHANNELS:
        for figure in baselines.FIGURES:
            noise = random.normal(0, 0.4, len(fields))
            fields[f"{figure}_{channel}"] = np.exp(level + shift + noise) * (1 if figure != "saturated" else 1e-3)
    store = Store(folder, tuple(sorted(set(fields["plate"]))), CHANNELS, (32,), "digest of the store")
    store.__dict__["fields"] = fields
    return store, plan_folds(fields, FoldsSettings())


def test_statistics_are_logarithms_but_for_the_saturated_share(tmp_path: Path) -> None:
    fields = make_store(tmp_path)[0].fields
    values = baselines.statistics(fields, CHANNELS)
    assert values.shape == (len(fields), 10)
    np.testing.assert_allclose(np.exp(values[:, 0]), fields["mean_dna"] + 1e-3)
    np.testing.assert_array_equal(values[:, -2:], fields[["saturated_dna", "saturated_actin"]])


def test_intensities_are_scored_on_the_folds_of_the_study(tmp_path: Path) -> None:
    """The count is that of a plain loop over compounds."""
    store, folds = make_store(tmp_path)
    logistic, neighbour = baselines.intensity_baselines(store, folds)
    own = store.fields[store.fields["role"] == "treatment"].reset_index(drop=True)
    values, right = baselines.statistics(own, CHANNELS), 0
    for compound in own["compound"].unique():
        mine = (own["compound"] == compound).to_numpy()
        middle, scale = values[~mine].mean(axis=0), values[~mine].std(axis=0)
        model = LogisticRegression(class_weight="balanced", max_iter=2000)
        model.fit((values[~mine] - middle) / scale, own["label"][~mine])
        found = pd.DataFrame(model.predict_proba((values[mine] - middle) / scale), columns=model.classes_)
        of_fields = own.loc[mine, ["plate", "well", "treatment", "label"]].reset_index(drop=True)
        wells = pd.concat([of_fields, found], axis=1).groupby([*of_fields]).mean()
        treatments = wells.groupby(["treatment", "label"]).mean()
        right += (treatments.idxmax(axis=1) == treatments.index.get_level_values("label")).sum()
    assert (logistic["name"], logistic["correct"], logistic["total"]) == ("intensity", right, 14)
    assert logistic["not_scorable"] == 0
    assert (neighbour["name"], neighbour["total"]) == ("intensity_neighbour", 14)
    assert neighbour["correct"] > 14 / 3


def test_what_looks_at_no_picture_where_not_all_is_asked(tmp_path: Path) -> None:
    """Of a whole study it is what the asked treatments alone say; of some folds, or without the batch, a plain loop."""
    store, folds = make_store(tmp_path)
    every = [fold.name for fold in folds.folds]
    own = store.fields[store.fields["role"] == "treatment"]
    known = own.assign(fold=own["compound"]).drop_duplicates(["treatment", "batch"])
    assert baselines.blind_baselines(store, folds, every) == scores.baselines(known, folds.classes)
    some = baselines.blind_baselines(store, folds, every[:2])
    asked = own[own["compound"].isin(every[:2])]["treatment"].nunique()
    assert some["majority"]["total"] == some["batch_only"]["total"] == asked
    apart = plan_folds(store.fields, FoldsSettings(also="batch"))
    found = baselines.blind_baselines(store, apart, [fold.name for fold in apart.folds])
    right = total = 0
    for fold in apart.folds:
        mine = own[own["compound"] == fold.name]
        others = own[~own["batch"].isin(set(mine["batch"]))].drop_duplicates("treatment")
        commonest = others["label"].value_counts().sort_index().idxmax()
        right += (mine.drop_duplicates("treatment")["label"] == commonest).sum()
        total += mine["treatment"].nunique()
    assert (found["majority"]["correct"], found["majority"]["total"]) == (right, total)
    assert found["batch_only"] is None
    assert [(row["name"], row["not_scorable"]) for row in found["table"]] == [("majority", 14 - total)]


def test_without_controls_nothing_is_whitened(tmp_path: Path) -> None:
    rows = baselines.intensity_baselines(*make_store(tmp_path, controls=False))
    assert [row["name"] for row in rows] == ["intensity"]


def write_features(folder: Path, about: dict[str, Any], tiles: pd.DataFrame, values: np.ndarray) -> None:
    ledger.write_json(folder / "features.json", about)
    ledger.write_table(folder / "tiles.parquet", tiles)
    array = zarr.create_array(folder / "features.zarr", shape=values.shape, dtype="float32")
    array[:] = values
    ledger.mark_done(folder, "d")


def test_features_that_lie_in_the_study_are_scored_by_neighbours(tmp_path: Path) -> None:
    store, folds = make_store(tmp_path)
    tiles = predictions().loc[:, lambda table: ~table.columns.str.startswith("p_")]
    values = np.random.default_rng(0).normal(tiles["label"].str.len().to_numpy()[:, None], 4, (len(tiles), 5))
    about = {"digest": "d", "store_digest": store.content_digest}
    for name, more in (("good", {}), ("of another store", {"store_digest": "x"}), ("of a run", {"run": {"id": "r"}})):
        write_features(tmp_path / "features" / name, {**about, **more}, tiles, values)
    (tmp_path / "features" / "begun").mkdir()
    assert baselines.feature_digests(tmp_path, store) == ["d"]
    rows = baselines.feature_baselines(tmp_path, store, folds)
    assert [row["name"] for row in rows] == ["nsc_good", "nscb_good"]
    for row, left_out in zip(rows, LEFT_OUT, strict=True):
        calls = neighbours(tiles, values.astype(np.float32), left_out)
        assert row["correct"] == calls["correct"].sum()
        assert (row["total"], row["not_scorable"]) == ((calls["call"] != "").sum(), (calls["call"] == "").sum())
    assert rows[1]["not_scorable"] > 0


def test_features_of_controls_whiten_the_others_and_are_never_scored(tmp_path: Path) -> None:
    """The rows of controls lie among the others; what they say of a treatment would be seen in the counts."""
    store, folds = make_store(tmp_path)
    tiles = predictions().loc[:, lambda table: ~table.columns.str.startswith("p_")].assign(role="treatment")
    dmso = tiles.drop_duplicates(["plate", "well"]).assign(role="dmso", label="", compound="DMSO", treatment="DMSO")
    every = pd.concat([tiles, dmso]).sort_values("plate", kind="stable", ignore_index=True)
    values = np.random.default_rng(0).normal(every["label"].str.len().to_numpy()[:, None], 4, (len(every), 5))
    values = (values + every["plate"].factorize()[0][:, None]).astype(np.float32)
    about = {"digest": "d", "store_digest": store.content_digest}
    write_features(tmp_path / "features" / "good", about, every, values)
    rows = baselines.feature_baselines(tmp_path, store, folds)
    assert [row["name"] for row in rows] == ["nsc_good", "nscb_good", "nsc_whitened_good", "nscb_whitened_good"]
    assert rows[2]["words"] == "features good whitened on DMSO, nearest neighbour of another compound"
    controls = (every["role"] == "dmso").to_numpy()
    whitened = whiten(values, controls, every["plate"].to_numpy())
    own = every[~controls].reset_index(drop=True)
    counted = []
    for given in (values, whitened):
        for left_out in LEFT_OUT:
            calls = neighbours(own, given[~controls], left_out)
            counted.append((calls["correct"].sum(), (calls["call"] != "").sum()))
    assert [(row["correct"], row["total"]) for row in rows] == counted
    assert {total for _, total in counted[::2]} == {14}
    bare = (every["role"] == "treatment") | (every["plate"] != "Week2_3")
    write_features(tmp_path / "features" / "lacking", about, every[bare], values[bare])
    rows = baselines.feature_baselines(tmp_path, store, folds)
    assert [row["name"] for row in rows][4:] == ["nsc_lacking", "nscb_lacking"]
