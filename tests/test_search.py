"""A run that chooses its settings: against a plain reference, without the held-out compound, stopped and continued."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cellhpc.attempts import finished
from cellhpc.attributions import ATTRIBUTIONS
from cellhpc.data import Data
from cellhpc.folds import Fold, Folds, plan_folds
from cellhpc.grid import Candidate, candidates
from cellhpc.ledger import read_json
from cellhpc.predictor import DRAWS, PREDICTIONS
from cellhpc.ranks import OneRank
from cellhpc.recipe import TrainSettings
from cellhpc.search import FLOOR, KEPT, Trainers, best, log_probability, train_chosen
from cellhpc.settings import FoldsSettings
from cellhpc.sweep import Run
from cellhpc.train import Interrupted, RunFailed, Trainer, Watch
from tests import small
from tests.ranks_at_work import start_ranks

MOBILENET = "MobileNet(alpha=0.25)"
SETTINGS = small.SETTINGS.model_copy(update={"batch_norm_momentum": 0.5})  # after few steps it sees its tiles already
GRID = candidates(SETTINGS, {"epochs": (1, 2), "learning_rate": (0.002, 0.02)})


@pytest.fixture(scope="module")
def folds() -> Folds:
    return plan_folds(small.tiles(), FoldsSettings(), search=True)


@pytest.fixture(scope="module")
def trainers() -> Trainers:
    data, _ = small.data()
    return Trainers(lambda settings: Trainer(MOBILENET, data, settings, OneRank()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, trainers: Trainers, folds: Folds) -> Path:
    """A run that searched undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run = small.run(folds, MOBILENET)
    choose(trainers, run, folds, folder, watch=Watch(keep_weights=True))
    return folder / run.id


def choose(
    trainers: Trainers,
    run: Run,
    folds: Folds,
    folder: Path,
    among: Sequence[Candidate] = GRID,
    watch: Watch | None = None,
) -> None:
    train_chosen(trainers, among, run, folds, folder, OneRank(), watch)


def outputs(unit: Path) -> Path:
    folder = finished(unit)
    assert folder is not None
    return folder


def predictions(unit: Path) -> pd.DataFrame:
    return pd.read_parquet(outputs(unit) / "predictions.parquet")


def record(unit: Path) -> dict[str, Any]:
    """What the run chose and why, but for the time that it took."""
    found: dict[str, Any] = read_json(outputs(unit) / "run.json")["search"]
    assert found.pop("seconds") > 0
    return found


def same_predictions(one: Path, other: Path) -> None:
    """Of the run and of all its candidates, to the last digit."""
    for below in ("", *(f"search/{candidate.name}" for candidate in GRID)):
        pd.testing.assert_frame_equal(predictions(one / below), predictions(other / below), check_exact=True)


