from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from cellhpc.checkpoint import Keeper
from cellhpc.curves import Curves
from cellhpc.errors import UserError
from cellhpc.ledger import read_json
from cellhpc.ranks import OneRank
from cellhpc.train import Interrupted, Trainer, train_run
from tests import small
from tests.test_train import MOBILENET, outputs, same_run


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of the only event file of a folder: epochs and values by name."""
    (path,) = folder.glob("events.out.tfevents.*")
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            curves[value.tag].append((event.step, float(tf.make_ndarray(value.tensor))))
    return curves


def wanted(history: list[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    keys = ("loss", "learning_rate", "steps", "seconds", "images_per_s", "waiting_for_data")
    for key in (*keys, "checkpoint_seconds", "predict_seconds", "memory_mb"):
        yield f"run/{key}", [(epoch["epoch"], epoch[key]) for epoch in history]
    for level in history[0]["held_out"]:
        counts = [(epoch["epoch"], epoch["held_out"][level]) for epoch in history]
        yield f"held_out/{level}", [(number, count["correct"] / count["total"]) for number, count in counts]


def test_a_run_that_was_stopped_shows_all_of_its_history_and_is_the_run_without_it(tmp_path: Path) -> None:
    data, folds = small.data(per_compound=4)
    run = small.run(folds, MOBILENET)
    trainer = Trainer(MOBILENET, data, small.SETTINGS.model_copy(update={"epochs": 3}), OneRank())
    train_run(trainer, run, folds, tmp_path / "without")
    assert not list((tmp_path / "without").rglob("events*"))
    for watch in (small.After(3), small.After(99)):
        watch.tensorboard = True
        try:
            train_run(trainer, run, folds, tmp_path / "with", watch)
        except Interrupted:
            stopped = read_events(tmp_path / "with" / run.id / "001")
            assert [epoch for epoch, _ in stopped["run/loss"]] == [1]
    unit = outputs(tmp_path / "with" / run.id)
    assert unit.name == "002"
    same_run(unit, outputs(tmp_path / "without" / run.id))
    curves = read_events(unit)
    expected = dict(wanted(read_json(unit / "history.json")["epochs"]))
    assert set(curves) == set(expected)
    for name, points in expected.items():
        assert [epoch for epoch, _ in curves[name]] == [1, 2, 3]
        assert curves[name] == [(epoch, pytest.approx(value)) for epoch, value in points]


def test_where_nothing_can_be_written_the_message_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as caught:
        Curves(tmp_path / "file" / "below").write([{"epoch": 1, "loss": 1.0}])
    assert caught.value.filename == str(tmp_path / "file" / "below")

    def full(self: Curves, history: Any) -> None:
        raise OSError(None, "no space", "there")

    class Nothing:
        ranks = OneRank()

    monkeypatch.setattr(Curves, "write", full)
    keeper = Keeper(tmp_path / "run", "digest", Nothing(), tensorboard=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"there can't be written: no space"):
        keeper.write_history([])
