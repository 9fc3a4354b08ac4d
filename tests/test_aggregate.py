"""A made-up study, aggregated: its numbers, its files, what is refused, and what is not done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cellhpc import ledger, scores
from cellhpc.aggregate import aggregate
from cellhpc.attempts import Attempt, finished
from cellhpc.errors import DataError
from cellhpc.folds import Fold, Folds, read_folds, write_folds
from tests.made_up import CLASSES, COMPOUNDS, make_run, make_study, predictions


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete study of two models, aggregated once."""
    study = tmp_path_factory.mktemp("study")
    aggregate(study, "made-up", make_study(study), CLASSES)
    return study


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "study")


def units(study: Path) -> list[Path]:
    return sorted((study / "runs").iterdir())


def outputs(unit: Path) -> Path:
    folder = finished(unit)
    assert folder is not None
    return folder


def again(study: Path, how: scores.How = "mean") -> dict[str, Any]:
    return aggregate(study, "made-up", units(study), CLASSES, how)


def change(unit: Path, **facts: Any) -> None:
    record = outputs(unit) / "run.json"
    ledger.write_json(record, {**ledger.read_json(record), **facts})


def violations(document: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "scores") -> list[str]:
    """What contradicts a JSON Schema, for the keywords that ours uses."""
    if "$ref" in schema:
        return violations(document, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, where)
    if "oneOf" in schema:
        fitting = [part for part in schema["oneOf"] if not violations(document, part, root, where)]
        return [] if len(fitting) == 1 else [f"{where}: fits {len(fitting)} alternatives"]
    if "const" in schema or "enum" in schema:
        return [] if document in schema.get("enum", [schema.get("const")]) else [f"{where}: {document!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    allowed = schema.get("type", [*kinds, "number"])
    for kind in [allowed] if isinstance(allowed, str) else allowed:
        if isinstance(document, (int, float) if kind == "number" else kinds[kind]):
            break
    else:
        return [f"{where}: {type(document).__name__}, not {allowed}"]
    found = []
    if isinstance(document, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{where}: lacks {key}" for key in schema.get("required", []) if key not in document]
        for key, value in document.items():
            if key not in properties and rest is False:
                found.append(f"{where}: unknown key {key}")
            elif key in properties or isinstance(rest, dict):
                found += violations(value, properties.get(key, rest), root, f"{where}.{key}")
    if isinstance(document, list):
        if not schema.get("minItems", 0) <= len(document) <= schema.get("maxItems", len(document)):
            found.append(f"{where}: {len(document)} items")
        for number, value in enumerate(document):
            found += violations(value, schema.get("items", {}), root, f"{where}[{number}]")
    return found


def test_scores_follow_the_schema_that_is_shipped(made: Path) -> None:
    schema = json.loads(resources.files("cellhpc").joinpath("scores.schema.json").read_text())
    document = ledger.read_json(made / "results" / "scores.json")
    assert violations(document, schema, schema) == []
    del document["models"][0]["levels"]["treatment"]
    document["models"][1]["levels"]["tile"]["accuracy"] = "high"
    assert violations(document, schema, schema) == [
        "scores.models[0].levels: lacks treatment",
        "scores.models[1].levels.tile.accuracy: str, not number",
    ]


def make_weekly_study(folder: Path) -> Path:
    """A study that leaves out the batch with the compound: two labels live in one batch alone."""
    scorable = [name for name, label in COMPOUNDS.items() if label == "DNA damage"]
    make_study(folder, starts=("imagenet",), compounds={name: COMPOUNDS[name] for name in scorable})
    whole = read_folds(folder / "folds.json")
    batches = predictions().groupby("compound")["batch"].first()
    folds = replace(
        whole,
        folds=tuple(replace(fold, also=(batches[fold.name],)) for fold in whole.folds),
        also="batch",
        not_scorable={name: 2 for name in COMPOUNDS if name not in scorable},
    )
    write_folds(folder / "folds.json", folds)
    for unit, fold in zip(units(folder), folds.folds, strict=True):
        table = pd.read_parquet(outputs(unit) / "predictions.parquet")
        ledger.write_table(outputs(unit) / "predictions.parquet", table.assign(batch=batches[fold.name]))
        change(unit, folds_sha256=folds.sha256, trained_on_also=sorted({"Week1", "Week2"} - set(fold.also)))
    return folder


def test_what_can_not_be_scored_without_its_batch_is_counted_and_named(tmp_path: Path) -> None:
    document = again(make_weekly_study(tmp_path))
    assert document["folds"]["also"] == "batch"
    assert sum(document["folds"]["not_scorable"].values()) == 8
    assert document["models"][0]["levels"]["treatment"]["total"] == 6
    assert document["baselines"]["majority"] is document["baselines"]["batch_only"] is None
    (caution,) = document["cautions"]
    assert caution.startswith("8 treatment(s) of compound ")
    assert "latrunculin B" in caution
    page = (tmp_path / "results" / "report.html").read_text()
    assert "Each compound was held out once, and training left out its\nbatch; 3 folds" in page


class TestSearch:
    """Runs that chose their settings."""

    @pytest.fixture
    def searched(self, tmp_path: Path) -> Path:
        """A study whose runs chose 3 epochs, but for the first one, which chose 2."""
        folder = tmp_path / "searched"
        runs = make_study(folder, starts=("imagenet",))
        folds = read_folds(folder / "folds.json")
        values = [fold.name for fold in folds.folds]
        inner = {name: tuple(sorted(set(values) - {name})[:2]) for name in values}
        folds = replace(folds, folds=tuple(replace(fold, inner=inner[fold.name]) for fold in folds.folds))
        write_folds(folder / "folds.json", folds)
        for number, unit in enumerate(runs):
            name = ledger.read_json(outputs(unit) / "run.json")["fold"]["name"]
            epochs = 3 if number else 2
            figures = {"log_probability": -0.5, "fields": {"correct": 3, "total": 4, "by_epoch": [1, 3]}}
            candidates = [
                {"name": "c00", "values": {"epochs": 2}, **figures},
                {"name": "c01", "values": {"epochs": 3}, **figures},
                {"name": "c02", "values": {"epochs": 9}, "diverged": True},
            ]
            search = {
                "chosen": f"c{epochs - 2:02d}", "values": {"epochs": epochs}, "inner": inner[name],
                "asked": inner[name], "trained_on": sorted(set(values) - {name, *inner[name]}), "seconds": 60.0,
                "candidates": candidates,
            }  # fmt: skip
            change(unit, folds_sha256=folds.sha256, search=search, settings={"epochs": epochs})
            history = outputs(unit) / "history.json"
            ledger.write_json(history, {"epochs": ledger.read_json(history)["epochs"][:epochs]})
        return folder

    def test_what_was_chosen_where_is_told(self, searched: Path) -> None:
        document = again(searched)
        schema = json.loads(resources.files("cellhpc").joinpath("scores.schema.json").read_text())
        assert violations(ledger.read_json(searched / "results" / "scores.json"), schema, schema) == []
        assert [run["values"]["epochs"] for run in document["search"]] == [2] + [3] * (len(COMPOUNDS) - 1)
        first = document["search"][0]
        assert (first["log_probability"], first["fields"]) == (-0.5, {"correct": 3, "total": 4, "by_epoch": [1, 3]})
        assert first["diverged"] == [{"epochs": 9}]
        (model,) = document["models"]
        assert model["cost"]["hours"] == pytest.approx(len(COMPOUNDS) * (120 + 60) / 3600)
        page = (searched / "results" / "report.html").read_text()
        for words in (
            "Settings that were chosen",
            f'<td class="n">1 of {len(COMPOUNDS)}</td>',
            "diverged: epochs = 9",
            "<td>1 3</td>",
        ):
            assert words in page

    def test_a_run_that_chose_fewer_epochs_stays_at_its_last_in_the_curves(self, searched: Path) -> None:
        curves = again(searched)["models"][0]["curves"]["all"]
        histories = [ledger.read_json(outputs(unit) / "history.json")["epochs"] for unit in units(searched)]
        for level, counts in curves.items():
            last = sum(epochs[-1]["held_out"][level]["correct"] for epochs in histories)
            assert (len(counts["correct"]), counts["correct"][-1]) == (3, last)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"asked": ["{held_out}"]}, r"holds out compound .*, which took part in its search: a leak"),
            ({"trained_on": ["{held_out}"]}, r"holds out compound .*, which took part in its search: a leak"),
            ({"asked": ["another"]}, r"chose on compound another; folds.json: "),
            ({"trained_on": ["{inner}"]}, r"its search trained on compound .*, on which it chose: a leak"),
        ],
    )
    def test_a_search_that_saw_too_much_is_refused(
        self, searched: Path, changes: dict[str, list[str]], message: str
    ) -> None:
        unit = units(searched)[0]
        facts = ledger.read_json(outputs(unit) / "run.json")
        known = {"held_out": facts["fold"]["name"], "inner": facts["search"]["inner"][0]}
        wrong = {key: [value.format(**known) for value in values] for key, values in changes.items()}
        change(unit, search={**facts["search"], **wrong})
        with pytest.raises(DataError, match=message):
            again(searched)

    def test_epochs_that_were_not_chosen_are_refused(self, searched: Path) -> None:
        change(units(searched)[1], settings={"epochs": 7})
        with pytest.raises(DataError, match=r"its history has 3 epochs, and it chose 7"):
            again(searched)

    def test_a_run_without_a_search_does_not_belong_to_them(self, searched: Path) -> None:
        record = outputs(units(searched)[0]) / "run.json"
        ledger.write_json(record, {key: value for key, value in ledger.read_json(record).items() if key != "search"})
        with pytest.raises(DataError, match=r"names inner compounds to choose on, and it did not choose"):
            again(searched)

    def test_without_one_there_is_none_in_the_document(self, made: Path) -> None:
        assert "search" not in ledger.read_json(made / "results" / "scores.json")
        assert "Settings that were chosen" not in (made / "results" / "report.html").read_text()


