from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from cellhpc.errors import UsageError
from cellhpc.settings import Job, parse_job
from cellhpc.study import StudyFolder


def job(folder: Path, **sections: dict[str, Any]) -> Job:
    document = {
        "study": {"name": "s", "folder": str(folder)},
        "screen": {"layout": "bbbc021", "path": "raw"},
        **sections,
    }
    return parse_job(document, "job")


def test_a_study_belongs_to_the_job_file_that_made_it(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study")
    study.claim(job(study.path))
    study.claim(job(study.path))
    with pytest.raises(UsageError) as fault:
        study.claim(job(study.path, train={"epochs": 3}, convert={"tile_grid": [1, 1]}))
    message = str(fault.value)
    assert (
        "belongs to another job file:\n  - convert.tile_grid is [1, 1], there [2, 2]\n  - train.epochs is 3, there 10"
        in message
    )
    assert "Choose another folder with --set study.folder=" in message


def test_a_sweep_may_grow(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study")
    study.claim(job(study.path))
    study.claim(job(study.path, sweep={"seeds": [0, 1]}, aggregate={"combine": "median"}))


@pytest.mark.parametrize("settled", [0, 64])
def test_windows_are_settled_once(tmp_path: Path, settled: int) -> None:
    study = StudyFolder(tmp_path / "study")
    study.claim(job(study.path))
    study.claim(job(study.path, train={"window_tiles": settled}))
    assert study.read_job().train.window_tiles == settled
    with pytest.raises(UsageError, match=rf"train.window_tiles is 32, there {settled}"):
        study.claim(job(study.path, train={"window_tiles": 32}))


def test_where_things_lie_and_what_is_done_with_bad_fields_may_change(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study")
    study.claim(job(study.path))
    moved = {"layout": "bbbc021", "path": "elsewhere"}
    study.claim(job(study.path, screen=moved, convert={"on_bad_field": "skip", "store": "shared"}))


def test_a_folder_that_can_not_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match=r"study.folder .*/file can't be written"),
        StudyFolder(tmp_path / "file").locked(),
    ):
        pass


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no study"):
        StudyFolder(tmp_path).claim(job(tmp_path))


def test_a_study_is_private_and_held_by_one_command_at_a_time(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study")
    with study.locked():
        assert stat.S_IMODE(study.path.stat().st_mode) == 0o700
        with pytest.raises(UsageError, match="another cellhpc command is at work in"), study.locked():
            pass
    with study.locked():
        pass
