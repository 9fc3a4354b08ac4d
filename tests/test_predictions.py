"""Predictions from anywhere: the numbers that their arithmetic demands, and what is refused."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix
from statsmodels.stats.proportion import proportion_confint

from cellhpc import ledger
from cellhpc.aggregate import aggregate
from cellhpc.errors import DataError, UsageError
from cellhpc.predictions import read_predictions, score_predictions
from tests.conftest import Cellhpc
from tests.made_up import CLASSES, make_study, predictions
from tests.made_up_scores import CLASSES as MOAS
from tests.test_aggregate import violations

SIZES = (5, 12, 6, 9, 8, 12, 8, 3, 14, 9, 7, 10)
"""Treatments of each class: 103 in all."""
WRONG = {0: 3, 40: 6, 90: 11}
"""Rows that are called another class than their own."""


def published() -> pd.DataFrame:
    """103 treatments of 12 classes, three of them wrong; columns named as the labels."""
    labels = np.repeat(MOAS, SIZES)
    called = [MOAS[WRONG.get(row, list(MOAS).index(label))] for row, label in enumerate(labels)]
    random = np.random.default_rng(0)
    values = random.dirichlet(np.ones(12), len(labels)) * 0.4
    values[np.arange(len(labels)), [MOAS.index(call) for call in called]] += 0.6
    table = pd.DataFrame({"compound": [f"{label} {row // 3}" for row, label in enumerate(labels)]})
    table["concentration"] = [0.1 * 3**row for row in range(3)] * 34 + [1.0]
    return pd.concat([table.assign(moa=labels), pd.DataFrame(values, columns=list(MOAS))], axis=1)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("published")
    published().to_csv(folder / "kensert.csv", index=False)
    return folder, score_predictions(folder / "kensert.csv", folder / "out", names={"label": "moa"})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A small table that is right; tests make it wrong."""
    return write(tmp_path, predictions(doses=(1.0,)))


def write(folder: Path, table: pd.DataFrame) -> Path:
    table.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def test_100_of_103_treatments_are_91_8_to_99_0(scored: tuple[Path, dict[str, Any]]) -> None:
    folder, document = scored
    (model,) = document["models"]
    assert list(model["levels"]) == ["treatment", "compound"]
    at = model["levels"]["treatment"]
    assert (at["correct"], at["total"]) == (100, 103)
    assert [round(100 * bound, 1) for bound in at["wilson95"]] == [91.8, 99.0]
    np.testing.assert_allclose(at["wilson95"], proportion_confint(100, 103, method="wilson"))
    table = published()
    calls = table[list(MOAS)].idxmax(axis=1)
    assert model["confusion"] == confusion_matrix(table["moa"], calls, labels=list(MOAS)).tolist()
    assert {row["label"]: (row["correct"], row["total"]) for row in model["by_label"]} == {
        label: (size - sum(MOAS[MOAS.index(label)] == table["moa"][row] for row in WRONG), size)
        for label, size in zip(MOAS, SIZES, strict=True)
    }
    assert len(model["wrong"]) == 3
    assert document["headline"][0].startswith(
        "kensert, from a table: 100 of 103 treatments, 97.1 % (95 % interval 91.8"
    )
    written = pd.read_csv(folder / "out" / "treatments.csv")
    assert written["correct"].sum() == 100


def test_the_document_and_the_page_say_what_the_table_was(scored: tuple[Path, dict[str, Any]]) -> None:
    folder, document = scored
    schema = json.loads(resources.files("cellhpc").joinpath("scores.schema.json").read_text())
    assert violations(ledger.read_json(folder / "out" / "scores.json"), schema, schema) == []
    about = document["table"]
    assert (about["name"], about["rows"], about["level"]) == ("kensert.csv", 103, "treatment")
    page = (folder / "out" / "report.html").read_text()
    for words in (about["sha256"], f"{about['bytes']:,} bytes", "100/103, 97.1 %", "91.8 to 99.0"):
        assert words in page
    for words in ("Learning curves", "Images/s", "wells.csv"):
        assert words not in page
    assert document["abbreviations"]["Eg5 inhibitors"] == "Eg5"
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"scores.json", "report.html", "treatments.csv", "compounds.csv", "by_label.csv", "confusion.svg"} <= names
    assert not {"wells.csv", "fields.csv", "comparisons.csv", "learning-curves.png"} & names