def test_numbers_are_those_of_all_folds_together(made: Path) -> None:
    document = ledger.read_json(made / "results" / "scores.json")
    tiles = pd.concat(
        [pd.read_parquet(outputs(unit) / "predictions.parquet") for unit in units(made) if "xavier" in unit.name]
    )
    model = next(model for model in document["models"] if model["initialisation"] == "xavier")
    for level, expected in scores.levels(tiles).items():
        assert {key: model["levels"][level][key] for key in expected} == expected
    treatments = scores.combine(tiles)["treatment"]
    assert np.trace(model["confusion"]) == treatments["correct"].sum()
    assert {row["treatment"] for row in model["wrong"]} == set(treatments[~treatments["correct"]]["treatment"])
    assert sum(row["total"] for row in model["by_compound"]) == len(treatments) == 2 * len(COMPOUNDS)
    assert document["baselines"]["chance"] == 1 / 3
    assert document["baselines"]["majority"]["total"] == len(treatments)
    assert (document["complete"], document["runs"]) == (True, {"done": 14, "expected": 14, "missing": []})


def test_curves_pool_counts_over_folds_and_end_at_the_scores(made: Path) -> None:
    for model in ledger.read_json(made / "results" / "scores.json")["models"]:
        for level, counts in model["curves"]["all"].items():
            assert len(counts["correct"]) == 3
            assert counts["correct"][-1] == model["levels"][level]["correct"]
            assert set(counts["total"]) == {model["levels"][level]["total"]}
        assert model["cost"]["hours"] == pytest.approx(7 * 120 / 3600)
        assert model["cost"]["images_per_s"] == 52.5  # the first epoch, at 51, compiles


