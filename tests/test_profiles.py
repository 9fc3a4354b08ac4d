"""Baselines on features, against plain loops; what is left out is not learnt from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.spatial.distance import cosine
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info

from cellhpc.backbone import choose_source
from cellhpc.convert import convert, plan_conversion
from cellhpc.errors import DataError, UsageError
from cellhpc.features import write_features
from cellhpc.profiles import baseline, folds, neighbours, predict, regression, render_baseline, require_untaught
from cellhpc.scores import combine
from cellhpc.screens import read_screen
from cellhpc.settings import load_job
from tests.made_up import predictions

WIDTH = 6
ALONE = {"cytochalasin B": "Actin disruptors", "latrunculin B": "Actin disruptors", "PP-2": "Epithelial",
         "AZ-A": "Epithelial", "AZ-B": "Epithelial"}  # fmt: skip


def make(compounds: dict[str, str] | None = None, skill: float = 1.0) -> tuple[pd.DataFrame, np.ndarray]:
    """Tiles of made-up compounds, four a batch, and features that tell the label with some noise."""
    tiles = predictions(compounds)
    tiles = tiles.loc[:, ~tiles.columns.str.startswith("p_")]
    random = np.random.default_rng(1)
    centres = {label: random.normal(0, skill, WIDTH) for label in sorted(tiles["label"].unique())}
    values = np.array([centres[label] for label in tiles["label"]]) + random.normal(1, 1, (len(tiles), WIDTH))
    return tiles, values.astype(np.float32)


def shown(found: dict[str, Any]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_baseline(found, "Baseline"))
    assert "…" not in capture.get()
    return capture.get()


@pytest.mark.parametrize("how", ["mean", "median"])
@pytest.mark.parametrize("left_out", ["compound", "compound_and_batch"])
def test_neighbours_are_those_of_a_plain_loop(left_out: str, how: str) -> None:
    tiles, values = make(skill=0.5)
    profiles, about = {}, {}
    for treatment, mine in tiles.groupby("treatment"):
        wells = [values[rows.index].astype(float).mean(0) for _, rows in mine.groupby(["plate", "well"])]
        profiles[treatment] = getattr(np, how)(wells, axis=0)
        about[treatment] = (mine["compound"].iloc[0], set(mine["batch"]), mine["label"].iloc[0])
    found = neighbours(tiles, values, left_out, how).set_index("treatment")
    assert sorted(found.index) == sorted(profiles)
    for treatment, (compound, batches, label) in about.items():
        others = [
            other
            for other, (its, where, _) in about.items()
            if its != compound and (left_out == "compound" or not batches & where)
        ]
        nearest = min(others, key=lambda other: cosine(profiles[treatment], profiles[other]))
        known = {about[other][2] for other in others}
        scorable = label in known and len(known) > 1
        assert found.loc[treatment, "nearest"] == nearest
        assert found.loc[treatment, "distance"] == pytest.approx(cosine(profiles[treatment], profiles[nearest]))
        assert found.loc[treatment, "call"] == (about[nearest][2] if scorable else "")
    assert 0 < found["correct"].sum() < len(found)


@pytest.mark.parametrize("left_out", ["compound", "compound_and_batch"])
def test_predictions_are_those_of_a_plain_loop(left_out: str) -> None:
    tiles, values = make(skill=0.5)
    found = predict(tiles, values, left_out).set_index(["plate", "well", "field", "tile"])
    columns = [name for name in found if name.startswith("p_")]
    assert np.allclose(found[columns].sum(axis=1), 1)
    seen = 0
    keys = ["compound"] if left_out == "compound" else ["compound", "batch"]
    for (compound, *batch), asked in tiles.groupby(keys):
        learnt = tiles[(tiles["compound"] != compound) & ~tiles["batch"].isin(batch)]
        if asked["label"].iloc[0] not in set(learnt["label"]):
            continue
        scaled = values.astype(float) / (values[learnt.index].astype(float) ** 2).mean() ** 0.5
        model = LogisticRegression(class_weight="balanced", max_iter=2000).fit(scaled[learnt.index], learnt["label"])
        expected = pd.DataFrame(0.0, index=asked.index, columns=columns)
        expected[[f"p_{name}" for name in model.classes_]] = model.predict_proba(scaled[asked.index])
        mine = found.loc[pd.MultiIndex.from_frame(asked[["plate", "well", "field", "tile"]]), columns]
        np.testing.assert_allclose(mine, expected, atol=1e-4)
        seen += len(asked)
    assert seen == len(found)


def test_what_is_left_out_is_not_learnt_from() -> None:
    tiles, _ = make()
    for left_out in ("compound", "compound_and_batch"):
        times = np.zeros(len(tiles), int)
        for asked, training in folds(tiles, left_out):
            times += asked
            assert set(tiles["compound"][asked]).isdisjoint(tiles["compound"][training])
            if left_out == "compound_and_batch":
                assert set(tiles["batch"][asked]).isdisjoint(tiles["batch"][training])
        assert (times == 1).all()


def test_a_baseline_counts_what_can_not_be_scored() -> None:
    """Week1 has four of the five compounds, all of "Actin disruptors" among them: without it, there is one label."""
    tiles, values = make(ALONE, skill=4)
    found = baseline(tiles, values)
    for method in ("logistic_regression", "nearest_neighbour"):
        one, both = found[method]["compound"], found[method]["compound_and_batch"]
        assert (one["treatment"]["total"], one["not_scorable"]) == (10, 0)
        assert (both["treatment"]["total"], both["not_scorable"]) == (2, 8)
    called = combine(predict(tiles, values, "compound"), "mean")
    told = found["logistic_regression"]["compound"]
    assert told["field"]["correct"] == called["field"]["correct"].sum()
    assert told["treatment"]["correct"] == called["treatment"]["correct"].sum() == 10
    assert found["baselines"]["chance"] == 0.5
    assert "10/10" in shown(found)


def test_one_batch_leaves_nothing_to_score_with_it_left_out() -> None:
    tiles, values = make(ALONE)
    found = baseline(tiles.assign(batch=""), values)
    assert found["logistic_regression"]["compound_and_batch"] is None
    assert found["nearest_neighbour"]["compound_and_batch"] is None
    assert shown(found).count("compound and batch") == 2


def test_labels_of_one_compound_each_are_refused() -> None:
    tiles, values = make({"cytochalasin B": "Actin disruptors", "PP-2": "Epithelial"})
    with pytest.raises(DataError, match=r"needs two labels.*\n  - Actin disruptors: 1 compound"):
        baseline(tiles, values)


def test_features_of_a_run_have_learnt_what_a_baseline_leaves_out() -> None:
    require_untaught({"network": "MobileNet"})
    with pytest.raises(UsageError, match="the features are of r1, which has learnt from 2 of the compounds"):
        require_untaught({"run": {"id": "r1", "trained_on": ["a", "b"], "held_out": ["c"]}})


def test_in_the_real_tables_92_of_103_treatments_can_be_scored_without_their_week(cellhpc_data: Path) -> None:
    folder = cellhpc_data / "bbbc021_metadata"
    images = pd.read_csv(folder / "BBBC021_v1_image.csv.gz")
    names = {"Image_Metadata_Plate_DAPI": "plate", "Image_Metadata_Well_DAPI": "well",
             "Image_Metadata_Compound": "compound", "Image_Metadata_Concentration": "concentration"}  # fmt: skip
    labels = pd.read_csv(folder / "BBBC021_v1_moa.csv")
    tiles = images.rename(columns=names)[list(names.values())].drop_duplicates(ignore_index=True)
    tiles = tiles.merge(labels.set_axis(["compound", "concentration", "label"], axis=1))
    tiles = tiles[tiles["compound"] != "DMSO"].reset_index(drop=True)
    tiles["treatment"] = tiles["compound"] + " " + tiles["concentration"].astype(str)
    tiles["batch"] = tiles["plate"].str.extract(r"^(Week\d+)_")[0]
    kept = (tiles["compound"] != "taxol") | ((tiles["batch"] == "Week1") & tiles["well"].str.startswith("D0"))
    tiles = tiles[kept].reset_index(drop=True)
    values = np.random.default_rng(0).normal(size=(len(tiles), 3))
    assert (neighbours(tiles, values, "compound")["call"] != "").sum() == 103
    assert (neighbours(tiles, values, "compound_and_batch")["call"] != "").sum() == 92


def test_regression_is_in_one_thread_and_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> int:
        return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    seen = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda *words: seen.append(threads()) or fit(*words))
    before = threads()
    values, labels = np.random.default_rng(0).normal(size=(40, 3)), np.repeat(["a", "b"], 20)
    assert regression(values, labels, values[:5]).sum(axis=1) == pytest.approx(np.ones(5))
    assert seen == [1]
    assert threads() == before


def test_frozen_features_reach_the_known_figures_on_real_fields(cellhpc_data: Path, tmp_path: Path) -> None:
    job = load_job(Path(__file__).parents[1] / "jobs" / "bbbc021_subset.toml")
    plan = plan_conversion(job.convert, read_screen(job.screen), (224,), tmp_path / "store")
    convert(plan)
    chosen = choose_source(plan.store, job.sweep.networks[0], job.sweep.weights[0])
    written = write_features(chosen, tmp_path / "features")
    found = baseline(written.tiles, written.read())
    alone, both = (found["logistic_regression"][left_out] for left_out in ("compound", "compound_and_batch"))
    assert (alone["treatment"]["correct"], alone["treatment"]["total"]) == (55, 55)
    assert alone["field"]["accuracy"] > 0.77
    assert both["treatment"]["correct"] >= 46
    assert both["treatment"]["total"] + both["not_scorable"] == 55
    # Labels that were dealt out to the compounds anew can't be learnt: nothing of what is left out leaks.
    labels = written.tiles.groupby("compound")["label"].first()
    dealt = dict(zip(labels.index, np.random.default_rng(0).permutation(labels), strict=True))
    nonsense = written.tiles.assign(label=written.tiles["compound"].map(dealt))
    assert combine(predict(nonsense, written.read(), "compound"))["treatment"]["correct"].sum() < 20
    assert neighbours(nonsense, written.read(), "compound")["correct"].sum() < 20
