from __future__ import annotations

from pathlib import Path

import pytest

from cellhpc.study import StudyFolder
from cellhpc.submission import (
    ENDS,
    SlurmJob,
    Task,
    ends,
    history,
    new_submission,
    pack,
    read_submission,
    submissions,
)


@pytest.mark.parametrize(
    ("parallel", "runs_per_job", "sizes"),
    [(1, 0, [9]), (2, 0, [5, 4]), (1, 4, [4, 4, 1]), (20, 0, [1] * 9), (4, 1, [1] * 9), (1, 100, [9])],
)
def test_runs_are_packed_in_their_order(parallel: int, runs_per_job: int, sizes: list[int]) -> None:
    runs = [f"run-{number}" for number in range(9)]
    tasks = pack(runs, 2, 3, parallel, runs_per_job)
    assert [len(task.runs) for task in tasks] == sizes
    assert [run for task in tasks for run in task.runs] == runs
    assert {(task.stage, task.ranks, task.threads) for task in tasks} == {("train", 2, 3)}
    assert [task.name for task in tasks][:2] == ["train-0000", "train-0001"][: len(tasks)]


def test_nothing_missing_is_no_task() -> None:
    assert pack([], 1, 1, 4, 0) == []


def test_the_normal_case_is_packed_for_one_throttled_array() -> None:
    runs = [str(number) for number in range(3 * 2 * 5 * 38)]
    assert len(runs) == 1140
    assert len(pack(runs, 4, 8, parallel=32, runs_per_job=0)) == 32
    assert len(pack(runs, 4, 8, parallel=32, runs_per_job=10)) == 114


def test_a_submission_is_what_was_recorded_of_it(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path)
    tasks = [Task("convert-0000", "convert", 4, 2), *pack(["a", "b", "c"], 2, 1, 2, 0)]
    made = new_submission(study, "slurm", tasks)
    assert made.folder == tmp_path / "jobs" / "0001"
    made = made.with_job(SlurmJob("17", "convert", 0, 1, False)).with_job(SlurmJob("18", "train", 0, 2, True))
    read = read_submission(made.folder)
    assert list(read.tasks.values()) == tasks
    assert read.jobs == made.jobs
    assert read.elements() == {"convert-0000": "17", "train-0000": "18_0", "train-0001": "18_1"}
    assert read.about["version"] == made.about["version"]
    again = new_submission(study, "here", [])
    assert [told.number for told in submissions(study)] == ["0002", "0001"]
    assert again.with_end().about["ended"] >= again.about["began"]


def test_an_array_that_was_split_keeps_the_numbers_of_its_tasks(tmp_path: Path) -> None:
    made = new_submission(StudyFolder(tmp_path), "slurm", pack(list("abcde"), 1, 1, 5, 0))
    for job in (
        SlurmJob("7", "train", 0, 2, True),
        SlurmJob("8", "train", 2, 2, True),
        SlurmJob("9", "train", 4, 1, False),
    ):
        made = made.with_job(job)
    assert made.elements() == {
        "train-0000": "7_0", "train-0001": "7_1", "train-0002": "8_0", "train-0003": "8_1", "train-0004": "9",
    }  # fmt: skip


def test_how_a_task_ended_is_read_line_by_line_and_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / ENDS).write_text("1700000000 n1 12-0 137 crashed\n1700000060 n2 12-1 0 checkpointed\n17000")
    first, second = ends(tmp_path)
    assert (first.host, first.attempt, first.code, first.how) == ("n1", "12-0", 137, "crashed")
    assert second.how == "checkpointed"
    assert ends(tmp_path / "never") == []


def test_the_history_of_a_study_names_its_slurm_jobs(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path)
    assert history(study) == []
    tasks = [Task("convert-0000", "convert"), *pack(list("abc"), 1, 1, 2, 0)]
    first = new_submission(study, "slurm", tasks, began=0.0)
    first.with_job(SlurmJob("17", "convert", 0, 1, False)).with_job(SlurmJob("18", "train", 0, 2, True))
    new_submission(study, "here", tasks[:1], began=86400.0, host="desk").with_end()
    slurm, here = history(study)
    assert slurm["jobs"] == [{"id": "17", "stage": "convert", "tasks": 1}, {"id": "18", "stage": "train", "tasks": 2}]
    assert slurm["tasks"] == {"convert": 1, "train": 2}
    assert (slurm["number"], slurm["executor"], slurm["ended"]) == ("0001", "slurm", None)
    assert slurm["began"] == "1970-01-01 00:00:00"
    assert (here["began"], here["host"], here["jobs"]) == ("1970-01-02 00:00:00", "desk", [])
    assert here["ended"] > here["began"]
