"""How far the trainings of this machine are; what is driven is tested with the whole road, in test_pipeline.py."""

from __future__ import annotations

import time
from pathlib import Path

from cellhpc.attempts import Attempt
from cellhpc.drive import _epochs_done


def test_epochs_of_a_search_count_and_a_run_that_chose_fewer_is_done(tmp_path: Path) -> None:
    unit, began = tmp_path / "run", time.time() - 1
    epoch = {"loss": 0.5, "images_per_s": 99.7}
    assert _epochs_done(unit, began, 12) == (0, "")
    for name, epochs in (("search/c00", 2), ("search/c01", 4)):
        attempt = Attempt.claim(unit / name, name)
        attempt.write_json("history.json", {"epochs": [epoch] * epochs})
        attempt.publish(name)
    assert _epochs_done(unit, began, 12)[0] == 6
    own = Attempt.claim(unit, "d")
    own.write_json("history.json", {"epochs": [epoch]})
    assert _epochs_done(unit, began, 12) == (7, "run: loss 0.500, 100 images/s")
    own.write_json("history.json", {"epochs": [epoch] * 2})
    own.publish("d")
    assert _epochs_done(unit, began, 12)[0] == 12
    assert _epochs_done(unit, time.time() + 1, 12) == (0, "")
