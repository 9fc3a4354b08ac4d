"""Conformal p-values against the formula in plain loops, against crepes draw by draw, and against their promise."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from crepes import ConformalClassifier
from numpy.typing import NDArray
from scipy.stats import binomtest

from cellhpc import conformal

CLASSES = 4


def made_up(
    compounds: int = 12, sizes: tuple[int, ...] = (1, 2, 3, 4), classes: int = CLASSES, seed: int = 0
) -> tuple[NDArray, NDArray, NDArray]:
    """Probabilities, truth and compounds: treatments of one compound are alike, and doubles occur (ties)."""
    random = np.random.default_rng(seed)
    counts = [sizes[number % len(sizes)] for number in range(compounds)]
    of = np.repeat(np.arange(compounds), counts)
    truth = (np.arange(compounds) % classes)[of]
    logits = random.normal(size=(compounds, classes))[of] + random.normal(0, 0.5, (len(of), classes))
    logits[np.arange(len(of)), truth] += 1.5
    weights = np.exp(logits)
    return np.round(weights / weights.sum(axis=1, keepdims=True), 2), truth, of


def by_the_formula(probabilities: NDArray, truth: NDArray, compounds: NDArray, by_label: bool) -> list[list[Fraction]]:
    """Write the formula as it stands, in fractions."""
    scores = 1 - probabilities
    values = []
    for i in range(len(truth)):
        row = []
        for c in range(probabilities.shape[1]):
            total, others = Fraction(1), 0
            for k in dict.fromkeys(compounds):
                own = [j for j in range(len(truth)) if compounds[j] == k and (not by_label or truth[j] == c)]
                if k != compounds[i] and own:
                    others += 1
                    total += Fraction(sum(scores[j, truth[j]] >= scores[i, c] for j in own), len(own))
            row.append(total / (others + 1))
        values.append(row)
    return values


@pytest.mark.parametrize("by_label", [False, True])
def test_the_p_values_are_the_formulas(by_label: bool) -> None:
    data = made_up()
    found = conformal.p_values(*data, by_label=by_label)
    exact = np.array([[float(value) for value in row] for row in by_the_formula(*data, by_label)])
    np.testing.assert_array_equal(found, exact)  # to the last digit: an alpha of 0.1 meets a p of 0.1


@pytest.mark.parametrize("by_label", [False, True])
def test_a_compound_of_several_labels(by_label: bool) -> None:
    probabilities, truth, compounds = made_up()
    truth = (truth + np.arange(len(truth)) % 2) % CLASSES
    expected = by_the_formula(probabilities, truth, compounds, by_label)
    np.testing.assert_array_equal(
        conformal.p_values(probabilities, truth, compounds, by_label), np.array(expected, dtype=float)
    )


def test_the_p_value_is_the_mean_of_crepes_over_balanced_draws() -> None:
    """Each draw has one treatment of each compound: a Mondrian bin of an ordinary conformal classifier."""
    probabilities, truth, compounds = made_up(compounds=8)
    scores, draws, tested = 1 - probabilities, 12, int(np.flatnonzero(compounds == 7)[0])
    rows, bins = [], []
    for draw in range(draws):
        for k in range(7):
            own = np.flatnonzero(compounds == k)
            rows.append(own[draw * len(own) // draws])
            bins.append(draw)
    classifier = ConformalClassifier().fit(scores[rows, truth[rows]], bins=np.array(bins))
    each = classifier.predict_p(np.repeat(scores[[tested]], draws, axis=0), bins=np.arange(draws), smoothing=False)
    np.testing.assert_allclose(conformal.p_values(probabilities, truth, compounds)[tested], each.mean(axis=0))


def test_with_one_treatment_a_compound_it_is_crepes_leaving_one_out() -> None:
    probabilities, truth, compounds = made_up(compounds=15, sizes=(1,))
    scores = 1 - probabilities
    for by_label in (False, True):
        found = conformal.p_values(probabilities, truth, compounds, by_label)
        for one in range(len(truth)):
            rest = np.delete(np.arange(len(truth)), one)
            own = scores[rest, truth[rest]]
            bins = truth[rest] if by_label else np.zeros(len(rest), int)
            classifier = ConformalClassifier().fit(own, bins=bins)
            candidates = np.arange(CLASSES) if by_label else np.zeros(CLASSES, int)
            expected = classifier.predict_p(scores[one], bins=candidates, smoothing=False)
            np.testing.assert_array_equal(found[one], expected)


def test_draws_that_can_not_be_balanced_err_upwards_and_little() -> None:
    """Compounds of 9, 11 and 13 treatments would take 1,287 draws, more than there are."""
    data = made_up(compounds=10, sizes=(9, 11, 13))
    found = conformal.p_values(*data)
    exact = np.array([[float(value) for value in row] for row in by_the_formula(*data, by_label=False)])
    assert (found >= exact - 1e-12).all()
    assert 0 < (found - exact).max() < 1 / conformal.DRAWS


@pytest.mark.parametrize("by_label", [False, True])
def test_a_compounds_own_label_takes_no_part_in_its_p_values(by_label: bool) -> None:
    probabilities, truth, compounds = made_up()
    own = compounds == 5
    before = conformal.p_values(probabilities, truth, compounds, by_label)
    for step in range(1, CLASSES):
        otherwise = np.where(own, (truth + step) % CLASSES, truth)
        after = conformal.p_values(probabilities, otherwise, compounds, by_label)
        np.testing.assert_array_equal(after[own], before[own])
        assert (after[~own] != before[~own]).any()


def test_the_finest_p_value_is_one_over_the_compounds() -> None:
    probabilities, truth, compounds = made_up(compounds=38, sizes=(2, 3))
    probabilities[0] = [1, 0, 0, 0]
    marginal = conformal.p_values(probabilities, truth, compounds)
    by_label = conformal.p_values(probabilities, truth, compounds, by_label=True)
    assert marginal[0, 1:] == pytest.approx(1 / 38)
    assert marginal.min() == pytest.approx(1 / 38)
    assert marginal[0, 0] == 1
    of_label = np.bincount(truth[np.unique(compounds, return_index=True)[1]])
    assert by_label[0, 1:] == pytest.approx(1 / (of_label[1:] + 1))
    document = conformal.conformal(marginal, by_label, truth, compounds, "ABCD", "compound")
    assert (document["unit"], document["compounds"], document["finest_p"]) == ("compound", 38, 1 / 38)
    assert "about 1 - 2 alpha is proven (Vovk 2015)" in document["guarantee"]
    assert (
        f"there are 10 at most, so that at an alpha below {1 / 11:.3g} every set holds every label."
        in document["guarantee"]
    )


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("shared", "nothing is promised for a new compound. The sets tell"),
        ("unknown", "Whether a network had seen the compound that it scores is not known here"),
    ],
)
def test_nothing_is_promised_where_a_compound_may_have_been_trained_on(split: conformal.Split, said: str) -> None:
    probabilities, truth, compounds = made_up()
    values = conformal.p_values(probabilities, truth, compounds)
    assert said in conformal.conformal(values, values, truth, compounds, "ABCD", split)["guarantee"]


def test_over_a_whole_study_the_true_labels_p_values_are_ranks() -> None:
    """Whatever a model is worth: coverage of the study that calibrates itself is no proof, as the guarantee says."""
    random = np.random.default_rng(0)
    probabilities, truth = random.dirichlet(np.ones(CLASSES), 40), random.integers(0, CLASSES, 40)
    values = conformal.p_values(probabilities, truth, np.arange(40))[np.arange(40), truth]
    np.testing.assert_array_equal(np.sort(values), np.arange(1, 41) / 40)


def test_by_label_bbbc021_has_too_few_compounds_for_small_alphas() -> None:
    """Two to four compounds a label: at alpha 0.1 every set holds all 12, at 0.2 labels of four can leave it."""
    label = np.repeat(np.arange(12), [3, 3, 2, 4, 4, 2, 3, 3, 4, 3, 4, 3])
    certain = np.eye(12)[label]
    by_label = conformal.p_values(certain, label, np.arange(38), by_label=True)
    found = conformal.conformal(by_label, by_label, label, np.arange(38), "ABCDEFGHIJKL")["by_label"]
    assert [entry["mean_size"] for entry in found[1:]] == [12, 12, 12]
    assert found[0]["mean_size"] == pytest.approx(12 - (22 * 4 + 16 * 3) / 38)


def test_what_does_not_calibrate_is_tested_all_the_same() -> None:
    probabilities, truth, compounds = made_up()
    calibrates = compounds < 9
    some = conformal.p_values(probabilities, truth, compounds, calibrates=calibrates)
    np.testing.assert_array_equal(
        some[calibrates], conformal.p_values(probabilities[calibrates], truth[calibrates], compounds[calibrates])
    )
    scores = 1 - probabilities
    by_itself = conformal.p_value(
        scores[~calibrates], scores[np.arange(len(truth)), truth][calibrates], compounds[calibrates]
    )
    np.testing.assert_array_equal(some[~calibrates], by_itself)


def test_one_compound_has_nothing_that_calibrates_it() -> None:
    for by_label in (False, True):
        assert (conformal.p_values(np.full((3, 2), 0.5), np.zeros(3, int), np.zeros(3, int), by_label) == 1).all()


def test_sets_are_counted_by_hand() -> None:
    marginal = np.array([[0.9, 0.04], [0.15, 0.02], [0.1, 0.1], [0.5, 0.5]])
    truth = np.array([0, 1, 1, 1])
    found = conformal.conformal(marginal, marginal, truth, np.array(["a", "b", "b", "c"]), ["x", "y"])
    at = {entry["alpha"]: entry for entry in found["marginal"]}
    assert list(at) == [0.2, 0.1, 0.05, 0.03]
    assert (at[0.2]["covered"], at[0.2]["empty"], at[0.2]["single"], at[0.2]["mean_size"]) == (2, 2, 1, 0.75)
    assert (at[0.1]["covered"], at[0.1]["empty"], at[0.1]["single"]) == (2, 1, 2)  # p = alpha is out
    assert (at[0.03]["covered"], at[0.03]["total"], at[0.03]["coverage"]) == (3, 4, 0.75)
    interval = binomtest(3, 4).proportion_ci(method="wilson")
    assert at[0.03]["wilson95"] == pytest.approx([interval.low, interval.high])
    assert found["by_label"][0]["per_label"] == [
        {"label": "x", "covered": 1, "total": 1, "mean_size": 1.0},
        {"label": "y", "covered": 1, "total": 3, "mean_size": pytest.approx(2 / 3)},
    ]


OTHERS, REPETITIONS = 99, 1000


def exchangeable(random: np.random.Generator, labels: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Compounds of these labels, the last one to be tested: nonconformity (treatments, 3), truth, compounds.

    One to four treatments a compound, strongly alike. Labels differ in how hard they are, so that what holds over all
    of them need not hold for each.
    """
    of = np.repeat(np.arange(len(labels)), random.integers(1, 5, len(labels)))
    logits = random.normal(0, 1, (len(labels), 3))[of] + random.normal(0, 0.3, (len(of), 3))
    logits[np.arange(len(of)), labels[of]] += np.array([0.5, 1.5, 3.0])[labels[of]]
    weights = np.exp(logits)
    return 1 - weights / weights.sum(axis=1, keepdims=True), labels[of], of


