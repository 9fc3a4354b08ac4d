"""Calibration against scikit-learn, SciPy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from cellhpc import calibration

CLASSES = 5


def made_up(treatments: int = 120, sharpness: float = 1.0, seed: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """Probabilities whose truth is drawn from them, then made too sure (sharpness > 1); three treatments a compound."""
    random = np.random.default_rng(seed)
    honest = random.dirichlet(np.full(CLASSES, 0.4), treatments)
    truth = np.array([random.choice(CLASSES, p=row) for row in honest])
    stated = honest**sharpness
    return stated / stated.sum(axis=1, keepdims=True), truth, np.arange(treatments) // 3


def test_likelihood_and_brier_score_are_scikit_learns() -> None:
    probabilities, truth, _ = made_up()
    assert calibration.nll(probabilities, truth) == pytest.approx(log_loss(truth, probabilities, labels=range(CLASSES)))
    by_class = [brier_score_loss(truth == one, probabilities[:, one], pos_label=True) for one in range(CLASSES)]
    assert calibration.brier(probabilities, truth) == pytest.approx(sum(by_class))


def test_a_true_class_of_probability_zero_is_counted_as_scikit_learn_counts_it() -> None:
    probabilities, truth = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([1, 0])
    assert calibration.nll(probabilities, truth) == pytest.approx(log_loss(truth, probabilities))
    assert calibration.brier(probabilities, truth) == pytest.approx((2 + 0.5) / 2)


def test_the_bins_are_scikit_learns_and_their_error_a_plain_loops() -> None:
    probabilities, truth, _ = made_up()
    found = calibration.calibration(probabilities, truth, 7)
    right, highest = probabilities.argmax(axis=1) == truth, probabilities.max(axis=1)
    accuracies, confidences = calibration_curve(right, highest, n_bins=7)
    filled = [one for one in found["bins"] if one["count"]]
    np.testing.assert_allclose([one["accuracy"] for one in filled], accuracies)
    np.testing.assert_allclose([one["confidence"] for one in filled], confidences)
    error = 0.0
    for number in range(7):
        inside = [i for i in range(len(truth)) if number / 7 <= highest[i] < (number + 1) / 7]
        if inside:
            gap = sum(right[i] for i in inside) / len(inside) - sum(highest[i] for i in inside) / len(inside)
            error += len(inside) / len(truth) * abs(gap)
    assert found["ece"] == pytest.approx(error)


def test_empty_bins_are_kept_and_an_edge_belongs_to_the_bin_above_it() -> None:
    probabilities = np.array([[0.7, 0.3], [0.7, 0.3], [1.0, 0.0]])
    found = calibration.bins(probabilities, np.array([0, 1, 0]))
    assert [one["count"] for one in found] == [0, 0, 0, 0, 0, 0, 0, 2, 0, 1]
    assert found[7] == {"low": pytest.approx(0.7), "high": 0.8, "count": 2, "confidence": 0.7, "accuracy": 0.5}
    assert found[8]["confidence"] is None
    assert found[8]["accuracy"] is None
    assert found[9]["high"] == 1.0


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_that_a_search_with_scikit_learns_loss_finds(sharpness: float) -> None:
    probabilities, truth, _ = made_up(sharpness=sharpness)

    def loss(log_temperature: float) -> float:
        powers = np.log(np.clip(probabilities, 2.3e-16, 1)) / np.exp(log_temperature)
        tempered = np.exp(powers) / np.exp(powers).sum(axis=1, keepdims=True)
        return log_loss(truth, tempered, labels=range(CLASSES))

    expected = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x
    found = calibration.fit_temperature(probabilities, truth)
    assert np.log(found) == pytest.approx(expected, abs=1e-4)
    assert (found > 1) == (sharpness > 1)
    assert calibration.nll(calibration.at_temperature(probabilities, found), truth) == pytest.approx(loss(expected))


def test_temperatures_at_the_ends() -> None:
    sure = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert calibration.fit_temperature(sure, np.array([0, 1, 0])) == calibration.TEMPERATURES[0]
    assert calibration.fit_temperature(sure, np.array([1, 0, 1])) == calibration.TEMPERATURES[1]
    assert calibration.fit_temperature(np.ones((3, 1)), np.zeros(3, int)) == 1.0
    assert calibration.fit_temperature(np.full((3, 2), 0.5), np.array([0, 1, 0])) == 1.0


def test_a_compound_is_tempered_by_the_others() -> None:
    probabilities, truth, compounds = made_up(sharpness=3.0)
    changed, temperatures = calibration.tempered(probabilities, truth, compounds)
    own = compounds == 7
    assert temperatures[7, 7] == calibration.fit_temperature(probabilities[~own], truth[~own])
    expected = probabilities[own] ** (1 / temperatures[7, 7])
    np.testing.assert_allclose(changed[own], expected / expected.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(changed.sum(axis=1), 1)
    assert (changed.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert calibration.nll(changed, truth) < calibration.nll(probabilities, truth)


def test_a_compounds_own_label_does_not_change_its_temperature() -> None:
    probabilities, truth, compounds = made_up(sharpness=3.0)
    otherwise = np.where(compounds == 7, (truth + 1) % CLASSES, truth)
    before, temperatures = calibration.tempered(probabilities, truth, compounds)
    after, changed = calibration.tempered(probabilities, otherwise, compounds)
    assert changed[7, 7] == temperatures[7, 7]
    assert changed[8, 8] != temperatures[8, 8]
    np.testing.assert_array_equal(after[compounds == 7], before[compounds == 7])


def test_one_compound_has_no_others() -> None:
    assert calibration.tempered(np.full((2, 2), 0.5), np.array([0, 1]), np.array(["a", "a"])) is None


def test_what_was_held_out_together_does_not_serve_itself() -> None:
    """Four compounds in two folds, as of two cell lines: others are those that the other fold held out."""
    probabilities, truth, compounds = made_up(sharpness=3.0)
    folds = np.where(compounds % 2, "odd", "even")
    both = calibration.tempered(probabilities, truth, compounds, folds)
    assert both is not None
    changed, temperatures = both
    other = folds == "even"
    assert temperatures[7, "odd"] == temperatures[5, "odd"]
    assert temperatures[7, "odd"] == calibration.fit_temperature(probabilities[other], truth[other])
    otherwise = np.where(compounds == 5, (truth + 1) % CLASSES, truth)
    again = calibration.tempered(probabilities, otherwise, compounds, folds)
    assert again is not None
    np.testing.assert_array_equal(again[0][compounds == 7], changed[compounds == 7])
    twice = np.arange(len(compounds)) % 2  # each compound is in both folds
    crossed = calibration.tempered(probabilities, truth, compounds, twice)
    assert crossed is not None
    others = (compounds != 7) & (twice == 1)
    assert crossed[1][7, 0] == calibration.fit_temperature(probabilities[others], truth[others])
    assert calibration.tempered(probabilities, truth, folds, twice * 0) is not None  # a single fold says nothing
