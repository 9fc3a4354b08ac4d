"""Entropies, rejection, what to repeat, known against unknown: against SciPy, scikit-learn, plain loops and by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from cellhpc import calibration, conformal, scores, uncertainty
from tests.made_up import CLASSES, predictions


def members_of(table: pd.DataFrame, number: int = 3, noise: float = 0.5) -> NDArray:
    """Members that differ: the table's probabilities with noise on their logarithms."""
    random = np.random.default_rng(0)
    logarithms = np.log(table[[scores.PREFIX + name for name in CLASSES]].to_numpy())
    weights = np.exp(logarithms + random.normal(0, noise, (number, *logarithms.shape)))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.fixture
def table() -> pd.DataFrame:
    return scores.combine(predictions(doses=(0.3, 1.0, 3.0), skill=0.3))["treatment"]


def test_entropies_are_scipys() -> None:
    members = np.random.default_rng(0).dirichlet([0.3, 0.3, 0.3, 0.3], (5, 40))
    parts = uncertainty.decompose(members)
    np.testing.assert_allclose(parts["entropy"], stats.entropy(members.mean(axis=0), axis=1))
    np.testing.assert_allclose(parts["aleatoric"], stats.entropy(members, axis=2).mean(axis=0))
    divergence = stats.entropy(members, members.mean(axis=0)[None], axis=2).mean(axis=0)  # of members from their mean
    np.testing.assert_allclose(parts["epistemic"], divergence, atol=1e-12)


