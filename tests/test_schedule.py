from __future__ import annotations

from typing import Any

import pytest

from cellhpc.recipe import TrainSettings
from cellhpc.schedule import learning_rate


def rates(steps_per_epoch: int = 2, ranks: int = 1, **settings: Any) -> list[float]:
    chosen = TrainSettings(learning_rate=0.8, **settings)
    return [learning_rate(chosen, step, steps_per_epoch, ranks) for step in range(chosen.epochs * steps_per_epoch)]


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        ({"epochs": 2}, [0.8, 0.8, 0.8, 0.8]),
        ({"epochs": 2, "schedule": "cosine"}, [0.8, 0.6828427, 0.4, 0.1171573]),
        ({"epochs": 3, "schedule": "step", "step_epochs": [1]}, [0.8, 0.8, 0.08, 0.08, 0.08, 0.08]),
        (
            {"epochs": 4, "schedule": "step", "step_epochs": [1, 3], "step_factor": 0.5},
            [0.8, 0.8, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2],
        ),
        ({"epochs": 3, "warmup_epochs": 2}, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]),
        ({"epochs": 2, "warmup_epochs": 1.25}, [0.32, 0.64, 0.8, 0.8]),  # two steps and a half
        ({"epochs": 2, "warmup_epochs": 0.25}, [0.8, 0.8, 0.8, 0.8]),  # its last step is the first
        ({"epochs": 3, "warmup_epochs": 1, "schedule": "cosine"}, [0.4, 0.8, 0.8, 0.6828427, 0.4, 0.1171573]),
        (
            {"epochs": 2, "warmup_epochs": 1.5, "schedule": "step", "step_epochs": [1]},
            [0.8 / 3, 1.6 / 3, 0.08, 0.08],
        ),
    ],
)
def test_the_learning_rate_of_each_step(settings: dict[str, Any], table: list[float]) -> None:
    assert rates(**settings) == pytest.approx(table)


def test_it_grows_with_the_ranks_only_when_asked() -> None:
    settings = {"epochs": 2, "schedule": "cosine", "warmup_epochs": 0.5}
    assert rates(ranks=4, **settings) == rates(**settings)
    grown = rates(ranks=4, scale_learning_rate=True, **settings)
    assert grown == pytest.approx([4 * rate for rate in rates(**settings)])


def test_the_cosine_ends_at_zero() -> None:
    settings = TrainSettings(epochs=3, schedule="cosine")
    assert learning_rate(settings, 300, 100) == pytest.approx(0)