def test_the_rule_of_learning_curves_is_told(tmp_path: Path) -> None:
    runs = make_study(tmp_path)
    change(runs[0], combine="median")
    assert aggregate(tmp_path, "made-up", runs, CLASSES)["curves_combined"] == ["mean", "median"]
    page = (tmp_path / "results" / "report.html").read_text()
    assert "probabilities combined by: mean or median. It is drawn and never used to choose." in page


def test_tables_hold_calls_and_probabilities_of_every_model(made: Path) -> None:
    for name, keys, units_of_a_model in (
        ("treatments", ["treatment"], 14),
        ("wells", ["plate", "well"], 42),
        ("fields", ["plate", "well", "field"], 84),
    ):
        table = pd.read_csv(made / "results" / f"{name}.csv")
        assert len(table) == 2 * units_of_a_model
        assert not table.duplicated(["network", "initialisation", *keys]).any()
        assert list(table.columns[:2]) == ["network", "initialisation"]
        columns = [scores.PREFIX + label for label in CLASSES]
        np.testing.assert_allclose(table[columns].sum(axis=1), 1)
        assert (table["call"] == np.array(CLASSES)[table[columns].to_numpy().argmax(axis=1)]).all()
        assert (table["correct"] == (table["call"] == table["label"])).all()


def test_wells_and_fields_are_the_tables_that_levels_make(made: Path) -> None:
    """They are put together row by row as folds come: the same as the tables in one piece."""
    for level, name in (("well", "wells"), ("field", "fields")):
        found = pd.read_csv(made / "results" / f"{name}.csv", dtype={"replicate": str})
        for start in ("imagenet", "xavier"):
            tiles = pd.concat(
                [
                    pd.read_parquet(outputs(unit) / "predictions.parquet").assign(fold=fold.name)
                    for unit, fold in zip(
                        [unit for unit in units(made) if start in unit.name],
                        read_folds(made / "folds.json").folds,
                        strict=True,
                    )
                ]
            )
            own = found[found["initialisation"] == start].drop(columns=["network", "initialisation"])
            own = own.sort_values(list(scores.KEYS[level])).reset_index(drop=True)
            pd.testing.assert_frame_equal(own, scores.combine(tiles)[level], check_dtype=False)


