from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cellhpc.errors import UsageError
from cellhpc.folds import plan_folds
from cellhpc.recipe import AUGMENTATIONS, PRESETS, TrainSettings
from cellhpc.settings import FoldsSettings, parse_job
from cellhpc.sweep import plan_runs
from tests import small

JOBS = Path(__file__).parents[1] / "jobs"


def train(**keys: Any) -> TrainSettings:
    document = {
        "study": {"name": "s", "folder": "study"},
        "screen": {"layout": "bbbc021", "path": "raw"},
        "train": keys,
    }
    return parse_job(document, "job.toml").train


@pytest.mark.parametrize(("preset", "job"), [("kensert2019", "bbbc021"), ("best", "bbbc021_subset")])
def test_a_preset_is_what_its_job_file_spells_out(preset: str, job: str) -> None:
    spelt = tomllib.loads((JOBS / f"{job}.toml").read_text())["train"]
    assert train(preset=preset).model_copy(update={"preset": "none"}) == train(**spelt)


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_that_are_given_win_and_what_came_out_is_written_down(preset: str) -> None:
    chosen = train(preset=preset, epochs=12, augment={"blur": 0.25})
    assert (chosen.epochs, chosen.augment.blur, chosen.augment.rotations) == (12, 0.25, False)
    left_out = {key: value for key, value in PRESETS[preset].items() if key not in ("epochs", "augment")}
    assert {key: getattr(chosen, key) for key in left_out} == left_out
    written = chosen.model_dump(mode="json")
    assert train(**written) == chosen


def test_a_preset_and_its_keys_spelt_out_are_the_same_run() -> None:
    folds = plan_folds(small.tiles(), FoldsSettings())
    jobs = [
        parse_job(
            {"study": {"name": "s", "folder": "f"}, "screen": {"layout": "bbbc021", "path": "raw"},
             "sweep": {"weights": ["xavier"]}, "train": keys}, "job",
        )
        for keys in ({"preset": "fast"}, PRESETS["fast"], {"preset": "fast", "label_smoothing": 0.1})
    ]  # fmt: skip
    preset, spelt, other = (plan_runs(job, folds, "store")[0].digest for job in jobs)
    assert preset == spelt != other


def test_names_and_tables_of_augmentation() -> None:
    assert train().augment == train(augment="kensert2019").augment == AUGMENTATIONS["kensert2019"]
    paper = {"rotations": True, "gains": [1, 1, 0.75, 1.25], "blur": 0.5, "noise": 0.5, "noise_variance": 50}
    assert train(augment=paper).augment == AUGMENTATIONS["kensert2019"]
    assert train(augment={}).augment == AUGMENTATIONS["none"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preset": "quick"}, r"train.preset: found 'quick'. Input should be 'none', 'kensert2019', 'fast' or 'best'"),
        ({"augment": "flips"}, r"train.augment: found 'flips'. Allowed are kensert2019, none, rotations, and a table"),
        ({"augment": {"blurr": 1}}, r"train.augment.blurr: unknown key. Valid here: rotations, gains, blur, noise"),
        ({"augment": {"blur": 2}}, r"train.augment.blur: found 2. Input should be less than or equal to 1"),
        ({"augment": {"gains": [0]}}, r"train.augment.gains.0: found 0. Input should be greater than 0"),
        ({"schedule": "step"}, r'train: schedule = "step" and step_epochs go together, as step_epochs = \[4, 8\]'),
        ({"step_epochs": [1]}, r'train: schedule = "step" and step_epochs go together'),
        ({"schedule": "step", "step_epochs": [4, 10]}, r"allowed are rising numbers below epochs \(10\)"),
        ({"schedule": "step", "step_epochs": [4, 4]}, r"step_epochs is \[4, 4\]; allowed are rising numbers"),
        ({"warmup_epochs": 10}, r"warmup_epochs is 10; it must be below epochs \(10\)"),
        ({"trained": "head_first", "head_epochs": 10}, r"head_epochs is 10; it must be below epochs \(10\)"),
        ({"xla": True, "batch_norm": "synchronised"}, r'xla and batch_norm = "synchronised" exclude each other'),
        (
            {"dropout_draws": 5},
            r"dropout_draws is 5 and dropout is 0: all draws would be the same; set dropout, as dropout",
        ),
        ({"precision": "float64"}, r"train.precision: found 'float64'. Input should be 'float32', 'bfloat16' or"),
    ],
)
def test_what_can_not_be_is_one_clear_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as fault:
        train(**keys)
    assert len(str(fault.value).splitlines()) == 1


def test_parts_of_the_network_by_epoch() -> None:
    first = train(trained="head_first", head_epochs=2)
    assert [first.part(epoch) for epoch in (1, 2, 3, 10)] == ["head", "head", "all", "all"]
    assert train().part(1) == "all"
    assert train(trained="head").part(10) == "head"
