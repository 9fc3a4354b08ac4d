"""Scores against independent computations: SciPy, scikit-learn, statsmodels and published counts."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from statsmodels.stats.proportion import proportion_confint

from cellhpc import scores
from tests.every_draw import exact_interval
from tests.made_up import CLASSES, predictions

COLUMNS = [scores.PREFIX + name for name in CLASSES]


@pytest.fixture
def table() -> pd.DataFrame:
    return predictions()


@pytest.mark.parametrize("how", ["mean", "median", "log", "vote"])
def test_levels_agree_with_the_tables_and_with_scikit_learn(table: pd.DataFrame, how: scores.How) -> None:
    combined, levels = scores.combine(table, how), scores.levels(table, how)
    assert tuple(levels) == scores.LEVELS
    for level, at in levels.items():
        assert at["accuracy"] == accuracy_score(combined[level]["label"], combined[level]["call"])
        assert at["total"] == len(combined[level])
        whole = scores.score(combined)[level]
        assert {key: whole[key] for key in at} == at
        assert whole["bootstrap95"] == scores.bootstrap_over_compounds(combined[level])


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
    np.testing.assert_allclose(at["wilson95"], proportion_confint(correct, total, method="wilson"))


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (0, 1), (1, 1), (55, 55)])
def test_wilson_interval_at_its_ends_is_scipys(correct: int, total: int) -> None:
    low, high = scores.accuracy(correct, total)["wilson95"]
    expected = stats.binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    np.testing.assert_allclose([low, high], [expected.low, expected.high], atol=1e-12)
    assert (low if correct == 0 else 1 - high) == 0  # exactly: a rounding error beyond would be no share


@pytest.mark.parametrize("how", ["mean", "median", "log"])
def test_the_first_two_calls_are_scikit_learns(table: pd.DataFrame, how: scores.How) -> None:
    for level, combined in scores.combine(table, how).items():
        named = scores.score({level: combined})[level]["top2"]
        assert named["accuracy"] == top_k_accuracy_score(combined["label"], combined[COLUMNS], k=2, labels=CLASSES)


def test_macro_accuracy_is_scikit_learns_balanced_one(table: pd.DataFrame) -> None:
    treatments = scores.combine(table)["treatment"].drop(index=[0, 1, 2])  # labels and compounds of unequal size
    macro = scores.macro(treatments)
    expected = balanced_accuracy_score(treatments["label"], treatments["call"])
    np.testing.assert_allclose(macro["label"]["accuracy"], expected)
    by_compound = treatments.groupby("compound")["correct"].mean()
    np.testing.assert_allclose(macro["compound"]["accuracy"], by_compound.mean())
    assert (macro["label"]["of"], macro["compound"]["of"]) == (3, len(by_compound))
    scipys = stats.bootstrap((by_compound.to_numpy(),), np.mean, method="percentile", rng=np.random.default_rng(1))
    np.testing.assert_allclose(macro["compound"]["bootstrap95"], scipys.confidence_interval, atol=0.05)
    exact = exact_interval(
        treatments, lambda drawn: float(drawn["correct"].groupby(drawn["label"].to_numpy()).mean().mean())
    )
    np.testing.assert_allclose(macro["label"]["bootstrap95"], exact, atol=0.02)
    assert scores.macro(treatments[treatments["compound"] == "PP-2"])["label"]["bootstrap95"] is None


def test_macro_accuracy_weighs_compounds_and_labels_the_same() -> None:
    """Label x: a 3 of 3, b 0 of 1; y: c 1 of 2. Over compounds (1 + 0 + 1/2) / 3, over labels (3/4 + 1/2) / 2."""
    rows = [("a", "x", True)] * 3 + [("b", "x", False), ("c", "y", True), ("c", "y", False)]
    macro = scores.macro(pd.DataFrame(rows, columns=["compound", "label", "correct"]))
    assert (macro["compound"]["accuracy"], macro["label"]["accuracy"]) == (0.5, 0.625)


def test_by_label_counts_compounds_and_treatments(table: pd.DataFrame) -> None:
    treatments = scores.combine(table)["treatment"]
    found = scores.by_label(treatments)
    diagonal = np.diag(confusion_matrix(treatments["label"], treatments["call"], labels=CLASSES))
    assert [row["label"] for row in found] == list(CLASSES)
    assert [row["correct"] for row in found] == diagonal.tolist()
    assert [row["compounds"] for row in found] == [2, 3, 2]
    for row in found:
        np.testing.assert_allclose(row["wilson95"], proportion_confint(row["correct"], row["total"], method="wilson"))


def test_spread_over_seeds() -> None:
    found = scores.spread([0.9, 0.8, 1.0])
    assert found == {"seeds": 3, "mean": pytest.approx(0.9), "sd": pytest.approx(0.1), "lowest": 0.8, "highest": 1.0}
    assert scores.spread([0.9]) is None


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
    scipys = stats.bootstrap(shares, np.mean, method="percentile", n_resamples=99_999, rng=np.random.default_rng(1))
    np.testing.assert_allclose([low, high], scipys.confidence_interval)  # in eighths
    np.testing.assert_allclose([low, high], stats.binom.ppf([0.025, 0.975], 8, 6 / 8) / 8)
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