def test_the_tiles_of_a_study_give_its_own_scores(tmp_path: Path) -> None:
    """Level by level, seed by seed: the table of all predictions is scored as the runs are."""
    runs = make_study(tmp_path / "study", seeds=(0, 1))
    expected = aggregate(tmp_path / "study", "study", runs, CLASSES)
    parts = []
    for unit in runs:
        facts = ledger.read_json(unit / "001" / "run.json")
        own = {"model": facts["network"], "seed": facts["seed"], "fold": facts["fold"]["name"]}
        own["initialisation"] = facts["initialisation"]
        parts.append(pd.read_parquet(unit / "001" / "predictions.parquet").assign(**own))
    path = tmp_path / "all.parquet"
    pd.concat(parts).to_parquet(path, index=False)
    found = score_predictions(path, tmp_path / "out")
    same = ("levels", "by_seed", "macro", "spread", "by_label", "confusion", "levels_of", "seeds")
    for mine, theirs in zip(found["models"], expected["models"], strict=True):
        assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}
    assert found["comparisons"] == expected["comparisons"]
    assert found["baselines"] == expected["baselines"]
    fields = [pd.read_csv(folder / "fields.csv") for folder in (tmp_path / "out", tmp_path / "study" / "results")]
    keys = ["network", "initialisation", "plate", "well", "field"]
    fields = [table[sorted(table)].sort_values(keys).reset_index(drop=True) for table in fields]
    pd.testing.assert_frame_equal(*fields)


def test_missing_folds_are_in_the_headline(tmp_path: Path) -> None:
    whole = predictions().assign(model="A")
    some = whole[whole["compound"] != "PP-2"].assign(model="B")
    document = score_predictions(write(tmp_path, pd.concat([whole, some])), tmp_path / "out")
    assert not document["complete"]
    assert document["headline"][0] == "Incomplete: compound PP-2 not predicted by every model and seed."
    assert "6 of 7 folds, without PP-2" in document["headline"][2]
    (pair,) = document["comparisons"]
    assert pair["treatments"] == 12


def test_a_table_that_says_what_was_trained_on_is_checked_for_leaks(tmp_path: Path) -> None:
    table = predictions()
    every = sorted(set(table["compound"]))
    others = {name: "; ".join(other for other in every if other != name) for name in every}
    sound = table.assign(trained_on=table["compound"].map(others))
    document = score_predictions(write(tmp_path, sound), tmp_path / "out")
    assert document["cautions"] == []
    leaky = sound.assign(trained_on=sound["trained_on"].where(sound["compound"] != "PP-2", "; ".join(every)))
    with pytest.raises(DataError) as fault:
        score_predictions(write(tmp_path, leaky), tmp_path / "other")
    rows = int((table["compound"] == "PP-2").sum())
    assert f"{rows} row(s) predict a compound that their network was trained on: a leak" in str(fault.value)
    assert f"PP-2: {rows} row(s)" in str(fault.value)
    assert not (tmp_path / "other").exists()


def test_splits_that_can_not_be_right_are_named_in_the_headline(tmp_path: Path) -> None:
    table = predictions()
    table["fold"] = table["compound"]
    assert len(score_predictions(write(tmp_path, table), tmp_path / "out")["cautions"]) == 1
    table["fold"] = table["replicate"]
    (_, shared) = score_predictions(write(tmp_path, table), tmp_path / "out")["cautions"]
    assert shared.startswith("What is held out is the fold: the same compounds are in training")
    other = table.assign(model="B", fold=table["replicate"].replace({"1": "2", "2": "1"}))
    other["fold"] = other["fold"].where(other["compound"] == "PP-2", table["compound"])
    both = pd.concat([table.assign(model="A", fold=table["compound"]), other])
    document = score_predictions(write(tmp_path, both), tmp_path / "out")
    assert document["cautions"][1] == (
        "Models or seeds were split differently; not in the same folds of all: PP-2. Folds are not looked at."
    )
    assert document["cautions"][1] in document["headline"]


