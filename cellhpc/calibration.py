"""Calibration: do probabilities mean what they say, and what a temperature makes of them.

Arrays: `probabilities` (treatments, classes), float64, whose rows sum to one; `truth` (treatments,), the number of each
treatment's true class; `compounds` (treatments,), its compound. Logarithms are natural, and a probability below
2.2e-16 counts as that much, as in scikit-learn: one zero for a true class would else make every mean infinite.

- NLL: mean of -log of the probability of the true class.
- Brier score (Brier 1950, Mon Weather Rev 78 1-3): mean of the squared differences to the truth, summed over the
  classes: 0 at best, 2 at worst.
- Expected calibration error (Guo, Pleiss, Sun & Weinberger 2017, ICML): treatments are binned by their highest
  probability; the mean over bins, weighted by their counts, of |accuracy - mean highest probability|.
- Temperature (the same paper): probabilities are raised to 1 / T and made to sum to one again. T > 1 takes
  confidence away, T < 1 gives more; no call changes. A compound's T is fitted on the other compounds only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

BINS = 10
TEMPERATURES = (0.05, 20.0)
"""Lowest and highest temperature: where every treatment is right, the best one would be zero."""
_LEAST = float(np.finfo(np.float64).eps)


def nll(probabilities: NDArray, truth: NDArray) -> float:
    """Give the negative log-likelihood, the mean over treatments, in nats."""
    return float(-_logarithms(probabilities)[np.arange(len(truth)), truth].mean())


def brier(probabilities: NDArray, truth: NDArray) -> float:
    """Brier score: mean over treatments, sum over classes, 0 to 2."""
    return float(np.square(probabilities - np.eye(probabilities.shape[1])[truth]).sum(axis=1).mean())


def bins(
    probabilities: NDArray, truth: NDArray, number: int = BINS, right: NDArray | None = None
) -> list[dict[str, Any]]:
    """Bin treatments by their highest probability, in bins of equal width.

    Parameters
    ----------
    probabilities, truth
        See the module's text.
    number
        Bins between 0 and 1. A bin holds its lower end; the last one holds 1 too.
    right
        Whether each is called right, (treatments,) of bool; by default where the highest probability is the truth's.

    Returns
    -------
    list
        For each bin `low`, `high`, `count`, and the mean highest probability `confidence` and the share of right calls
        `accuracy`, which are None where it is empty.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth if right is None else right
    edges = np.arange(number + 1) / number  # linspace's are a little off some decimals
    of = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, number - 1)
    return [
        {
            "low": float(edges[one]),
            "high": float(edges[one + 1]),
            "count": int((of == one).sum()),
            "confidence": float(confidence[of == one].mean()) if (of == one).any() else None,
            "accuracy": float(right[of == one].mean()) if (of == one).any() else None,
        }
        for one in range(number)
    ]


def calibration(
    probabilities: NDArray, truth: NDArray, number: int = BINS, right: NDArray | None = None
) -> dict[str, Any]:
    """Measure how well probabilities are calibrated, over one treatment or more; the parameters are those of `bins`.

    Returns
    -------
    dict
        `nll`, `brier`, `ece`, and `bins` as `bins` gives them.
    """
    binned = bins(probabilities, truth, number, right)
    error = sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in binned if one["count"])
    return {
        "nll": nll(probabilities, truth),
        "brier": brier(probabilities, truth),
        "ece": error / len(truth),
        "bins": binned,
    }


def fit_temperature(probabilities: NDArray, truth: NDArray) -> float:
    """Find the temperature of the lowest negative log-likelihood.

    In 1 / T it is convex, so that its slope has one zero; where that lies outside `TEMPERATURES`, the nearer end is
    given, and 1 where every temperature is as good (a single class).
    """
    logarithms = _logarithms(probabilities)
    logarithms -= logarithms.max(axis=1, keepdims=True)
    of_truth = logarithms[np.arange(len(truth)), truth]

    def slope(log_temperature: float) -> float:
        """Slope of the negative log-likelihood by 1 / T: mean logarithm as the tempered ones weigh it, less truth's."""
        weights = np.exp(logarithms * np.exp(-log_temperature))
        return float(((weights * logarithms).sum(axis=1) / weights.sum(axis=1) - of_truth).sum())

    if slope(0.0) == 0:
        return 1.0
    lowest, highest = TEMPERATURES
    if slope(np.log(lowest)) <= 0:
        return lowest
    if slope(np.log(highest)) >= 0:
        return highest
    return float(np.exp(brentq(slope, np.log(lowest), np.log(highest), xtol=1e-10)))


def at_temperature(probabilities: NDArray, temperature: float | NDArray) -> NDArray:
    """Temper probabilities with one temperature, or with one for each treatment, (treatments,)."""
    scaled = _logarithms(probabilities) / np.reshape(temperature, (-1, 1))
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def tempered(
    probabilities: NDArray, truth: NDArray, compounds: NDArray, folds: NDArray | None = None
) -> tuple[NDArray, dict[tuple[Any, Any], float]] | None:
    """Temper each compound with the temperature that fits other compounds of other folds best.

    Its own truth takes no part, nor that of what was held out together with it.

    Parameters
    ----------
    probabilities, truth
        Of each treatment (treatments, classes), and the number of its class (treatments,).
    compounds, folds
        Those of each treatment (treatments,); without folds, or with a single one, each compound is one.

    Returns
    -------
    tuple or None
        The tempered probabilities (treatments, classes), and the temperature of each compound and fold; None where one
        has no other compound in another fold.
    """
    compounds = np.asarray(compounds)
    folds = compounds if folds is None or len(set(folds)) < 2 else np.asarray(folds)
    of = list(zip(compounds.tolist(), folds.tolist(), strict=True))
    others = {(compound, fold): (compounds != compound) & (folds != fold) for compound, fold in dict.fromkeys(of)}
    if not all(mask.any() for mask in others.values()):
        return None
    temperatures = {unit: fit_temperature(probabilities[mask], truth[mask]) for unit, mask in others.items()}
    return at_temperature(probabilities, np.array([temperatures[unit] for unit in of])), temperatures


def _logarithms(probabilities: NDArray) -> NDArray:
    return np.log(np.clip(np.asarray(probabilities, dtype=np.float64), _LEAST, 1.0))
