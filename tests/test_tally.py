"""A model counted fold by fold, against the same model scored in one piece."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellhpc import scores
from cellhpc.levels import PREFIX, Ladder, average_tables, check_probabilities, combine
from cellhpc.tally import ModelTally, Predicted
from cellhpc.uncertainty import assess
from tests.made_up import CLASSES, predictions

COLUMNS = [PREFIX + name for name in CLASSES]
HOWS = ("mean", "median", "log", "vote")


def fold_by_fold(tables: dict[int, pd.DataFrame], how: scores.How = "mean") -> ModelTally:
    """Add the predictions of each seed compound by compound; seeds whose rows are the same share a ladder."""
    model = ModelTally(CLASSES, how)
    for compound in sorted(set(pd.concat(tables.values())["compound"])):
        members, known = {}, {}
        for seed, table in tables.items():
            own = table[table["compound"] == compound].reset_index(drop=True).assign(fold=compound)
            if len(own):
                keys = own.drop(columns=COLUMNS)
                ladder = known.setdefault(keys.to_csv(), Ladder(keys, CLASSES))
                members[seed] = Predicted(ladder, check_probabilities(own))
        model.add(members)
    return model


@pytest.mark.parametrize("how", HOWS)
def test_folds_one_by_one_give_what_all_together_give(how: scores.How) -> None:
    tables = {seed: predictions(seed=seed) for seed in (2, 0, 1)}
    found = fold_by_fold(tables, how).document()
    whole = combine(average_tables([*tables.values()]), how)
    assert found["levels"] == scores.score(whole)
    assert found["seeds"] == [0, 1, 2]
    for seed, table in tables.items():
        assert found["by_seed"][str(seed)]["levels"] == scores.score(combine(table, how))
    assert found["macro"] == scores.macro(whole["treatment"])
    assert found["confusion"] == scores.confusion(whole["treatment"], CLASSES).to_numpy().tolist()
    of_seeds = [entry["levels"]["treatment"]["accuracy"] for entry in found["by_seed"].values()]
    assert found["spread"]["sd"] == pytest.approx(np.std(of_seeds, ddof=1))


def test_seeds_whose_rows_have_another_order_are_averaged_row_by_row() -> None:
    tables = {0: predictions(seed=0), 1: predictions(seed=1).sample(frac=1, random_state=3)}
    found, plain = fold_by_fold(tables), combine(average_tables([*tables.values()]))
    pd.testing.assert_frame_equal(found.treatments.drop(columns="fold"), plain["treatment"])
    assert found.document()["levels"] == scores.score(plain)


def test_members_are_the_seeds_in_the_order_of_the_treatments() -> None:
    tables = {seed: predictions(seed=seed) for seed in (1, 0)}
    model = fold_by_fold({1: tables[1], 0: tables[0][tables[0]["compound"] != "PP-2"]})
    members, treatments = model.members(), model.treatments
    assert members.shape == (2, len(treatments), len(CLASSES))
    for number, seed in enumerate((0, 1)):
        own = combine(tables[seed])["treatment"].set_index("treatment").loc[treatments["treatment"], COLUMNS]
        there = (treatments["compound"] != "PP-2").to_numpy() | (seed == 1)
        np.testing.assert_allclose(members[number][there], own[there], atol=1e-6)
    assert np.isnan(members[0][(treatments["compound"] == "PP-2").to_numpy()]).all()
    assert model.document()["spread"] is None  # one of the two seeds lacks a fold


def test_a_member_that_lacks_a_fold_says_nothing_of_uncertainty() -> None:
    tables = {seed: predictions(seed=seed) for seed in range(4)}
    tables[1] = tables[1][tables[1]["compound"] != "PP-2"]
    model = fold_by_fold(tables)
    found = model.assessment.document
    assert found == assess(model.asked, CLASSES, model.members()[[0, 2, 3]], "seeds").document
    assert found["decomposition"]["members"] == 3
    left = {seed: tables[seed] for seed in (0, 1)}
    assert fold_by_fold(left).assessment.document["decomposition"] is None


def test_draws_of_dropout_are_members_in_place_of_their_seed() -> None:
    tables = [predictions(seed=seed) for seed in range(4)]
    keys = tables[0].drop(columns=COLUMNS)
    ladder = Ladder(keys, CLASSES)
    values = [check_probabilities(table) for table in tables]
    model = ModelTally(CLASSES, "mean")
    model.add({7: Predicted(ladder, values[0], np.stack(values[1:]))})
    members = model.members()
    parts = model.document()["uncertainty"]["decomposition"]
    assert (parts["kind"], parts["members"], len(members)) == ("dropout draws", 3, 3)
    for member, table in zip(members, tables[1:], strict=True):
        np.testing.assert_allclose(member, combine(table)["treatment"][COLUMNS], atol=1e-6)
    assert model.document()["levels"] == scores.score(combine(tables[0]))


def test_rows_of_an_unknown_label_count_for_nothing() -> None:
    table = predictions()
    keys = table.drop(columns=COLUMNS)
    ladder = Ladder(keys.assign(unknown=keys["label"] == "Epithelial"), CLASSES)
    model = ModelTally(CLASSES, "mean")
    model.add({0: Predicted(ladder, check_probabilities(table))})
    known = table[table["label"] != "Epithelial"]
    assert model.document()["levels"] == scores.score(combine(known))
    assert len(model.asked) == model.members().shape[1] == len(model.treatments) + 4
    assert set(model.asked.loc[model.asked["unknown"], "label"]) == {"Epithelial"}