def test_files(made: Path) -> None:
    names = {path.name for path in (made / "results").iterdir()}
    pictures = ("confusion", "confusion-ResNet50-imagenet", "confusion-ResNet50-xavier", "learning-curves")
    pictures += ("reliability", "conformal", "rejection")
    expected = {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")}
    expected |= {f"confusion-ResNet50-{start}.csv" for start in ("imagenet", "xavier")}
    expected |= {"scores.json", "report.html", "treatments.csv", "wells.csv", "fields.csv", "done.json"}
    expected |= {"compounds.csv", "by_label.csv", "comparisons.csv", "p_values.csv", "repeat.csv", "uncertainty.csv"}
    expected |= {"accuracy.csv", "calibration.csv", "reliability.csv", "conformal.csv", "rejection.csv", "curves.csv"}
    assert names == expected
    matrix = pd.read_csv(made / "results" / "confusion-ResNet50-xavier.csv", index_col="label")
    assert list(matrix.index) == list(matrix.columns) == list(CLASSES)


def test_a_second_call_writes_nothing_and_a_change_does(study: Path) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (study / "results").iterdir()}

    before = times()
    again(study)
    assert times() == before
    again(study, "median")
    assert all(time > before[name] for name, time in times().items())
    assert ledger.read_json(study / "results" / "scores.json")["combine"] == "median"


def test_an_interrupted_aggregation_is_done_again(study: Path) -> None:
    (study / "results" / "done.json").unlink()
    (study / "results" / "confusion-gone.png").touch()
    again(study)
    assert (study / "results" / "done.json").exists()
    assert not (study / "results" / "confusion-gone.png").exists()


def test_a_run_that_was_interrupted_counts_with_its_last_attempt(study: Path) -> None:
    """An attempt that began later, and is not done, changes nothing."""
    before = again(study)
    unit = units(study)[0]
    digest = f"digest of {unit.name}"
    later = Attempt.claim(unit, digest)
    later.write_json("history.json", {"epochs": []})
    assert again(study) == before
    shutil.copytree(outputs(unit), later.folder, dirs_exist_ok=True)
    (unit / "done.json").unlink()
    later.publish(digest)
    assert outputs(unit) == later.folder
    assert again(study)["models"] == before["models"]


def test_seeds_make_an_ensemble(tmp_path: Path) -> None:
    runs = make_study(tmp_path, starts=("xavier",), seeds=(3, 1))
    (model,) = aggregate(tmp_path, "seeds", runs, CLASSES)["models"]
    members = {seed: predictions(seed=seed + 80, skill=0.35) for seed in (1, 3)}
    assert (model["seeds"], model["levels_of"]) == ([1, 3], "ensemble of 2 seeds (mean probability of each tile)")
    for seed, table in members.items():
        for level, at in scores.levels(table).items():
            assert model["by_seed"][str(seed)]["levels"][level]["correct"] == at["correct"]
        own = model["curves"][str(seed)]["tile"]
        assert (own["correct"][-1], own["total"][-1]) == (scores.levels(table)["tile"]["correct"], len(table))
    columns = [scores.PREFIX + name for name in CLASSES]
    mean = members[1].assign(**((members[1][columns] + members[3][columns]) / 2))
    assert model["levels"]["tile"]["correct"] == scores.levels(mean)["tile"]["correct"]
    assert model["curves"]["all"]["tile"]["total"][0] == 2 * len(mean)
    assert (model["cost"]["runs"], model["cost"]["ranks"]) == (len(runs), [2])
    assert model["cost"]["hours"] == pytest.approx(len(runs) * 120 / 3600)


