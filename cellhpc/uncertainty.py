"""Uncertainty of treatments: entropies, what is lost by keeping doubtful calls, what to repeat, known against unknown.

All of it is of one model (network and initialisation), over its table of treatments (`scores.combine`). Arrays:
`probabilities` (treatments, classes) and `members` (members, treatments, classes), float64, whose rows sum to one. A
member is a seed (deep ensemble; Lakshminarayanan, Pritzel & Blundell 2017, NeurIPS), or a draw of a seed with dropout
(Gal & Ghahramani 2016, ICML). Entropies are in nats.

- Predictive entropy: that of the members' mean; the whole uncertainty.
- Expected entropy, aleatoric: the mean of the members' entropies; what more members would not take away.
- Mutual information, epistemic: the first less the second; how far members disagree (Gal 2016, Uncertainty in Deep
  Learning, section 3.3; Depeweg, Hernandez-Lobato, Doshi-Velez & Udluft 2018, ICML).
- Risk and coverage: the share of wrong calls among the treatments that are kept, when the most uncertain are set
  aside; its mean over every number that is kept is the area AURC (Geifman & El-Yaniv 2017, NeurIPS). Treatments that
  are equally uncertain are in no order: the mean over all of their orders is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import entr
from sklearn.metrics import roc_auc_score

from cellhpc.calibration import calibration, tempered
from cellhpc.conformal import Split, conformal, p_values
from cellhpc.scores import PREFIX

REPEAT_ALPHA = 0.1
"""Alpha of the conformal sets in the table of what to repeat."""
NEARLY = 0.5
"""A second label is nearly as likely from this part of the first one's probability on."""
DISAGREE = 0.25
"""Members disagree where this part of them, or more, calls otherwise."""
_KEYS = ("fold", "treatment", "compound", "label")


@dataclass(frozen=True)
class Assessment:
    """What is known of a model's uncertainty.

    Parameters
    ----------
    document
        For `scores.json`: `calibration`, `conformal`, `decomposition`, `rejection`, `repeat`, `unknown`, as `assess`
        says.
    p_values
        One row a treatment: `fold` (where there is one), `treatment`, `compound`, `label`, `call`; then for each class
        the p-values `marginal_<class>` and `by_label_<class>`. No rows where no compound has another one to be
        calibrated by.
    repeat
        Treatments to be repeated in the lab, the most uncertain first: the columns of `document["repeat"]`, with sets
        written as `a; b`.
    treatments
        One row a treatment, in the order of the table: `fold` (where there is one), `treatment`, `compound`, `label`,
        `call`, `known` (whether its label was among those trained on), and in nats `entropy` and, where there are
        members, `aleatoric` and `epistemic`.
    """

    document: dict[str, Any]
    p_values: pd.DataFrame
    repeat: pd.DataFrame
    treatments: pd.DataFrame


