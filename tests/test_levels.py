"""Levels and rules of combining against independent computations: pandas' group-by, SciPy, and counts by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cellhpc import levels
from cellhpc.errors import DataError
from cellhpc.scores import levels as accuracies
from tests.made_up import CLASSES, predictions

COLUMNS = [levels.PREFIX + name for name in CLASSES]
HOWS = ("mean", "median", "log", "vote")


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
    combined = levels.combine(table, "mean")
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
    found = levels.combine(table, "median")["treatment"].set_index(["label", "treatment"]).loc[treatments.index]
    np.testing.assert_allclose(found[COLUMNS], treatments.div(treatments.sum(axis=1), axis=0), atol=1e-6)
    assert found["call"].tolist() == np.array(CLASSES)[treatments.to_numpy().argmax(axis=1)].tolist()
    fields = table.groupby(["plate", "well", "field"])[COLUMNS].median()
    np.testing.assert_allclose(
        levels.combine(table, "median")["field"][COLUMNS], fields.div(fields.sum(axis=1), axis=0), atol=1e-6
    )


def test_mean_counts_fields_and_not_tiles() -> None:
    one, two = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    table = by_hand([("B02", 1, "A 1 uM", "P1", one), *[("B02", 2, "A 1 uM", "P1", two)] * 3])
    well = levels.combine(table, "mean")["well"].iloc[0]
    assert (well["p_x"], well["p_y"], well["p_z"]) == (0.5, 0.5, 0.0)
    assert levels.combine(table, "median")["well"].iloc[0]["call"] == "y"


def test_median_without_a_common_class_is_the_mean() -> None:
    tiles = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    table = by_hand([("B02", 1, "A 1 uM", "P1", p) for p in tiles])
    np.testing.assert_allclose(levels.combine(table, "median")["treatment"][["p_x", "p_y", "p_z"]], [[1 / 3] * 3])


@pytest.mark.parametrize("how", HOWS)
def test_rows_sum_to_one_at_every_level_whatever_the_order(table: pd.DataFrame, how: levels.How) -> None:
    shuffled = table.sample(frac=1, random_state=1)
    for level, combined in levels.combine(table, how).items():
        np.testing.assert_allclose(combined[COLUMNS].sum(axis=1), 1, atol=1e-12)
        again = levels.combine(shuffled, how)[level]
        pd.testing.assert_frame_equal(combined, again, check_exact=False)


def test_a_fold_keeps_the_treatments_of_two_cell_lines_apart(table: pd.DataFrame) -> None:
    table["fold"] = np.where(table["replicate"] == "1", "MCF7", "A549")
    assert len(levels.combine(table)["treatment"]) == 2 * len(levels.combine(table.drop(columns="fold"))["treatment"])


def test_an_ensemble_is_the_mean_of_its_members_tile_by_tile(table: pd.DataFrame) -> None:
    other = predictions(seed=1).sample(frac=1, random_state=2)
    averaged = levels.average_tables([table, other])
    keys = list(levels.KEYS["tile"])
    expected = pd.concat([table, other]).groupby(keys)[COLUMNS].mean()
    np.testing.assert_allclose(averaged.set_index(keys).loc[expected.index][COLUMNS], expected, atol=1e-6)


def test_log_is_the_geometric_mean_normalised(table: pd.DataFrame) -> None:
    combined = levels.combine(table, "log")
    for level, below in (("field", "tile"), ("well", "field"), ("treatment", "well"), ("compound", "treatment")):
        keys = [key for key in levels.KEYS[level] if key in table]
        grouped = combined[below].groupby(keys)[COLUMNS]
        expected = grouped.agg(lambda column: stats.gmean(np.maximum(column, levels.LOG_FLOOR)))
        found = combined[level].set_index(keys).loc[expected.index]
        np.testing.assert_allclose(found[COLUMNS], expected.div(expected.sum(axis=1), axis=0), atol=1e-9)


def test_log_has_a_floor_so_that_one_tile_rules_nothing_out() -> None:
    table = by_hand([("B02", 1, "A 1 uM", "P1", p) for p in [[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0]]])
    field = levels.combine(table, "log")["field"].iloc[0]
    expected = np.array([(0.9 * 0.9 * 1e-6) ** (1 / 3), (0.1 * 0.1) ** (1 / 3), 1e-6])
    np.testing.assert_allclose(field[["p_x", "p_y", "p_z"]].astype(float), expected / expected.sum())
    assert field["p_x"] > 0


def test_vote_is_the_share_of_calls_below(table: pd.DataFrame) -> None:
    combined = levels.combine(table, "vote")
    for level, below in (("field", "tile"), ("well", "field"), ("treatment", "well"), ("compound", "treatment")):
        keys = [key for key in levels.KEYS[level] if key in table]
        votes = pd.get_dummies(combined[below]["call"])[list(CLASSES)].groupby([combined[below][key] for key in keys])
        found = combined[level].set_index(keys)
        np.testing.assert_allclose(found[COLUMNS], votes.mean().loc[found.index], atol=1e-12)


def test_equal_votes_are_settled_by_the_mean() -> None:
    """One vote each: y has the higher mean (0.55 to 0.45). x comes first in the columns and would win else."""
    table = by_hand([("B02", 1, "A 1 uM", "P1", p) for p in [[0.6, 0.4, 0.0], [0.3, 0.7, 0.0]]])
    field = levels.combine(table, "vote")["field"].iloc[0]
    assert (field["p_x"], field["p_y"], field["call"]) == (0.5, 0.5, "y")
    assert field["top2"]  # x is true, and second
    assert not field["correct"]
    two_to_one = by_hand([("B02", 1, "A 1 uM", "P1", p) for p in [[0.4, 0.35, 0.25]] * 2 + [[0.0, 1.0, 0.0]]])
    assert levels.combine(two_to_one, "vote")["field"].iloc[0]["call"] == "x"
    assert levels.combine(two_to_one, "mean")["field"].iloc[0]["call"] == "y"


def test_compounds_stand_on_their_treatments(table: pd.DataFrame) -> None:
    combined = levels.combine(table)
    expected = combined["treatment"].groupby("compound")[COLUMNS].mean()
    found = combined["compound"].set_index("compound")
    np.testing.assert_allclose(found[COLUMNS], expected.loc[found.index], atol=1e-12)
    assert found["tiles"].sum() == len(table)
    assert not {"treatment", "concentration", "well"} & set(found.columns)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("start", ["field", "well", "treatment"])
def test_a_table_may_begin_at_a_coarser_level(table: pd.DataFrame, how: levels.How, start: str) -> None:
    """The mean looks one level down: what a coarser table says climbs on as it does inside the finer one."""
    combined = levels.combine(table, how)
    coarse = combined[start].drop(columns=["tiles", "call", "correct", "top2"]).sample(frac=1, random_state=0)
    again = levels.combine(coarse, how)
    assert tuple(again) == levels.LEVELS[levels.LEVELS.index(start) :]
    np.testing.assert_allclose(again[start][COLUMNS], combined[start][COLUMNS], atol=1e-12)
    if how == "mean":
        np.testing.assert_allclose(again["compound"][COLUMNS], combined["compound"][COLUMNS], atol=1e-12)


def test_a_compound_of_several_labels_is_no_unit(table: pd.DataFrame) -> None:
    table.loc[table["treatment"] == "PP-2 3 uM", "label"] = "DNA damage"
    assert tuple(levels.combine(table)) == ("tile", "field", "well", "treatment")


def test_one_ladder_serves_every_model_of_the_same_rows(table: pd.DataFrame) -> None:
    ladder = levels.Ladder(table.drop(columns=COLUMNS), CLASSES)
    for seed in (1, 2):
        other = predictions(seed=seed)
        climbed = ladder.climb(levels.check_probabilities(other))
        treatments = levels.unit_table(ladder, "treatment", climbed["treatment"])
        pd.testing.assert_frame_equal(treatments, levels.combine(other)["treatment"])


def test_doses_that_have_an_order_keep_it_and_unknown_ones_come_last() -> None:
    doses = pd.Categorical(["low", None, "high", "mid"], categories=["low", "mid", "high"], ordered=True)
    rows = [("B02", 1, f"A {dose}", "P1", [0.5, 0.3, 0.2]) for dose in ("low", "none", "high", "mid")]
    wells = by_hand([(f"B0{number}", *row[1:]) for number, row in enumerate(rows)])
    found = levels.combine(wells.assign(concentration=doses))["treatment"]
    assert found["treatment"].tolist() == ["A low", "A mid", "A high", "A none"]
    found = levels.combine(wells.assign(concentration=[1.0, np.nan, 30.0, 5.0]))["treatment"]
    assert found["treatment"].tolist() == ["A low", "A mid", "A high", "A none"]


def test_an_unknown_rule_is_refused(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="allowed: log, mean, median, vote"):
        levels.combine(table, "mode")  # type: ignore[arg-type]


class TestRefusals:
    def test_rows_that_are_no_probabilities_are_listed(self, table: pd.DataFrame) -> None:
        table.loc[3, COLUMNS] = [2.0, -1.0, 0.0]
        table.loc[7, COLUMNS] = [0.5, 0.2, 0.1]
        table.loc[9, COLUMNS[0]] = np.nan
        with pytest.raises(DataError, match=r"3 of .* rows of predictions hold no probabilities") as caught:
            levels.combine(table)
        assert len(caught.value.problems) == 3
        assert "sum 0.8, lowest 0.1" in caught.value.problems[1]
        assert f"well {table['well'][7]}" in caught.value.problems[1]

    def test_a_missing_column_is_named_with_those_that_are_there(self, table: pd.DataFrame) -> None:
        with pytest.raises(DataError, match=r"(?s)no column well.*no column label.*Found: batch, compound"):
            accuracies(table.drop(columns=["well", "label"]))
        with pytest.raises(DataError, match="no column p_<class>"):
            accuracies(table.drop(columns=COLUMNS))

    def test_an_empty_table(self, table: pd.DataFrame) -> None:
        with pytest.raises(DataError, match="has no rows"):
            accuracies(table.head(0))

    def test_a_label_that_is_no_class(self, table: pd.DataFrame) -> None:
        table.loc[0, "label"] = "DNA damag"
        with pytest.raises(DataError, match=r"(?s)'DNA damag': 1 rows.*Classes .*: Actin disruptors, DNA damage"):
            accuracies(table)

    def test_a_tile_twice(self, table: pd.DataFrame) -> None:
        with pytest.raises(DataError, match=r"(?s)2 tiles are predicted more than once.*tile 0: 2 rows"):
            levels.combine(pd.concat([table, table.head(2)]))

    def test_a_well_with_two_treatments(self, table: pd.DataFrame) -> None:
        table.loc[table["treatment"] == "PP-2 3 uM", "well"] = table.loc[
            table["treatment"] == "PP-2 1 uM", "well"
        ].iloc[0]
        table["field"] += 10 * (table["treatment"] == "PP-2 3 uM")
        with pytest.raises(DataError, match=r"(?s)A well must be of one kind.*treatment PP-2 1 uM, PP-2 3 uM"):
            levels.combine(table)

    def test_a_treatment_with_two_labels(self, table: pd.DataFrame) -> None:
        table.loc[(table["treatment"] == "PP-2 3 uM") & (table["replicate"] == "1"), "label"] = "DNA damage"
        with pytest.raises(DataError, match="treatment PP-2 3 uM: label DNA damage, Epithelial"):
            levels.combine(table)
