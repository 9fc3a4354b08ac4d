"""The whole road on a tiny synthetic screen: killed, resumed, compared; and the mistakes that a user can make on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from cellhpc.attempts import finished as finished_run
from cellhpc.ledger import read_json
from tests.conftest import Cellhpc
from tests.small_screen import make_small_screen

JOB = """
[study]
name = "tiny"
folder = "{folder}/study"
[screen]
layout = "bbbc021"
path = "{folder}/raw"
[train]
epochs = 2
batch_size = 16
learning_rate = 0.02
augment = "rotations"
[sweep]
networks = ["MobileNet(alpha=0.25)"]
weights = ["xavier"]
tile_px = 32
ranks = 2
keep_weights = true
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic screen of six compounds."""
    return make_small_screen(tmp_path_factory.mktemp("screen") / "raw", moas=3)


def job_file(folder: Path, raw: Path) -> Path:
    """A job file in `folder`, on that screen."""
    path = folder / "job.toml"
    path.write_text(JOB.format(folder=folder))
    (folder / "raw").symlink_to(raw)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, raw: Path, cellhpc: Cellhpc) -> tuple[Path, str]:
    """A study that ran undisturbed on two ranks, and what the command said."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cellhpc("run", job_file(folder, raw))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def results_of(folder: Path) -> tuple[Any, pd.DataFrame]:
    """Levels and treatment probabilities of a study: what must not depend on how it was run."""
    scores = read_json(folder / "study" / "results" / "scores.json")
    return scores["models"][0]["levels"], pd.read_csv(folder / "study" / "results" / "treatments.csv")


def test_one_command_from_raw_plates_to_a_scored_result_on_two_ranks(finished: tuple[Path, str]) -> None:
    folder, said = finished
    scores = read_json(folder / "study" / "results" / "scores.json")
    assert scores["complete"]
    assert scores["runs"]["done"] == scores["runs"]["expected"] == 6
    (model,) = scores["models"]
    totals = {level: count["total"] for level, count in model["levels"].items()}
    assert totals == {"tile": 6 * 3 * 4 * 4, "field": 6 * 3 * 4, "well": 6 * 3, "treatment": 6, "compound": 6}
    for count in model["levels"].values():
        assert count["accuracy"] == pytest.approx(count["correct"] / count["total"])
        low, high = count["wilson95"]
        assert low <= count["accuracy"] <= high
    for unit in (folder / "study" / "runs").iterdir():
        run = finished_run(unit)
        assert run is not None
        record = read_json(run / "run.json")
        assert record["ranks"] == 2
        predicted = pd.read_parquet(run / "predictions.parquet")
        assert (run / "weights.npz").is_file()
        assert set(predicted["compound"]) == set(record["fold"]["held_out"])
    for name in ("confusion.png", "learning-curves.png", "report.html"):
        assert (folder / "study" / "results" / name).stat().st_size > 5000
    assert str(folder / "study" / "results" / "report.html") in said.replace("\n", "")
    assert "chance" in said.lower()