def last_is_covered(random: np.random.Generator, labels: NDArray) -> NDArray:
    """Whether the set of a treatment of the last compound, calibrated by all the others, holds its label; by alpha."""
    nonconformity, truth, compounds = exchangeable(random, labels)
    scores = nonconformity[np.arange(len(truth)), truth]
    others = compounds < len(labels) - 1
    tested = random.choice(np.flatnonzero(~others))
    return conformal.p_value(scores[tested], scores[others], compounds[others]) > np.array(conformal.ALPHAS)


def assert_within_binomial_error(covered: NDArray, others: int = OTHERS) -> None:
    """Between 1 - alpha and what whole compounds allow, 1 / (K + 1) more, with an error of 1 in 1,000 at each end."""
    for count, alpha in zip(covered.sum(axis=0), conformal.ALPHAS, strict=True):
        most = min(1 - alpha + 1 / (others + 1), 1)
        assert binomtest(count, len(covered), 1 - alpha, alternative="less").pvalue > 1e-3, (alpha, count)
        assert binomtest(count, len(covered), most, alternative="greater").pvalue > 1e-3, (alpha, count)


def test_marginal_coverage_is_what_is_promised_over_all_labels_and_not_for_each() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, (REPETITIONS, OTHERS + 1))
    covered = np.array([last_is_covered(random, row) for row in labels])
    assert_within_binomial_error(covered)
    hardest = covered[labels[:, -1] == 0, 0]
    assert binomtest(hardest.sum(), len(hardest), 0.8, alternative="less").pvalue < 1e-3


