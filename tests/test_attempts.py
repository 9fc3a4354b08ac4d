"""Attempts at a unit: who may write, whose outputs count, and what a process that was cut off can't do."""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from cellhpc.attempts import FAILED, Attempt, Superseded, finished, newest
from cellhpc.ledger import mark_done, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_attempt_is_published_with_its_outputs_and_earlier_ones_are_removed(tmp_path: Path) -> None:
    unit = tmp_path / "run"
    first = Attempt.claim(unit, "a", {"job": "12_3"})
    first.write_json("history.json", {"epochs": []})
    assert read_json(first.folder / "attempt.json").items() >= {"job": "12_3", "digest": "a"}.items()
    assert (finished(unit), newest(unit)) == (None, unit / "001")
    write_json(unit / FAILED, {"reason": "out of memory"})
    second = Attempt.claim(unit, "a")
    assert not (unit / FAILED).exists()
    assert second.earlier() == [unit / "001"]
    second.write_table("predictions.parquet", pd.DataFrame({"p": [1.0]}))
    assert second.publish("a", host="n1")
    assert finished(unit) == finished(unit, "a") == newest(unit) == unit / "002"
    assert finished(unit, "b") is None
    assert read_json(unit / "done.json") == {"digest": "a", "attempt": "002", "host": "n1"}
    assert names(unit) == ["002/attempt.json", "002/predictions.parquet", "done.json"]


def test_what_was_cut_off_ends_at_its_next_write_and_touches_nothing(tmp_path: Path) -> None:
    unit = tmp_path / "run"
    zombie = Attempt.claim(unit, "a")
    zombie.write_json("history.json", {"epochs": [1]})
    heir = Attempt.claim(unit, "a")
    heir.write_json("history.json", {"epochs": [1, 2]})
    with pytest.raises(Superseded):
        zombie.require_current()
    before = names(unit)
    for write in (
        lambda: zombie.write_json("history.json", {"epochs": ["wrong"]}),
        lambda: zombie.write_table("predictions.parquet", pd.DataFrame()),
        lambda: zombie.publish("a"),
    ):
        with pytest.raises(Superseded, match="attempt 001 of run was superseded by 002"):
            write()
    assert names(unit) == before
    heir.publish("a")
    assert finished(unit) == heir.folder
    assert read_json(heir.folder / "history.json") == {"epochs": [1, 2]}


def test_a_folder_that_was_removed_during_a_write_is_not_made_again(tmp_path: Path) -> None:
    unit = tmp_path / "run"
    zombie = Attempt.claim(unit, "a")

    def cut_off() -> None:
        with zombie.replacing("checkpoint.npz") as temporary:
            temporary.write_bytes(b"old")
            Attempt.claim(unit, "a").publish("a")

    with pytest.raises(Superseded):
        cut_off()
    assert names(unit) == ["002/attempt.json", "done.json"]
    assert not zombie.folder.exists()
    shutil.rmtree(unit / "002")
    with pytest.raises(Superseded, match="its folder is gone"):
        zombie.require_current()


def test_of_two_that_publish_the_same_one_counts(tmp_path: Path) -> None:
    """The first one looked just before the second one began."""
    unit = tmp_path / "run"
    late = Attempt.claim(unit, "a")
    heir = Attempt.claim(unit, "a")
    write_json(unit / "done.json", {"digest": "a", "attempt": late.name})
    assert heir.publish("a") is False
    assert finished(unit, "a") == late.folder
    assert late.folder.exists()


def test_a_marker_of_other_settings_is_removed_at_the_beginning_and_at_the_end(tmp_path: Path) -> None:
    unit = tmp_path / "run"
    old = Attempt.claim(unit, "a")
    old.publish("a")
    new = Attempt.claim(unit, "b")
    assert finished(unit) is None
    write_json(unit / "done.json", {"digest": "a", "attempt": old.name})  # it looked before the new one began
    assert new.publish("b")
    assert finished(unit, "b") == new.folder
    assert not old.folder.exists()


def test_a_marker_of_a_newer_attempt_stays_even_if_its_folder_is_not_seen(tmp_path: Path) -> None:
    unit = tmp_path / "run"
    zombie = Attempt.claim(unit, "a")
    write_json(unit / "done.json", {"digest": "b", "attempt": "002"})
    with pytest.raises(Superseded, match="superseded by 002"):
        zombie.publish("a")
    assert read_json(unit / "done.json")["digest"] == "b"


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are left that can be mounted for a test; so the call fails as it does there."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    attempt = Attempt.claim(tmp_path, "a")
    assert attempt.publish("a")
    assert attempt.publish("a") is False
    assert finished(tmp_path, "a") == attempt.folder
    assert names(tmp_path) == ["001/attempt.json", "done.json"]


@pytest.mark.parametrize("marker", ['{"digest": "a"}', '{"digest": "a", "attempt": "007"}', '{"dig', "[]"])
def test_a_marker_that_names_no_outputs_is_none(tmp_path: Path, marker: str) -> None:
    (tmp_path / "done.json").write_text(marker)
    assert finished(tmp_path) is None
    attempt = Attempt.claim(tmp_path, "a")
    assert attempt.publish("a")
    assert finished(tmp_path, "a") == attempt.folder


def test_nothing_there(tmp_path: Path) -> None:
    assert finished(tmp_path / "run") is newest(tmp_path / "run") is None
    mark_done(tmp_path / "other", "a")
    assert finished(tmp_path / "other") is None


def test_attempts_that_begin_together_get_folders_of_their_own_and_one_is_current(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def claim(_: int) -> Attempt | None:
        together.wait()
        with contextlib.suppress(Superseded):
            return Attempt.claim(tmp_path, "a")
        return None

    with ThreadPoolExecutor(8) as pool:
        claimed = [attempt for attempt in pool.map(claim, range(8)) if attempt]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:03d}" for number in range(1, 9)]
    assert newest(claimed[0].unit) == next(attempt.folder for attempt in claimed if attempt.number == 8)