def test_the_plan_of_folds_that_leave_labels_out(tmp_path: Path, raw: Path, cellhpc: Cellhpc) -> None:
    done = cellhpc("run", job_file(tmp_path, raw), "--dry-run", "--set", "folds.unknown=true")
    assert done.returncode == 0, done.stderr
    held_out = "Hold out each label with all its compounds (unknown), and 2 compound(s) of the other labels (known)"
    assert held_out in done.stdout
    assert "folds   3, of 3 labels" in done.stdout
    steps = 2 * (2 * 12 * 4 // 16)  # two epochs; two of six compounds are left, of 12 fields with four tiles
    assert f"steps   {3 * steps:,} of 16 tiles at most" in done.stdout


def test_a_second_call_does_nothing_and_says_so(finished: tuple[Path, str], cellhpc: Cellhpc) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    again = cellhpc("run", folder / "job.toml")
    assert again.returncode == 0
    assert "Nothing was to be converted or trained." in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_killed_in_training_and_run_again_it_gives_the_same_result(
    finished: tuple[Path, str], tmp_path: Path, raw: Path, cellhpc: Cellhpc
) -> None:
    job = job_file(tmp_path, raw)
    command = subprocess.Popen([sys.executable, "-m", "cellhpc.cli", "run", str(job)], env={**os.environ})
    runs = tmp_path / "study" / "runs"
    try:
        deadline = time.monotonic() + 240
        while len(list(runs.glob("*/done.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks = psutil.Process(command.pid).children(recursive=True)
    finally:
        command.send_signal(signal.SIGKILL)
        command.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert alive == []  # ranks end with the command that started them
    kept = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/done.json")}
    assert 2 <= len(kept) < 6
    again = cellhpc("run", job)
    assert again.returncode == 0, again.stderr
    assert {name: (runs / name / "done.json").stat().st_mtime_ns for name in kept} == kept
    levels, treatments = results_of(tmp_path)
    levels_undisturbed, treatments_undisturbed = results_of(finished[0])
    assert levels == levels_undisturbed
    pd.testing.assert_frame_equal(treatments, treatments_undisturbed, check_exact=True)


def test_a_rank_that_dies_ends_its_job_with_a_reason_and_the_rest_is_kept(tmp_path: Path, raw: Path) -> None:
    job = job_file(tmp_path, raw)
    command = subprocess.Popen(
        [sys.executable, "-m", "cellhpc.cli", "run", str(job)], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    runs = tmp_path / "study" / "runs"
    deadline = time.monotonic() + 240
    while not list(runs.glob("*/done.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    began = time.monotonic()
    children = psutil.Process(command.pid).children(recursive=True)
    (second,) = [child for child in children if child.environ().get("CELLHPC_RANK") == "1"]
    second.kill()
    _, said = command.communicate(timeout=120)
    assert command.returncode == 1
    assert time.monotonic() - began < 60
    assert "1 of 1 training task(s) and 0 run(s) failed; finished runs are kept." in said
    assert "train-0000: rank 1 was ended by signal 9 (out of memory?)" in said
    assert "Run the same command again to do what is missing." in said
    assert "Traceback" not in said
    assert list(runs.glob("*/done.json"))


def test_a_command_that_is_killed_while_ranks_start_leaves_none_behind(tmp_path: Path, raw: Path) -> None:
    job = job_file(tmp_path, raw)
    command = subprocess.Popen([sys.executable, "-m", "cellhpc.cli", "run", str(job)], env={**os.environ})
    jobs = tmp_path / "study" / "jobs"
    deadline = time.monotonic() + 240
    ranks: list[psutil.Process] = []
    while len(ranks) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        started = list(jobs.glob("*/train-0000/here-0"))
        ranks = psutil.Process(command.pid).children(recursive=True) if started else []
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert len(ranks) >= 2
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []


def test_one_run_that_fails_does_not_stop_the_others(tmp_path: Path, raw: Path, cellhpc: Cellhpc) -> None:
    """A learning rate that only the network without batch normalisation can't bear."""
    job = job_file(tmp_path, raw)
    changes = ('sweep.networks=["VGG16", "MobileNet(alpha=0.25)"]', "train.learning_rate=1e6", "train.epochs=1")
    words = [word for change in changes for word in ("--set", change)]
    failed = cellhpc("run", job, *words, "--set", "sweep.ranks=1")
    assert failed.returncode == 1
    names = set(
        re.findall(r"(VGG16_xavier_s0_f\d\d): the loss is nan at epoch 1, step \d+ with learning", failed.stderr)
    )
    assert names
    assert f"0 of 1 training task(s) and {len(names)} run(s) failed" in failed.stderr
    done = {path.parent.name for path in (tmp_path / "study" / "runs").glob("*/done.json")}
    assert not names & done
    assert len([name for name in done if name.startswith("MobileNet-alpha0.25")]) == 6
    assert len(done) == 12 - len(names)
    assert "Traceback" not in failed.stderr


def test_a_finished_store_needs_no_raw_pictures(
    finished: tuple[Path, str], tmp_path: Path, raw: Path, cellhpc: Cellhpc
) -> None:
    (tmp_path / "tables").mkdir()
    for table in raw.glob("*.csv"):
        (tmp_path / "tables" / table.name).write_bytes(table.read_bytes())
    again = cellhpc("run", finished[0] / "job.toml", "--set", f"screen.path={tmp_path / 'tables'}")
    assert again.returncode == 0, again.stderr
    assert "Nothing was to be converted or trained." in again.stdout


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ('sweep.networks=["InceptionV3"]', 2, "InceptionV3 with input (32, 32, 3)"),
        ('sweep.networks=["MobileNet(alpha=0.25, beta=1)"]', 2, "beta"),
        ("sweep.seeds=[-1]", 2, "sweep.seeds.0: found -1. Input should be greater than or equal to 0"),
        ('sweep.weights=["{folder}/job.toml"]', 1, "not a weights file in the layout of keras.applications"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_a_pixel_is_converted(
    tmp_path: Path, raw: Path, cellhpc: Cellhpc, change: str, code: int, message: str
) -> None:
    refused = cellhpc("run", job_file(tmp_path, raw), "--set", change.format(folder=tmp_path))
    assert refused.returncode == code, refused.stderr
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "study" / "store").exists()


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path, raw: Path, cellhpc: Cellhpc) -> None:
    job = job_file(tmp_path, raw)
    told = cellhpc("run", job, "--dry-run")
    assert told.returncode == 0, told.stderr
    said = ("72 fields", "288 tiles", "folds   6", "runs    6", "steps   180", "memory  of all tiles on a host ")
    for part in (*said, "Nothing has been written"):
        assert part in told.stdout
    facts = json.loads(cellhpc("run", job, "--dry-run", "--json").stdout)
    assert facts["training"]["steps_missing"] == 180  # 60 fields of 4 tiles in batches of 16, 2 epochs, 6 runs
    assert facts["conversion"]["bytes_in"] > 72 * 3 * 64 * 80 * 2
    assert 0 < facts["training"]["tiles_in_memory_bytes"] < facts["training"]["memory_for_tiles_bytes"]
    assert not (tmp_path / "study").exists()


def test_stages_one_by_one_give_what_one_command_gives(
    finished: tuple[Path, str], tmp_path: Path, raw: Path, cellhpc: Cellhpc
) -> None:
    job = job_file(tmp_path, raw)
    early = cellhpc("aggregate", job)
    assert early.returncode == 2
    assert "is not converted yet. Type: cellhpc convert JOB.toml" in early.stderr
    unconverted = cellhpc("train", job)
    assert unconverted.returncode == 2
    assert "is not converted yet. Type: cellhpc convert JOB.toml" in unconverted.stderr
    for stage in ("convert", "train", "aggregate"):
        done = cellhpc(stage, job)
        assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)[0] == results_of(finished[0])[0]


def settings(*those: str) -> list[str]:
    """Words of a command that set these."""
    return [word for one in those for word in ("--set", one)]


def test_tiles_that_do_not_fit_come_in_windows_and_a_study_goes_on_as_it_began(
    finished: tuple[Path, str], tmp_path: Path, raw: Path, cellhpc: Cellhpc
) -> None:
    job = job_file(tmp_path, raw)
    store = settings(f"convert.store={finished[0] / 'study' / 'store'}", "train.epochs=1", "sweep.ranks=1")
    more = settings("sweep.stage=true", "sweep.tensorboard=true", "sweep.attributions=1")
    small, ample = settings("sweep.memory_gb=0.0005"), settings("sweep.memory_gb=0.1")
    # 288 tiles of 3,072 bytes; two windows of 64 fit into half a megabyte, where 128 would not.
    told = cellhpc("train", job, *store, *small, "--dry-run").stdout
    assert "of two windows of 64 tiles on a host 0 MB; 0 MB are for tiles (sweep.memory_gb)" in told
    assert "all tiles, 1 MB, don't fit: they come in windows (train.window_tiles)" in told
    assert "of all tiles on a host 1 MB; 100 MB" in cellhpc("train", job, *store, *ample, "--dry-run").stdout
    assert cellhpc("convert", job, *store, *ample).returncode == 0  # binds the folder, but settles no window
    assert read_json(tmp_path / "study" / "job.json")["train"]["window_tiles"] is None
    done = cellhpc("run", job, *store, *more, *small)
    assert done.returncode == 0, done.stderr
    assert "tiles in windows of 64" in done.stderr
    study = tmp_path / "study"
    assert read_json(study / "job.json")["train"]["window_tiles"] == 64
    (model,) = read_json(study / "results" / "scores.json")["models"]
    assert model["levels"]["tile"]["total"] == 6 * 3 * 4 * 4
    assert len(list((study / "runs").rglob("events.out.tfevents.*"))) == 6
    assert model["wrong"]  # after one epoch
    assert list((study / "runs").rglob("attributions.npz"))
    assert "spoke for" in (study / "results" / "report.html").read_text()
    again = cellhpc("run", job, *store, *more, *ample, "--dry-run", "--json")
    assert json.loads(again.stdout)["training"]["runs_missing"] == 0
    other = cellhpc("run", job, *store, *more, *ample, *settings("train.window_tiles=32"))
    assert other.returncode == 2
    assert "train.window_tiles is 32, there 64" in other.stderr
    assert cellhpc("convert", job, *store, *more, *ample).returncode == 0  # what is settled stays
    assert read_json(study / "job.json")["train"]["window_tiles"] == 64


def test_a_study_that_began_in_memory_says_where_it_can_not_go_on(
    finished: tuple[Path, str], tmp_path: Path, raw: Path, cellhpc: Cellhpc
) -> None:
    shutil.copytree(finished[0] / "study", tmp_path / "study")
    shutil.rmtree(next((tmp_path / "study" / "runs").glob("*_f03")))
    job, small = job_file(tmp_path, raw), settings("sweep.memory_gb=0.0005")
    assert read_json(tmp_path / "study" / "job.json")["train"]["window_tiles"] == 0
    told = "Read them in windows with --set train.window_tiles=64, in a new study.folder"
    assert told in cellhpc("run", job, *small, "--dry-run").stdout
    refused = cellhpc("run", job, *small)
    assert refused.returncode == 2
    assert told in refused.stderr
    assert "Traceback" not in refused.stderr


def test_runs_choose_their_settings_with_one_command_more_in_the_job_file(
    finished: tuple[Path, str], tmp_path: Path, raw: Path, cellhpc: Cellhpc
) -> None:
    job = job_file(tmp_path, raw)
    job.write_text(job.read_text().replace("ranks = 2", "ranks = 1") + "[search]\nlearning_rate = [0.005, 0.02]\n")
    words = ["--set", f"convert.store={finished[0] / 'study' / 'store'}", "--set", "train.epochs=1"]
    told = cellhpc("run", job, *words, "--dry-run")
    for part in (
        "runs    6, of which 6 are missing: 18 trainings",
        "search  each run chooses among 2 candidates (learning_rate: 0.005, 0.02)",
        "on 2 inner compounds of its own training set",
        "in 2 fold(s)",
        "steps   198 of 16 tiles",  # 60 fields of 4 tiles, and 36 of them in each of two inner trainings
    ):
        assert part in told.stdout, told.stdout + told.stderr
    done = cellhpc("run", job, *words)
    assert done.returncode == 0, done.stderr
    scores = read_json(tmp_path / "study" / "results" / "scores.json")
    assert scores["complete"]
    assert [run["fold"] for run in scores["search"]] == sorted(run["fold"] for run in scores["search"])
    for run in scores["search"]:
        assert run["values"]["learning_rate"] in (0.005, 0.02)
        assert (len(run["inner"]), run["fields"]["total"]) == (2, 24)
        assert run["fold"] not in run["inner"]
    assert cellhpc("status", tmp_path / "study").returncode == 0
    again = cellhpc("run", job, *words)
    assert "Nothing was to be converted or trained." in again.stdout
    refused = cellhpc("run", job, *words, "--set", "search.learning_rate=[0.005, 0.01]")
    assert "search.learning_rate is [0.005, 0.01], there [0.005, 0.02]" in refused.stderr


def test_a_study_of_another_job_file_is_refused(finished: tuple[Path, str], cellhpc: Cellhpc) -> None:
    refused = cellhpc("run", finished[0] / "job.toml", "--set", "train.epochs=3")
    assert refused.returncode == 2
    assert "belongs to another job file" in refused.stderr
    assert "train.epochs is 3, there 2" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_pictures_that_are_missing_are_refused_before_anything_is_written(
    tmp_path: Path, raw: Path, cellhpc: Cellhpc
) -> None:
    (tmp_path / "tables").mkdir()
    for table in raw.glob("*.csv"):
        (tmp_path / "tables" / table.name).write_bytes(table.read_bytes())
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(folder=tmp_path).replace(f"{tmp_path}/raw", f"{tmp_path}/tables"))
    refused = cellhpc("run", job)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "study" / "store").exists()
    shown = cellhpc("inspect", job)
    assert shown.returncode == 0
    assert "none of" in shown.stdout


def test_bbbc014_trains_on_one_cell_line_and_is_tested_on_the_other(tmp_path: Path, cellhpc: Cellhpc) -> None:
    """It learns, wells are called by the mean of their tiles, and curves lead epoch by epoch to the final counts."""
    small = ("--set", "size_px=[128, 160]", "--set", "cell_px=14")
    made = cellhpc("synth", "bbbc014", tmp_path / "raw", "--preset", "demo", *small)
    assert made.returncode == 0, made.stderr
    job = tmp_path / "job.toml"
    text = JOB.format(folder=tmp_path).replace('"bbbc021"', '"bbbc014"').replace("ranks = 2", "ranks = 1")
    learning = 'learning_rate = 0.05\nschedule = "cosine"\nbatch_norm_momentum = 0.8\ninput_scaling = "keras"'
    for old, new in (("epochs = 2", "epochs = 6"), ("learning_rate = 0.02", learning), ("rotations", "none")):
        assert old in text
        text = text.replace(old, new)
    job.write_text(text + '[folds]\nby = "cell_line"\n[convert]\npreprocessing = "none"\ntile_grid = [4, 4]\n')
    done = cellhpc("run", job)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "study" / "results"
    scores = read_json(results / "scores.json")
    assert scores["runs"]["done"] == 2
    model, labels = scores["models"][0], scores["classes"]
    assert len(labels) == 2
    at = model["levels"]["well"]
    assert f": {at['correct']} of 64 wells, " in scores["headline"][0]
    assert list(model["levels"]) == ["tile", "field", "well", "treatment"]  # one compound, two labels
    assert at["total"] == 64  # columns 5 to 8 of the 96 wells carry no label
    assert not [sentence for sentence in scores["headline"] if "leak" in sentence]

    tiles, histories, columns = [], [], [f"p_{label}" for label in labels]
    for unit in sorted((tmp_path / "study" / "runs").iterdir()):
        run = finished_run(unit) or pytest.fail(f"{unit.name} is not finished")
        record, predicted = read_json(run / "run.json"), pd.read_parquet(run / "predictions.parquet")
        assert set(predicted["cell_line"]) == set(record["fold"]["held_out"])
        assert record["fold"]["held_out"] + record["trained_on"] in (["A549", "MCF7"], ["MCF7", "A549"])
        tiles.append(predicted)
        histories.append(read_json(run / "history.json")["epochs"])
    predicted = pd.concat(tiles, ignore_index=True)

    means = predicted.groupby("well")[columns].mean()
    wells = pd.read_csv(results / "wells.csv").set_index("well").loc[means.index]
    np.testing.assert_allclose(wells[columns], means, atol=1e-6)
    called = np.array(labels)[means.to_numpy().argmax(axis=1)]
    right = called == predicted.groupby("well")["label"].first()
    assert list(wells["call"]) == list(called)
    assert at["correct"] == right.sum()
    assert at["wilson95"][0] > 0.6, at  # chance is a half

    for level, curve in model["curves"]["all"].items():
        for what in ("correct", "total"):
            epochs = zip(*histories, strict=True)  # both folds' counts, epoch by epoch
            assert curve[what] == [sum(entry["held_out"][level][what] for entry in epoch) for epoch in epochs]
            assert len(curve[what]) == 6
            assert curve[what][-1] == model["levels"][level][what]
