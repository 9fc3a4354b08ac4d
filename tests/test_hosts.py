from __future__ import annotations

import pytest

from cellhpc.hosts import PLACE, place_here


@pytest.mark.parametrize(
    ("place", "of_slurm", "expected"),
    [("3", None, 3), (None, "1", 1), ("0", "1", 0), (None, None, 0), (None, "", 0), (None, "?", 0)],
)
def test_each_process_of_a_host_has_a_place(
    place: str | None, of_slurm: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this machine's own executor says goes before Slurm: a shell within a job has Slurm's number too."""
    for name, value in ((PLACE, place), ("SLURM_LOCALID", of_slurm)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert place_here() == expected
