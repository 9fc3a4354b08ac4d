from __future__ import annotations

import dataclasses
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest

from cellhpc import checkpoint, train
from cellhpc.aggregate import aggregate
from cellhpc.attempts import Superseded, finished
from cellhpc.checkpoint import BEFORE, CHECKPOINT, WEIGHTS, read_checkpoint
from cellhpc.errors import DataError, UserError
from cellhpc.folds import plan_folds, write_folds
from cellhpc.ledger import read_json, write_json
from cellhpc.networks import set_weights
from cellhpc.predictor import DRAWS
from cellhpc.ranks import OneRank
from cellhpc.recipe import AUGMENTATIONS
from cellhpc.scores import levels
from cellhpc.settings import FoldsSettings
from cellhpc.train import Interrupted, RunFailed, Trainer, Watch, _class_weights, train_run
from tests import small
from tests.ranks_at_work import start_ranks
from tests.waiting import wait_until

MOBILENET = "MobileNet(alpha=0.25)"


class PowerCut(BaseException):
    """Ends a process at once: nothing that comes after is written."""


def outputs(unit: Path) -> Path:
    folder = finished(unit)
    assert folder is not None
    return folder


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_run(one: Path, other: Path) -> None:
    """Predictions are equal bit for bit, and histories but for what depends on the clock and the machine."""
    tables = [pd.read_parquet(folder / "predictions.parquet") for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert [(folder / DRAWS).exists() for folder in (one, other)] in ([False] * 2, [True] * 2)
    if (one / DRAWS).exists():
        assert (one / DRAWS).read_bytes() == (other / DRAWS).read_bytes()
    clock = {"seconds", "images_per_s", "waiting_for_data", "checkpoint_seconds", "predict_seconds", "memory_mb"}
    first, second = (
        [{key: value for key, value in epoch.items() if key not in clock} for epoch in read_json(path)["epochs"]]
        for path in (one / "history.json", other / "history.json")
    )
    assert first == second


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    data, _ = small.data()
    return Trainer(MOBILENET, data, small.SETTINGS, OneRank())


@pytest.fixture(scope="module")
def dropout_trainer() -> Trainer:
    settings = small.SETTINGS.model_copy(update={"augment": AUGMENTATIONS["kensert2019"], "schedule": "cosine"})
    data, _ = small.data(per_compound=4)
    return Trainer("EfficientNetB0", data, settings, OneRank())


@pytest.fixture(params=["trainer", "dropout_trainer"])
def either(request: pytest.FixtureRequest) -> Trainer:
    """A network with batch statistics, and one with dropout besides."""
    return request.getfixturevalue(request.param)


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


def test_packed_runs_are_the_runs_they_would_be_alone(either: Trainer) -> None:
    _, folds = small.data()
    network = either.network.text
    second = small.run(folds, network, fold=4, seed=7)
    either.fit(small.run(folds, network, fold=0), folds)
    _, packed = either.fit(second, folds)
    _, alone = Trainer(network, either.data, either.settings, OneRank()).fit(second, folds)
    pd.testing.assert_frame_equal(packed, alone, check_exact=True)


def test_a_run_leaves_its_record_and_is_not_done_twice(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folds = small.data()
    run = small.run(folds, MOBILENET)
    train_run(trainer, run, folds, tmp_path)
    first, second = capsys.readouterr().out.splitlines()  # what a batch log tells: a line an epoch
    assert first.startswith(f"{run.id}: epoch 1 of 2: loss ")
    last = read_json(outputs(tmp_path / run.id) / "history.json")["epochs"][-1]
    right = last["held_out"]["field"]
    assert f"loss {last['loss']:.3f}, {right['correct']} of {right['total']} held-out fields, " in second
    record = read_json(outputs(tmp_path / run.id) / "run.json")
    assert record["fold"] == {"name": run.fold.name, "held_out": list(run.fold.held_out)}
    assert record["folds_sha256"] == folds.sha256
    assert not set(record["trained_on"]) & set(run.fold.held_out)
    assert record["training_tiles"] + record["held_out_tiles"] == len(trainer.data.tiles)
    assert (record["attempt"], record["attempts"], record["interruptions"]) == ("001", 1, 0)
    before = snapshot(tmp_path / run.id)
    assert {path.name for path in before} == {
        "attempt.json", "history.json", "run.json", "predictions.parquet", "done.json"
    }  # fmt: skip
    train_run(trainer, run, folds, tmp_path)
    assert snapshot(tmp_path / run.id) == before
    assert capsys.readouterr().out == ""


def test_calls_after_an_epoch_are_counted_by_the_rule_of_the_study(trainer: Trainer, tmp_path: Path) -> None:
    _, folds = small.data()
    run = small.run(folds, MOBILENET)
    for how in ("mean", "vote"):
        train_run(trainer, run, folds, tmp_path / how, Watch(combine=how))
        folder = outputs(tmp_path / how / run.id)
        assert read_json(folder / "run.json")["combine"] == how
        expected = levels(pd.read_parquet(folder / "predictions.parquet"), how)
        told = read_json(folder / "history.json")["epochs"][-1]["held_out"]
        assert told == {level: {key: at[key] for key in ("correct", "total")} for level, at in expected.items()}


class TestKeptWeights:
    def test_they_predict_what_the_run_predicted_and_are_the_same_after_a_stop(
        self, either: Trainer, tmp_path: Path
    ) -> None:
        data, folds = small.data(per_compound=len(either.data.tiles) // 9)
        run = small.run(folds, either.network.text)
        train_run(either, run, folds, tmp_path / "whole", Watch(keep_weights=True))
        watch = small.After(2)
        watch.keep_weights = True
        with pytest.raises(Interrupted):
            train_run(either, run, folds, tmp_path / "parts", watch)
        assert not list((tmp_path / "parts").rglob(WEIGHTS))
        train_run(either, run, folds, tmp_path / "parts", Watch(keep_weights=True))
        kept, again = (outputs(tmp_path / part / run.id) / WEIGHTS for part in ("whole", "parts"))
        assert kept.read_bytes() == again.read_bytes()
        other = Trainer(either.network.text, data, either.settings, OneRank())
        set_weights(other.model, kept)
        predicted = other.predictor.predict(np.flatnonzero(folds.held_out(data.tiles, run.fold)))
        said = pd.read_parquet(kept.with_name("predictions.parquet"))
        pd.testing.assert_frame_equal(predicted, said, check_exact=True)

    def test_they_are_keras_own_in_their_order(self, trainer: Trainer, tmp_path: Path) -> None:
        """As the README says, with NumPy and Keras alone."""
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        train_run(trainer, run, folds, tmp_path, Watch(keep_weights=True))
        backbone = keras.applications.MobileNet(
            alpha=0.25, include_top=False, weights=None, pooling="avg", input_shape=(32, 32, 3)
        )
        model = keras.Model(backbone.input, keras.layers.Dense(3)(backbone.output))
        with np.load(outputs(tmp_path / run.id) / WEIGHTS) as file:
            model.set_weights([file[name] for name in file.files])
        tiles = trainer.data.pixels.astype(np.float32)
        assert np.array_equal(model(tiles, training=False), trainer.model(tiles, training=False))

    def test_a_full_disk_is_told_and_the_run_is_not_done(self, trainer: Trainer, tmp_path: Path) -> None:
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # stands for the disk
        try:
            with pytest.raises(UserError, match=r"001/weights.npz can't be written: File too large\."):
                train_run(trainer, run, folds, tmp_path, Watch(keep_weights=True))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert finished(tmp_path / run.id) is None


class TestWhatIsMinimised:
    """Of a head that hardly moves on a backbone that stays: the loss of an epoch is that of its predictions."""

    def trained(self, **more: Any) -> tuple[float, Trainer, np.ndarray]:
        data, folds = small.data()
        still = {"trained": "head", "batch_norm": "frozen", "learning_rate": 1e-12, "epochs": 1, "class_weights": False}
        trainer = Trainer("VGG16", data, small.SETTINGS.model_copy(update={**still, **more}), OneRank())
        run = small.run(folds, "VGG16")
        history, _ = trainer.fit(run, folds)
        return history[0]["loss"], trainer, np.flatnonzero(folds.training(data.tiles, run.fold))

    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_label_smoothing_shares_the_target_out(self, smoothing: float) -> None:
        loss, trainer, training = self.trained(label_smoothing=smoothing)
        assert len(training) % trainer.settings.batch_size == 0  # every tile once
        predicted = trainer.predictor.predict(training).filter(like="p_").to_numpy()
        assert predicted.std() > 0.01
        targets = np.eye(3)[trainer.data.targets[training]] * (1 - smoothing) + smoothing / 3
        assert loss == pytest.approx(-(targets * np.log(predicted)).sum(axis=1).mean(), rel=1e-4)

    def test_dropout_hides_features_from_the_head_while_it_learns_and_not_after(self) -> None:
        loss, trainer, training = self.trained(dropout=0.5)
        predicted = trainer.predictor.predict(training)
        pd.testing.assert_frame_equal(predicted, trainer.predictor.predict(training), check_exact=True)
        targets = np.eye(3)[trainer.data.targets[training]]
        of_all_features = -(targets * np.log(predicted.filter(like="p_").to_numpy())).sum(axis=1).mean()
        assert abs(loss - of_all_features) > 1e-3


def test_an_epoch_tells_how_long_its_steps_waited_for_data(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folds = small.data()
    run = small.run(folds, MOBILENET)
    trainer.fit(run, folds)
    quick, _ = trainer.fit(run, folds)
    feed = train.feed

    @contextmanager
    def slow(*given: Any) -> Iterator[Iterator[np.ndarray]]:
        def late(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for batch in batches:
                time.sleep(0.2)
                yield batch

        with feed(*given) as batches:
            yield late(batches)

    monkeypatch.setattr(train, "feed", slow)
    starved, _ = trainer.fit(run, folds)
    for epoch, other in zip(quick, starved, strict=True):
        assert other["waiting_for_data"] * other["seconds"] >= 4 * 0.2
        assert epoch["waiting_for_data"] < other["waiting_for_data"] < 1
        assert other["images_per_s"] == pytest.approx(64 / other["seconds"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        assert 0.5 * peak < other["memory_mb"] <= peak


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where() -> None:
    data, folds = small.data()
    settings = small.SETTINGS.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(
        RunFailed, match=r"the loss is nan at epoch 1, step \d with learning rate 1e\+30. Lower train.l"
    ):
        Trainer("VGG16", data, settings, OneRank()).fit(small.run(folds, "VGG16"), folds)


class TestInterruptions:
    def test_a_run_that_was_stopped_three_times_is_the_whole_run(self, either: Trainer, tmp_path: Path) -> None:
        _, folds = small.data()
        steps = (len(either.data.tiles) * 8 // 9) // either.settings.batch_size
        network = either.network.text
        run, other = small.run(folds, network), small.run(folds, network, fold=3)
        train_run(either, run, folds, tmp_path / "whole")
        for after in (steps - 2, 0, steps - 2):  # in an epoch, at its end or the next one's begin, in the last one
            with pytest.raises(Interrupted, match=rf"run-0-0 was stopped in epoch \d, after step \d of {steps}"):
                train_run(either, run, folds, tmp_path / "parts", small.After(after))
            with pytest.raises(Interrupted):  # another run of this process leaves its traces in the variables
                train_run(either, other, folds, tmp_path / "parts", small.After(0))
        train_run(either, run, folds, tmp_path / "parts")
        whole, parts = outputs(tmp_path / "whole" / run.id), outputs(tmp_path / "parts" / run.id)
        same_run(whole, parts)
        record = read_json(parts / "run.json")
        assert (record["attempt"], record["attempts"], record["interruptions"]) == ("004", 4, 3)
        assert record["seconds"] > 0
        assert {path.name for path in (tmp_path / "parts" / run.id).iterdir()} == {"004", "done.json"}
        assert not (parts / CHECKPOINT).exists()

    def test_a_process_that_is_killed_at_any_moment_goes_on(self, tmp_path: Path) -> None:
        """Checkpoints are due all the time: some are under way when the kill -9 comes."""
        unit, more = tmp_path / small.run(small.data()[1], MOBILENET).id, json.dumps({"epochs": 12})
        random = np.random.default_rng(0)
        for attempt in range(1, 4):
            program = Path(__file__).with_name("resume_program.py")
            with subprocess.Popen([sys.executable, str(program), str(tmp_path), "often", more]) as process:
                wait_until((unit / f"{attempt:03d}" / CHECKPOINT).exists, 120)
                time.sleep(random.uniform(0, 0.1))
                process.kill()
            assert process.returncode == -signal.SIGKILL
            assert finished(unit) is None
        start_ranks("resume_program.py", 1, tmp_path / "meeting", tmp_path, "whole", "often", more)
        same_run(outputs(tmp_path / "whole"), outputs(unit))
        assert read_json(outputs(unit) / "run.json")["interruptions"] == 3

    def test_two_ranks_go_through_stops_and_a_kill(self, tmp_path: Path) -> None:
        """Ranks 1, 0, 1 are told; rank 0 is superseded, then can't write; rank 1 is killed: none waits for another."""
        draws = {"dropout": 0.3, "dropout_draws": 4}
        parts = ("whole", "interrupted", json.dumps(draws))
        (first,) = start_ranks("resume_program.py", 2, tmp_path / "1", tmp_path, *parts, killed=1)
        second = read_json(tmp_path / "rank-1.json")
        told = [["Interrupted", 3], ["Interrupted", 2], ["Interrupted", 4]]
        assert first["ends"][:3] == second["ends"][:3] == told
        # What goes wrong while a checkpoint is written is told a step or more later, on all ranks after the same one.
        assert [kind for kind, _ in first["ends"][3:]] == ["Superseded", "UserError"]
        assert [kind for kind, _ in second["ends"][3:]] == ["Interrupted", "UserError"]
        assert [steps for _, steps in first["ends"]] == [steps for _, steps in second["ends"]]
        assert "rank 0 lost another of the 2 ranks" in first["lost"]
        assert first["seconds"] < 60
        unit = tmp_path / small.run(small.data()[1], MOBILENET).id
        assert (unit / "007" / CHECKPOINT).exists()
        start_ranks("resume_program.py", 2, tmp_path / "2", tmp_path, "rest", json.dumps(draws))
        same_run(outputs(tmp_path / "whole"), outputs(unit))
        kept = [(outputs(folder) / WEIGHTS).read_bytes() for folder in (tmp_path / "whole", unit)]
        assert kept[0] == kept[1]
        record = read_json(outputs(unit) / "run.json")
        assert (record["attempt"], record["attempts"], record["interruptions"]) == ("008", 8, 4)
        # One rank draws the same with their weights, of other batches.
        data, folds = small.data()
        one = Trainer(MOBILENET, data, small.SETTINGS.model_copy(update=draws), OneRank())
        set_weights(one.model, outputs(unit) / WEIGHTS)
        drawn = one.predictor.draw(np.flatnonzero(folds.held_out(data.tiles, folds.folds[0])), seed=0)
        pd.testing.assert_frame_equal(drawn, pd.read_parquet(outputs(unit) / DRAWS), check_exact=False, atol=1e-5)

    def test_two_ranks_with_many_options_are_stopped_after_every_step(self, tmp_path: Path) -> None:
        settings = {
            "trained": "head_first", "optimizer": "adamw", "weight_decay": 0.01, "clip_norm": 1.0, "dropout": 0.5,
            "warmup_epochs": 0.5, "batch_norm": "synchronised", "precision": "bfloat16", "compression": "fp16",
        }  # fmt: skip
        arguments = ("whole", "stopped", json.dumps(settings))
        first, _ = start_ranks("resume_program.py", 2, tmp_path / "meeting", tmp_path, *arguments)
        assert first["stops"] == 12
        same_run(outputs(tmp_path / "whole"), outputs(tmp_path / small.run(small.data()[1], MOBILENET).id))

    def test_checkpoints_are_written_when_they_are_due(self, trainer: Trainer, tmp_path: Path) -> None:
        _, folds = small.data()
        run = small.run(folds, MOBILENET)

        def cut() -> None:
            raise PowerCut

        with pytest.raises(PowerCut):
            train_run(trainer, run, folds, tmp_path, small.After(6, cut, checkpoint_seconds=0))
        about, _ = read_checkpoint(tmp_path / run.id / "001" / CHECKPOINT)
        done = 4 * (about["progress"]["epoch"] - 1) + about["progress"]["step"]
        assert 1 <= done <= 5  # of eight; the last one that was written in time
        (epoch,) = read_json(tmp_path / run.id / "001" / "history.json")["epochs"]
        assert epoch["checkpoint_seconds"] > 0
        watch = Watch()
        train_run(trainer, run, folds, tmp_path, watch)
        assert watch.steps_done == 8 - done
        train_run(trainer, run, folds, tmp_path / "whole")
        same_run(outputs(tmp_path / "whole" / run.id), outputs(tmp_path / run.id))

    def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(
        self, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        save, four_steps = checkpoint._save, threading.Event()

        def slowly(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
            assert four_steps.wait(60)
            save(path, arrays)

        def cut() -> None:
            four_steps.set()
            raise PowerCut

        monkeypatch.setattr(checkpoint, "_save", slowly)
        with pytest.raises(PowerCut):
            train_run(trainer, run, folds, tmp_path, small.After(4, cut, checkpoint_seconds=0))
        path = tmp_path / run.id / "001" / CHECKPOINT
        wait_until(path.exists, 30)
        about, _ = read_checkpoint(path)
        assert (about["progress"]["epoch"], about["progress"]["step"]) == (1, 1)
        watch = Watch()
        train_run(trainer, run, folds, tmp_path, watch)
        assert watch.steps_done == 7
        train_run(trainer, run, folds, tmp_path / "whole")
        same_run(outputs(tmp_path / run.id), outputs(tmp_path / "whole" / run.id))

    def test_a_torn_checkpoint_is_skipped_for_the_one_before_it(
        self, trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        unit = tmp_path / run.id

        def cut() -> None:
            raise PowerCut

        with pytest.raises(PowerCut):  # in the first attempt: there is no earlier one
            train_run(trainer, run, folds, tmp_path, small.After(7, cut, checkpoint_seconds=0))
        torn, before = unit / "001" / CHECKPOINT, unit / "001" / BEFORE
        where = [read_checkpoint(path)[0]["progress"] for path in (before, torn)]
        assert (where[0]["epoch"], where[0]["step"]) < (where[1]["epoch"], where[1]["step"])
        torn.write_bytes(torn.read_bytes()[:-1000])
        watch = Watch()
        train_run(trainer, run, folds, tmp_path, watch)
        said = capsys.readouterr().out
        assert f"{torn} is skipped: damaged: " in said
        assert f"continued from {before}: epoch {where[0]['epoch']}, {where[0]['step']} steps" in said
        assert watch.steps_done == 8 - 4 * (where[0]["epoch"] - 1) - where[0]["step"]
        assert not list(unit.rglob("checkpoint*"))
        train_run(trainer, run, folds, tmp_path / "whole")
        same_run(outputs(tmp_path / "whole" / run.id), outputs(unit))

    def test_a_damaged_checkpoint_is_skipped_for_an_earlier_one_and_then_for_the_start(
        self, trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        unit = tmp_path / run.id
        train_run(trainer, run, folds, tmp_path / "whole")
        for after in (1, 2):
            with pytest.raises(Interrupted):
                train_run(trainer, run, folds, tmp_path, small.After(after))
        torn = unit / "002" / CHECKPOINT
        torn.write_bytes(torn.read_bytes()[:-1000])
        with pytest.raises(Interrupted):
            train_run(trainer, run, folds, tmp_path, small.After(0))
        said = capsys.readouterr().out
        assert f"{torn} is skipped: damaged: " in said
        assert f"continued from {unit / '001' / CHECKPOINT}: epoch 1, 2 steps" in said
        for path in unit.glob(f"*/{CHECKPOINT}"):
            path.write_bytes(b"")
        watch = Watch()
        train_run(trainer, run, folds, tmp_path, watch)
        assert watch.steps_done == 8
        same_run(outputs(tmp_path / "whole" / run.id), outputs(unit))

    def test_a_checkpoint_of_other_settings_is_not_continued(self, trainer: Trainer, tmp_path: Path) -> None:
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        with pytest.raises(Interrupted):
            train_run(trainer, run, folds, tmp_path, small.After(2))
        watch = Watch()
        changed = dataclasses.replace(run, digest="other")
        train_run(trainer, changed, folds, tmp_path, watch)
        assert watch.steps_done == 8
        assert read_json(outputs(tmp_path / run.id) / "run.json")["attempts"] == 1

    # It wakes before a checkpoint, before a history, before its outputs.
    @pytest.mark.parametrize(("after", "checkpoint_seconds"), [(2, 0), (2, 600), (8, 600)])
    def test_a_process_that_was_cut_off_overwrites_nothing_of_its_successor(
        self, after: int, checkpoint_seconds: float, trainer: Trainer, tmp_path: Path
    ) -> None:
        """The successor does the whole run while the first one hangs, which then goes on, with wrong numbers by now."""
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        left: dict[Path, bytes] = {}

        def succeed() -> None:
            train_run(trainer, run, folds, tmp_path)
            left.update(snapshot(tmp_path / run.id))

        with pytest.raises(Superseded, match="attempt 001 of run-0-0 was superseded by 002"):
            train_run(trainer, run, folds, tmp_path, small.After(after, succeed, checkpoint_seconds))
        assert left
        assert snapshot(tmp_path / run.id) == left
        assert outputs(tmp_path / run.id).name == "002"

    def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(self, trainer: Trainer, tmp_path: Path) -> None:
        _, folds = small.data()
        run = small.run(folds, MOBILENET)
        with pytest.raises(Interrupted):
            train_run(trainer, run, folds, tmp_path, small.After(1))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # stands for the disk
        try:
            with pytest.raises(UserError, match=r"002/checkpoint.npz can't be written: File too large\."):
                train_run(trainer, run, folds, tmp_path, small.After(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name for path in (tmp_path / run.id / "002").iterdir()} == {"attempt.json", "history.json"}
        watch = Watch()
        train_run(trainer, run, folds, tmp_path, watch)
        assert watch.steps_done == 6


def test_two_ranks_have_equal_weights_after_every_epoch(tmp_path: Path) -> None:
    first, second = start_ranks("train_program.py", 2, tmp_path, MOBILENET, 32, 16, 3, 8, 0.01)
    assert len(first["checksums"]) == 3
    assert first["checksums"] == second["checksums"]
    assert all(own != other for own, other in zip(first["own"], second["own"], strict=True))  # moving statistics
    assert first["steps"] == second["steps"] == [4, 4, 4]
    assert first["probabilities"] == second["probabilities"]
    scaled, _ = start_ranks(
        "train_program.py", 2, tmp_path / "scaled", MOBILENET, 32, 16, 3, 8, 0.005, '{"scale_learning_rate": true}'
    )
    assert scaled["learning_rates"] == first["learning_rates"] == pytest.approx([0.01] * 3)
    assert scaled["probabilities"] == first["probabilities"]


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


def test_a_class_that_a_fold_does_not_train_on_changes_no_weight() -> None:
    assert _class_weights(np.array([0, 0, 0, 2]), 3).tolist() == pytest.approx([4 / (2 * 3), 0, 4 / (2 * 1)])


def test_a_study_that_leaves_labels_out_is_trained_and_scored_on_what_is_known(
    trainer: Trainer, tmp_path: Path
) -> None:
    table = trainer.data.tiles
    folds = plan_folds(table, FoldsSettings(unknown=True))
    write_folds(tmp_path / "folds.json", folds)
    runs = [small.run(folds, MOBILENET, fold, seed) for seed in (0, 1) for fold in range(3)]
    for run in runs:
        train_run(trainer, run, folds, tmp_path / "runs")
        record = read_json(outputs(tmp_path / "runs" / run.id) / "run.json")
        assert record["fold"] == {
            "name": run.fold.name, "held_out": list(run.fold.held_out), "unknown": run.fold.unknown
        }  # fmt: skip
        assert set(record["trained_on"]) == set(table["compound"]) - set(run.fold.held_out)
        assert not any(name.startswith(run.fold.unknown) for name in record["trained_on"])
        predicted = pd.read_parquet(outputs(tmp_path / "runs" / run.id) / "predictions.parquet")
        assert Counter(predicted["label"]) == {
            label: 3 * 8 if label == run.fold.unknown else 8 for label in small.CLASSES
        }
        (*_, last) = read_json(outputs(tmp_path / "runs" / run.id) / "history.json")["epochs"]
        assert last["held_out"]["tile"]["total"] == 2 * 8
        assert last["held_out"]["treatment"]["total"] == 2

    def scores() -> dict[str, Any]:
        return aggregate(tmp_path, "unknown", [tmp_path / "runs" / run.id for run in runs], folds.classes)

    document = scores()
    assert document["folds"]["unknown"]
    (model,) = document["models"]
    # Two known compounds in each fold, one treatment each; the same compound may be known in two folds.
    totals = {level: count["total"] for level, count in model["levels"].items()}
    assert totals == {"tile": 3 * 16, "field": 3 * 4, "well": 3 * 2, "treatment": 3 * 2, "compound": 3 * 2}
    known = [
        pd.read_parquet(outputs(tmp_path / "runs" / run.id) / "predictions.parquet").query("label != @run.fold.unknown")
        for run in runs
    ]
    mean = [  # over the seeds
        first.filter(like="p_").add(second.filter(like="p_")).idxmax(axis=1) == "p_" + first["label"]
        for first, second in zip(known[:3], known[3:], strict=True)
    ]
    assert model["levels"]["tile"]["correct"] == sum(map(sum, mean))
    assert model["curves"]["all"]["tile"]["total"] == [2 * 3 * 16] * 2
    assert document["baselines"]["majority"] is None
    (caution,) = document["cautions"]
    assert "Treatments of that label can't be right and are not scored" in caution
    record = outputs(tmp_path / "runs" / runs[0].id) / "run.json"
    facts = read_json(record)
    write_json(record, {**facts, "fold": {**facts["fold"], "unknown": "dim"}})
    with pytest.raises(DataError, match=r"run-0-0: fold bright leaves out the label dim; folds.json: bright"):
        scores()
    write_json(record, {**facts, "trained_on": [*facts["trained_on"], "bright-0"]})
    with pytest.raises(DataError, match="run-0-0: holds out compound bright-0, which it trained on: a leak"):
        scores()
