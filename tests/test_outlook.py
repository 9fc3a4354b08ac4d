"""A study's plan and its cost, as `--dry-run` tells them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellhpc.outlook import place_on
from cellhpc.site import parse_site
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
epochs = 3
batch_size = 16
[sweep]
networks = ["ResNet50", "VGG16"]
weights = ["xavier"]
tile_px = 32
"""
SITE = """
[train]
throttle = 2
time = 60
cpus_per_task = 4
gres = "gpu:a100:2"
[measured]
images_per_s = {{ ResNet50 = 20{more} }}
predicted_per_s = 100
start_seconds = 30
run_seconds = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outlook")
    make_small_screen(folder / "raw")
    (folder / "job.toml").write_text(JOB.format(folder=folder))
    return folder


DryRun = Callable[..., str]


@pytest.fixture
def dry_run(folder: Path, cellhpc: Cellhpc) -> DryRun:
    """What a command says with --dry-run; `more` goes into the site file's speeds."""

    def command(name: str, *words: str, more: str = ", VGG16 = 10", job: str = "job.toml") -> str:
        (folder / "site.toml").write_text(SITE.format(more=more))
        done = cellhpc(name, folder / job, "--dry-run", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return command


def test_the_dry_run_for_a_site_tells_what_trainings_cost(folder: Path, dry_run: DryRun) -> None:
    words = ("--site", str(folder / "site.toml"))
    cost = json.loads(dry_run("run", *words, "--json"))["cost"]
    # Four folds of 12 fields, of four tiles each: 144 tiles to train on, 48 held out.
    steps = 3 * (144 // 16)
    assert [one["steps"] for one in cost["networks"]] == [4 * steps] * 2
    jobs = [4 * (steps * 16 / speed + 3 * 48 / 100 + 2) + 30 for speed in (20, 10)]  # a job for each network
    assert (cost["jobs"], cost["at_a_time"], cost["starts"]) == (2, 2, 2)
    assert cost["wall_seconds"] == pytest.approx(max(jobs))
    assert cost["gpu_hours"] == pytest.approx(2 * sum(jobs) / 3600)
    assert cost["core_hours"] == pytest.approx(4 * sum(jobs) / 3600)
    assert cost["bytes_read"] == 2 * 192 * 32 * 32 * 3
    said = dry_run("run", *words)
    assert "Cost of 8 run(s) in 2 job(s) of 1 rank(s) on 2 GPU(s) and 4 core(s), 2 at a time" in said
    assert f"training: about {max(jobs) / 60:.2f} min once jobs run" in said
    assert "    - ResNet50: 20.0 images/s in a job with 1 rank(s), " in said
    assert "tiles before compression, none set aside: the store is not converted yet" in said
    assert not (folder / "study").exists()


def test_a_network_without_a_speed_is_one_line_with_what_to_type(folder: Path, dry_run: DryRun) -> None:
    said = dry_run("run", "--site", str(folder / "site.toml"), more="").splitlines()
    assert [line for line in said if "not known" in line] == [
        "  time    not known: no run of VGG16 has been measured. Type the same when one has finished, or give its "
        "speed in the site file: [measured] images_per_s = { VGG16 = ... }"
    ]


def test_a_search_is_counted_with_its_candidates(folder: Path, dry_run: DryRun) -> None:
    (folder / "searching.toml").write_text((folder / "job.toml").read_text() + "[search]\nepochs = [1, 2]\n")
    words = ("--site", str(folder / "site.toml"), "--json")
    facts = json.loads(dry_run("run", *words, job="searching.toml"))
    # Each fold has one compound more to spare: 96 tiles to search on; then two epochs of 144 at most.
    steps = (1 + 2) * (96 // 16) + 2 * (144 // 16)
    assert [(one["runs"], one["steps"]) for one in facts["cost"]["networks"]] == [(4, 4 * steps)] * 2
    assert facts["training"]["steps_missing"] == 2 * 4 * steps


def test_here_it_is_told_too_but_not_of_other_stages(dry_run: DryRun) -> None:
    assert "no run of ResNet50 has been measured" in dry_run("run")
    assert "Cost of" not in dry_run("convert")
    assert "cost" not in json.loads(dry_run("convert", "--json"))


@pytest.mark.parametrize(
    ("train", "gpus"),
    [
        ({}, 0), ({"gpus_per_task": 1}, 4), ({"gres": "gpu:2", "nodes": 2}, 4), ({"gres": "gpu:a100:4"}, 4),
        ({"gres": "gpu"}, 1), ({"gres": "gpu:a100"}, 1), ({"gres": "nvme:100,gpu:h100:3(S:0)"}, 3),
        ({"gres": "nvme:100"}, 0),
    ],
)  # fmt: skip
def test_gpus_of_a_job_are_counted(train: dict[str, Any], gpus: int) -> None:
    place = place_on(parse_site({"train": {"time": 60, "cpus_per_task": 3, **train}}, "site"), 4)
    assert (place.gpus, place.cores, place.seconds) == (gpus, 12, 3600 - 120)