def test_missing_folds_are_in_the_headline(study: Path) -> None:
    for unit in units(study)[:2]:
        (unit / "done.json").unlink()
    document = again(study)
    assert not document["complete"]
    first, imagenet, xavier = document["headline"]
    assert (
        first == "Incomplete: 12 of 14 runs are finished. Missing: ResNet50_imagenet_s0_f00, ResNet50_imagenet_s0_f01."
    )
    assert "10 treatments" in imagenet
    assert "5 of 7 folds, without AZ-A, PP-2" in imagenet
    assert "folds" not in xavier
    assert first in (study / "results" / "report.html").read_text()


def test_the_uncertainty_is_that_of_the_treatments(made: Path) -> None:
    document = ledger.read_json(made / "results" / "scores.json")
    treatments = pd.read_csv(made / "results" / "treatments.csv")
    columns = [scores.PREFIX + label for label in CLASSES]
    p_values = pd.read_csv(made / "results" / "p_values.csv")
    for model in document["models"]:
        own = treatments[treatments["initialisation"] == model["initialisation"]]
        likelihood = [row[scores.PREFIX + row["label"]] for _, row in own.iterrows()]
        assert model["uncertainty"]["calibration"]["nll"] == pytest.approx(-np.log(likelihood).mean())
        assert model["uncertainty"]["unknown"] is model["uncertainty"]["decomposition"] is None
        assert (p_values["initialisation"] == model["initialisation"]).sum() == len(own)
    assert own[columns].shape == (14, 3)
    assert list(pd.read_csv(made / "results" / "repeat.csv").columns[:4]) == [
        "network", "initialisation", "treatment", "compound",
    ]  # fmt: skip


class TestUnknownLabels:
    """Folds that leave out a label altogether, and one known compound beside it."""

    @pytest.fixture
    def left_out(self, tmp_path: Path) -> Path:
        study = tmp_path / "left-out"
        labels = {name: (label,) for name, label in COMPOUNDS.items()}
        beside = {"Actin disruptors": "cisplatin", "DNA damage": "PP-2", "Epithelial": "cisplatin"}
        names = {label: [name for name, own in COMPOUNDS.items() if own == label] for label in CLASSES}
        made = tuple(Fold(label, tuple(sorted([*names[label], beside[label]])), unknown=label) for label in CLASSES)
        folds = Folds("compound", CLASSES, labels, (), made)
        write_folds(study / "folds.json", folds)
        table = predictions(seed=5)
        for number, fold in enumerate(made):
            unit = study / "runs" / f"ResNet50_imagenet_s0_f{number:02d}"
            own = table[table["compound"].isin(fold.held_out)].reset_index(drop=True)
            make_run(unit, own, "ResNet50", "imagenet", 0, fold, folds, 3)
            change(unit, fold={"name": fold.name, "held_out": list(fold.held_out), "unknown": fold.name})
        return study

    def test_only_known_ones_are_scored_once_for_each_fold(self, left_out: Path) -> None:
        document = again(left_out)
        (model,) = document["models"]
        known = scores.combine(predictions(seed=5))["treatment"]
        right = known.groupby("compound")["correct"].sum()
        at = model["levels"]["treatment"]
        assert (at["correct"], at["total"]) == (2 * right["cisplatin"] + right["PP-2"], 6)
        assert [row["label"] for row in model["by_label"]] == ["DNA damage", "Epithelial"]
        assert document["cautions"][0].startswith("Each fold leaves a label out altogether.")
        assert document["baselines"]["majority"] is None
        unknown = model["uncertainty"]["unknown"]
        assert (unknown["known"], unknown["unknown"]) == (6, 14)
        assert set(pd.read_csv(left_out / "results" / "compounds.csv")["compound"]) == {"cisplatin", "PP-2"}

    def test_a_run_that_says_otherwise_than_the_split_is_refused(self, left_out: Path) -> None:
        unit = units(left_out)[0]
        facts = ledger.read_json(outputs(unit) / "run.json")["fold"]
        change(unit, fold={"name": facts["name"], "held_out": facts["held_out"]})
        with pytest.raises(DataError, match=r"leaves out the label none; folds.json: Actin disruptors"):
            again(left_out)

    def test_a_fold_that_was_trained_twice_is_refused(self, left_out: Path) -> None:
        first = units(left_out)[0]
        shutil.copytree(first, first.with_name("copy"))
        with pytest.raises(DataError, match=r"cisplatin is held out by 2 runs: .*copy"):
            again(left_out)


