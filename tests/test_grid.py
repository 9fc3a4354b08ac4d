"""`[search]` of the job file: its candidates, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cellhpc.errors import UsageError
from cellhpc.grid import candidates, describe
from cellhpc.recipe import TrainSettings
from cellhpc.settings import Job, parse_job


def job(search: dict[str, Any], train: dict[str, Any] | None = None, **sweep: Any) -> Job:
    document = {
        "study": {"name": "s", "folder": "study"},
        "screen": {"layout": "bbbc021", "path": "raw"},
        "train": train or {},
        "search": search,
        "sweep": sweep,
    }
    return parse_job(document, "job")


def test_candidates_are_all_combinations_on_top_of_train() -> None:
    found = job({"epochs": [8, 16], "augment": ["none", "rotations"]}, {"preset": "best", "epochs": 5}).candidates
    assert [candidate.name for candidate in found] == ["c00", "c01", "c02", "c03"]
    assert [describe(candidate.values) for candidate in found] == [
        'epochs = 8, augment = "none"', 'epochs = 8, augment = "rotations"',
        'epochs = 16, augment = "none"', 'epochs = 16, augment = "rotations"',
    ]  # fmt: skip
    for candidate in found:
        expected = {"preset": "best", **candidate.values}
        assert candidate.settings == TrainSettings.model_validate(expected)


def test_without_a_search_there_are_none() -> None:
    assert candidates(TrainSettings(), {}) == ()
    assert job({}).candidates == ()


def test_a_job_that_was_written_down_has_the_same_candidates() -> None:
    first = job(
        {"learning_rate": [0.003, 0.01], "step_epochs": [[2], [2, 4]]}, {"schedule": "step", "step_epochs": [1]}
    )
    assert parse_job(first.model_dump(mode="json"), "job.json").candidates == first.candidates


@pytest.mark.parametrize(
    ("search", "train", "message"),
    [
        ({"epochs": 8}, {}, r"job: search.epochs: found 8. A list is wanted, in square brackets: \[8\]"),
        ({"epochs": []}, {}, r"job: search.epochs is empty"),
        ({"epochs": [8]}, {}, r"search has 1 candidate\(s\), the product of its lists; allowed are 2 to 64"),
        ({"epochs": [1, 2] * 10, "momentum": [0.0] * 4}, {}, r"search has 80 candidate\(s\)"),
        ({"epochs": [8, 8]}, {}, r"the candidates epochs = 8 and epochs = 8 are the same; name it once"),
        ({"epoch": [8, 9]}, {}, r"search.epoch: this can't be searched. Allowed: epochs, batch_size, learning_rate"),
        ({"inputs": [["dna"], ["actin"]]}, {}, r"search.inputs: this can't be searched"),
        ({"dropout_draws": [5, 9]}, {"dropout": 0.5}, r"search.dropout_draws: this can't be searched"),
        (
            {"dropout": [0.0, 0.5]},
            {"dropout": 0.5, "dropout_draws": 9},
            r"the candidate dropout = 0.0 is not allowed: dropout_draws is 9 and dropout is 0: all draws would be the",
        ),
        ({"epochs": [4, 8]}, {"warmup_epochs": 5}, r"the candidate epochs = 4 is not allowed: warmup_epochs is 5"),
        ({"learning_rate": [0.1, -1]}, {}, r"the candidate learning_rate = -1 is not allowed: learning_rate: Input"),
        ({"batch_size": [8, 9]}, {}, r"the candidate batch_size = 9 can't be shared equally by sweep.ranks 2"),
    ],
)  # fmt: skip
def test_what_can_not_be_searched_is_told(search: dict[str, Any], train: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        job(search, train, ranks=2)


def test_settings_that_only_the_steps_know_share_a_graph() -> None:
    settings = TrainSettings()
    for key, value in {"epochs": 3, "learning_rate": 0.1, "schedule": "cosine"}.items():
        assert settings.model_copy(update={key: value}).graph() == settings.graph()
    others = {"batch_size": 8, "dropout": 0.5, "optimizer": "adamw", "momentum": 0.5, "trained": "head"}
    for key, value in others.items():
        assert settings.model_copy(update={key: value}).graph() != settings.graph()


def test_a_search_does_not_choose_for_what_leaves_the_batch_out() -> None:
    document = job({"epochs": [8, 16]}).model_dump(mode="json")
    document["folds"] = {"also": "batch"}
    with pytest.raises(UsageError, match=r"search and folds\.also exclude each other: inner compounds share their"):
        parse_job(document, "job")
