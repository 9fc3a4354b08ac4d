"""What status says of a study's folder; of Slurm's queue, see test_nights.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from cellhpc import slurm
from cellhpc.attempts import FAILED, Attempt
from cellhpc.board import render_status
from cellhpc.errors import UsageError
from cellhpc.folds import plan_folds, write_folds
from cellhpc.ledger import write_json
from cellhpc.record import content_digest
from cellhpc.settings import FoldsSettings, Job, parse_job
from cellhpc.slurm import JobState
from cellhpc.status import find_logs, last_error, look, open_study, submitted_tasks
from cellhpc.study import StudyFolder
from cellhpc.submission import LOGS, SlurmJob, Submission, new_submission, pack
from cellhpc.sweep import Run, plan_runs
from tests import small
from tests.conftest import Cellhpc


@pytest.fixture
def begun(tmp_path: Path) -> tuple[StudyFolder, Job, list[Run]]:
    """A study of nine runs whose store is there."""
    document = {
        "study": {"name": "s", "folder": str(tmp_path / "study")},
        "screen": {"layout": "bbbc021", "path": "raw"},
        "sweep": {"networks": ["MobileNet"], "weights": ["xavier"]},
    }
    job = parse_job(document, "job")
    study = StudyFolder(job.study.folder)
    study.claim(job)
    folds = plan_folds(small.tiles(), FoldsSettings())
    write_folds(study.folds, folds)
    store = study.store(job)
    write_json(study.plates, ["P1"])
    write_json(store / "store.json", {"format": 2})
    write_json(store / "plates" / "P1" / "plate.json", {"digest": "d", "labels": "l", "bad_fields": []})
    return study, job, plan_runs(job, folds, content_digest(store, ["P1"]))


def submission(study: StudyFolder, runs: list[Run], tasks: int = 3) -> Submission:
    """A submission of this machine, of tasks that share the runs."""
    made = new_submission(study, "here", pack([run.id for run in runs], 1, 1, tasks, 0))
    (made.folder / LOGS).mkdir()
    for task in made.tasks:
        made.task_folder(task).mkdir()
        (made.folder / LOGS / f"{task}_0_log.out").write_text("cellhpc began\n")
    return made


def test_a_run_is_done_only_with_the_digest_that_is_expected_now(begun: tuple[StudyFolder, Job, list[Run]]) -> None:
    study, job, runs = begun
    Attempt.claim(study.runs / runs[0].id, runs[0].digest).publish(runs[0].digest)
    Attempt.claim(study.runs / runs[1].id, "other").publish("other")
    status = look(study, job)
    assert status.counts == {"done": 1, "stale": 1, "missing": 7}
    assert not status.complete
    assert {stage.stage: stage.state for stage in status.stages} == {"convert": "done", "aggregate": "missing"}


def test_why_each_run_is_not_done(begun: tuple[StudyFolder, Job, list[Run]]) -> None:
    """Three tasks of three runs: a run with a bug; a task that crashed; a task that was cancelled."""
    study, job, runs = begun
    made = submission(study, runs)
    unit = study.runs / runs[0].id
    Attempt.claim(unit, runs[0].digest)
    write_json(unit / FAILED, {"reason": "ZeroDivisionError: division by zero", "submission": "0001"})
    Attempt.claim(study.runs / runs[3].id, runs[3].digest)
    (made.task_folder("train-0001") / "ends").write_text("1 n1 7-0 1 crashed\n2 n2 7-1 137 crashed\n")
    (made.folder / LOGS / "train-0001_0_log.out").write_text("slurmstepd: error: Exceeded job memory limit\nbye\n")
    Attempt.claim(study.runs / runs[6].id, runs[6].digest)
    (made.task_folder("train-0002") / "ends").write_text("3 n1 8-0 143 cancelled\n")
    found = {run.run: run for run in look(study, job).runs}
    assert (found[runs[0].id].state, found[runs[0].id].reason) == ("failed", "ZeroDivisionError: division by zero")
    crashed = found[runs[3].id]
    assert crashed.state == "failed"
    assert crashed.reason == ("killed (out of memory?) on n2 (2 times): slurmstepd: error: Exceeded job memory limit")
    assert found[runs[4].id].state == "missing"
    assert found[runs[4].id].reason.startswith("train-0001 ended before it: killed")
    assert found[runs[6].id].state == found[runs[7].id].state == "stopped"


def test_what_slurm_does_not_answer_is_unknown_and_not_failed(
    begun: tuple[StudyFolder, Job, list[Run]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study, job, runs = begun
    made = new_submission(study, "slurm", pack([run.id for run in runs], 1, 1, 3, 0))
    made = made.with_job(SlurmJob("12", "train", 0, 3, True))
    for task in made.tasks:
        made.task_folder(task).mkdir()
    (made.task_folder("train-0000") / "ends").write_text("1 n1 12-0 1 cancelled\n")
    (made.task_folder("train-0001") / "ends").write_text("1 n1 13-0 1 crashed\n")  # and perhaps queued again
    monkeypatch.setenv("PATH", str(tmp_path))
    status = look(study, job)
    assert status.counts == {"unknown": 6, "stopped": 3}
    assert status.at_work
    assert "squeue is not on PATH" in status.notes[0]


def test_a_run_that_failed_is_told_while_others_of_its_task_are_trained(
    begun: tuple[StudyFolder, Job, list[Run]],
) -> None:
    study, job, runs = begun
    made = submission(study, runs, tasks=1)
    why = {"reason": "the loss is nan", "submission": made.number, "task": "train-0000"}
    (study.runs / runs[0].id).mkdir(parents=True)
    write_json(study.runs / runs[0].id / FAILED, why)
    with study.locked():
        assert look(study, job).counts == {"waiting": 8, "failed": 1}


def test_jobs_of_another_cluster_with_our_numbers_are_not_ours(
    begun: tuple[StudyFolder, Job, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _, runs = begun
    made = new_submission(study, "slurm", pack([run.id for run in runs], 1, 1, 1, 0))
    made = made.with_job(SlurmJob("12", "train", 0, 1, False))
    comment = f"cellhpc:s:0001:{made.about['id']}"
    for known_as, count in ((comment, 1), ("cellhpc:s:0001:another", 0), ("", 0)):
        state = JobState("12", "RUNNING", comment=known_as)
        monkeypatch.setattr(slurm, "queue", lambda state=state: {"12": state})
        assert len(submitted_tasks(study).tasks) == count


def test_a_command_that_has_ended_does_not_run_when_another_holds_the_study(
    begun: tuple[StudyFolder, Job, list[Run]],
) -> None:
    study, job, runs = begun
    submission(study, runs).with_end()
    with study.locked():
        assert not look(study, job).at_work


def test_a_run_of_a_command_at_work_is_running_with_how_far_it_is(begun: tuple[StudyFolder, Job, list[Run]]) -> None:
    study, job, runs = begun
    made = submission(study, runs, tasks=1)
    about = {"submission": made.number, "task": "train-0000", "host": "n1"}
    attempt = Attempt.claim(study.runs / runs[0].id, runs[0].digest, about)
    epoch = {"images_per_s": 120.0, "waiting_for_data": 0.01, "memory_mb": 900.0}
    attempt.write_json("history.json", {"epochs": [epoch, epoch]})
    with study.locked():
        status = look(study, job)
        assert status.at_work
    first, second = status.runs[:2]
    assert (first.state, first.epoch, first.epochs, first.node) == ("running", 2, job.train.epochs, "n1")
    assert (first.images_per_s, first.memory_mb) == (120.0, 900.0)
    assert second.state == "waiting"
    after = look(study, job).runs
    assert {run.state for run in after} == {"stopped"}


def test_a_run_that_searches_is_running_with_its_candidate(begun: tuple[StudyFolder, Job, list[Run]]) -> None:
    study, job, runs = begun
    made = submission(study, runs, tasks=1)
    about = {"submission": made.number, "task": "train-0000", "host": "n1"}
    unit = study.runs / runs[0].id
    Attempt.claim(unit / "search" / "c00", "d", {**about, "candidate": [1, 2], "epochs": 4}).publish("d")
    attempt = Attempt.claim(unit / "search" / "c01", "e", {**about, "candidate": [2, 2], "epochs": 7})
    attempt.write_json("history.json", {"epochs": [{"images_per_s": 120.0}] * 3})
    with study.locked():
        status = look(study, job)
    assert (status.runs[0].state, status.runs[0].candidate) == ("running", "2 of 2")
    assert (status.runs[0].epoch, status.runs[0].epochs) == (3, 7)
    console = Console(width=120, record=True)
    console.print(render_status(status))
    assert "3/7, candidate 2 of 2" in console.export_text()
    Attempt.claim(unit, runs[0].digest, {**about, "epochs": 4})
    with study.locked():
        last = look(study, job).runs[0]
    assert (last.state, last.candidate, last.epoch, last.epochs) == ("running", "", 0, 4)
    assert look(study, job).runs[0].state == "stopped"


def test_logs_are_found_by_run_and_by_task(begun: tuple[StudyFolder, Job, list[Run]], cellhpc: Cellhpc) -> None:
    study, _, runs = begun
    made = submission(study, runs)
    expected = [made.folder / LOGS / "train-0001_0_log.out"]
    assert find_logs(study, runs[4].id) == find_logs(study, "train-0001") == expected
    with pytest.raises(UsageError, match=r"no run, task or stage 'train' was ever started"):
        find_logs(study, "train")
    said = cellhpc("logs", study.path, runs[4].id)
    assert "cellhpc began" in said.stdout
    refused = cellhpc("logs", study.path, "none")
    assert refused.returncode == 2
    assert "See their names with: cellhpc status" in refused.stderr


def test_the_last_error_is_what_the_task_said_not_what_srun_saw(begun: tuple[StudyFolder, Job, list[Run]]) -> None:
    study, _, runs = begun
    made = submission(study, runs)
    log = made.folder / LOGS / "train-0000_0_log.out"
    log.write_text("cellhpc: weights.h5: no weights\nsrun: error: n1: task 0: Exited with exit code 1\n")
    assert last_error(made, "train-0000") == "cellhpc: weights.h5: no weights"


def test_the_exit_code_says_whether_all_is_done(begun: tuple[StudyFolder, Job, list[Run]], cellhpc: Cellhpc) -> None:
    study, _, runs = begun
    for run in runs:
        Attempt.claim(study.runs / run.id, run.digest).publish(run.digest)
    assert cellhpc("status", study.path).returncode == 1
    write_json(study.results / "scores.json", {"complete": True, "runs": {"expected": len(runs)}})
    write_json(study.results / "done.json", {"digest": "d"})
    said = cellhpc("status", study.path, "--json")
    assert said.returncode == 0
    facts = json.loads(said.stdout)
    assert facts["complete"]
    assert facts["counts"] == {"done": 9}
    shown = cellhpc("status", study.path)
    assert "s: 9 runs: 9 done" in shown.stdout
    assert "All is done. Report:" in shown.stdout


def test_a_folder_without_a_study_is_refused(tmp_path: Path, cellhpc: Cellhpc) -> None:
    with pytest.raises(UsageError, match="no study of cellhpc is there"):
        open_study(tmp_path)
    for command in ("status", "resume", "cancel"):
        refused = cellhpc(command, tmp_path)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