def assess(
    treatments: pd.DataFrame,
    classes: Sequence[str],
    members: NDArray | None = None,
    kind: str = "",
    unknown: NDArray | None = None,
    by: str = "",
) -> Assessment:
    """Assess the uncertainty of one model.

    Parameters
    ----------
    treatments
        One row a treatment: `treatment`, `compound`, `label`, `call`, and `p_<class>` for each class; `fold`, maybe.
    classes
        Names of the classes, in the order of the networks' outputs.
    members
        Probabilities of the members (members, treatments, classes), treatments in the order of the table; each has all
        of them.
    kind
        What a member is, in words: `seeds`, `dropout draws`, `seeds and dropout draws`.
    unknown
        Which treatments are of a label that their fold's networks were never trained on, (treatments,) of bool. They
        count for nothing but `unknown`, and calibrate nothing.
    by
        What the folds held out, as `compound`; empty where that is not known.

    Returns
    -------
    Assessment
        Its document has None for what the study is too small for:

        - `calibration`: what `calibration.calibration` gives, and `after_temperature`: the same after
          each compound was tempered by others of other folds (None where there are none), and `temperatures` with
          `lowest`, `median`, `highest` over them.
        - `conformal`: what `conformal.conformal` gives; None for one compound.
        - `decomposition`: `members`, `kind`, and the means over treatments of `entropy`, `aleatoric`, `epistemic`; None
          for fewer than two members.
        - `rejection`: as `rejection` gives it.
        - `repeat`: a list of `treatment`, `compound`, `label`, `call`, `p_call`, `entropy`, `epistemic` (None without
          members), `set` (labels in the marginal set at `REPEAT_ALPHA`, None without one), `why` in words. Treatments
          for which there is no reason are not in it.
        - `unknown`: as `known_against_unknown` gives it; None if no treatment is unknown.

    Raises
    ------
    ValueError
        The members are not of these treatments and classes.
    """
    classes = list(classes)
    values = treatments[[PREFIX + name for name in classes]].to_numpy(dtype=np.float64)
    if members is not None and members.shape[1:] != values.shape:
        raise ValueError(f"members are of {members.shape[1:]} treatments and classes, the table of {values.shape}")
    if members is not None and len(members) < 2:
        members = None
    known = np.ones(len(values), bool) if unknown is None else ~np.asarray(unknown, dtype=bool)
    parts = decompose(members) if members is not None else {"entropy": entropy(values)}
    table = treatments.reset_index(drop=True)
    compounds = table["compound"].to_numpy()
    truth = np.array(
        [classes.index(label) if inside else -1 for label, inside in zip(table["label"], known, strict=True)]
    )
    several = len(set(compounds[known])) > 1
    marginal = by_label = None
    if several:
        marginal = p_values(values, truth, compounds, calibrates=known)
        by_label = p_values(values, truth, compounds, by_label=True, calibrates=known)
    folds = table["fold"].to_numpy() if "fold" in table else None
    repeat = _repeat(table, classes, values, parts, marginal, members, kind, known)
    document: dict[str, Any] = dict.fromkeys(("calibration", "conformal", "decomposition", "rejection"))
    if known.any():
        wrong = (table["call"] != table["label"]).to_numpy()
        document["calibration"] = _calibration(
            values[known], truth[known], compounds[known], ~wrong[known], None if folds is None else folds[known]
        )
        document["rejection"] = rejection(parts["entropy"][known], wrong[known])
    if marginal is not None and by_label is not None:
        found = conformal(
            marginal[known], by_label[known], truth[known], compounds[known], classes, split_of(table, by)
        )
        document["conformal"] = found
    if members is not None and known.any():
        means = {name: float(part[known].mean()) for name, part in parts.items()}
        document["decomposition"] = {"members": len(members), "kind": kind, **means}
    document["repeat"] = repeat
    document["unknown"] = known_against_unknown(table, known, parts["entropy"], parts.get("epistemic"))
    written = pd.DataFrame(repeat, columns=_REPEAT)
    written["set"] = ["" if one is None else "; ".join(one) for one in written["set"]]
    units = _keys_of(table).assign(known=known, **parts)
    return Assessment(document, _p_table(table, classes, marginal, by_label), written, units)


def split_of(treatments: pd.DataFrame, by: str) -> Split:
    """Say what the networks that scored a compound had seen of it.

    Parameters
    ----------
    treatments
        With the column `compound` and, where it is known, `fold`.
    by
        What the folds held out; empty where that is not known.
    """
    if by == "compound":
        return "compound"
    if not by or "fold" not in treatments or treatments["fold"].nunique() < 2:
        return "unknown"
    return "shared" if (treatments.groupby("compound")["fold"].nunique() > 1).any() else "compound"


def entropy(probabilities: NDArray) -> NDArray:
    """Entropy of each row of probabilities, in nats; zero times the logarithm of zero is zero."""
    return entr(np.asarray(probabilities, dtype=np.float64)).sum(axis=-1)