def test_draws_of_dropout_must_be_of_the_same_tiles(study: Path) -> None:
    """Draws change no score: they are members, whose tables the uncertainty is made from."""
    before = again(study)
    for unit in units(study):
        table = pd.read_parquet(outputs(unit) / "predictions.parquet")
        draws = pd.concat([table.assign(draw=draw) for draw in range(3)], ignore_index=True)
        ledger.write_table(outputs(unit) / "draws.parquet", draws)
    for model, plain in zip(again(study)["models"], before["models"], strict=True):
        uncertainty = model.pop("uncertainty")["decomposition"]
        assert (uncertainty["members"], uncertainty["kind"]) == (3, "dropout draws")
        assert uncertainty["epistemic"] == pytest.approx(0, abs=1e-6)  # the draws are all the same
        assert model == {key: value for key, value in plain.items() if key != "uncertainty"}
    path = outputs(units(study)[0]) / "draws.parquet"
    ledger.write_table(path, pd.read_parquet(path).iloc[:-1])
    with pytest.raises(DataError, match=r"f00: draws.parquet holds other tiles than predictions.parquet"):
        again(study)


def test_entropies_of_every_treatment_are_a_table(study: Path) -> None:
    again(study)
    found = pd.read_csv(study / "results" / "uncertainty.csv")
    treatments = pd.read_csv(study / "results" / "treatments.csv")
    assert found[["network", "initialisation", "treatment"]].equals(
        treatments[["network", "initialisation", "treatment"]]
    )
    values = treatments[[scores.PREFIX + name for name in CLASSES]].to_numpy()
    np.testing.assert_allclose(found["entropy"], stats.entropy(values, axis=1), atol=1e-7)


def test_models_are_compared_over_compounds(made: Path) -> None:
    document = ledger.read_json(made / "results" / "scores.json")
    (pair,) = document["comparisons"]
    assert (pair["a"], pair["b"], pair["compounds"]) == ("ResNet50, imagenet", "ResNet50, xavier", len(COMPOUNDS))
    first, second = (model["levels"]["treatment"]["correct"] for model in document["models"])
    assert pair["a_only"] - pair["b_only"] == first - second
    assert sum(pair[key] for key in ("a_only", "b_only", "both", "neither")) == pair["treatments"] == 14
    table = pd.read_csv(made / "results" / "comparisons.csv")
    assert table.loc[0, "p_value"] == pair["p_value"]
    assert [table.loc[0, "bootstrap95_low"], table.loc[0, "bootstrap95_high"]] == pair["bootstrap95"]


def test_networks_are_compared_and_averaged(tmp_path: Path) -> None:
    runs = make_study(tmp_path, networks=("ResNet50", "Net(alpha=0.5, depth=2)"))
    document = aggregate(tmp_path, "two", runs, CLASSES)
    schema = json.loads(resources.files("cellhpc").joinpath("scores.schema.json").read_text())
    assert violations(ledger.read_json(tmp_path / "results" / "scores.json"), schema, schema) == []
    assert len(document["comparisons"]) == 4
    assert [row["name"] for row in document["ensembles"]] == [
        "mean of 2 networks, imagenet",
        "mean of 2 networks, xavier",
    ]
    page = (tmp_path / "results" / "report.html").read_text()
    at = document["ensembles"][1]["treatment"]
    assert "Mean of 2 networks, xavier" in page
    assert f"{at['correct']}/{at['total']}, {100 * at['accuracy']:.1f} %" in page
    wells = pd.read_csv(tmp_path / "results" / "wells.csv")
    assert set(wells["network"]) == {"ResNet50", "Net(alpha=0.5, depth=2)"}


def test_compounds_and_labels_have_tables(made: Path) -> None:
    compounds = pd.read_csv(made / "results" / "compounds.csv")
    treatments = pd.read_csv(made / "results" / "treatments.csv")
    model = ["network", "initialisation"]
    expected = treatments.groupby([*model, "compound"])["correct"].agg(["sum", "size"])
    found = compounds.set_index([*model, "compound"]).loc[expected.index]
    assert found["right"].tolist() == expected["sum"].tolist()
    assert found["treatments"].tolist() == expected["size"].tolist()
    labels = pd.read_csv(made / "results" / "by_label.csv")
    assert labels.groupby(model)["total"].sum().tolist() == [14, 14]


