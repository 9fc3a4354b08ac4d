"""Conformal prediction over compounds: p-values for each treatment and class, sets of labels, and how often they hold.

The nonconformity of a treatment with a class is one less the class's probability. Treatments of a compound resemble
each other, so that compounds, and not treatments, can be exchanged: hierarchical conformal prediction (Lee, Barber &
Willett 2023, arXiv 2306.06342; repeated subsampling of Dunn, Wasserman & Ramdas 2022, J Am Stat Assoc 118 2491-2502).
With K calibrating compounds k, the p-value of a treatment and a candidate class is

    (1 + sum over k of the share of k's treatments whose nonconformity with their true class is at least this one's)
    / (K + 1)

and the set at alpha holds the classes with p > alpha. Marginal: all other compounds calibrate every class.
By label (class-conditional, Mondrian): those whose true label is the candidate class. A treatment's own compound
never calibrates it, nor does its label take part. No p-value is below 1 / (K + 1), and none is drawn at random (no
smoothing), so that ties make sets larger, never smaller.

The counting is crepes' (`ConformalClassifier`). One of a compound's treatments, drawn at random, would make compounds
a plain sample; the formula is the mean of p over all R balanced draws, in which each treatment comes equally often. All
draws of all compounds go to crepes in one sample. Beside them stand R - 1 scores above all others: with them, the
treatment itself, which crepes counts once, has the weight R of a compound, and crepes' p is the formula's. R is the
least common multiple of the numbers of treatments, up to `DRAWS`. Where that does not do, the draws are as balanced
as they can be, those of high nonconformity first: p is then never below the formula's, and above it by less than 1 / R.

`GUARANTEES` say what is promised, in words that stand beside the sets (split: Papadopoulos et al. 2002, ECML; across
folds: Vovk 2015, Ann Math Artif Intell 74 9-28; of a compound, one treatment at random: Lee, Barber & Willett).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from crepes import ConformalClassifier
from numpy.typing import NDArray

from cellhpc.scores import accuracy

ALPHAS = (0.2, 0.1, 0.05, 0.03)
DRAWS = 840
"""Most draws: divisible by 1 to 8, so that p-values are exact for compounds of up to eight treatments."""

Split = Literal["compound", "shared", "unknown"]
"""What the networks that scored a compound had seen of it: nothing; some of it, as with replicates or cell lines held
out; or it is not known, as with tables from elsewhere."""
_OTHERS = "Every set comes from the other compounds alone. "
_RANKED = (
    " Over all compounds of one study, each ranked among the others, coverage is so by construction: what a model is "
    "worth shows in the size of its sets."
)
GUARANTEES: MappingProxyType[Split, str] = MappingProxyType(
    {
        "compound": _OTHERS
        + "Where their probabilities and this compound's come from one model that has seen none of them, a set holds "
        "the true label of a new compound's treatment with probability 1 - alpha at least (split-conformal). Across "
        "folds that is not so: the networks that scored the other compounds were trained with this one among their "
        "training compounds (cross-conformal). For a new compound, then, about 1 - 2 alpha is proven (Vovk 2015), "
        "although coverage is usually near 1 - alpha." + _RANKED,
        "shared": _OTHERS
        + "But the networks that scored a compound had been trained with treatments or wells of the same compound: "
        "nothing is promised for a new compound. The sets tell how well known compounds are told apart again."
        + _RANKED,
        "unknown": _OTHERS
        + "Whether a network had seen the compound that it scores is not known here. If it had, nothing is promised "
        "for a new compound. If none had, a set holds the true label of a new compound's treatment with probability "
        "1 - alpha at least where all probabilities come from one network (split-conformal), and about 1 - 2 alpha is "
        "proven where they come from those of several folds (cross-conformal; Vovk 2015)." + _RANKED,
    }
)


def p_value(tested: NDArray, calibrating: NDArray, compounds: NDArray) -> NDArray:
    """P-values of nonconformity scores, by the hierarchical formula of the module's text.

    Parameters
    ----------
    tested
        Nonconformity of what is tested with its candidate classes, any shape.
    calibrating
        Nonconformity of the calibrating treatments with their true class, (n,).
    compounds
        Their compounds, (n,): whole numbers or names. None of them may be a tested treatment's own.

    Returns
    -------
    NDArray
        P-values, float64, in the shape of `tested`; 1 where nothing calibrates.
    """
    draws, copies = _balanced(calibrating, compounds)
    return _counted(tested, np.repeat(calibrating, copies), draws)


def p_values(
    probabilities: NDArray,
    truth: NDArray,
    compounds: NDArray,
    by_label: bool = False,
    calibrates: NDArray | None = None,
) -> NDArray:
    """P-values of each treatment and class, from the other compounds.

    Parameters
    ----------
    probabilities
        (treatments, classes), rows sum to one.
    truth
        Number of each treatment's true class, (treatments,).
    compounds
        Its compound, (treatments,).
    by_label
        Whether a class is calibrated by the compounds of that label alone. Of a compound with several labels, the
        treatments of that label count.
    calibrates
        Which treatments calibrate, (treatments,) of bool; all, if None.

    Returns
    -------
    NDArray
        (treatments, classes), float64, in 0 to 1.
    """
    nonconformity = 1 - np.asarray(probabilities, dtype=np.float64)
    codes = np.unique(np.asarray(compounds), return_inverse=True)[1]
    chosen = np.ones(len(truth), dtype=bool) if calibrates is None else np.asarray(calibrates, dtype=bool)
    scores = nonconformity[np.arange(len(truth)), truth]
    values = np.ones_like(nonconformity)
    groups: list[Any] = list(range(nonconformity.shape[1])) if by_label else [slice(None)]
    for columns in groups:
        rows = np.flatnonzero(chosen & (truth == columns) if by_label else chosen)
        draws, copies = _balanced(scores[rows], codes[rows])
        drawn, compound_of = np.repeat(scores[rows], copies), np.repeat(codes[rows], copies)
        for tested, own in _tested(codes, codes[rows]):
            others = drawn if own is None else drawn[compound_of != own]
            values[tested, columns] = _counted(nonconformity[tested, columns], others, draws)
    return values


def conformal(
    marginal: NDArray,
    by_label: NDArray,
    truth: NDArray,
    compounds: NDArray,
    classes: Sequence[str],
    split: Split = "unknown",
) -> dict[str, Any]:
    """Say how often sets hold the true label, and how large they are.

    Parameters
    ----------
    marginal, by_label
        P-values of `p_values`, (treatments, classes).
    truth, compounds
        As there.
    classes
        Names of the classes.
    split
        What the networks had seen of a compound that they scored.

    Returns
    -------
    dict
        `unit`; `guarantee` in words; number of `compounds`; `finest_p`, the lowest p-value that can be; `marginal` and
        `by_label`: for each of `ALPHAS` `alpha`, `coverage`, `covered`, `total`, `wilson95` (over treatments), the
        `mean_size` of sets, and how many are `empty` or hold a `single` label. `by_label` has `per_label` besides: for
        each label among the treatments `label`, `covered`, `total`, `mean_size`.
    """
    names = np.unique(np.asarray(compounds))
    of_label = [len(np.unique(np.asarray(compounds)[truth == one])) for one in range(len(classes))]
    most = max(of_label)
    by_label_words = (
        f" By label, a label is calibrated by its own compounds alone: there are {most} at most, so that at an "
        f"alpha below {1 / (most + 1):.3g} every set holds every label. Such sets are large because compounds are few."
    )
    return {
        "unit": "compound",
        "guarantee": GUARANTEES[split] + by_label_words,
        "compounds": len(names),
        "finest_p": 1 / len(names),
        "marginal": [_sets(marginal, truth, alpha) for alpha in ALPHAS],
        "by_label": [
            {**_sets(by_label, truth, alpha), "per_label": _per_label(by_label, truth, alpha, classes)}
            for alpha in ALPHAS
        ],
    }


def _balanced(scores: NDArray, compounds: NDArray) -> tuple[int, NDArray]:
    """Give the number of draws, and how often each treatment is drawn: in draw r of R, number floor(r n / R) of n."""
    sizes = np.unique(compounds, return_inverse=True, return_counts=True)
    draws = min(math.lcm(*(int(size) for size in np.unique(sizes[2]))), DRAWS)
    order = np.lexsort((-scores, sizes[1]))
    group, of = sizes[1][order], sizes[2][sizes[1][order]]
    place = np.arange(len(scores)) - np.searchsorted(group, group)
    copies = np.empty(len(scores), dtype=np.int64)
    copies[order] = -(-(place + 1) * draws // of) + (-place * draws // of)
    return draws, copies


def _tested(codes: NDArray, calibrating: NDArray) -> Iterator[tuple[NDArray, int | None]]:
    """Treatments that have the same calibrating compounds: those of each such compound, and all that are of none."""
    calibrators = np.unique(calibrating)
    for own in calibrators:
        yield np.flatnonzero(codes == own), int(own)
    free = np.flatnonzero(~np.isin(codes, calibrators))
    if len(free):
        yield free, None


def _counted(tested: NDArray, drawn: NDArray, draws: int) -> NDArray:
    """Count with crepes: the drawn scores, and R - 1 above all others."""
    sample = np.concatenate([drawn, np.full(draws - 1, np.inf)])
    values = ConformalClassifier().fit(sample).predict_p(tested.reshape(-1), smoothing=False)
    return values.reshape(tested.shape)


def _sets(values: NDArray, truth: NDArray, alpha: float) -> dict[str, Any]:
    sets = values > alpha
    held = accuracy(int(sets[np.arange(len(truth)), truth].sum()), len(truth))
    sizes = sets.sum(axis=1)
    return {
        "alpha": alpha,
        "coverage": held["accuracy"],
        "covered": held["correct"],
        "total": held["total"],
        "wilson95": held["wilson95"],
        "mean_size": float(sizes.mean()),
        "empty": int((sizes == 0).sum()),
        "single": int((sizes == 1).sum()),
    }


def _per_label(values: NDArray, truth: NDArray, alpha: float, classes: Sequence[str]) -> list[dict[str, Any]]:
    sets = values > alpha
    return [
        {
            "label": label,
            "covered": int(sets[truth == number, number].sum()),
            "total": int((truth == number).sum()),
            "mean_size": float(sets[truth == number].sum(axis=1).mean()),
        }
        for number, label in enumerate(classes)
        if (truth == number).any()
    ]