def decompose(members: NDArray) -> dict[str, NDArray]:
    """Split the uncertainty of each treatment.

    Parameters
    ----------
    members
        Probabilities (members, treatments, classes).

    Returns
    -------
    dict
        `entropy`, `aleatoric`, `epistemic`, each (treatments,), in nats; the first is the sum of the others, and none
        is below zero.
    """
    whole = entropy(np.mean(members, axis=0, dtype=np.float64))
    aleatoric = np.minimum(entropy(members).mean(axis=0), whole)  # alike members differ by rounding
    return {"entropy": whole, "aleatoric": aleatoric, "epistemic": whole - aleatoric}


def rejection(uncertainty: NDArray, wrong: NDArray, by: str = "entropy") -> dict[str, Any]:
    """Risk against coverage: set the most uncertain treatments aside, one after the other.

    Parameters
    ----------
    uncertainty
        Of each treatment, (n,), n > 0; more is less certain.
    wrong
        Whether its call is wrong, (n,) of bool.
    by
        What the uncertainty is.

    Returns
    -------
    dict
        `aurc`; `aurc_best`, had all wrong calls been the most uncertain; `aurc_random`, the share of wrong calls, which
        uncertainty that knows nothing would have; `by`; and `curve`: for each number of treatments kept, from 1, the
        `coverage` (share kept) and `risk` (share of them that is wrong, the mean over the orders of equals).
    """
    order = np.argsort(uncertainty, kind="stable")
    number, kept = len(order), np.arange(1, len(order) + 1)
    wrong = np.asarray(wrong, dtype=np.float64)
    group = np.unique(np.asarray(uncertainty)[order], return_inverse=True)[1]
    expected = (np.bincount(group, weights=wrong[order]) / np.bincount(group))[group]  # of equals, each the same share
    risk = np.cumsum(expected) / kept
    best = np.cumsum(np.sort(wrong)) / kept
    return {
        "aurc": float(risk.mean()),
        "aurc_best": float(best.mean()),
        "aurc_random": float(wrong.mean()),
        "by": by,
        "curve": [{"coverage": float(one / number), "risk": float(at)} for one, at in zip(kept, risk, strict=True)],
    }


def known_against_unknown(
    treatments: pd.DataFrame, known: NDArray, whole: NDArray, epistemic: NDArray | None = None
) -> dict[str, Any] | None:
    """Ask whether treatments of a label that was never trained on are more uncertain than the others.

    Parameters
    ----------
    treatments
        With the columns `label` and, maybe, `fold`.
    known
        Whether the label was among those trained on, (treatments,) of bool.
    whole, epistemic
        Predictive entropy, and mutual information where there are members, (treatments,).

    Returns
    -------
    dict or None
        `auroc`: how probable it is that an unknown treatment has the higher entropy than a known one (a half: no better
        than a coin), `auroc_epistemic` or None, the numbers of `known` and `unknown` treatments, and `per_label` for
        each unknown label: `label`, `auroc`, `known`, `unknown`, against the known treatments of the folds that left
        it out. An area is None where one side is empty; the whole is None where no treatment is unknown.
    """
    if known.all():
        return None
    labels = treatments["label"].to_numpy()
    folds = treatments["fold"].to_numpy() if "fold" in treatments else np.zeros(len(treatments))
    per_label = []
    for label in sorted(set(labels[~known])):
        left_out = ~known & (labels == label)
        beside = known & np.isin(folds, folds[left_out])
        chosen = left_out | beside
        area = _area(left_out[chosen], whole[chosen])
        per_label.append({"label": label, "auroc": area, "known": int(beside.sum()), "unknown": int(left_out.sum())})
    return {
        "auroc": _area(~known, whole),
        "auroc_epistemic": None if epistemic is None else _area(~known, epistemic),
        "known": int(known.sum()),
        "unknown": int((~known).sum()),
        "per_label": per_label,
    }


