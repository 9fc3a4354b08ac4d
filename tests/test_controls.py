"""Tiles of control wells: those of treatments stay as they are, and nothing that learns, splits or scores sees them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from PIL import Image

from cellhpc import baselines
from cellhpc.aggregate import aggregate
from cellhpc.attempts import finished
from cellhpc.backbone import choose_source
from cellhpc.convert import ConversionPlan, convert, plan_conversion, tasks
from cellhpc.correct import TileRecipe, cut_tiles, histograms, plate_statistics
from cellhpc.errors import DataError, UsageError
from cellhpc.features import Features, write_features
from cellhpc.folds import plan_folds, write_folds
from cellhpc.ledger import read_json
from cellhpc.overview import plate_overview, well_box
from cellhpc.profiles import neighbours
from cellhpc.ranks import OneRank
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings, FoldsSettings, TrainSettings
from cellhpc.tiles import Store
from cellhpc.train import Trainer, load_data, train_run
from cellhpc.upkeep import verify
from cellhpc.whitening import whiten
from tests import small, test_convert
from tests.conftest import Cellhpc
from tests.test_convert import SETTINGS, contents, make_screen, make_screen_with_a_bad_control, mend, pixels

MOBILENET = "MobileNet(alpha=0.25)"
CHANNELS = ("dna", "actin", "tubulin")
COMPOUNDS = ("a-1", "a-2", "b-1", "b-2")
threads = test_convert.threads  # a cluster that starts at once


def plan(screen: Screen, store: Path, sides_px: tuple[int, ...] = (16, 24), **more: Any) -> ConversionPlan:
    return plan_conversion(ConvertSettings(**{"shard_fields": 2, "controls": True, **more}), screen, sides_px, store)


# In the store


def test_controls_come_after_the_treatments_whose_tiles_stay_as_they_are(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    convert(plan_conversion(SETTINGS, screen, (16, 24), tmp_path / "without"))
    made = plan(screen, tmp_path / "with")
    convert(made)
    without, store = Store.open(tmp_path / "without"), Store.open(tmp_path / "with")
    pd.testing.assert_frame_equal(store.tiles, without.tiles)
    pd.testing.assert_frame_equal(store.fields, without.fields)
    for px in (16, 24):
        assert np.array_equal(store.read(store.tiles, px), without.read(without.tiles, px))
    before, after = contents(without.folder), contents(store.folder)
    whole = [name for name in before if "/c.0." in name or "/c.1." in name]  # two treatments' fields each
    assert len(whole) == 8
    assert all(before[name] == after[name] for name in whole)
    assert set(after) - set(before) == {f"{folder}/{name}" for plate in ("P0", "P1") for folder, name in (
        (f"tiles.zarr/{plate}/tiles_16", "c.3.0.0.0"), (f"tiles.zarr/{plate}/tiles_24", "c.3.0.0.0"),
        (f"plates/{plate}", "00003.json"))}  # fmt: skip
    assert without.controls.empty
    assert list(store.controls) == list(store.tiles)
    assert set(store.controls["label"]) == {""}
    for plate in (0, 1):
        assert list(store.tiles_of(f"P{plate}")["role"]) == ["treatment"] * 20 + ["dmso"] * 8
        statistics = plate_statistics(sum(histograms(pixels(100 * plate + number)) for number in (5, 6)))
        for number, (well, field) in {5: ("B03", 2), 6: ("B04", 1)}.items():
            mine = store.controls.query(f"plate == 'P{plate}' and well == '{well}' and field == {field}")
            wanted = cut_tiles(pixels(100 * plate + number), TileRecipe((2, 2), (16, 24)), statistics)
            for px in (16, 24):
                np.testing.assert_array_equal(store.read(mine, px), wanted.tiles[px])


def test_they_are_counted_for_themselves(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    made = plan(screen, tmp_path / "store")
    totals, without = made.totals(), plan_conversion(SETTINGS, screen, (16, 24), tmp_path / "other").totals()
    assert (totals["fields"], totals["tiles"], totals["control_tiles"]) == (10, 40, 16)
    assert (without["fields"], without["tiles"], without["control_tiles"]) == (10, 40, 0)
    assert totals["bytes_out"] == 56 * 3 * (16**2 + 24**2)
    size = sum((tmp_path / "raw" / name).stat().st_size for name in screen.fields.filter(like="file_").to_numpy().flat)
    assert without["bytes_in"] == size
    assert totals["bytes_in"] == size * 18 // 14  # for the statistics, and for tiles
    told = made.render()
    assert "4 DMSO fields for the statistics, 4 DMSO fields for tiles of controls; " in told
    assert "40 tiles and 16 of controls, of 16 and 24 pixels" in told
    convert(made)
    assert sum(path.is_file() for path in made.store.rglob("*")) == totals["files"]
    assert made.counts() == {
        "plates": 2, "fields": 10, "bad_fields": 0, "tiles": 40, "kept_tiles": 40, "near_empty_tiles": 0,
        "control_tiles": 16, "kept_control_tiles": 16, "set_aside": [],
    }  # fmt: skip


def test_without_them_a_store_is_what_it_was(tmp_path: Path) -> None:
    """Digests of before there were controls; they change with `planning.FORMAT`, and with it alone."""
    screen = make_screen(tmp_path / "raw")
    made = plan_conversion(SETTINGS, screen, (16, 24), tmp_path / "store")
    assert "controls" not in made.identity
    assert [task.digest[:8] for task in made.tasks[:3]] == ["c138ad5e", "5b5f7b7f", "41acce35"]
    assert [plate.digest[:8] for plate in made.plates] == ["63cd874b", "03588719"]
    convert(made)


def test_a_store_has_them_or_not(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    convert(plan(screen, tmp_path / "with"))
    convert(plan(screen, tmp_path / "without", controls=False))
    with pytest.raises(UsageError, match="controls: false in the store, true wanted now") as fault:
        plan(screen, tmp_path / "without")
    another = "Choose another folder with --set convert.store=FOLDER, or remove this one."
    assert str(fault.value).splitlines()[-1] == f"Tiles of controls come only into a new store. {another}"
    with pytest.raises(UsageError, match="controls: true in the store, false wanted now") as fault:
        plan(screen, tmp_path / "with", controls=False)
    assert str(fault.value).splitlines()[-1] == f"Use what is there with --set convert.controls=true. {another}"
    with pytest.raises(UsageError) as fault:
        plan(screen, tmp_path / "with", controls=False, preprocessing="zscore", statistics="plate")
    assert str(fault.value).splitlines()[1:] == [
        '  - preprocessing: "kensert2019" in the store, "zscore" wanted now',
        '  - statistics: "dmso" in the store, "plate" wanted now',
        "  - zscore_range: not used in the store, [-2.0, 6.0] wanted now",
        "  - controls: true in the store, false wanted now",
        another,
    ]


HOW: dict[str, dict[str, Any]] = {
    "as the paper": {},
    "by all fields of a plate": {"preprocessing": "zscore", "statistics": "plate", "illumination": "mean"},
    "percentiles": {"preprocessing": "percentile", "shard_fields": 4},
}


@pytest.mark.parametrize("how", HOW)
def test_what_is_missing_is_done_and_all_is_verified(how: str, tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    convert(plan(screen, tmp_path / "store", **HOW[how]))
    whole = contents(tmp_path / "store")
    folder = tmp_path / "store/plates/P1"
    last = max(folder.glob("0*.json"))  # controls, with or without the last treatments
    for path in (folder / "plate.json", last, tmp_path / f"store/tiles.zarr/P1/tiles_16/c.{int(last.stem)}.0.0.0"):
        path.unlink()
    assert not plan(screen, tmp_path / "store", **HOW[how]).is_finished
    convert(plan(screen, tmp_path / "store", **HOW[how]))
    assert contents(tmp_path / "store") == whole
    found = verify(tmp_path / "store")  # each field made anew and compared: controls too
    assert found.problems == ()
    assert (found.compared, found.without_pictures) == (14, 0)
    shard = tmp_path / f"store/tiles.zarr/P0/tiles_16/c.{int(last.stem)}.0.0.0"
    shard.write_bytes(shard.read_bytes()[::-1])
    (problem,) = verify(tmp_path / "store", sample=0).problems
    assert f"tiles_16/{shard.name}: its checksum is not the one that was recorded" in problem


@pytest.mark.parametrize("preprocessing", ["kensert2019", "none"])
def test_a_plate_without_controls_is_named(preprocessing: str, tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    bare = screen.fields[(screen.fields["plate"] != "P1") | (screen.fields["role"] != "dmso")]
    with pytest.raises(DataError, match=r"plate are whitened on, .*and 1 of 2 plates have none") as fault:
        plan(dataclasses.replace(screen, fields=bare), tmp_path / "store", preprocessing=preprocessing)
    assert fault.value.problems == ("plate P1: no DMSO field",)
    assert "Set convert.controls = false" in str(fault.value)
    # One message is enough: what normalises by these wells is named with it.
    both = preprocessing == "kensert2019"
    assert ('convert.preprocessing = "kensert2019" normalises each plate by its DMSO wells' in str(fault.value)) is both
    assert ('convert.controls = false, and convert.statistics = "plate"' in str(fault.value)) is both


def test_a_control_that_can_not_be_read_is_refused_or_set_aside_once(tmp_path: Path) -> None:
    screen = make_screen_with_a_bad_control(tmp_path)
    with pytest.raises(DataError, match=r"plate P0: well B04 field 1: P0/06_dna.tif: truncated") as fault:
        convert(plan(screen, tmp_path / "store"))
    assert len(fault.value.problems) == 1
    skip = plan(screen, tmp_path / "store", on_bad_field="skip")
    convert(skip)
    counts = skip.counts()
    assert (counts["bad_fields"], counts["control_tiles"], counts["kept_control_tiles"]) == (1, 8, 4)
    assert [(one["well"], one["role"]) for one in counts["set_aside"]] == [("B04", "dmso")]
    assert len(Store.open(tmp_path / "store").controls) == 4
    mend(tmp_path / "raw", tmp_path / "good")
    convert(plan(screen, tmp_path / "store", on_bad_field="skip"))
    convert(plan(screen, tmp_path / "whole"))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_the_archive_has_each_field_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = make_screen(tmp_path / "raw")
    convert(plan(screen, tmp_path / "without", archive=tmp_path / "archive", controls=False))
    written = []

    def note(archive: Any, plate: str, well: str, field: int, *rest: Any) -> None:
        written.append((plate, well, field))
        write(archive, plate, well, field, *rest)

    write = tasks.write_field
    monkeypatch.setattr(tasks, "write_field", note)
    made = plan(screen, tmp_path / "with", archive=tmp_path / "other")
    convert(made)
    assert made.is_finished
    assert len(written) == len(set(written)) == 14
    assert contents(tmp_path / "other") == contents(tmp_path / "archive")
    convert(plan(screen, tmp_path / "third", archive=tmp_path / "archive"))  # stores of both kinds may share it
    assert contents(tmp_path / "other") == contents(tmp_path / "archive")


def test_a_plate_shows_the_pictures_of_its_controls(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1, fields=4)
    pictures = []
    for controls in (False, True):
        made = plan(screen, tmp_path / str(controls), controls=controls)
        convert(made)
        path = tmp_path / f"{controls}.png"
        plate_overview(Store.open(made.store), "P0").save(path)
        x, y, side = well_box(1, 2, 12)  # B03, whose fields are controls
        pictures.append(np.asarray(Image.open(path))[y : y + side, x : x + side])
    rim, inner = (np.s_[1:3], np.s_[8 : side // 3, 8 : side - 8])
    assert (pictures[0][inner] == 255).all()  # an empty frame
    assert (pictures[1][inner] == 255).mean() < 0.2
    assert 0.3 < (pictures[1][rim] > 200).all(axis=-1).mean() < 0.9  # dashes


# Beside a study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three plates, eight wells of four compounds and two of DMSO, with two fields of four tiles each; two stores."""
    root = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(0)
    rows = []
    for plate in range(3):
        for number in range(20):
            well, field = divmod(number, 2)
            compound = "DMSO" if well in (1, 6) else COMPOUNDS[well % 4]
            control = compound == "DMSO"
            files = {f"file_{channel}": f"{plate}-{number}-{channel}.png" for channel in CHANNELS}
            for file in files.values():
                level = {"D": 100, "a": 60, "b": 150}[compound[0]] + 10 * plate
                Image.fromarray(random.normal(level, 20, (64, 64)).clip(1, 255).astype(np.uint8)).save(root / file)
            rows.append({
                "plate": f"P{plate}", "batch": f"W{plate // 2}", "well": f"B{12 - well:02d}", "field": field + 1,
                "compound": compound, "concentration": np.nan if control else 1.0, "unit": "uM",
                "treatment": compound if control else f"{compound} 1 uM", "label": "" if control else compound[0],
                "replicate": str(plate + 1), "role": "dmso" if control else "treatment", **files,
            })  # fmt: skip
    screen = Screen(pd.DataFrame(rows), CHANNELS, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_convert.convert_module, "_cluster", test_convert.one_process.cluster)
        for name, controls in (("without", False), ("with", True)):
            convert(plan(screen, root / name, (32,), preprocessing="none", controls=controls))
    return root