class TestRefusals:
    def test_nothing_finished(self, study: Path) -> None:
        for unit in units(study):
            (unit / "done.json").unlink()
        with pytest.raises(DataError, match=r"(?s)none of the 14 runs is finished.*cellhpc train"):
            again(study)

    def test_every_problem_is_listed_with_its_run(self, study: Path) -> None:
        runs = units(study)
        change(runs[0], folds_sha256="f" * 64)
        change(runs[1], classes=[*reversed(CLASSES)])
        (outputs(runs[2]) / "predictions.parquet").write_bytes(b"torn")
        ledger.write_json(outputs(runs[3]) / "history.json", {"epochs": []})
        with pytest.raises(DataError) as caught:
            again(study)
        text = str(caught.value)
        for unit, words in zip(
            runs, ("split ffffffffffff", "in another order", "can't be read", "no epochs"), strict=False
        ):
            assert any(line.startswith(f"{unit.name}: ") and words in line for line in caught.value.problems), text
        assert "cellhpc run JOB.toml" in text

    @pytest.mark.parametrize(
        ("file", "wrong"),
        [
            ("history.json", {"epochs": None}),
            ("history.json", {"epochs": [{"images_per_s": None, "held_out": {}}]}),
            ("run.json", {"seconds": "12"}),
            ("run.json", {"ranks": "two"}),
        ],
    )
    def test_records_that_hold_something_else(self, study: Path, file: str, wrong: dict[str, Any]) -> None:
        path = outputs(units(study)[0]) / file
        ledger.write_json(path, {**ledger.read_json(path), **wrong})
        with pytest.raises(DataError, match=r"ResNet50_imagenet_s0_f00: can't be read: "):
            again(study)

    def test_a_run_that_does_not_say_what_it_was_trained_on(self, study: Path) -> None:
        path = outputs(units(study)[0]) / "run.json"
        facts = ledger.read_json(path)
        del facts["trained_on"]
        ledger.write_json(path, facts)
        with pytest.raises(DataError, match=r"f00: run.json does not say trained_on: nobody can tell"):
            again(study)

    def test_a_compound_that_is_held_out_and_in_its_own_training(self, study: Path) -> None:
        change(units(study)[0], trained_on=["AZ-A", "PP-2"])
        with pytest.raises(DataError, match=r"f00: holds out compound AZ-A, which it trained on: a leak"):
            again(study)

    def test_a_compound_that_was_trained_on(self, study: Path) -> None:
        first, second = units(study)[:2]
        leaking = pd.concat([pd.read_parquet(outputs(unit) / "predictions.parquet") for unit in (first, second)])
        ledger.write_table(outputs(first) / "predictions.parquet", leaking)
        with pytest.raises(DataError, match=r"f00: predicts compound PP-2, which its fold AZ-A trained on: a leak"):
            again(study)

    def test_a_batch_that_was_trained_on(self, tmp_path: Path) -> None:
        study = make_weekly_study(tmp_path)
        change(units(study)[0], trained_on_also=["Week1", "Week2"])
        with pytest.raises(DataError, match=r"f00: predicts batch Week1, which it trained on: a leak"):
            again(study)

    def test_a_compound_that_is_held_out_twice(self, study: Path) -> None:
        first = units(study)[0]
        shutil.copytree(first, first.with_name("copy"))
        with pytest.raises(DataError, match=r"ResNet50, imagenet, seed 0: AZ-A is held out by 2 runs: .*copy"):
            again(study)

    def test_a_fold_that_the_split_does_not_have(self, study: Path) -> None:
        change(units(study)[0], fold={"name": "AZ-A", "held_out": ["AZ-A", "PP-2"]})
        with pytest.raises(DataError, match=r"(?s)fold AZ-A holds out AZ-A, PP-2; folds.json: AZ-A.*no predictions of"):
            again(study)

    def test_columns_of_probabilities_in_another_order(self, study: Path) -> None:
        path = outputs(units(study)[0]) / "predictions.parquet"
        table = pd.read_parquet(path)
        ledger.write_table(path, table[[*table.columns[:-3], *reversed(table.columns[-3:])]])
        with pytest.raises(
            DataError, match=r"classes in predictions are Epithelial, DNA damage.*expected in another order"
        ):
            again(study)

    def test_rows_that_are_no_probabilities(self, study: Path) -> None:
        path = outputs(units(study)[0]) / "predictions.parquet"
        ledger.write_table(path, pd.read_parquet(path).assign(**{"p_Epithelial": 2.0}))
        with pytest.raises(DataError, match=r"ResNet50_imagenet_s0_f00: .* hold no probabilities"):
            again(study)

    def test_predictions_without_keys(self, study: Path) -> None:
        path = outputs(units(study)[0]) / "predictions.parquet"
        ledger.write_table(path, pd.read_parquet(path).drop(columns=["plate", "tile"]))
        with pytest.raises(DataError, match=r"f00: predictions.parquet has no column plate, tile"):
            again(study)

    def test_a_tile_twice(self, study: Path) -> None:
        path = outputs(units(study)[0]) / "predictions.parquet"
        table = pd.read_parquet(path)
        ledger.write_table(path, pd.concat([table, table.head(1)]))
        with pytest.raises(DataError, match="1 tiles are predicted more than once"):
            again(study)

    def test_a_well_of_two_folds(self, study: Path) -> None:
        """Where the predictions do not say what was held out, wells still tell."""
        first, second = units(study)[:2]
        for unit in units(study):
            path = outputs(unit) / "predictions.parquet"
            ledger.write_table(
                path, pd.read_parquet(path).rename(columns={"compound": "substance"}).assign(compound="?")
            )
        folds = replace(read_folds(study / "folds.json"), by="substance_held_out")
        write_folds(study / "folds.json", folds)
        for unit in units(study):
            change(unit, folds_sha256=folds.sha256)
        shutil.copy(outputs(first) / "predictions.parquet", outputs(second) / "predictions.parquet")
        with pytest.raises(DataError, match=r"plate Week2_., well .*: is held out by two folds, AZ-A and PP-2"):
            again(study)

    def test_results_stay_as_they_were_when_runs_are_refused(self, study: Path) -> None:
        before = {path.name: path.read_bytes() for path in (study / "results").iterdir()}
        last = outputs(units(study)[-1]) / "predictions.parquet"
        last.write_bytes(b"torn")
        with pytest.raises(DataError, match="can't be read"):
            again(study)
        assert {path.name: path.read_bytes() for path in (study / "results").iterdir()} == before

    def test_histories_of_different_lengths(self, study: Path) -> None:
        path = outputs(units(study)[0]) / "history.json"
        ledger.write_json(path, {"epochs": ledger.read_json(path)["epochs"][:2]})
        with pytest.raises(DataError, match="2 epochs in ResNet50_imagenet_s0_f00; 3 epochs in"):
            again(study)


