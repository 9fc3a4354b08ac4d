from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellhpc.ledger import read_json
from cellhpc.ranks import OneRank
from cellhpc.train import RunFailed, Trainer, _class_weights, _learning_rate, train_run
from tests import small
from tests.ranks_at_work import start_ranks

MOBILENET = "MobileNet(alpha=0.25)"


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    data, _ = small.data()
    return Trainer(MOBILENET, data, small.SETTINGS, OneRank())


def test_a_run_learns_and_predicts_only_what_it_held_out(trainer: Trainer) -> None:
    data, folds = small.data()
    run = small.run(folds, MOBILENET)
    history, predictions = trainer.fit(run, folds)
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert history[1]["loss"] < history[0]["loss"]
    assert set(predictions["compound"]) == set(run.fold.held_out)
    assert len(predictions) == (data.tiles["compound"] == run.fold.held_out[0]).sum()
    assert list(predictions.columns[-3:]) == ["p_bright", "p_dim", "p_middle"]
    assert np.allclose(predictions.filter(like="p_").sum(axis=1), 1, atol=1e-5)
    assert history[-1]["held_out"]["tile"]["total"] == len(predictions)


@pytest.mark.parametrize("network", [MOBILENET, "EfficientNetB0"])  # the second has dropout
def test_packed_runs_are_the_runs_they_would_be_alone(network: str) -> None:
    data, folds = small.data(per_compound=4)
    second = small.run(folds, network, fold=4, seed=7)
    shared = Trainer(network, data, small.SETTINGS, OneRank())
    shared.fit(small.run(folds, network, fold=0), folds)
    _, packed = shared.fit(second, folds)
    _, alone = Trainer(network, data, small.SETTINGS, OneRank()).fit(second, folds)
    pd.testing.assert_frame_equal(packed, alone, check_exact=True)


def test_a_run_leaves_its_record_and_is_not_done_twice(trainer: Trainer, tmp_path: Path) -> None:
    _, folds = small.data()
    run = small.run(folds, MOBILENET)
    train_run(trainer, run, folds, tmp_path)
    record = read_json(tmp_path / run.id / "run.json")
    assert record["fold"] == {"name": run.fold.name, "held_out": list(run.fold.held_out)}
    assert record["folds_sha256"] == folds.sha256
    assert not set(record["trained_on"]) & set(run.fold.held_out)
    assert record["training_tiles"] + record["held_out_tiles"] == len(trainer.data.tiles)
    before = (tmp_path / run.id / "predictions.parquet").stat().st_mtime_ns
    train_run(trainer, run, folds, tmp_path)
    assert (tmp_path / run.id / "predictions.parquet").stat().st_mtime_ns == before


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where() -> None:
    data, folds = small.data()
    settings = small.SETTINGS.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(
        RunFailed, match=r"the loss is nan at epoch 1, step \d with learning rate 1e\+30. Lower train.l"
    ):
        Trainer("VGG16", data, settings, OneRank()).fit(small.run(folds, "VGG16"), folds)


def test_two_ranks_have_equal_weights_after_every_epoch(tmp_path: Path) -> None:
    first, second = start_ranks("train_program.py", 2, tmp_path, MOBILENET, 32, 16, 3, 8, 0.01)
    assert len(first["checksums"]) == 3
    assert first["checksums"] == second["checksums"]
    assert first["steps"] == second["steps"] == [4, 4, 4]
    assert first["probabilities"] == second["probabilities"]


def test_two_ranks_at_half_the_batch_follow_one_rank_without_batch_statistics(tmp_path: Path) -> None:
    """VGG16 has no batch normalisation: each rank's half of a batch gives half of the same mean gradient."""
    (one,) = start_ranks("train_program.py", 1, tmp_path, "VGG16", 32, 16, 2, 8, 1e-4)
    two, _ = start_ranks("train_program.py", 2, tmp_path, "VGG16", 32, 16, 2, 8, 1e-4)
    assert np.allclose(one["losses"], two["losses"], rtol=1e-5)
    assert np.allclose(one["probabilities"], two["probabilities"], atol=1e-4)
    assert one["losses"][0] - one["losses"][1] > 1e-3  # the tolerance is small against what was learnt


@pytest.mark.parametrize(("network", "side_px"), [("ResNet50", 224), ("InceptionV3", 299), ("InceptionResNetV2", 299)])
def test_each_network_of_the_paper_trains_on_two_ranks_at_its_own_size(
    network: str, side_px: int, tmp_path: Path
) -> None:
    first, second = start_ranks("train_program.py", 2, tmp_path, network, side_px, 2, 1, 1, 1e-3)
    assert first["checksums"] == second["checksums"]
    assert first["steps"] == [4]
    assert np.isfinite(first["losses"]).all()


def test_class_weights_are_those_of_the_paper() -> None:
    assert _class_weights(np.array([0, 0, 0, 1]), 2).tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])


def test_cosine_schedule_falls_from_the_learning_rate_to_zero() -> None:
    settings = small.SETTINGS.model_copy(update={"schedule": "cosine"})
    rates = [_learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == settings.learning_rate
    assert rates[50] == pytest.approx(settings.learning_rate / 2)
    assert rates[100] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)