def _area(unknown: NDArray, uncertainty: NDArray) -> float | None:
    return float(roc_auc_score(unknown, uncertainty)) if unknown.any() and not unknown.all() else None


def _calibration(
    values: NDArray, truth: NDArray, compounds: NDArray, right: NDArray, folds: NDArray | None
) -> dict[str, Any]:
    after = None
    if (scaled := tempered(values, truth, compounds, folds)) is not None:
        changed, temperatures_of = scaled
        found = list(temperatures_of.values())
        temperatures = {"lowest": min(found), "median": float(np.median(found)), "highest": max(found)}
        after = {**calibration(changed, truth, right=right), "temperatures": temperatures}
    return {**calibration(values, truth, right=right), "after_temperature": after}


_REPEAT = ["treatment", "compound", "label", "call", "p_call", "entropy", "epistemic", "set", "why"]


def _repeat(
    table: pd.DataFrame,
    classes: list[str],
    values: NDArray,
    parts: dict[str, NDArray],
    marginal: NDArray | None,
    members: NDArray | None,
    kind: str,
    known: NDArray,
) -> list[dict[str, Any]]:
    """Rank the treatments that there is a reason to repeat; equals stay in the order of the table."""
    ranked = []
    for row in np.argsort(-parts["entropy"], kind="stable"):
        held = None if marginal is None else [classes[one] for one in np.flatnonzero(marginal[row] > REPEAT_ALPHA)]
        one = table.iloc[row]
        called = classes.index(one["call"])
        why = _why(one, classes, values[row], held)
        if members is not None:
            # Of equal votes, any may be the call: a member that has another as high does not call otherwise.
            otherwise = int((members[:, row].max(axis=1) > members[:, row, called] + 1e-6).sum())
            if otherwise >= DISAGREE * len(members):
                why.append(f"{otherwise} of {len(members)} {kind or 'members'} call otherwise")
        if why and known[row]:
            ranked.append(
                {
                    **{name: one[name] for name in _REPEAT[:4]},
                    "p_call": float(values[row, called]),
                    "entropy": float(parts["entropy"][row]),
                    "epistemic": float(parts["epistemic"][row]) if "epistemic" in parts else None,
                    "set": held,
                    "why": "; ".join(why),
                }
            )
    return ranked


def _why(one: pd.Series, classes: list[str], values: NDArray, held: list[str] | None) -> list[str]:
    """Reasons to repeat a treatment, in words; the first are what one looks at first."""
    called = classes.index(one["call"])
    why = []
    if one["call"] != one["label"]:
        why.append(f"called {one['call']} and is {one['label']} ({values[classes.index(one['label'])]:.2f})")
    others = [n for n in np.argsort(-values, kind="stable") if classes[n] not in (one["call"], one["label"])]
    near = [n for n in others if values[n] >= NEARLY * values[called]]
    if near:
        why.append("nearly as likely: " + ", ".join(f"{classes[n]} ({values[n]:.2f})" for n in near[:2]))
    if held is not None and not held:
        why.append(f"no label conforms at alpha {REPEAT_ALPHA}")
    if held is not None and len(held) > 1:
        why.append(f"{len(held)} labels conform at alpha {REPEAT_ALPHA}")
    return why


def _keys_of(table: pd.DataFrame) -> pd.DataFrame:
    return table[[name for name in (*_KEYS, "call") if name in table]]


def _p_table(
    table: pd.DataFrame, classes: list[str], marginal: NDArray | None, by_label: NDArray | None
) -> pd.DataFrame:
    keys = _keys_of(table)
    names = [f"{how}_{name}" for how in ("marginal", "by_label") for name in classes]
    if marginal is None or by_label is None:
        return keys.iloc[:0].reindex(columns=[*keys.columns, *names])
    return pd.concat([keys, pd.DataFrame(np.hstack([marginal, by_label]), columns=names)], axis=1)
