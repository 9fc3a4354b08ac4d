"""Scores against independent computations: pandas' group-by, SciPy, scikit-learn and published counts."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, confusion_matrix

from cellhpc import scores
from cellhpc.errors import DataError
from tests.made_up import CLASSES, predictions

COLUMNS = [scores.PREFIX + name for name in CLASSES]


@pytest.fixture
def table() -> pd.DataFrame:
    return predictions()


def by_hand(rows: list[tuple[str, int, str, str, list[float]]], compound: str = "A", label: str = "x") -> pd.DataFrame:
    """One row a tile: well, field, treatment, plate, probabilities of x, y, z."""
    made = [
        {"plate": plate, "well": well, "field": field, "tile": tile, "treatment": treatment, "compound": compound,
         "label": label, "p_x": p[0], "p_y": p[1], "p_z": p[2]}
        for tile, (well, field, treatment, plate, p) in enumerate(rows)
    ]  # fmt: skip
    return pd.DataFrame(made)


def test_mean_goes_from_tiles_to_fields_to_wells_to_treatments(table: pd.DataFrame) -> None:
    combined = scores.combine(table, "mean")
    described = ["treatment", "label"]
    fields = table.groupby(["plate", "well", "field", *described], as_index=False)[COLUMNS].mean()
    wells = fields.groupby(["plate", "well", *described], as_index=False)[COLUMNS].mean()
    treatments = wells.groupby(described, as_index=False)[COLUMNS].mean()
    for level, expected, keys in (
        ("field", fields, ["plate", "well", "field"]),
        ("well", wells, ["plate", "well"]),
        ("treatment", treatments, ["treatment"]),
    ):
        found = combined[level].sort_values(keys)
        np.testing.assert_allclose(found[COLUMNS], expected.sort_values(keys)[COLUMNS], atol=1e-6)
        calls = np.array(CLASSES)[expected.sort_values(keys)[COLUMNS].to_numpy().argmax(axis=1)]
        assert found["call"].tolist() == calls.tolist()
    assert len(combined["tile"]) == len(table)
    assert combined["treatment"]["tiles"].sum() == len(table)


def test_median_is_the_papers(table: pd.DataFrame) -> None:
    """Element-wise median over the tiles of a (replicate, treatment), median over the replicates, argmax."""
    replicates = table.groupby(["label", "treatment", "replicate"])[COLUMNS].median()
    treatments = replicates.groupby(["label", "treatment"])[COLUMNS].median()
    found = scores.combine(table, "median")["treatment"].set_index(["label", "treatment"]).loc[treatments.index]
    np.testing.assert_allclose(found[COLUMNS], treatments.div(treatments.sum(axis=1), axis=0), atol=1e-6)
    assert found["call"].tolist() == np.array(CLASSES)[treatments.to_numpy().argmax(axis=1)].tolist()
    fields = table.groupby(["plate", "well", "field"])[COLUMNS].median()
    np.testing.assert_allclose(
        scores.combine(table, "median")["field"][COLUMNS], fields.div(fields.sum(axis=1), axis=0), atol=1e-6
    )


def test_mean_counts_fields_and_not_tiles() -> None:
    one, two = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    table = by_hand([("B02", 1, "A 1 uM", "P1", one), *[("B02", 2, "A 1 uM", "P1", two)] * 3])
    well = scores.combine(table, "mean")["well"].iloc[0]
    assert (well["p_x"], well["p_y"], well["p_z"]) == (0.5, 0.5, 0.0)
    assert scores.combine(table, "median")["well"].iloc[0]["call"] == "y"


def test_median_without_a_common_class_is_the_mean() -> None:
    tiles = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    table = by_hand([("B02", 1, "A 1 uM", "P1", p) for p in tiles])
    np.testing.assert_allclose(scores.combine(table, "median")["treatment"][["p_x", "p_y", "p_z"]], [[1 / 3] * 3])


@pytest.mark.parametrize("how", ["mean", "median"])
def test_rows_sum_to_one_at_every_level_whatever_the_order(table: pd.DataFrame, how: scores.How) -> None:
    shuffled = table.sample(frac=1, random_state=1)
    for level, combined in scores.combine(table, how).items():
        np.testing.assert_allclose(combined[COLUMNS].sum(axis=1), 1, atol=1e-12)
        again = scores.combine(shuffled, how)[level]
        pd.testing.assert_frame_equal(combined, again, check_exact=False)


def test_a_fold_keeps_the_treatments_of_two_cell_lines_apart(table: pd.DataFrame) -> None:
    table["fold"] = np.where(table["replicate"] == "1", "MCF7", "A549")
    assert len(scores.combine(table)["treatment"]) == 2 * len(scores.combine(table.drop(columns="fold"))["treatment"])


@pytest.mark.parametrize("how", ["mean", "median"])
def test_levels_agree_with_the_tables_and_with_scikit_learn(table: pd.DataFrame, how: scores.How) -> None:
    combined, levels = scores.combine(table, how), scores.levels(table, how)
    assert tuple(levels) == scores.LEVELS
    for level, at in levels.items():
        assert at["accuracy"] == accuracy_score(combined[level]["label"], combined[level]["call"])
        assert at["total"] == len(combined[level])
        assert {**at, "bootstrap95": scores.bootstrap_over_compounds(combined[level])} == scores.score(combined)[level]


def test_levels_of_an_epoch_are_quick() -> None:
    table = predictions().head(200)
    scores.levels(table)
    best = min(timed(table) for _ in range(5))
    assert best < 0.02, f"{1000 * best:.1f} ms for 200 tiles"


def timed(table: pd.DataFrame) -> float:
    began = time.perf_counter()
    scores.levels(table)
    return time.perf_counter() - began


@pytest.mark.parametrize(("correct", "total", "low", "high"), [(100, 103, 91.8, 99.0), (98, 103, 89.1, 97.9)])
def test_wilson_interval_of_published_counts(correct: int, total: int, low: float, high: float) -> None:
    at = scores.accuracy(correct, total)
    assert [round(100 * bound, 1) for bound in at["wilson95"]] == [low, high]
    assert at["accuracy"] == correct / total
    z, share = stats.norm.ppf(0.975), correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    np.testing.assert_allclose(at["wilson95"], [middle - half, middle + half])


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_an_accuracy_that_is_none(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="no accuracy"):
        scores.accuracy(correct, total)


def test_bootstrap_draws_whole_compounds() -> None:
    """Compounds that are right or wrong as a whole give wider intervals than single treatments; SciPy agrees."""
    right = {"a": True, "b": True, "c": False, "d": True, "e": False, "f": True, "g": True, "h": True}
    table = pd.DataFrame({"compound": np.repeat([*right], 4), "correct": np.repeat([*right.values()], 4)})
    low, high = scores.bootstrap_over_compounds(table) or pytest.fail("no interval")
    assert [low, high] == scores.bootstrap_over_compounds(table)
    shares = (np.array([*right.values()], dtype=float),)
    scipys = stats.bootstrap(shares, np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(1))
    np.testing.assert_allclose([low, high], scipys.confidence_interval, atol=0.13)
    wilson = scores.accuracy(24, 32)["wilson95"]
    assert high - low > wilson[1] - wilson[0]


def test_bootstrap_weighs_compounds_by_their_treatments() -> None:
    table = pd.DataFrame({"compound": ["a"] * 9 + ["b"], "correct": [True] * 9 + [False]})
    assert scores.bootstrap_over_compounds(table) == [0.0, 1.0]
    assert scores.bootstrap_over_compounds(table[table["compound"] == "a"]) is None


def test_confusion_is_scikit_learns_with_empty_classes_kept(table: pd.DataFrame) -> None:
    treatments = scores.combine(table)["treatment"]
    classes = [*CLASSES, "Protein synthesis"]
    found = scores.confusion(treatments, classes)
    expected = confusion_matrix(treatments["label"], treatments["call"], labels=classes)
    assert (found.to_numpy() == expected).all()
    assert found.shape == (4, 4)
    assert found.loc["DNA damage"].sum() == 6  # three compounds at two doses


def test_by_compound_counts_treatments_the_wrong_ones_first() -> None:
    treatments = pd.DataFrame(
        {"compound": ["b", "b", "a", "a"], "label": ["x", "x", "y", "y"], "correct": [True, True, True, False]}
    )
    assert scores.by_compound(treatments).to_dict("records") == [
        {"compound": "a", "label": "y", "correct": 1, "total": 2},
        {"compound": "b", "label": "x", "correct": 2, "total": 2},
    ]


def test_baselines_by_hand() -> None:
    """Compound a (x, 3 treatments), b (x, 1), c (y, 1), d (y, 2); a and d share a batch, c is alone in its own.

    Held out a: training x 1, y 3, so y: 0 of 3 right. b: x 3, y 3, so x (first of equals): right. c: x 4, y 2: wrong.
    d: x 4, y 1: 0 of 2. Batch: a sees d (y): 0 of 3. d sees a (x): 0 of 2. b sees d and a, x 3, y 2: right. c sees
    nobody, so the majority x: wrong.
    """
    rows = [("a", "x", "W1")] * 3 + [("b", "x", "W1"), ("c", "y", "W2"), ("d", "y", "W1"), ("d", "y", "W1")]
    wells = pd.DataFrame(rows, columns=["compound", "label", "batch"])
    wells["treatment"] = [f"{compound} {dose} uM" for dose, compound in enumerate(wells["compound"])]
    found = scores.baselines(pd.concat([wells, wells]), ["x", "y"])
    assert found["chance"] == 0.5
    assert (found["majority"]["correct"], found["majority"]["total"]) == (1, 7)
    assert (found["batch_only"]["correct"], found["batch_only"]["total"]) == (1, 7)
    assert scores.baselines(wells.assign(batch=""), ["x", "y"])["batch_only"] is None
    assert scores.baselines(wells[:3], ["x", "y"])["majority"] is None


def test_categorical_columns_give_the_same(table: pd.DataFrame) -> None:
    described = ["plate", "batch", "well", "compound", "treatment", "label"]
    categorical = table.astype(dict.fromkeys(described, "category"))
    plain, other = scores.combine(table), scores.combine(categorical)
    assert scores.levels(categorical) == scores.levels(table)
    assert scores.score(other) == scores.score(plain)
    assert scores.baselines(other["well"], CLASSES) == scores.baselines(plain["well"], CLASSES)
    assert scores.by_compound(other["treatment"]).to_dict() == scores.by_compound(plain["treatment"]).to_dict()


def test_batch_alone_finds_labels_that_a_batch_confounds(table: pd.DataFrame) -> None:
    confounded = table.assign(batch=table["label"])
    assert scores.baselines(scores.combine(confounded)["well"], CLASSES)["batch_only"]["accuracy"] == 1


def test_an_ensemble_is_the_mean_of_its_members_tile_by_tile(table: pd.DataFrame) -> None:
    other = predictions(seed=1).sample(frac=1, random_state=2)
    averaged = scores.average_tables([table, other])
    keys = list(scores.KEYS["tile"])
    expected = pd.concat([table, other]).groupby(keys)[COLUMNS].mean()
    np.testing.assert_allclose(averaged.set_index(keys).loc[expected.index][COLUMNS], expected, atol=1e-6)


class TestRefusals:
    def test_rows_that_are_no_probabilities_are_listed(self, table: pd.DataFrame) -> None:
        table.loc[3, COLUMNS] = [2.0, -1.0, 0.0]
        table.loc[7, COLUMNS] = [0.5, 0.2, 0.1]
        table.loc[9, COLUMNS[0]] = np.nan
        with pytest.raises(DataError, match=r"3 of .* rows of predictions hold no probabilities") as caught:
            scores.combine(table)
        assert len(caught.value.problems) == 3
        assert "sum 0.8, lowest 0.1" in caught.value.problems[1]
        assert f"well {table['well'][7]}" in caught.value.problems[1]

    def test_a_missing_column_is_named_with_those_that_are_there(self, table: pd.DataFrame) -> None:
        with pytest.raises(DataError, match=r"(?s)no column well.*no column label.*Found: batch, compound"):
            scores.levels(table.drop(columns=["well", "label"]))
        with pytest.raises(DataError, match="no column p_<class>"):
            scores.levels(table.drop(columns=COLUMNS))

    def test_an_empty_table(self, table: pd.DataFrame) -> None:
        with pytest.raises(DataError, match="has no rows"):
            scores.levels(table.head(0))

    def test_a_label_that_is_no_class(self, table: pd.DataFrame) -> None:
        table.loc[0, "label"] = "DNA damag"
        with pytest.raises(DataError, match=r"(?s)'DNA damag': 1 rows.*Classes .*: Actin disruptors, DNA damage"):
            scores.levels(table)

    def test_a_tile_twice(self, table: pd.DataFrame) -> None:
        with pytest.raises(DataError, match=r"(?s)2 tiles are predicted more than once.*tile 0: 2 rows"):
            scores.combine(pd.concat([table, table.head(2)]))

    def test_a_well_with_two_treatments(self, table: pd.DataFrame) -> None:
        table.loc[table["treatment"] == "PP-2 3 uM", "well"] = table.loc[
            table["treatment"] == "PP-2 1 uM", "well"
        ].iloc[0]
        table["field"] += 10 * (table["treatment"] == "PP-2 3 uM")
        with pytest.raises(DataError, match=r"(?s)A well must be of one kind.*treatment PP-2 1 uM, PP-2 3 uM"):
            scores.combine(table)

    def test_a_treatment_with_two_labels(self, table: pd.DataFrame) -> None:
        table.loc[(table["treatment"] == "PP-2 3 uM") & (table["replicate"] == "1"), "label"] = "DNA damage"
        with pytest.raises(DataError, match="treatment PP-2 3 uM: label DNA damage, Epithelial"):
            scores.combine(table)
