from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cellhpc.errors import UsageError
from cellhpc.folds import Folds, plan_folds
from cellhpc.settings import FoldsSettings, Job, parse_job
from cellhpc.sweep import plan_runs, tile_sizes_px
from tests import small


def job(**sweep: Any) -> Job:
    document = {
        "study": {"name": "s", "folder": "study"},
        "screen": {"layout": "bbbc021", "path": "raw"},
        "sweep": sweep,
    }
    return parse_job(document, "job")


@pytest.fixture
def folds() -> Folds:
    return plan_folds(small.tiles(), FoldsSettings())


def test_the_grid_is_network_by_initialisation_by_seed_by_fold(folds: Folds) -> None:
    runs = plan_runs(
        job(networks=["ResNet50", "VGG16"], weights=["imagenet", "xavier"], seeds=[0, 1, 2]), folds, "store"
    )
    assert len(runs) == 2 * 2 * 3 * 9
    assert len({run.id for run in runs}) == len({run.digest for run in runs}) == len(runs)
    assert runs[0].id == "ResNet50_imagenet_s0_f00"
    assert [run.network for run in runs] == ["ResNet50"] * 54 + ["VGG16"] * 54  # neighbours share a graph


def test_a_digest_covers_what_the_result_depends_on_and_nothing_else(folds: Folds, tmp_path: Path) -> None:
    weights = tmp_path / "w.h5"
    weights.write_bytes(b"1")

    def first(
        store: str = "store", train: dict[str, Any] | None = None, search: dict[str, Any] | None = None, **sweep: Any
    ) -> str:
        planned = job(weights=[str(weights)], **sweep)
        planned = planned.model_copy(update={"train": planned.train.model_copy(update=train or {})})
        planned = planned.model_copy(update={"search": search or {}})
        return plan_runs(planned, folds, store)[0].digest

    base = first()
    assert first(parallel_jobs=2, runs_per_job=5, attributions=3) == base
    assert first(seeds=[0, 1]) == base
    assert first(ranks=2) != base  # batch statistics and augmentation see a rank's share
    assert first(store="other") != base
    assert first(train={"epochs": 3}) != base
    assert first(train={"dropout": 0.5}) != first(train={"dropout": 0.5, "dropout_draws": 9})
    assert first(tile_px=64) != base
    assert first(search={"epochs": (3, 4)}) != base
    weights.write_bytes(b"2")
    assert first() != base


def test_tiles_are_made_in_the_sizes_that_the_networks_need() -> None:
    assert tile_sizes_px(job(networks=["ResNet50", "InceptionV3", "VGG16"])) == (224, 299)
    assert tile_sizes_px(job(networks=["ResNet50", "InceptionV3"], tile_px=96)) == (96,)


def test_two_weights_files_of_one_name_are_refused(folds: Folds, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.h5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"sweep.weights: two files have one name"):
        plan_runs(job(weights=[str(tmp_path / "a/w.h5"), str(tmp_path / "b/w.h5")]), folds, "store")


def test_one_network_in_two_spellings_is_refused(folds: Folds) -> None:
    networks = ["MobileNet(alpha=0.25)", "MobileNet(alpha = 0.25)"]
    with pytest.raises(
        UsageError, match=r"sweep.networks names a network twice: MobileNet-alpha0.25, MobileNet-alpha0"
    ):
        plan_runs(job(networks=networks, weights=["xavier"]), folds, "store")