@pytest.mark.parametrize("label", [0, 1, 2])
def test_coverage_by_label_is_what_is_promised_for_each(label: int) -> None:
    random = np.random.default_rng(label)
    labels = np.full(OTHERS + 1, label)  # by label, a label is calibrated by its own compounds
    assert_within_binomial_error(np.array([last_is_covered(random, labels) for _ in range(REPETITIONS)]))


def test_coverage_when_every_compound_is_tested_by_the_others() -> None:
    """As a study does it: 24 compounds, each by the 23 others; the mean over 200 studies, which are independent."""
    shares = []
    for seed in range(200):
        data = made_up(compounds=24, sizes=(1, 2, 3), seed=seed)
        random = np.random.default_rng(seed)
        values = conformal.p_values(*data)[np.arange(len(data[1])), data[1]]
        one = [random.choice(np.flatnonzero(data[2] == compound)) for compound in range(24)]
        shares.append((values[one] > 0.125).mean())
    error = np.std(shares) / np.sqrt(len(shares))
    assert 0.875 - 3 * error <= np.mean(shares) <= 0.875 + 1 / 24 + 3 * error


@pytest.mark.parametrize(("compounds", "largest", "seconds"), [(38, 7, 2), (222, 8, 20)])
def test_it_is_fast(compounds: int, largest: int, seconds: float) -> None:
    """About 150 and 1,000 treatments of 12 classes, marginal and by label, with as many draws as there can be."""
    data = made_up(compounds, tuple(range(1, largest + 1)), classes=12)
    start = time.process_time()
    for by_label in (False, True):
        conformal.p_values(*data, by_label=by_label)
    assert time.process_time() - start < seconds


def test_coverage_by_label_holds_for_each_among_compounds_of_all() -> None:
    """As a study has it: labels that differ in how hard they are, each calibrated by its own compounds."""
    random = np.random.default_rng(5)
    labels, each = np.repeat([0, 1, 2], 20), 20
    covered = np.empty((3, REPETITIONS, len(conformal.ALPHAS)), bool)
    for repetition in range(REPETITIONS):
        nonconformity, truth, compounds = exchangeable(random, labels)
        values = conformal.p_values(1 - nonconformity, truth, compounds, by_label=True)
        for label in range(3):
            own = random.choice(np.flatnonzero(compounds == each * label))
            covered[label, repetition] = values[own, label] > np.array(conformal.ALPHAS)
    for found in covered:
        assert_within_binomial_error(found, each - 1)