def test_as_they_are_they_need_no_statistics(made: Path) -> None:
    store = Store.open(made / "with")
    assert len(store.controls) == 48
    first = store.controls.iloc[:4]
    name = store.fields.query("plate == 'P0' and well == @first.well.iloc[0] and field == 1").iloc[0]["file_actin"]
    whole = np.asarray(Image.open(made / name))
    np.testing.assert_array_equal(store.read(first, 32)[2, ..., 1], whole[32:, :32])


def test_nothing_that_learns_or_splits_sees_them(made: Path) -> None:
    without, store = Store.open(made / "without"), Store.open(made / "with")
    assert store.content_digest != without.content_digest
    folds = plan_folds(store.fields, FoldsSettings())
    assert folds.sha256 == plan_folds(without.fields, FoldsSettings()).sha256
    assert "DMSO" not in folds.labels
    every = pd.concat([store.tiles_of(plate) for plate in store.plates], ignore_index=True)
    controls = (every["role"] == "dmso").to_numpy()
    for fold in folds.folds:
        assert not (controls & (folds.training(every, fold) | folds.held_out(every, fold))).any()
    ours, theirs = load_data(store, folds, 32), load_data(without, folds, 32)
    pd.testing.assert_frame_equal(ours.tiles, theirs.tiles)
    assert np.array_equal(ours.pixels, theirs.pixels)
    # Intensity statistics are told of fields; with 8-bit pixels those of controls are only known with controls.
    names = [[row["name"] for row in baselines.intensity_baselines(one, folds)] for one in (without, store)]
    assert names == [["intensity"], ["intensity", "intensity_neighbour"]]
    logistic, neighbour = baselines.intensity_baselines(store, folds)
    assert logistic == baselines.intensity_baselines(without, folds)[0]
    assert neighbour["total"] == 4


