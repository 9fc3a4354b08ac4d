"""Synthetic screens: the layout of the real ones, the same bytes always, and a phenotype that generalises."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
import tifffile
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cellhpc.errors import UsageError
from cellhpc.synth import choose, synth
from cellhpc.synth.bbbc021 import plan_wells
from cellhpc.synth.looks import MOAS

IMAGE_COLUMNS = [
    *("TableNumber", "ImageNumber", "Image_FileName_DAPI", "Image_PathName_DAPI", "Image_FileName_Tubulin"),
    *("Image_PathName_Tubulin", "Image_FileName_Actin", "Image_PathName_Actin", "Image_Metadata_Plate_DAPI"),
    *("Image_Metadata_Well_DAPI", "Replicate", "Image_Metadata_Compound", "Image_Metadata_Concentration"),
]
PLATE, WELL, COMPOUND = "Image_Metadata_Plate_DAPI", "Image_Metadata_Well_DAPI", "Image_Metadata_Compound"
CONCENTRATION = "Image_Metadata_Concentration"
TINY = {"size_px": (64, 80), "cell_px": 20, "moas": 2, "compounds_per_moa": 2, "replicates": 2, "sites": 2}
"""A few wells in pictures too small to show much."""
SMALL = {"size_px": (128, 160), "cell_px": 24, "replicates": 2, "sites": 2, "seed": 3}
"""The demo's screen in smaller pictures and fewer of them: 200 fields."""


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "bbbc021"
    return folder, synth(folder, choose("bbbc021", "demo", SMALL), workers=1)


def read_tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_csv(folder / "BBBC021_v1_image.csv"), pd.read_csv(folder / "BBBC021_v1_moa.csv")


def test_bbbc021_has_the_tables_of_the_real_one(small):
    folder, summary = small
    image, moa = read_tables(folder)
    assert list(image.columns) == IMAGE_COLUMNS
    assert list(moa.columns) == ["compound", "concentration", "moa"]
    assert (folder / "BBBC021_v1_moa.csv").read_text().endswith('"DMSO",0.000000,"DMSO"\n')
    assert set(moa.moa) == {*list(MOAS)[:6], "DMSO"}
    assert len(image) == summary["fields"]
    assert len(moa) - 1 == summary["treatments"] == 36
    assert summary["compounds"] == 18
    assert summary["moas"] == 6
    assert image.groupby([PLATE, WELL]).size().eq(2).all()  # two sites, as set here
    controls = image[image[COMPOUND] == "DMSO"]
    assert controls[CONCENTRATION].eq(0).all()
    assert controls.groupby(PLATE)[WELL].nunique().to_dict() == dict.fromkeys(image[PLATE].unique(), 6)
    assert not image.duplicated(["TableNumber", "ImageNumber"]).any()


def test_the_columns_are_those_of_the_real_tables(small, cellhpc_data):
    image, moa = read_tables(small[0])
    real = cellhpc_data / "bbbc021_metadata"
    assert list(image.columns) == list(pd.read_csv(real / "BBBC021_v1_image.csv.gz", nrows=1).columns)
    real_moa = pd.read_csv(real / "BBBC021_v1_moa.csv")
    assert list(moa.columns) == list(real_moa.columns)
    assert set(MOAS) | {"DMSO"} == set(real_moa.moa)
    copied = set(moa.compound) & set(real_moa.compound)
    assert copied == {"taxol", "DMSO"}


def test_bbbc021_pictures_lie_where_the_table_says(small):
    folder, summary = small
    image, _ = read_tables(folder)
    guid = "[0-9A-F]{8}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{12}"
    named = set()
    for channel, number in (("DAPI", 1), ("Tubulin", 2), ("Actin", 4)):
        for row in image.itertuples():
            name, place = getattr(row, f"Image_FileName_{channel}"), getattr(row, f"Image_PathName_{channel}")
            assert re.fullmatch(rf"(Week\d+_\d{{6}}_)?[B-G]\d\d_s\d_w{number}{guid}\.tif", name)
            assert re.fullmatch(r"Week\d+/Week\d+_\d{5}", place)
            assert place.endswith(getattr(row, PLATE))
            named.add(f"{place}/{name}")
    assert named == {str(path.relative_to(folder)) for path in folder.rglob("*.tif")}
    assert len(named) == summary["files"]
    assert summary["bytes"] == sum((folder / name).stat().st_size for name in named)
    with tifffile.TiffFile(folder / min(named)) as file:
        picture = file.asarray()
        assert file.pages.first.compression == 1  # uncompressed, as the real ones
    assert picture.dtype == np.uint16
    assert picture.shape == (128, 160)
    assert 100 < np.percentile(picture, 1) < 1000 < np.percentile(picture, 99) < 20_000