def test_seeds_that_were_split_differently_are_an_ensemble_all_the_same(tmp_path: Path) -> None:
    seeds = [predictions(doses=(1.0,), seed=seed).assign(seed=seed) for seed in (0, 1)]
    seeds[0]["fold"], seeds[1]["fold"] = (seeds[0]["compound"] == "PP-2") + 1, (seeds[1]["compound"] == "AZ-A") + 1
    document = score_predictions(write(tmp_path, pd.concat(seeds)), tmp_path / "out")
    assert "Models or seeds were split differently" in document["cautions"][1]
    (model,) = document["models"]
    assert model["levels"]["treatment"]["total"] == 7
    assert model["spread"]["seeds"] == model["uncertainty"]["decomposition"]["members"] == 2


def test_names_that_differ_by_signs_alone_are_kept_apart(tmp_path: Path) -> None:
    right = predictions(skill=1.0, doses=(1.0,))
    columns = [name for name in right if name.startswith("p_")]
    wrong = right.assign(**dict(zip(columns, right[columns[::-1]].to_numpy().T, strict=True)))
    both = pd.concat([right.assign(model="ResNet50"), wrong.assign(model="ResNet50+")])
    document = score_predictions(write(tmp_path, both), tmp_path / "out")
    assert [model["slug"] for model in document["models"]] == ["ResNet50-from-a-table", "ResNet50-from-a-table-2"]
    for model in document["models"]:
        matrix = pd.read_csv(tmp_path / "out" / f"confusion-{model['slug']}.csv")
        assert np.trace(matrix[list(CLASSES)]) == model["levels"]["treatment"]["correct"]


def test_concentrations_may_be_words_and_columns_categories(tmp_path: Path) -> None:
    given = predictions(doses=(1.0,)).drop(columns=["treatment", "unit"]).assign(concentration="high")
    names = ["compound", "label", "plate", "concentration"]
    given.astype(dict.fromkeys(names, "category")).to_parquet(tmp_path / "table.parquet")
    document = score_predictions(tmp_path / "table.parquet", tmp_path / "out")
    assert document["models"][0]["levels"]["treatment"]["total"] == 7
    assert "cisplatin high" in (tmp_path / "out" / "treatments.csv").read_text()
    assert (tmp_path / "out" / "report.html").exists()


def test_a_class_that_no_row_has_must_be_named(tmp_path: Path) -> None:
    given = predictions(doses=(1.0,), skill=0.0).rename(columns=lambda name: name.removeprefix("p_"))
    path = write(tmp_path, given[given["label"] != CLASSES[2]])
    with pytest.raises(DataError, match=r"(?s)don't sum to one.*each with --class"):
        score_predictions(path, tmp_path / "out")
    assert score_predictions(path, tmp_path / "out", classes=CLASSES)["classes"] == list(CLASSES)


def test_keys_that_are_not_there_are_made_of_those_that_are(tmp_path: Path) -> None:
    plain = predictions()
    bare = plain.drop(columns=["plate", "batch", "well", "tile", "treatment"]).groupby(
        ["compound", "concentration", "unit", "replicate", "field", "label"], as_index=False
    ).mean()  # fmt: skip
    table, classes = read_predictions(write(tmp_path, bare))
    assert classes == list(CLASSES)
    assert set(table["treatment"]) == {f"{name} {dose} uM" for name in set(plain["compound"]) for dose in (1, 3)}
    assert set(table["well"][table["treatment"] == "PP-2 3 uM"]) == {f"PP-2 3 uM, {replicate}" for replicate in "123"}
    (model,) = score_predictions(tmp_path / "table.csv", tmp_path / "out")["models"]
    assert [model["levels"][level]["total"] for level in ("field", "well", "treatment")] == [84, 42, 14]


def test_names_that_look_like_numbers_stay_as_they_are(tmp_path: Path) -> None:
    table = predictions(doses=(1.0,)).assign(plate="007", fold="01")
    table["well"] = table["replicate"] + table["well"]
    read, _ = read_predictions(write(tmp_path, table.replace({"PP-2": "NA"})))
    assert set(read["plate"]) == {"007"}
    assert set(read["fold"]) == {"01"}
    assert "NA" in set(read["compound"])