def figure(table: pd.DataFrame) -> float:
    """The figure that chooses, by loops."""
    tiles: dict[str, dict[tuple[Any, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in table.to_dict("records"):
        field = (row["plate"], row["well"], row["field"])
        tiles[row["compound"]][field].append(float(row[f"p_{row['label']}"]))
    of_compounds = []
    for fields in tiles.values():
        logarithms = [math.log(max(sum(own) / len(own), FLOOR)) for own in fields.values()]
        of_compounds.append(sum(logarithms) / len(logarithms))
    return sum(of_compounds) / len(of_compounds)


def test_it_chooses_what_a_network_without_the_held_out_compound_chooses(
    whole: Path, trainers: Trainers, folds: Folds
) -> None:
    """That network's process never has the compound's tiles: pictures of it take no part in the search."""
    data, _ = small.data()
    run = small.run(folds, MOBILENET)
    keep = ~data.tiles["compound"].isin(run.fold.held_out).to_numpy()
    tiles = data.tiles[keep].reset_index(drop=True)
    rest = Data(data.pixels[keep], tiles, data.classes, data.channels)
    inner = Folds("compound", folds.classes, {}, (), (Fold("inner", run.fold.inner),))
    trainer = Trainer(MOBILENET, rest, SETTINGS, OneRank())
    figures = []
    for candidate in GRID:
        trainer.use(candidate.settings)
        _, asked = trainer.fit(dataclasses.replace(run, fold=inner.folds[0]), inner)
        pd.testing.assert_frame_equal(asked, predictions(whole / "search" / candidate.name), check_exact=True)
        figures.append(figure(asked))
    found = record(whole)
    assert [one["log_probability"] for one in found["candidates"]] == pytest.approx(figures, abs=1e-6)
    assert len(set(figures)) == len(GRID)
    chosen = GRID[int(np.argmax(figures))]
    assert (found["chosen"], found["values"]) == (chosen.name, chosen.values)
    _, expected = trainers.of(chosen.settings).fit(run, folds)
    pd.testing.assert_frame_equal(expected, predictions(whole), check_exact=True)


def test_draws_and_attributions_are_of_the_run_and_not_of_its_search(folds: Folds, tmp_path: Path) -> None:
    data, _ = small.data()
    keys = {"trained": "head", "dropout": 0.3, "dropout_draws": 2}
    grid = candidates(SETTINGS.model_copy(update=keys), {"epochs": (1, 2)})
    few = Trainers(lambda settings: Trainer(MOBILENET, data, settings, OneRank()))
    run = small.run(folds, MOBILENET)
    choose(few, run, folds, tmp_path, grid, Watch(attributions=1))
    left = {path.name for path in outputs(tmp_path / run.id).iterdir()}
    assert left == {"attempt.json", "history.json", "run.json", PREDICTIONS, DRAWS, ATTRIBUTIONS}
    for candidate in grid:
        left = {path.name for path in outputs(tmp_path / run.id / "search" / candidate.name).iterdir()}
        assert left == {"attempt.json", "history.json", "run.json", PREDICTIONS}


def test_the_record_says_what_was_chosen_and_on_what(whole: Path, folds: Folds) -> None:
    fold = small.run(folds, MOBILENET).fold
    facts, found = read_json(outputs(whole) / "run.json"), record(whole)
    compounds = set(small.tiles()["compound"])
    assert set(found["inner"]) == set(found["asked"]) == set(fold.inner)
    assert set(found["trained_on"]) == compounds - {*fold.inner, *fold.held_out}
    assert set(facts["trained_on"]) == compounds - set(fold.held_out)
    assert [one["values"] for one in found["candidates"]] == [candidate.values for candidate in GRID]
    chosen = next(candidate for candidate in GRID if candidate.name == found["chosen"])
    assert TrainSettings.model_validate(facts["settings"]) == chosen.settings
    for candidate, one in zip(GRID, found["candidates"], strict=True):
        unit = whole / "search" / candidate.name
        table = predictions(unit)
        right = table.groupby("field")["compound"].nunique()
        assert one["fields"]["total"] == int(right.sum())
        epochs = read_json(outputs(unit) / "history.json")["epochs"]
        assert one["fields"]["by_epoch"] == [epoch["held_out"]["field"]["correct"] for epoch in epochs]
        assert one["fields"]["by_epoch"][-1] == one["fields"]["correct"]
        assert set(table["compound"]) == set(fold.inner)
        assert not set(read_json(outputs(unit) / "run.json")["trained_on"]) & {*fold.inner, *fold.held_out}
        assert not (outputs(unit) / "weights.npz").exists()
        about = read_json(outputs(unit) / "attempt.json")
        assert (about["candidate"], about["epochs"]) == ([1 + GRID.index(candidate), 4], candidate.settings.epochs)
    assert (outputs(whole) / "weights.npz").exists()


def test_stopped_again_and_again_it_chooses_and_predicts_the_same(
    whole: Path, trainers: Trainers, folds: Folds, tmp_path: Path
) -> None:
    run = small.run(folds, MOBILENET)
    other = small.run(folds, MOBILENET, fold=4)
    stopped = []
    while finished(tmp_path / run.id) is None:
        try:
            choose(trainers, run, folds, tmp_path, watch=small.After(3))
        except Interrupted as fault:
            stopped.append(str(fault).split(" was stopped")[0])
        with pytest.raises(Interrupted):  # another run of this process leaves its traces in the variables
            choose(trainers, other, folds, tmp_path, watch=small.After(0))
    assert len(stopped) >= 3
    assert run.id in stopped
    assert set(stopped) & {f"{run.id}/search/{candidate.name}" for candidate in GRID}
    assert record(tmp_path / run.id) == record(whole)
    same_predictions(tmp_path / run.id, whole)


def test_what_is_done_is_not_done_again(whole: Path, trainers: Trainers, folds: Folds) -> None:
    run = small.run(folds, MOBILENET)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    choose(trainers, run, folds, whole.parent)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_candidate_that_diverges_is_told_and_never_chosen(trainers: Trainers, folds: Folds, tmp_path: Path) -> None:
    run = small.run(folds, MOBILENET)
    grid = candidates(SETTINGS, {"learning_rate": (1e38, 0.01, 3e38)})
    choose(trainers, run, folds, tmp_path, grid)
    found = record(tmp_path / run.id)
    assert found["values"] == {"learning_rate": 0.01}
    first, _, last = found["candidates"]
    assert first == {"name": "c00", "values": {"learning_rate": 1e38}, "diverged": True}
    assert last == {"name": "c02", "values": {"learning_rate": 3e38}, "diverged": True}
    again = dataclasses.replace(run, id="again")
    with pytest.raises(RunFailed, match=r"every candidate of the search diverged: c00: .*; c01: "):
        choose(trainers, again, folds, tmp_path, candidates(SETTINGS, {"learning_rate": (1e38, 3e38)}))
    assert not list((tmp_path / "again").glob("0*"))


def test_two_ranks_choose_the_same_when_they_are_stopped(tmp_path: Path) -> None:
    first, second = start_ranks("search_program.py", 2, tmp_path / "meeting", tmp_path)
    assert first["stops"] == second["stops"] > 2
    assert record(tmp_path / "whole") == record(tmp_path / "stopped")
    pd.testing.assert_frame_equal(predictions(tmp_path / "whole"), predictions(tmp_path / "stopped"), check_exact=True)


class TestTheChoice:
    def test_a_compound_counts_once_and_so_does_each_of_its_fields(self) -> None:
        rows = [("a", 1, 0.5), ("a", 1, 0.7), ("a", 2, 0.2), ("b", 1, 0.9), ("b", 1, 0.0), ("c", 1, 0.0)]
        table = pd.DataFrame(
            [
                {"plate": "P", "well": name, "field": field, "tile": number, "treatment": name, "compound": name,
                 "label": "x", "p_x": p, "p_y": 1 - p}
                for number, (name, field, p) in enumerate(rows)
            ]
        )  # fmt: skip
        expected = ((math.log(0.6) + math.log(0.2)) / 2 + math.log(0.45) + math.log(FLOOR)) / 3
        assert log_probability(table, "compound") == pytest.approx(expected)
        assert log_probability(table, "compound") == pytest.approx(figure(table.assign(plate="P")))

    def test_of_equal_candidates_the_earlier_is_taken(self) -> None:
        assert best([{"log_probability": -0.5}, {"log_probability": -0.3}, {"log_probability": -0.3}]) == 1
        assert best([{"diverged": "nan"}, {"log_probability": -9.0}]) == 1
        assert best([{"diverged": "nan"}]) == -1


class TestTrainers:
    """Compiled networks: shared where they can be, and few."""

    class Stub:
        def __init__(self, settings: TrainSettings) -> None:
            self.settings = settings

        def use(self, settings: TrainSettings) -> None:
            assert settings.graph() == self.settings.graph()
            self.settings = settings

    def test_candidates_that_only_the_steps_tell_apart_share_one(self) -> None:
        made: list[TrainSettings] = []
        trainers = Trainers(lambda settings: (made.append(settings), self.Stub(settings))[1])  # type: ignore[arg-type,func-returns-value,return-value]
        for candidate in GRID:
            assert trainers.of(candidate.settings).settings == candidate.settings
        assert len(made) == 1

    def test_a_process_holds_few(self) -> None:
        made: list[TrainSettings] = []
        trainers = Trainers(lambda settings: (made.append(settings), self.Stub(settings))[1])  # type: ignore[arg-type,func-returns-value,return-value]
        grid = candidates(TrainSettings(), {"dropout": [number / 10 for number in range(KEPT + 2)]})
        for _ in range(2):
            for candidate in grid:
                assert trainers.of(candidate.settings).settings == candidate.settings
                assert len(trainers._kept) <= KEPT
        assert len(made) == len(grid) + 3  # the first ones are still there

    def test_settings_of_another_graph_are_refused(self, trainers: Trainers) -> None:
        trainer = trainers.of(GRID[0].settings)
        with pytest.raises(ValueError, match="these settings need another compiled network"):
            trainer.use(SETTINGS.model_copy(update={"dropout": 0.5}))
        assert trainer.settings == GRID[0].settings
