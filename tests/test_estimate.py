"""The model of what trainings cost: by hand, and against what small trainings really do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellhpc.cost import Cost, Load, Place, Stored
from cellhpc.data import load_data
from cellhpc.estimate import estimate, makespan, starts_of
from cellhpc.measured import Figure, Parts
from cellhpc.ranks import OneRank
from cellhpc.recipe import TrainSettings
from cellhpc.shards import Shards
from cellhpc.traffic import Sizes
from cellhpc.train import Trainer
from tests import small

MOBILENET = "MobileNet(alpha=0.25)"
SETTINGS = TrainSettings(epochs=2, batch_size=10, augment="none")
LOAD = Load("ResNet50", 224, training=105, held_out=30, epochs=2, batch_size=10)  # 10 steps an epoch
STORED = Stored(135, {224: 1350.0}, {224: 1500.0}, "made up")
PARTS = {
    "ResNet50": Parts(Figure(20.0, "here", 1), Figure(60.0, "here", 1), Figure(5.0, "here", 1), Figure(0.5, "here", 1))
}
RUN_S = 2 * 10 * 10 / 20 + 2 * 30 / 60 + 0.5
SIZES = {"ResNet50": Sizes(head=1_000, all=1_000_000, normalised=64)}


def cost(runs: int = 6, runs_per_job: int = 2, at_a_time: int = 2, **others: Any) -> Cost:
    jobs = [[LOAD] * runs_per_job for _ in range(runs // runs_per_job)]
    given = {"place": Place(), "settings": SETTINGS, "stored": STORED, "parts": PARTS} | others
    return estimate([(at_a_time, jobs)], **given)


def test_hours_and_wall_clock_are_those_by_hand() -> None:
    found = cost(place=Place(cores=8, gpus=2))
    (network,) = found.networks
    assert (network.runs, network.steps, network.images, network.predicted) == (6, 6 * 20, 6 * 200, 6 * 60)
    assert network.hours == pytest.approx(6 * RUN_S / 3600)
    job = 5 + 2 * RUN_S
    assert found.job_hours == pytest.approx(3 * job / 3600)
    assert (found.gpu_hours, found.core_hours) == pytest.approx((2 * 3 * job / 3600, 8 * 3 * job / 3600))
    assert found.wall_seconds == pytest.approx(2 * job)  # three jobs, two at a time
    assert (found.jobs, found.at_a_time, found.starts) == (3, 2, 3)
    assert found.bytes_read == 3 * 1350
    assert cost(place=Place(nodes=4)).bytes_read == 3 * 4 * 1350


def test_jobs_begin_in_their_order_as_places_get_free() -> None:
    assert makespan([4, 1, 1, 3], 2) == 5  # the first place: 4; the second: 1, 1, 3
    assert makespan([4, 1, 1, 3], 1) == 9
    assert makespan([4, 1, 1, 3], 9) == 4
    assert makespan([], 3) == 0


def test_a_job_that_is_longer_than_its_limit_starts_as_often_as_it_must() -> None:
    assert [starts_of(100, 10, limit) for limit in (None, 110, 109, 60, 11, 10)] == [1, 1, 2, 2, 100, None]
    found = cost(place=Place(seconds=9.0))  # four seconds of work after each start-up
    starts = -(-2 * RUN_S // 4)
    assert found.starts == 3 * starts
    assert found.wall_seconds == pytest.approx(2 * (2 * RUN_S + 5 * starts))
    assert found.bytes_read == 3 * starts * 1350
    never = cost(place=Place(seconds=5.0))
    assert never.wall_seconds is None
    assert never.unknown == ("a start-up takes longer than a job may run; give train.time of the site file more",)


def test_tiles_in_windows_are_read_in_every_epoch_and_staged_ones_at_every_start() -> None:
    windows = SETTINGS.model_copy(update={"window_tiles": 20})
    assert cost(settings=windows).bytes_read == 6 * 2 * (100 + 30) * 10
    assert cost(settings=windows, stage=True, place=Place(nodes=3)).bytes_read == 3 * 3 * 1500


def test_with_other_ranks_a_step_is_its_share_of_arithmetic_and_the_means() -> None:
    found = cost(place=Place(ranks=4), sizes=SIZES, allreduce_mb_per_s=60)
    sent = 2 * 3 / 4 * (4 * 1_000_000 + 12)
    seconds = 10 / 20 / 4 + sent / 60e6
    (network,) = found.networks
    assert network.sent_bytes == sent
    assert network.sent_bytes_in_all == sent * 4 * 6 * 20
    assert network.images_per_s == pytest.approx(10 / seconds)
    # Back to one rank, from what four were measured with.
    back = {"ResNet50": replace(PARTS["ResNet50"], images_per_s=Figure(10 / seconds, "here", 4))}
    assert cost(parts=back, sizes=SIZES, allreduce_mb_per_s=60).networks[0].images_per_s == pytest.approx(20)


def test_what_is_not_known_is_said_and_not_made_up() -> None:
    found = cost(parts={"ResNet50": Parts()})
    assert (found.wall_seconds, found.core_hours, found.networks[0].hours) == (None, None, None)
    assert found.networks[0].steps == 120
    assert found.bytes_read == 3 * 1350
    assert "not known: no run of ResNet50 has been measured." in found.render()
    assert "[measured] images_per_s = { ResNet50 = ... }" in found.render()
    ranks = cost(place=Place(ranks=2), sizes=SIZES)
    assert ranks.unknown[0].startswith("ResNet50 was measured with 1 rank(s), not 2. Give measured.allreduce_mb_per_s")
    without_tensorflow = cost(place=Place(ranks=2))
    assert without_tensorflow.unknown[0].endswith("is counted by TensorFlow, which is not installed here")
    assert without_tensorflow.networks[0].sent_bytes is None
    lower = cost(parts={"ResNet50": Parts(PARTS["ResNet50"].images_per_s)})
    assert lower.networks[0].hours == pytest.approx(6 * (200 + 60) / 20 / 3600)  # predictions at the training's speed
    assert any("the hours are a lower bound" in line for line in lower.assumptions)


def test_the_head_alone_sends_its_own_gradients() -> None:
    place, ranks = Place(ranks=2), {"ResNet50": replace(PARTS["ResNet50"], images_per_s=Figure(20.0, "here", 2))}
    first = SETTINGS.model_copy(update={"trained": "head_first", "head_epochs": 1})
    sent = cost(place=place, settings=first, sizes=SIZES, parts=ranks).networks[0].sent_bytes
    assert sent == (4 * 1_000 + 12 + 4 * 1_000_000 + 12) / 2  # the mean of both epochs; a ring of two sends all once


# ---- against small trainings


class Counted:
    """Counts the tiles that a function of a trainer gets."""

    def __init__(self, work: Any) -> None:
        self.work, self.calls, self.tiles = work, 0, 0

    def __call__(self, pixels: np.ndarray, *others: Any) -> Any:
        self.calls, self.tiles = self.calls + 1, self.tiles + len(pixels)
        return self.work(pixels, *others)


def test_steps_tiles_and_bytes_are_those_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run on tiles in memory, one on windows: everything that the model counts is counted as it happens."""
    store, folds = small.store(tmp_path / "screen")
    settings = small.SETTINGS.model_copy(update={"batch_size": 12, "window_tiles": 24})
    run = small.run(folds, MOBILENET)
    shards = store.shards(store.tiles, 32)
    stored = Stored(len(store.tiles), {32: shards.stored_bytes()}, {}, "as stored")
    load = Load(
        MOBILENET,
        32,
        int(folds.training(store.tiles, run.fold).sum()),
        int(folds.held_out(store.tiles, run.fold).sum()),
        settings.epochs,
        settings.batch_size,
    )
    read: list[int] = []
    plain = os.pread

    def counting(file: int, size: int, offset: int) -> bytes:
        found = plain(file, size, offset)
        read.append(len(found))
        return found

    monkeypatch.setattr(os, "pread", counting)

    def model(settings: TrainSettings) -> Cost:
        return estimate([(1, [[load]])], Place(), settings, stored, {MOBILENET: Parts()})

    load_data(store, folds, 32)
    assert sum(read) == model(settings.model_copy(update={"window_tiles": None})).bytes_read
    data = load_data(store, folds, 32, window_tiles=24)
    assert isinstance(data.pixels, Shards)
    trainer = Trainer(MOBILENET, data, settings, OneRank())
    steps, predictions = Counted(trainer._steps["all"]), Counted(trainer.predictor.step)
    monkeypatch.setattr(trainer, "_steps", {"all": steps})
    monkeypatch.setattr(trainer.predictor, "step", predictions)
    read.clear()
    history, _ = trainer.fit(run, folds)
    (network,) = model(settings).networks
    assert (steps.calls, steps.tiles, predictions.tiles) == (network.steps, network.images, network.predicted)
    assert network.steps == sum(epoch["steps"] for epoch in history)
    # Which tiles are left out of an epoch's last batch is drawn, and tiles are not all of one size when compressed.
    assert sum(read) == pytest.approx(model(settings).bytes_read, rel=0.02)