def test_members_that_agree_or_contradict_each_other() -> None:
    agree, contradict = [[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]
    parts = uncertainty.decompose(np.array([agree, contradict]).transpose(1, 0, 2))
    np.testing.assert_allclose(parts["entropy"], np.log(2))
    np.testing.assert_allclose(parts["aleatoric"], [np.log(2), 0])
    np.testing.assert_allclose(parts["epistemic"], [0, np.log(2)])
    same = uncertainty.decompose(np.repeat(np.random.default_rng(0).dirichlet([1, 1, 1], (1, 50)), 3, axis=0))
    assert (same["epistemic"] >= 0).all()
    np.testing.assert_allclose(same["epistemic"], 0, atol=1e-12)


def area(wrong: list[float]) -> float:
    """Area of risk against coverage of calls in this order."""
    return sum(sum(wrong[:kept]) / kept for kept in range(1, len(wrong) + 1)) / len(wrong)


def test_risk_and_coverage_are_a_plain_loops() -> None:
    random = np.random.default_rng(0)
    doubt, wrong = random.uniform(size=60), random.uniform(size=60) < 0.3
    found = uncertainty.rejection(doubt, wrong)
    ranked = [float(wrong[i]) for i in sorted(range(60), key=lambda i: doubt[i])]
    assert found["aurc"] == pytest.approx(area(ranked))
    assert found["aurc_best"] == pytest.approx(area(sorted(ranked)))
    assert found["aurc_random"] == pytest.approx(wrong.mean())
    assert found["aurc_best"] < found["aurc"]
    assert found["curve"][19] == {"coverage": 20 / 60, "risk": pytest.approx(sum(ranked[:20]) / 20)}
    assert found["curve"][-1] == {"coverage": 1.0, "risk": pytest.approx(wrong.mean())}


def test_equals_are_averaged_over_all_of_their_orders() -> None:
    doubt, wrong = np.array([2, 1, 2, 0, 2, 1]), np.array([1, 1, 0, 0, 1, 0])
    areas = [
        area([float(wrong[i]) for i in order])
        for order in itertools.permutations(range(6))
        if all(doubt[a] <= doubt[b] for a, b in itertools.pairwise(order))
    ]
    assert len(areas) == 2 * 6
    assert uncertainty.rejection(doubt, wrong)["aurc"] == pytest.approx(np.mean(areas))
    nothing_known = uncertainty.rejection(np.zeros(6), wrong)
    assert nothing_known["aurc"] == pytest.approx(nothing_known["aurc_random"])


def test_the_document_is_made_of_the_parts(table: pd.DataFrame) -> None:
    members = members_of(table)
    found = uncertainty.assess(table, CLASSES, members, "seeds")
    json.dumps(found.document, allow_nan=False)
    assert [*found.document] == ["calibration", "conformal", "decomposition", "rejection", "repeat", "unknown"]
    values = table[["p_" + name for name in CLASSES]].to_numpy()
    truth, compounds = table["label"].map(CLASSES.index).to_numpy(), table["compound"].to_numpy()
    changed, temperatures = calibration.tempered(values, truth, compounds)
    expected = calibration.calibration(values, truth)
    after = found.document["calibration"].pop("after_temperature")
    assert found.document["calibration"] == expected
    lowest, *_, highest = sorted(temperatures.values())
    assert after.pop("temperatures") == {
        "lowest": lowest,
        "median": pytest.approx(np.median([*temperatures.values()])),
        "highest": highest,
    }
    assert after == calibration.calibration(changed, truth)
    marginal, by_label = (conformal.p_values(values, truth, compounds, one) for one in (False, True))
    assert found.document["conformal"] == conformal.conformal(marginal, by_label, truth, compounds, CLASSES)
    parts = uncertainty.decompose(members)
    assert found.document["decomposition"] == {
        "members": 3,
        "kind": "seeds",
        **{name: pytest.approx(part.mean()) for name, part in parts.items()},
    }
    assert found.document["rejection"] == uncertainty.rejection(parts["entropy"], ~table["correct"].to_numpy())
    assert found.document["unknown"] is None
    assert found.p_values["treatment"].tolist() == table["treatment"].tolist()
    np.testing.assert_array_equal(found.p_values.filter(regex="^marginal_").to_numpy(), marginal)
    np.testing.assert_array_equal(found.p_values["by_label_Epithelial"], by_label[:, 2])
    assert found.treatments["treatment"].tolist() == table["treatment"].tolist()
    for name, part in parts.items():
        np.testing.assert_array_equal(found.treatments[name], part)


def test_what_networks_had_seen_of_a_compound_is_told_by_the_folds(table: pd.DataFrame) -> None:
    by_compound = table.assign(fold=table["compound"])
    replicates = table.assign(fold=[str(number % 2) for number in range(len(table))])
    assert replicates.groupby("compound")["fold"].nunique().max() == 2
    assert uncertainty.split_of(table, "") == "unknown"
    assert uncertainty.split_of(by_compound, "") == "unknown"  # what was trained on is not known
    assert uncertainty.split_of(by_compound, "cell_line") == "compound"
    assert uncertainty.split_of(replicates, "replicate") == "shared"
    assert uncertainty.split_of(replicates[replicates["fold"] == "0"], "replicate") == "unknown"
    assert uncertainty.split_of(by_compound[by_compound["fold"] == "AZ-A"], "compound") == "compound"


def test_what_to_repeat_is_ranked_with_reasons() -> None:
    rows = [
        ("a 1", "a", "x", (0.98, 0.01, 0.01)),
        ("b 1", "b", "x", (0.45, 0.40, 0.15)),
        ("c 1", "c", "y", (0.90, 0.06, 0.04)),
        ("d 1", "d", "z", (0.01, 0.01, 0.98)),
    ]
    table = pd.DataFrame([row[:3] for row in rows], columns=["treatment", "compound", "label"])
    table = pd.concat([table, pd.DataFrame([row[3] for row in rows], columns=["p_x", "p_y", "p_z"])], axis=1)
    table["call"] = ["x", "x", "x", "z"]
    members = np.stack([table[["p_x", "p_y", "p_z"]].to_numpy()] * 4)
    members[0, 1] = [0.1, 0.8, 0.1]
    found = uncertainty.assess(table, ["x", "y", "z"], members, "seeds")
    ranked = found.document["repeat"]
    assert [one["treatment"] for one in ranked[:2]] == ["b 1", "c 1"]
    assert ranked[0]["why"].startswith("nearly as likely: y (0.40)")
    assert ranked[0]["why"].endswith("1 of 4 seeds call otherwise")
    assert ranked[1]["why"].startswith("called x and is y (0.06)")
    assert (ranked[1]["call"], ranked[1]["label"], ranked[1]["p_call"], ranked[1]["epistemic"]) == ("x", "y", 0.9, 0)
    assert ranked[0]["entropy"] == pytest.approx(stats.entropy(members.mean(axis=0)[1]))
    assert found.repeat["set"].tolist() == ["; ".join(one["set"]) for one in ranked]
    assert found.repeat.drop(columns="set").to_dict("records") == [
        {name: value for name, value in one.items() if name != "set"} for one in ranked
    ]


@pytest.mark.parametrize(
    ("skill", "words"), [(0.3, "labels conform at alpha 0.1"), (0.9, "no label conforms at alpha 0.1")]
)
def test_sets_that_are_empty_or_hold_several_are_reasons(skill: float, words: str) -> None:
    compounds = {f"{label} {n}": label for label in CLASSES for n in range(20)}
    table = scores.combine(predictions(compounds, doses=(1.0,), skill=skill, seed=5))["treatment"]
    found = uncertainty.assess(table, CLASSES)
    chosen = [one for one in found.document["repeat"] if words in one["why"]]
    assert chosen
    by_treatment = found.p_values.set_index("treatment").filter(regex="^marginal_")
    for one in chosen:
        held = by_treatment.columns[by_treatment.loc[one["treatment"]] > 0.1].str.removeprefix("marginal_")
        assert one["set"] == held.tolist()
        assert (len(one["set"]) == 0) if words.startswith("no") else (len(one["set"]) > 1)


def test_certain_and_right_treatments_are_not_repeated() -> None:
    compounds = {f"{label} {n}": label for label in CLASSES for n in range(4)}
    table = scores.combine(predictions(compounds))["treatment"]
    table[["p_" + name for name in CLASSES]] = np.eye(3)[table["label"].map(CLASSES.index)]
    found = uncertainty.assess(table.assign(call=table["label"]), CLASSES)
    assert found.document["repeat"] == []
    assert found.repeat.empty
    assert [*found.repeat][:4] == ["treatment", "compound", "label", "call"]
    assert (found.document["calibration"]["nll"], found.document["rejection"]["aurc"]) == (0, 0)


def leave_labels_out(table: pd.DataFrame) -> tuple[pd.DataFrame, NDArray, NDArray]:
    """Each label left out once: its treatments, which the networks don't know, beside the others."""
    folds = [table.assign(fold=label) for label in CLASSES[:2]]
    together = pd.concat(folds, ignore_index=True)
    unknown = (together["fold"] == together["label"]).to_numpy()
    return together, unknown, members_of(together)


def test_known_against_unknown_is_scikit_learns(table: pd.DataFrame) -> None:
    together, unknown, members = leave_labels_out(table)
    found = uncertainty.assess(together, CLASSES, members, "seeds", unknown).document["unknown"]
    parts = uncertainty.decompose(members)
    assert found["auroc"] == pytest.approx(roc_auc_score(unknown, parts["entropy"]))
    assert found["auroc_epistemic"] == pytest.approx(roc_auc_score(unknown, parts["epistemic"]))
    assert (found["known"], found["unknown"]) == ((~unknown).sum(), unknown.sum())
    assert [one["label"] for one in found["per_label"]] == [*CLASSES[:2]]
    for one in found["per_label"]:
        inside = (together["fold"] == one["label"]).to_numpy()
        assert one["auroc"] == pytest.approx(roc_auc_score(unknown[inside], parts["entropy"][inside]))
        assert one["known"] + one["unknown"] == inside.sum()


def test_unknown_treatments_count_for_nothing_else(table: pd.DataFrame) -> None:
    together, unknown, members = leave_labels_out(table)
    known = together[~unknown].reset_index(drop=True)
    whole = uncertainty.assess(together, CLASSES, members, "seeds", unknown)
    alone = uncertainty.assess(known, CLASSES, members[:, ~unknown], "seeds")
    for name in ("calibration", "conformal", "decomposition", "rejection", "repeat"):
        assert whole.document[name] == alone.document[name], name
    pd.testing.assert_frame_equal(whole.p_values[~unknown].reset_index(drop=True), alone.p_values)
    assert len(whole.p_values) == len(together)


def test_all_unknown(table: pd.DataFrame) -> None:
    found = uncertainty.assess(table, CLASSES, unknown=np.ones(len(table), bool)).document
    assert found["unknown"]["auroc"] is None
    assert [found[name] for name in ("calibration", "conformal", "decomposition", "rejection")] == [None] * 4
    assert found["repeat"] == []


def test_small_studies_give_what_they_can(table: pd.DataFrame) -> None:
    def of(*compounds: str) -> pd.DataFrame:
        return table[table["compound"].isin(compounds)].reset_index(drop=True)

    one = uncertainty.assess(of("cisplatin"), CLASSES, members_of(of("cisplatin"), 1), "seeds")
    assert one.document["conformal"] is None
    assert one.document["decomposition"] is None
    assert one.document["calibration"]["after_temperature"] is None
    assert one.document["calibration"]["nll"] > 0
    assert one.document["rejection"] is not None
    assert {treatment["set"] for treatment in one.document["repeat"]} <= {None}
    assert one.p_values.empty
    assert "by_label_Epithelial" in one.p_values
    two = uncertainty.assess(of("cisplatin", "PP-2"), CLASSES)
    assert two.document["conformal"]["finest_p"] == 0.5
    assert two.document["conformal"]["marginal"][0]["mean_size"] == 3
    assert two.document["calibration"]["after_temperature"] is not None
    for some in (one, two):
        json.dumps(some.document, allow_nan=False)
    empty = uncertainty.assess(table.iloc[:0], CLASSES)
    assert [empty.document[name] for name in ("calibration", "conformal", "rejection", "unknown")] == [None] * 4


def test_one_class() -> None:
    table = pd.DataFrame({"treatment": ["a", "b"], "compound": ["a", "b"], "label": "x", "call": "x", "p_x": 1.0})
    found = uncertainty.assess(table, ["x"], np.ones((2, 2, 1)), "dropout draws", np.array([False, False])).document
    assert found["calibration"]["after_temperature"]["temperatures"]["median"] == 1
    assert found["conformal"]["marginal"][0]["coverage"] == 1
    assert found["decomposition"]["epistemic"] == 0
    assert found["repeat"] == []


def test_members_of_another_table_are_refused(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="members are of"):
        uncertainty.assess(table, CLASSES, members_of(table)[:, 1:])