def test_replicates_that_are_held_out_are_no_new_compounds(tmp_path: Path) -> None:
    """Every treatment is asked once a fold, by networks that know its compound: named so, and nothing is promised."""
    labels = {replicate: CLASSES for replicate in "123"}
    folds = Folds("replicate", CLASSES, labels, (), tuple(Fold(one, (one,)) for one in labels))
    write_folds(tmp_path / "folds.json", folds)
    table = predictions()
    for fold in folds.folds:
        own = table[table["replicate"] == fold.name].reset_index(drop=True)
        make_run(tmp_path / "runs" / f"r{fold.name}", own, "ResNet50", "imagenet", 0, fold, folds, epochs=2)
    document = again(tmp_path)
    (model,) = document["models"]
    assert model["levels"]["treatment"]["total"] == 3 * 14
    (caution,) = document["cautions"]
    assert caution in document["headline"]
    assert caution.startswith("What is held out is the replicate: the same compounds are in training, so this is not")
    assert "nothing is promised for a new compound" in model["uncertainty"]["conformal"]["guarantee"]


def test_a_reader_is_told_of_fields_set_aside(tmp_path: Path) -> None:
    study = tmp_path / "study"
    made = make_study(study)
    bad = {"plate": "P1", "well": "B02", "field": 1, "role": "treatment", "reason": "torn"}
    document = aggregate(study, "made", made, CLASSES, conversion={"bad_fields": 1, "set_aside": [bad]})
    assert document["cautions"] == ["1 field(s) could not be read and were set aside; scores.json lists them."]
    assert document["headline"][-1:] == document["cautions"]
    assert document["conversion"]["set_aside"] == [bad]
