"""The text that sbatch gets; with a real cluster its effect is proven in test_cluster_*.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cellhpc.batch import _outside_of_a_job, image_digest, plan_batches
from cellhpc.errors import UsageError
from cellhpc.settings import Job, parse_job
from cellhpc.site import Site, load_site, parse_site
from cellhpc.study import StudyFolder
from cellhpc.submission import Task, pack

HERE = Path(__file__).parent
STUDY = StudyFolder(Path("/studies/moa"))


def job(**sections: Any) -> Job:
    document: dict[str, Any] = {
        "study": {"name": "moa", "folder": str(STUDY.path)},
        "screen": {"layout": "bbbc021", "path": "/raw"},
        **sections,
    }
    return parse_job(document, "job")


def tasks(ranks: int = 4, runs: int = 5) -> list[Task]:
    trained = pack([f"run-{number}" for number in range(runs)], ranks, 8, parallel=runs, runs_per_job=0)
    return [Task("convert-0000", "convert", 2, 32), *trained, Task("aggregate-0000", "aggregate")]


def texts(site: Site, most: int = 1001, image: str | None = None, **sections: Any) -> str:
    folder = STUDY.jobs / "0001"
    batches = plan_batches(STUDY, job(**sections), site, tasks(), folder, most, image)
    scripts = [batch.text(folder, ",".join(batch.after) or None) for batch in batches]
    return "\n".join(scripts).replace(sys.executable, "PYTHON")


@pytest.mark.parametrize("example", ["cpu", "gpu"])
def test_the_scripts_of_the_example_sites_are_these(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    site = load_site(HERE.parent / "slurm" / f"{example}.toml")
    image = None if site.container is None else "cellhpc-gpu.sif sha256:0123"
    expected = HERE / "golden" / f"{example}.sbatch"
    assert texts(site, image=image) == expected.read_text()


def test_the_scripts_are_shell(tmp_path: Path) -> None:
    site = load_site(HERE.parent / "slurm" / "cpu.toml")
    script = tmp_path / "script.sh"
    script.write_text(texts(site))
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_an_array_is_split_where_the_cluster_says(tmp_path: Path) -> None:
    site = parse_site({"train": {"throttle": 5}}, "site")
    batches = plan_batches(STUDY, job(), site, tasks(runs=5), tmp_path, 2, None)
    trains = [batch for batch in batches if batch.stage == "train"]
    assert [(batch.first, len(batch.tasks)) for batch in trains] == [(0, 2), (2, 2), (4, 1)]
    assert "#SBATCH --array=0-1%1\n" in trains[0].text(tmp_path, None)  # the throttle is that of all together
    assert "#SBATCH --array=0-1%2\n" in trains[1].text(tmp_path, None)
    assert "first=2" in trains[1].text(tmp_path, None)
    assert "--array" not in trains[2].text(tmp_path, None)


def test_the_scores_wait_for_trainings_however_they_end_but_only_for_a_conversion_that_went_well() -> None:
    batches = plan_batches(STUDY, job(), parse_site({}, "site"), tasks(), STUDY.jobs / "0001", 1001, None)
    assert {batch.stage: batch.after for batch in batches} == {
        "convert": (),
        "train": ("afterok:convert",),
        "aggregate": ("afterok:convert", "afterany:train"),
    }
    assert all("--kill-on-invalid-dep=yes" in batch.text(STUDY.path, "afterok:1") for batch in batches)


def test_what_a_stage_says_goes_before_what_holds_for_all() -> None:
    site = parse_site(
        {
            "slurm": {"partition": "cpu", "account": "a", "reservation": "r", "options": {"nice": 5}},
            "train": {"partition": "gpu", "options": {"nice": 7, "exclusive": True}},
        },
        "site",
    )
    scripts = texts(site).split("#!/bin/bash")[1:]
    convert, train, aggregate = scripts
    assert "--partition=cpu" in convert
    assert "--partition=cpu" in aggregate
    assert "--partition=gpu" in train
    for script in scripts:
        assert "--account=a" in script
        assert "--reservation=r" in script
    assert "--nice=5" in convert
    assert "--nice=7" in train
    assert "#SBATCH --exclusive\n" in train


def test_a_container_gets_the_folders_that_the_study_needs(tmp_path: Path) -> None:
    image = tmp_path / "cellhpc.sif"
    image.write_bytes(b"image")
    (tmp_path / "weights").mkdir()
    (tmp_path / "raw").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    site = parse_site(
        {
            "container": {"image": str(image), "binds": ["/more:/more:ro"], "options": ["--cleanenv"]},
            "train": {"gres": "gpu:2"},
            "scratch": {"folder": "/local/$SLURM_JOB_ID"},
        },
        "site",
    )
    screen = {"layout": "bbbc021", "path": str(tmp_path / "raw")}
    weights = {"weights": [str(tmp_path / "weights" / "w.h5")]}
    more = {"screen": screen, "sweep": weights, "convert": {"archive": str(tmp_path / "archive")}}
    convert, train, _ = texts(site, image=image_digest(site), **more).split("#!/bin/bash")[1:]
    own = [tmp_path / name for name in ("raw", "elsewhere", "weights", "archive")]
    for path in (STUDY.path, *own, "/more:/more:ro"):
        assert f"--bind {path} " in train
    assert '--bind "$TMPDIR"' in train
    assert f"--nv --cleanenv {image} /opt/cellhpc/bin/python -u -m submitit" in train
    assert "--nv" not in convert
    assert (
        "export CELLHPC_IMAGE='cellhpc.sif sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d'"
        in train
    )


def test_an_image_that_is_not_there_is_refused_with_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"container.image .*/no.sif: no such file. Build one: make container"):
        image_digest(parse_site({"container": {"image": str(tmp_path / "no.sif")}}, "site"))


def test_a_stage_takes_back_an_option_that_holds_for_all() -> None:
    site = parse_site(
        {"slurm": {"options": {"exclusive": True, "nice": 100}}, "aggregate": {"options": {"exclusive": False}}}, "site"
    )
    of = {batch.stage: batch.text(STUDY.jobs / "0001", None) for batch in
          plan_batches(STUDY, job(), site, tasks(), STUDY.jobs / "0001", 1001, None)}  # fmt: skip
    assert "#SBATCH --exclusive\n" in of["train"]
    assert "exclusive" not in of["aggregate"]
    assert "#SBATCH --nice=100\n" in of["aggregate"]


def test_an_image_that_was_changed_since_ends_the_job_before_its_work(tmp_path: Path) -> None:
    image = tmp_path / "an image.sif"
    image.write_bytes(b"first")
    site = parse_site({"container": {"image": str(image)}}, "site")
    line = next(line for line in texts(site, image=image_digest(site)).splitlines() if "was changed" in line)
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 0
    image.write_bytes(b"another")
    ended = subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "type: cellhpc resume STUDY" in ended.stdout


def test_what_slurm_told_the_job_one_submits_from_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    with _outside_of_a_job():
        assert {name for name in os.environ if name.startswith("SLURM_")} == {"SLURM_CONF"}
    assert os.environ["SLURM_RESTART_COUNT"] == "2"