def test_the_full_preset_has_the_proportions_of_the_real_screen():
    settings = choose("bbbc021", "full")
    wells = pd.DataFrame(plan_wells(settings))
    assert settings.size_px == (1024, 1280)
    assert settings.sites == 4
    assert wells.groupby("plate").size().eq(60).all()
    assert wells.week.nunique() == 10
    assert wells[wells.compound == "DMSO"].groupby("plate").size().eq(6).all()
    assert wells[wells.compound == "taxol"].groupby("plate").size().ge(6).all()
    assert set(wells.moa) - {""} == set(MOAS)
    others = wells[~wells.compound.isin(["DMSO", "taxol"])]
    assert others.groupby("compound").week.nunique().eq(1).all()
    assert others.groupby(["compound", "concentration"]).agg({"plate": "nunique", "well": "size"}).eq(3).all(axis=None)
    # The taxol rule keeps Week1's wells D0x: the dose series of the first plate set.
    kept = wells[(wells.compound == "taxol") & (wells.week == 1) & wells.well.str.startswith("D0")]
    assert kept.groupby("concentration").size().eq(3).all()
    assert {0.3, 1.0, 3.0} <= set(kept.concentration)


def test_in_the_demo_every_plate_holds_every_mechanism():
    wells = pd.DataFrame(plan_wells(choose("bbbc021", "demo")))
    assert wells[wells.moa != ""].groupby("plate").moa.nunique().eq(6).all()
    assert wells.plate.nunique() == 6
    assert wells.week.nunique() == 2


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    settings = choose("bbbc021", "demo", TINY)
    synth(tmp_path / "one", settings, workers=1)
    synth(tmp_path / "two", settings, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    synth(tmp_path / "other", choose("bbbc021", "demo", TINY | {"seed": 1}), workers=1)
    pictures = [{v for k, v in contents(tmp_path / f).items() if k.endswith(".tif")} for f in ("one", "other")]
    assert not pictures[0] & pictures[1]


def test_a_second_call_does_nothing_and_an_interrupted_one_is_completed(tmp_path):
    settings = choose("bbbc021", "demo", TINY)
    assert synth(tmp_path, settings, workers=1)["made"]
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tif")}
    assert not synth(tmp_path, settings, workers=1)["made"]
    assert {path: path.stat().st_mtime_ns for path in times} == times

    # As a kill leaves it: the mark is that of an unfinished screen, one picture is missing and one torn.
    (tmp_path / "synth.json").rename(tmp_path / "synth-unfinished.json")
    missing, torn, *whole = sorted(times)
    missing.unlink()
    torn.write_bytes(b"II*")
    assert synth(tmp_path, settings, workers=1)["made"]
    assert contents(tmp_path) == before
    assert all(path.stat().st_mtime_ns == times[path] for path in whole)


def test_a_killed_call_leaves_no_process_and_is_completed_by_the_next(tmp_path):
    settings = choose("bbbc021", "demo", TINY | {"sites": 3})
    program = tmp_path / "program.py"
    program.write_text(
        "from cellhpc.synth import choose, synth\n"
        "if __name__ == '__main__':\n"
        f"    synth({str(tmp_path / 'killed')!r}, choose('bbbc021', 'demo', {TINY | {'sites': 3}!r}), workers=2)\n"
    )
    first = subprocess.Popen([sys.executable, str(program)], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").rglob("*.tif")):
        assert first.poll() is None
        time.sleep(0.02)
    others = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert psutil.wait_procs(others, timeout=30)[1] == []
    assert not (tmp_path / "killed" / "synth.json").exists()
    synth(tmp_path / "killed", settings, workers=1)
    synth(tmp_path / "whole", settings, workers=1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(
        UsageError, match=r"not empty and holds no synthetic screen \(found: thesis.tex\).*empty folder"
    ):
        synth(tmp_path, choose("bbbc014", "demo"))
    assert contents(tmp_path).keys() == {"thesis.tex"}


def test_a_folder_with_another_screen_is_refused(tmp_path):
    synth(tmp_path, choose("bbbc021", "demo", TINY), workers=1)
    with pytest.raises(UsageError, match=r"holds another synthetic screen \(bbbc021, digest \w{12}\)"):
        synth(tmp_path, choose("bbbc021", "demo", TINY | {"seed": 5}), workers=1)


@pytest.mark.parametrize(
    ("layout", "preset", "overrides", "message"),
    [
        ("bbbc022", "demo", {}, "layout is 'bbbc022'. Allowed: bbbc021, bbbc014."),
        ("bbbc021", "tiny", {}, "preset is 'tiny'. Allowed: full, demo."),
        ("bbbc021", "demo", {"plates": 3}, "plates: unknown key. Valid here: seed, size_px, cell_px, moas"),
        ("bbbc021", "demo", {"moas": 13}, "moas: found 13"),
        ("bbbc021", "demo", {"concentrations": 8, "compounds_per_moa": 6}, "set plate_sets higher than 2"),
        ("bbbc014", "demo", {"size_px": (8, 8)}, "at least 32 pixels"),
    ],
)
def test_wrong_settings_say_what_is_allowed(layout, preset, overrides, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        choose(layout, preset, overrides)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    with pytest.raises(UsageError, match=r"needs 101\.9 GB, 1\.0 GB are free"):
        synth(tmp_path / "full", choose("bbbc021", "full"))
    assert not (tmp_path / "full").exists()


def features(picture: np.ndarray) -> np.ndarray:
    """Cheap numbers on one field: quantiles, and contrast left at three scales, of each channel."""
    values = []
    for channel in picture.astype(np.float32):
        channel = np.sqrt(channel)
        values += list(np.quantile(channel, [0.1, 0.5, 0.75, 0.9, 0.97, 0.995]))
        for sigma in (1, 2, 4):
            fine = cv2.GaussianBlur(channel, (0, 0), sigma) - cv2.GaussianBlur(channel, (0, 0), 2 * sigma)
            values += [fine.std(), np.abs(fine).mean()]
    return np.array(values)


@pytest.fixture(scope="module")
def profiles(small):
    """Labelled fields of the small screen: features standardised on each plate's DMSO, and the table's columns."""
    folder, _ = small
    image, moa = read_tables(folder)
    image["moa"] = image.merge(
        moa, how="left", left_on=[COMPOUND, CONCENTRATION], right_on=["compound", "concentration"]
    ).moa
    names = [f"Image_FileName_{channel}" for channel in ("DAPI", "Tubulin", "Actin")]
    raw = np.stack(
        [
            features(np.stack([tifffile.imread(folder / row["Image_PathName_DAPI"] / row[name]) for name in names]))
            for _, row in image.iterrows()
        ]
    )
    normalised = raw.copy()
    for plate in image[PLATE].unique():
        rows = (image[PLATE] == plate).to_numpy()
        dmso = raw[rows & (image[COMPOUND] == "DMSO").to_numpy()]
        normalised[rows] = (raw[rows] - dmso.mean(0)) / dmso.std(0)
    labelled = (image[COMPOUND] != "DMSO").to_numpy()
    return normalised[labelled], image[labelled].reset_index(drop=True)


def leave_one_compound_out(x: np.ndarray, table: pd.DataFrame) -> float:
    """Fraction of the fields whose mechanism is predicted by a model that never saw their compound."""
    right = 0
    for compound in table[COMPOUND].unique():
        held_out = (table[COMPOUND] == compound).to_numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        model.fit(x[~held_out], table.moa[~held_out])
        right += (model.predict(x[held_out]) == table.moa[held_out]).sum()
    return right / len(table)


def test_a_left_out_compound_is_recognised_by_its_mechanism(profiles):
    x, table = profiles
    assert leave_one_compound_out(x, table) > 0.6  # six mechanisms: chance is about 0.2


def test_a_left_out_compound_is_not_recognised_by_its_plate(profiles):
    _, table = profiles
    plates = pd.get_dummies(table[PLATE]).to_numpy(float)
    assert leave_one_compound_out(plates, table) < 0.3


def test_shuffled_mechanisms_are_not_recognised(profiles):
    x, table = profiles
    compounds = table.drop_duplicates(COMPOUND)
    shuffled = dict(zip(compounds[COMPOUND], np.random.default_rng(0).permutation(compounds.moa), strict=True))
    assert leave_one_compound_out(x, table.assign(moa=table[COMPOUND].map(shuffled))) < 0.4


def test_bbbc014_has_the_names_and_bitmaps_of_the_real_one(tmp_path):
    summary = synth(tmp_path, choose("bbbc014", "demo", {"size_px": (96, 128)}), workers=1)
    names = {path.name for path in tmp_path.glob("*.Bmp")}
    wells = [(row, column) for row in "ABCDEFGH" for column in range(1, 13)]
    assert names == {
        f"Channel {channel}-{number:02d}-{row}-{column:02d}-00.Bmp"
        for channel in (1, 2)
        for number, (row, column) in enumerate(wells, 1)
    }
    assert summary["files"] == 192
    with Image.open(tmp_path / "Channel 1-13-B-01-00.Bmp") as picture:
        assert (picture.format, picture.mode, picture.size) == ("BMP", "L", (128, 96))
    plate_map = pd.read_csv(tmp_path / "BBBC014_plate_map.csv")
    assert list(plate_map.columns) == ["well", "cell_line", "compound", "concentration_M"]
    first, last = plate_map.iloc[0], plate_map.iloc[-1]
    assert (first.well, first.cell_line, first.concentration_M) == ("A01", "MCF7", 1e-7)
    assert (last.well, last.cell_line, last.concentration_M) == ("H12", "A549", 1e-13)
    assert choose("bbbc014").size_px == (1024, 1360)


def test_bbbc014_moves_the_reporter_into_the_nuclei_with_the_dose(tmp_path):
    synth(tmp_path, choose("bbbc014", "demo", {"rows": "AE"}), workers=1)

    def translocation(row: str, column: int) -> float:
        number = 12 * "ABCDEFGH".index(row) + column
        reporter, dna = (
            np.asarray(Image.open(tmp_path / f"Channel {c}-{number:02d}-{row}-{column:02d}-00.Bmp"), float)
            for c in (1, 2)
        )
        nuclei = dna > 40
        around = cv2.dilate(nuclei.astype(np.uint8), np.ones((5, 5))).astype(bool) & ~nuclei
        return reporter[nuclei].mean() / reporter[around].mean()

    for row in "AE":
        ratios = [translocation(row, column) for column in range(1, 13)]
        assert min(ratios[:4]) > 1.2 * max(ratios[8:])
