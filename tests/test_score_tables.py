"""Tables of a document say what it says, number by number."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from cellhpc.compare import ensembles
from cellhpc.score_tables import flat_intervals, tables_of
from tests.made_up_scores import CLASSES, MadeUp, make_scores


@pytest.fixture(scope="module")
def made() -> MadeUp:
    """A study of three networks, and the means of them."""
    found = make_scores()
    models = {(one["network"], one["initialisation"]): found.tables[one["slug"]] for one in found.document["models"]}
    return replace(found, document={**found.document, "ensembles": ensembles(models, CLASSES)})


@pytest.fixture(scope="module")
def tables(made: MadeUp) -> dict[str, pd.DataFrame]:
    return tables_of(made.document)


def test_every_accuracy_of_the_headline_is_in_one_table(made: MadeUp, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["accuracy.csv"]
    for model in made.document["models"]:
        own = table[table["model"] == f"{model['network']}, {model['initialisation']}"]
        for level, at in model["levels"].items():
            (row,) = own[(own["of"] == model["levels_of"]) & (own["level"] == level)].to_dict("records")
            assert (row["correct"], row["total"]) == (at["correct"], at["total"])
            assert [row["wilson95_low"], row["wilson95_high"]] == at["wilson95"]
        for seed, entry in model["by_seed"].items():
            (row,) = own[(own["of"] == f"seed {seed}") & (own["level"] == "treatment")].to_dict("records")
            assert row["correct"] == entry["levels"]["treatment"]["correct"]
    beside = table[table["of"].isin(["baseline", "ensemble of networks"])]
    expected = [one["treatment"]["correct"] for one in made.document["ensembles"]]
    expected += [row["correct"] for row in made.document["baselines"]["table"]]
    assert beside["correct"].tolist() == expected
    assert len(made.document["ensembles"]) == 2


def test_uncertainty_is_told_number_by_number(made: MadeUp, tables: dict[str, pd.DataFrame]) -> None:
    model = made.document["models"][0]
    name, found = f"{model['network']}, {model['initialisation']}", model["uncertainty"]

    def of(file: str) -> pd.DataFrame:
        table = tables[file]
        return table[table["model"] == name]

    calibration = of("calibration.csv").set_index("state")
    assert calibration.loc["as predicted", "nll"] == found["calibration"]["nll"]
    after = found["calibration"]["after_temperature"]
    assert calibration.loc["after temperature", "ece"] == after["ece"]
    assert calibration.loc["after temperature", "temperatures_median"] == after["temperatures"]["median"]
    assert of("reliability.csv")["count"].sum() == sum(
        one["count"] for at in (found["calibration"], after) for one in at["bins"]
    )
    sets = of("conformal.csv")
    for at in found["conformal"]["marginal"]:
        (row,) = sets[(sets["kind"] == "marginal") & (sets["alpha"] == at["alpha"])].to_dict("records")
        assert (row["covered"], row["mean_size"], row["empty"]) == (at["covered"], at["mean_size"], at["empty"])
    assert len(of("rejection.csv")) == len(found["rejection"]["curve"])


def test_curves_are_long(made: MadeUp, tables: dict[str, pd.DataFrame]) -> None:
    model = made.document["models"][0]
    table = tables["curves.csv"]
    own = table[table["model"] == f"{model['network']}, {model['initialisation']}"]
    for seed, levels in model["curves"].items():
        for level, counts in levels.items():
            rows = own[(own["seed"] == seed) & (own["level"] == level)]
            assert rows["epoch"].tolist() == list(range(1, len(counts["correct"]) + 1))
            assert rows["correct"].tolist() == counts["correct"]


def test_intervals_and_entries_become_columns() -> None:
    table = flat_intervals([{"a": 1, "wilson95": [0.1, 0.9], "top2": {"b": 2, "wilson95": None}}])
    assert table.to_dict("records") == [
        {
            "a": 1,
            "wilson95_low": 0.1,
            "wilson95_high": 0.9,
            "top2_b": 2,
            "top2_wilson95_low": None,
            "top2_wilson95_high": None,
        }
    ]


def test_counts_stay_whole_numbers_where_some_rows_have_none() -> None:
    table = flat_intervals([{"right": 1, "share": 1.0}, {"share": 0.5}])
    assert table.to_csv(index=False) == "right,share\n1,1.0\n,0.5\n"
