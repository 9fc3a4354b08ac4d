from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cellhpc.attempts import Attempt
from cellhpc.errors import UsageError
from cellhpc.ledger import read_json, write_json
from cellhpc.measured import Parts, parts_of
from cellhpc.site import MeasuredSettings

NETWORK = "MobileNet(alpha=0.25)"


def epoch(images_per_s: float, seconds: float) -> dict[str, Any]:
    return {"images_per_s": images_per_s, "seconds": seconds, "predict_seconds": 0.5}


def finished_run(
    folder: Path, number: int, epochs: list[dict[str, Any]], beside: float, started: float | None = None, ranks: int = 2
) -> tuple[str, Path]:
    """A run that took so many seconds beside its steps and predictions; `started` before it, if it was the first."""
    unit = folder / f"run-{number}"
    attempt = Attempt.claim(unit, "d")
    about = attempt.folder / "attempt.json"
    facts = read_json(about)
    write_json(about, facts | ({"started": facts["began"] - started} if started is not None else {}))
    attempt.write_json("history.json", {"epochs": epochs})
    attempt.write_json("run.json", {"ranks": ranks, "threads": 4, "host": "n1", "attempts": 1, "held_out_tiles": 40})
    attempt.publish("d")
    took = beside + sum(one["seconds"] + one["predict_seconds"] for one in epochs)
    os.utime(about, (1000, 1000))
    os.utime(unit / "done.json", (1000 + took, 1000 + took))
    return NETWORK, unit


def values(parts: Parts) -> list[float | None]:
    return [
        figure and figure.value
        for figure in (parts.images_per_s, parts.predicted_per_s, parts.start_seconds, parts.run_seconds)
    ]


def test_finished_runs_tell_their_speed_and_what_they_took_beside(tmp_path: Path) -> None:
    first = finished_run(tmp_path, 0, [epoch(25, 16.0), epoch(100, 4.0)], beside=3.0, started=10.0)
    units = [first, *(finished_run(tmp_path, number, [epoch(100, 4.0)] * 2, beside=1.0) for number in (1, 2))]
    parts = parts_of([NETWORK], 2, MeasuredSettings(), [*units, (NETWORK, tmp_path / "missing")])[NETWORK]
    # The process took 10 s, the first epoch 12 s more than 400 images at 100/s, and the first run 2 s more than others.
    assert values(parts) == pytest.approx([100, 80, 24, 1])
    assert parts.images_per_s is not None
    assert parts.images_per_s.ranks == 2
    assert parts.images_per_s.source == "finished runs of this study, 4 thread(s) on n1"


def test_runs_with_as_many_ranks_are_asked_first(tmp_path: Path) -> None:
    units = [finished_run(tmp_path, number, [epoch(100.0 * ranks, 4.0)] * 2, 1.0, None, ranks)
             for number, ranks in enumerate((1, 1, 2))]  # fmt: skip
    for ranks, known in ((2, (200, 2)), (1, (100, 1)), (8, (100, 1))):
        speed = parts_of([NETWORK], ranks, MeasuredSettings(), units)[NETWORK].images_per_s
        assert speed is not None
        assert (speed.value, speed.ranks) == known


def test_the_site_file_goes_before_runs_and_names_networks_as_one_likes(tmp_path: Path) -> None:
    units = [finished_run(tmp_path, 0, [epoch(100, 4.0)] * 2, 1.0)]
    site = MeasuredSettings(images_per_s={"MobileNet( alpha = 0.25 )": 7, "any": 5}, start_seconds=60, ranks=1)
    parts = parts_of([NETWORK, "ResNet50"], 2, site, units)
    assert values(parts[NETWORK]) == pytest.approx([7, 80, 60, 1])
    assert values(parts["ResNet50"]) == [5, None, 60, None]
    speed = parts["ResNet50"].images_per_s
    assert speed is not None
    assert (speed.ranks, speed.source) == (1, "measured.images_per_s of the site file")


def test_a_study_of_which_nothing_is_known_has_no_figures(tmp_path: Path) -> None:
    assert parts_of([NETWORK], 1, MeasuredSettings(), [(NETWORK, tmp_path / "run-0")]) == {NETWORK: Parts()}


def test_a_speed_of_what_is_no_network_is_refused() -> None:
    with pytest.raises(UsageError, match=r"measured.images_per_s of the site file: 'ResNet5' is no network"):
        parts_of([NETWORK], 1, MeasuredSettings(images_per_s={"ResNet5": 7}), [])