def test_no_run_learns_from_them_or_predicts_them_and_no_score_counts_them(made: Path, tmp_path: Path) -> None:
    """Run by run and to the last count; the first run is what it is on a store without controls."""
    stores = {name: Store.open(made / name) for name in ("with", "without")}
    folds = plan_folds(stores["with"].fields, FoldsSettings())
    settings = TrainSettings(
        epochs=2, batch_size=16, learning_rate=0.01, input_scaling="keras", augment="none", batch_norm_momentum=0.5
    )
    outputs = {}
    for name, store in stores.items():
        trainer = Trainer(MOBILENET, load_data(store, folds, 32), settings, OneRank())
        for fold in range(len(folds.folds)) if name == "with" else (0,):
            run = small.run(folds, MOBILENET, fold)
            train_run(trainer, run, folds, tmp_path / name / "runs")
            outputs[name, fold] = finished(tmp_path / name / "runs" / run.id) or pytest.fail("not finished")
    tiles = dict(zip(COMPOUNDS, (72, 48, 24, 48), strict=True))  # 3, 2, 1 and 2 wells on each plate, and 2 of DMSO
    for fold, compound in enumerate(COMPOUNDS):
        record = read_json(outputs["with", fold] / "run.json")
        predicted = pd.read_parquet(outputs["with", fold] / "predictions.parquet")
        assert record["fold"]["held_out"] == [compound]
        assert record["trained_on"] == [other for other in COMPOUNDS if other != compound]
        assert record["training_tiles"] == 192 - tiles[compound]
        assert record["held_out_tiles"] == len(predicted) == tiles[compound]
        assert set(predicted["compound"]) == {compound}
        controls = stores["with"].controls[["plate", "well"]].drop_duplicates()
        assert predicted.merge(controls, on=["plate", "well"]).empty
    first, without = (read_json(outputs[name, 0] / "history.json")["epochs"] for name in stores)
    np.testing.assert_allclose([epoch["loss"] for epoch in first], [epoch["loss"] for epoch in without], rtol=1e-4)
    tables = [pd.read_parquet(outputs[name, 0] / "predictions.parquet") for name in stores]
    pd.testing.assert_frame_equal(*(table.drop(columns="row", errors="ignore") for table in tables), rtol=1e-3)

    write_folds(tmp_path / "with/folds.json", folds)
    units = sorted((tmp_path / "with/runs").iterdir())
    aggregate(tmp_path / "with", "controls", units, folds.classes, store=stores["with"])
    scores = read_json(tmp_path / "with/results/scores.json")
    assert scores["complete"]
    assert scores["classes"] == ["a", "b"]
    (model,) = scores["models"]
    totals = {level: count["total"] for level, count in model["levels"].items()}
    assert totals == {"tile": 192, "field": 48, "well": 24, "treatment": 4, "compound": 4}
    assert np.sum(model["confusion"]) == 4
    assert sorted(row["compound"] for row in model["by_compound"]) == list(COMPOUNDS)
    for table in ("wells.csv", "fields.csv", "treatments.csv", "compounds.csv"):
        assert set(pd.read_csv(tmp_path / "with/results" / table)["compound"]) == set(COMPOUNDS)


