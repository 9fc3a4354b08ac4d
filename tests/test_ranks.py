from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cellhpc.ranks import OneRank, _slots
from tests.ranks_at_work import start_ranks


@pytest.mark.parametrize("place", ["all cores", "one core"])
def test_two_processes_that_start_by_themselves_become_two_ranks(place: str, tmp_path: Path) -> None:
    answers, own = start_ranks("rank_program.py", 2, tmp_path, place), os.getpriority(os.PRIO_PROCESS, 0)
    alone = place == "one core" or len(os.sched_getaffinity(0)) == 1
    for rank, seen in enumerate(answers):
        assert seen == {
            "rank": rank,
            "size": 2,
            "broadcast": [1.0],
            "mean": [[0.5], [[1.0, 2.0]]],
            "mean_fp16": [1.0, 0.0],
            "gather": [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]],
            "equal": True,
            "unequal": False,
            "computes_at": own,
            # On one core, those that listen to sockets step back.
            "threads_at": sorted({own, 19}) if alone else [own],
        }


def test_one_rank_never_imports_horovod() -> None:
    program = (
        "import sys; from cellhpc.ranks import joined\n"
        "with joined() as ranks: assert (ranks.rank, ranks.size) == (0, 1)\n"
        "assert not any(name.startswith('horovod') for name in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CELLHPC_R")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)


def test_the_verbs_of_a_single_rank_change_nothing() -> None:
    ranks, rows = OneRank(), np.arange(6).reshape(3, 2)
    assert ranks.gather(rows) is rows
    assert ranks.mean([rows]) == [rows]
    assert ranks.equal([rows])


@pytest.mark.parametrize(
    ("hosts", "local", "cross"),
    [
        (["a", "a"], [(0, 2), (1, 2)], [(0, 1), (0, 1)]),
        (["a", "b"], [(0, 1), (0, 1)], [(0, 2), (1, 2)]),
        (["a", "a", "b"], [(0, 2), (1, 2), (0, 1)], [(0, 2), (0, 1), (1, 2)]),
    ],
)
def test_places_of_ranks_on_hosts(hosts: list[str], local: list[tuple[int, int]], cross: list[tuple[int, int]]) -> None:
    slots = _slots(hosts)
    assert [(slot["local_rank"], slot["local_size"]) for slot in slots] == local
    assert [(slot["cross_rank"], slot["cross_size"]) for slot in slots] == cross