def test_a_second_call_does_nothing_and_another_rule_all(table: Path, tmp_path: Path) -> None:
    first = score_predictions(table, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert score_predictions(table, tmp_path / "out") == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert score_predictions(table, tmp_path / "out", "vote")["combine"] == "vote"
    coarse = pd.read_csv(tmp_path / "out" / "treatments.csv").drop(columns=["tiles", "call", "correct", "top2"])
    score_predictions(write(tmp_path, coarse.drop(columns=["network", "initialisation"])), tmp_path / "out")
    assert not (tmp_path / "out" / "wells.csv").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.drop(columns="label"), r"(?s)lacks columns.*no column label.*--label-column NAME"),
            (lambda t: t.drop(columns=["treatment", "concentration"]), "no column treatment or concentration"),
            (lambda t: t.drop(columns="well").drop(columns="replicate"), "no column well"),
            (lambda t: t.filter(regex="^(?!p_)"), r"(?s)no column of probability.*Name them with --class"),
            (lambda t: pd.concat([t, t.head(2)]), "2 tiles are predicted more than once"),
            (lambda t: t.assign(p_Epithelial=2.0), "rows of predictions hold no probabilities"),
            (lambda t: t.assign(p_Epithelial="high"), "rows of predictions hold no probabilities"),
            (lambda t: t.assign(label=["DNA damage", *t["label"][1:]]), r"(?s)one label.*cytochalasin B: .*, DNA dam"),
            (lambda t: t.replace({"Epithelial": "Epithelia"}), "(?s)not among its classes.*'Epithelia': "),
            (lambda t: t.head(0), "has no rows"),
            (lambda t: t.assign(label=["", *t["label"][1:]]), r"(?s)1 of \d+ rows have no label.*line 2"),
            (lambda t: t.assign(model=["", *["A"] * (len(t) - 1)]), r"1 of \d+ rows have no model"),
            (lambda t: t.assign(seed="first"), "seeds are whole numbers, found: first"),
        ],
    )
    def test_a_table_that_is_wrong(self, tmp_path: Path, change: Any, message: str) -> None:
        path = write(tmp_path, change(predictions(doses=(1.0,))))
        with pytest.raises(DataError, match=message):
            score_predictions(path, tmp_path / "out")
        assert not list(tmp_path.glob("out/*"))

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such table"):
            score_predictions(tmp_path / "absent.csv", tmp_path / "out")
        for name, content in (("a.parquet", b"torn"), ("a.csv", b"\xff\xfe\x00"), ("b.csv", b"")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=r"can't be read|is empty"):
                score_predictions(tmp_path / name, tmp_path / "out")

    def test_a_column_that_is_not_there(self, table: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"has no column moa\. Found: "):
            score_predictions(table, tmp_path / "out", names={"label": "moa"})

    def test_a_folder_that_holds_something_else(self, table: Path, tmp_path: Path) -> None:
        study = tmp_path / "study"
        aggregate(study, "made-up", make_study(study, starts=("xavier",)), CLASSES)
        with pytest.raises(UsageError, match="holds something else"):
            score_predictions(table, study / "results")
        with pytest.raises(UsageError, match="holds something else"):
            score_predictions(table, tmp_path)
        shutil.rmtree(study)


def test_the_command(cellhpc: Cellhpc, tmp_path: Path) -> None:
    published().to_csv(tmp_path / "kensert.csv", index=False)
    words = ("score", tmp_path / "kensert.csv", "--out", tmp_path / "out", "--label-column", "moa")
    said = cellhpc(*words)
    assert said.returncode == 0, said.stderr
    for part in ("100/103", "97.1", "91.8 to 99.0", "Report: "):
        assert part in said.stdout
    answered = cellhpc(*words, "--json")
    assert json.loads(answered.stdout)["models"][0]["levels"]["treatment"]["correct"] == 100
    refused = cellhpc(*words[:-2])
    assert (refused.returncode, "no column label" in refused.stderr) == (1, True)
    assert "Traceback" not in refused.stderr
