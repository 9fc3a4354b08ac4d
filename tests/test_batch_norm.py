from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks_at_work import start_ranks
from tests.test_train import MOBILENET


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, which sees the whole batch."""
    (seen,) = start_ranks("batch_norm_program.py", 1, tmp_path_factory.mktemp("one"), "batch")
    return seen


def distance(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    """Largest difference of two ranks' arrays, each against the largest value of its array."""
    pairs = zip(one[key], other[key], strict=True)
    return max(np.abs(np.subtract(*pair)).max() / (np.abs(pair[0]).max() + 1e-3) for pair in pairs)


def test_synchronised_two_ranks_are_one_rank_with_their_batch(one: dict[str, Any], tmp_path: Path) -> None:
    """Loss, gradients of all weights and moving statistics: those of the whole batch, and equal on both ranks."""
    first, second = start_ranks("batch_norm_program.py", 2, tmp_path, "synchronised")
    assert first == second
    assert distance(one, first, "loss_and_gradients") < 1e-3
    assert distance(one, first, "statistics") < 1e-5


def test_of_its_own_share_each_rank_has_other_statistics(one: dict[str, Any], tmp_path: Path) -> None:
    first, second = start_ranks("batch_norm_program.py", 2, tmp_path, "batch")
    assert first["statistics"] != second["statistics"]
    assert distance(one, first, "loss_and_gradients") > 1e-2
    assert distance(one, first, "statistics") > 1e-3


def test_two_synchronised_ranks_have_one_network_without_averaging_their_statistics(tmp_path: Path) -> None:
    settings = json.dumps({"batch_norm": "synchronised", "compression": "fp16"})
    first, second = start_ranks("train_program.py", 2, tmp_path, MOBILENET, 32, 16, 2, 4, 0.01, settings)
    assert first["own"] == first["checksums"] == second["own"]
