"""Paired comparisons against SciPy's permutation test, statsmodels' McNemar, and counts by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar

from cellhpc.compare import compare, comparisons, ensembles, sign_flip_p
from cellhpc.levels import combine
from tests.every_draw import exact_interval
from tests.made_up import CLASSES, predictions


def treatments(right: dict[str, list[bool]]) -> pd.DataFrame:
    rows = [
        {"compound": name, "treatment": f"{name} {dose}", "correct": correct}
        for name, all_of in right.items()
        for dose, correct in enumerate(all_of)
    ]
    return pd.DataFrame(rows)


def test_counts_and_p_by_hand() -> None:
    """Differences by compound are +2, 0, -1: of the 4 patterns of +-2 +-1, all have a sum of at least 1: p is 1.

    With c right in both they are +2, +1, 0, say: 2 of 4 patterns reach 3.
    """
    first = treatments({"a": [True, True], "b": [True, False], "c": [False]})
    second = treatments({"a": [False, False], "b": [False, True], "c": [True]})
    found = compare(first, second) or pytest.fail("nothing in common")
    assert [found[key] for key in ("a_only", "b_only", "both", "neither")] == [3, 2, 0, 0]
    assert found["difference"] == pytest.approx(1 / 5)
    assert (found["p_value"], found["compounds"], found["treatments"]) == (1.0, 3, 5)
    assert sign_flip_p(np.array([2, 1, 0])) == 0.5
    assert sign_flip_p(np.array([0, 0])) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_p_is_scipys_of_all_sign_flips(seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-3, 5, 10)
    whole = permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(differences) == pytest.approx(whole.pvalue)


def test_p_of_many_compounds_is_that_of_scipys_random_sign_flips() -> None:
    differences = np.random.default_rng(5).integers(-2, 4, 38)
    drawn = permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    )
    assert sign_flip_p(differences) == pytest.approx(drawn.pvalue, abs=4 * np.sqrt(0.25 / 9999))


def test_mcnemar_is_statsmodels() -> None:
    a, b = (combine(predictions(seed=seed, skill=skill))["treatment"] for seed, skill in ((0, 0.6), (1, 0.1)))
    found = compare(a, b) or pytest.fail("nothing in common")
    table = [[found["both"], found["a_only"]], [found["b_only"], found["neither"]]]
    assert found["mcnemar_p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert found["difference"] == pytest.approx(a["correct"].mean() - b["correct"].mean())
    both = a[["compound", "treatment", "correct"]].merge(b[["treatment", "correct"]], on="treatment")
    exact = exact_interval(both, lambda drawn: float(drawn["correct_x"].mean() - drawn["correct_y"].mean()))
    np.testing.assert_allclose(found["bootstrap95"], exact, atol=0.02)


def test_the_other_way_round_is_the_same_with_the_other_sign() -> None:
    a, b = (combine(predictions(seed=seed))["treatment"] for seed in (0, 1))
    one, other = compare(a, b), compare(b, a)
    assert one
    assert other
    assert (one["p_value"], one["mcnemar_p"]) == (other["p_value"], other["mcnemar_p"])
    np.testing.assert_allclose(one["bootstrap95"], -np.array(other["bootstrap95"])[::-1])


def test_only_what_both_were_asked_is_compared() -> None:
    a, b = (combine(predictions(seed=seed))["treatment"] for seed in (0, 1))
    some = compare(a, b[b["compound"] != "PP-2"])
    assert some
    assert some["treatments"] == len(a) - 2
    assert compare(a[:3], b[3:]) is None
    alone = compare(a[a["compound"] == "PP-2"], b)
    assert alone
    assert alone["bootstrap95"] is None


def test_pairs_differ_in_one_thing_alone() -> None:
    table = combine(predictions())["treatment"]
    models = {(network, start): table for network in ("A", "B") for start in ("imagenet", "xavier")}
    pairs = {(pair["a"], pair["b"]) for pair in comparisons(models)}
    assert pairs == {
        ("A, imagenet", "A, xavier"),
        ("B, imagenet", "B, xavier"),
        ("A, imagenet", "B, imagenet"),
        ("A, xavier", "B, xavier"),
    }


def test_an_ensemble_of_networks_is_the_mean_of_their_treatments() -> None:
    tables = {name: combine(predictions(seed=seed))["treatment"] for seed, name in enumerate("ABC")}
    tables["C"] = tables["C"][tables["C"]["compound"] != "PP-2"]
    models = {(name, "imagenet"): table for name, table in tables.items()} | {("A", "xavier"): tables["A"]}
    (found,) = ensembles(models, CLASSES)
    assert (found["name"], found["networks"]) == ("mean of 3 networks, imagenet", ["A", "B", "C"])
    columns = [f"p_{name}" for name in CLASSES]
    stacked = pd.concat(table for table in tables.values()).groupby(["treatment", "label"])[columns]
    mean = stacked.mean()[stacked.size() == 3]
    right = mean.idxmax(axis=1).str.removeprefix("p_") == mean.index.get_level_values("label")
    assert (found["treatment"]["correct"], found["treatment"]["total"]) == (right.sum(), 12)
    matrix = np.array(found["confusion"])
    assert (np.trace(matrix), matrix.sum()) == (right.sum(), 12)
    assert set(found["wrong"]) == set(mean.index.get_level_values("treatment")[~right])