def test_features_of_controls_are_kept_apart(made: Path, tmp_path: Path) -> None:
    without, store = Store.open(made / "without"), Store.open(made / "with")
    plain, found = (
        write_features(choose_source(one.folder, MOBILENET, "xavier"), tmp_path / name)
        for name, one in (("without", without), ("with", store))
    )
    rows = pd.read_parquet(found.folder / "tiles.parquet")
    assert "role" not in pd.read_parquet(plain.folder / "tiles.parquet")
    assert list(rows.query("plate == 'P1'")["role"]) == ["treatment"] * 64 + ["dmso"] * 16
    assert (found.facts["tiles"], found.facts["controls"]) == (len(rows), 48) == (240, 48)
    assert "controls" not in plain.facts
    pd.testing.assert_frame_equal(found.tiles, plain.tiles)
    np.testing.assert_allclose(found.read(), plain.read(), atol=1e-5)
    controls = (rows["role"] == "dmso").to_numpy()
    every = np.asarray(zarr.open_array(found.folder / "features.zarr", mode="r")[:])
    assert np.array_equal(found.read(), every[~controls])
    expected = whiten(every, controls, rows["plate"].to_numpy())
    assert np.array_equal(found.read_whitened(), expected[~controls])
    assert found.not_whitened == ""
    assert "there are no tiles of controls" in plain.not_whitened
    with pytest.raises(DataError, match="P0, P1, P2: without a control on each plate"):
        plain.read_whitened()
    bare = Features(found.folder, found.about, found.facts)
    bare.__dict__["_rows"] = rows.assign(role=rows["role"].where(rows["plate"] != "P1", "treatment"))
    assert bare.not_whitened == "P1: no tile of a control was kept"


def test_the_command_tells_of_both(made: Path, tmp_path: Path, cellhpc: Cellhpc) -> None:
    words = ("--network", MOBILENET, "--weights", "xavier", "--baseline")
    said = cellhpc("features", made / "with", *words, "--out", tmp_path / "with")
    assert said.returncode == 0, said.stderr
    assert "256 features of 240 tiles (48 of controls), made in" in said.stdout
    assert (said.stdout.count("nearest neighbour "), said.stdout.count("nearest neighbour, whitened ")) == (2, 2)
    features, document = Features.open(tmp_path / "with"), read_json(tmp_path / "with/baseline.json")
    assert (document["classes"], document["treatments"]) == (["a", "b"], 4)
    told = document["nearest_neighbour_whitened"]
    calls = neighbours(features.tiles, features.read_whitened(), "compound")
    assert told["compound"]["treatment"]["correct"] == calls["correct"].sum()
    assert (told["compound"]["treatment"]["total"], told["compound_and_batch"]) == (4, None)  # all are in both weeks
