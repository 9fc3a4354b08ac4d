"""The reader of MetaXpress' plates: what names and folders tell, the plate map, and what is wrong with them."""

from __future__ import annotations

import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from cellhpc.cli import cli
from cellhpc.convert import plan_conversion
from cellhpc.errors import DataError, UsageError
from cellhpc.screens import Screen, read_screen, require_sound
from cellhpc.settings import ConvertSettings, MetaxpressScreen, load_job, parse_job

GUID = "3BDD60DB-BC14-4D09-BDC5-D4DEA3F7A6D3"
CHANNELS = {"dna": 1, "actin": 2}
COLUMNS = {"plate": "Plate", "well": "Well", "compound": "Drug", "concentration": "Dose", "label": "Target"}
HEADER = "Plate,Well,Drug,Dose,Target"
MAP = ("P1,B02,DMSO,,", "P1,B03,taxol,0.3,tubulin", "P1,B04,nocodazole,1,tubulin", "P1,B05,cisplatin,10,dna")
WELLS = ("B02", "B03", "B04", "B05")


def settings(folder: Path, **changes: Any) -> MetaxpressScreen:
    keys = {"layout": "metaxpress", "path": folder, "table": "map.csv", "columns": COLUMNS, "channels": CHANNELS}
    return MetaxpressScreen(**(keys | changes))


def write_map(folder: Path, *rows: str, header: str = HEADER) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "map.csv").write_text("\n".join([header, *(rows or MAP), ""]), encoding="utf-8")


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def named(wells: Iterable[str] = WELLS, sites: Iterable[int] = (1, 2), waves: Iterable[int] = (1, 2)) -> list[str]:
    """Names as MetaXpress writes them, each with another GUID, half of which begin with a digit."""
    return [
        f"my screen_{well}_s{site}_w{wave}{16**7 * (number % 16):08X}-0B5F-41F4-93EA-0000{number:08X}.tif"
        for number, (well, site, wave) in enumerate(itertools.product(wells, sites, waves), start=5)
    ]


def make(folder: Path, *rows: str) -> None:
    """A plate with four wells, two sites each, and its map."""
    write_map(folder, *rows)
    touch(folder / "P1" / "TimePoint_1", *named())


def read(folder: Path, **changes: Any) -> Screen:
    return read_screen(settings(folder, **changes))


def test_names_tell_well_site_and_wavelength(tmp_path: Path) -> None:
    make(tmp_path)
    screen = read(tmp_path)
    require_sound(screen)
    fields = screen.fields
    assert screen.channels == ("dna", "actin")
    assert fields[["plate", "well", "field"]].to_numpy().tolist() == [["P1", w, s] for w in WELLS for s in (1, 2)]
    assert fields.groupby("well")["role"].first().to_list() == ["dmso", "treatment", "treatment", "treatment"]
    assert fields["treatment"].to_list()[::2] == ["DMSO", "taxol 0.3 uM", "nocodazole 1 uM", "cisplatin 10 uM"]
    names = named()
    assert fields["file_dna"].to_list() == [f"P1/TimePoint_1/{name}" for name in names[::2]]
    assert fields["file_actin"].to_list() == [f"P1/TimePoint_1/{name}" for name in names[1::2]]
    assert (screen.pictures_expected, screen.pictures_missing) == (16, 0)
    assert screen.notes == (
        "label dna: a single compound (cisplatin). Held out, nothing is left to learn the label from; "
        'set folds.on_single_compound = "drop" to drop the label.',
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"val screen_E07_s1_w2{GUID}.tif", ("E07", 1, 2)),
        (f"val screen_E07_s12_w2{GUID.lower()}.TIF", ("E07", 12, 2)),
        (f"MIP_2P_E07_s3_w1{'0' * 8}-1111-2222-3333-{'4' * 12}.tif", ("E07", 3, 1)),
        (f"P_E07_s3{'12345678'}-1111-2222-3333-{'4' * 12}.tif", ("E07", 3, 1)),
        (f"P_E07{'12345678'}-1111-2222-3333-{'4' * 12}.tif", ("E07", 1, 1)),
        (f"P_E7{'12345678'}-1111-2222-3333-{'4' * 12}.tif", ("E07", 1, 1)),
        (f"P_E07_w2{GUID}.tif", ("E07", 1, 2)),
        (f"G10_s1_w1{GUID}.tif", ("G10", 1, 1)),
        ("PLATE_E07_s1_w2.TIF", ("E07", 1, 2)),
        ("PLATE_E07_S1_W2.TIFF", ("E07", 1, 2)),
        ("PLATE_e7_s1_w2.tif", ("E07", 1, 2)),
        ("PLATE_E07.tif", ("E07", 1, 1)),
        ("P_A1_B2_C3_s2_w1.tif", ("C03", 2, 1)),
        ("plate [1] (größe)_P24_s2.tif", ("P24", 2, 1)),
        ("P_AF48_s1_w1.tif", ("AF48", 1, 1)),
        ("P_Z09_s1_w1.tif", ("Z09", 1, 1)),
    ],
)
def test_a_name_in_any_of_its_forms(tmp_path: Path, name: str, expected: tuple[str, int, int]) -> None:
    well, site, wave = expected
    touch(tmp_path / "P1", name)
    # The map writes the well in another way than the picture.
    short = re.sub(r"\b([A-Z]+)0", r"\1", well).lower()
    write_map(tmp_path, f"P1,{short},taxol,1,tubulin")
    screen = read(tmp_path, channels={"dna": wave})
    assert screen.fields[["well", "field", "file_dna"]].to_numpy().tolist() == [[well, site, f"P1/{name}"]]
    assert screen.problems == ()


def test_what_is_no_picture_is_counted_or_passed_over(tmp_path: Path) -> None:
    make(tmp_path)
    thumbnails = [name.replace("_w1", "_w1_thumb") for name in named() if "_w1" in name]
    touch(tmp_path / "P1" / "TimePoint_1", *thumbnails, "P_B02_s1_w1_Thumb.TIF")
    touch(tmp_path / "P1", "overview.tif", "P_s1_w1.tif", "P_A49_s1_w1.tif", "P_B00.tiff", "Thumbs.db", "a.jpg")
    touch(tmp_path / "P1" / "TimePoint_1", "._my screen_B02_s1_w1.tif")
    touch(tmp_path / "P1" / ".trash", "P_B02_s1_w1.tif")
    screen = read(tmp_path)
    assert screen.problems == ()
    assert len(screen.fields) == 8
    assert screen.notes[:2] == (
        "thumbnails, which are not read: 9",
        "TIFFs that are not named as P1_E07_s1_w2.tif, and not read: 4, for instance "
        "'P1/P_A49_s1_w1.tif', 'P1/P_B00.tiff', 'P1/P_s1_w1.tif'",
    )


def test_a_folder_without_plates_is_refused(tmp_path: Path) -> None:
    write_map(tmp_path)
    touch(tmp_path / "P1", "overview.tif")
    with pytest.raises(DataError, match=r"no picture is of a well of map\.csv") as fault:
        read(tmp_path)
    assert "not read: 1, for instance 'P1/overview.tif'" in str(fault.value)
    assert "Pictures are named as P1_E07_s1_w2.tif. See screen.path" in str(fault.value)
    with pytest.raises(DataError, match=r"absent: can't be listed: No such file or directory\.\nSet screen\.path\."):
        read(tmp_path / "absent", tables=tmp_path)


def test_plates_are_named_by_their_folders_at_any_depth(tmp_path: Path) -> None:
    write_map(tmp_path, *MAP, "Größe [2],B03,taxol,0.3,tubulin")
    touch(tmp_path / "week 1" / "P1", *named())
    # A Mac writes the umlaut in two characters.
    touch(tmp_path / "week 2" / unicodedata.normalize("NFD", "Größe [2]") / "TimePoint_1" / "ZStep_1", *named(["B03"]))
    screen = read(tmp_path)
    assert screen.problems == ()
    assert screen.fields.groupby("plate").size().to_dict() == {"Größe [2]": 2, "P1": 8}
    assert screen.pictures_missing == 0


def test_the_folder_itself_can_be_the_plate(tmp_path: Path) -> None:
    make(tmp_path)
    screen = read(tmp_path / "P1", tables=tmp_path)
    assert screen.problems == ()
    assert set(screen.fields["plate"]) == {"P1"}
    assert screen.fields["file_dna"].str.startswith("TimePoint_1/").all()


def test_a_pattern_takes_the_plate_out_of_the_path(tmp_path: Path) -> None:
    write_map(tmp_path)
    touch(tmp_path / "P1" / "2015-02-03" / "123" / "TimePoint_1", *named())
    with pytest.raises(DataError, match=r"left out: 8, of 123 B02, 123 B03, 123 B04, 123 B05") as fault:
        read(tmp_path)
    assert "wells of map.csv without a picture: P1 B02, P1 B03, P1 B04, P1 B05" in str(fault.value)
    assert "screen.plate_pattern" in str(fault.value)
    assert set(read(tmp_path, plate_pattern="^([^/]+)/").fields["plate"]) == {"P1"}
    with pytest.raises(DataError, match=r"'P1/2015-02-03/123': screen\.plate_pattern '\^\(Q.+ does not match"):
        read(tmp_path, plate_pattern=r"^(Q\d)/")


def test_a_pattern_joins_folders_of_one_wavelength_each(tmp_path: Path) -> None:
    write_map(tmp_path)
    for wave in (1, 2):
        touch(tmp_path / f"images_P1w{wave}", *named(waves=[wave]))
    screen = read(tmp_path, plate_pattern=r"_(.+)w\d$")
    require_sound(screen)
    assert screen.fields["file_actin"].str.startswith("images_P1w2/").all()


def stacked(folder: Path) -> None:
    """Two wavelengths in three steps and a projection."""
    write_map(folder)
    touch(folder / "P1" / "TimePoint_1", *named())
    for step in (1, 2, 3):
        touch(folder / "P1" / "TimePoint_1" / f"ZStep_{step}", *named())


def test_a_plane_of_a_stack_must_be_chosen(tmp_path: Path) -> None:
    stacked(tmp_path)
    with pytest.raises(UsageError) as fault:
        read(tmp_path)
    assert str(fault.value) == 'screen.z: plate P1 has several planes. Set the one to read: "projection", 1, 2, 3.'
    assert read(tmp_path, z=2).fields["file_dna"].str.startswith("P1/TimePoint_1/ZStep_2/my").all()
    assert read(tmp_path, z="projection").fields["file_dna"].str.startswith("P1/TimePoint_1/my").all()


def test_exports_have_the_projection_in_step_0(tmp_path: Path) -> None:
    stacked(tmp_path)
    export = tmp_path / "P1" / "TimePoint_1" / "ZStep_0"
    touch(export)
    for picture in (tmp_path / "P1" / "TimePoint_1").glob("*.tif"):
        picture.rename(export / picture.name)
    assert read(tmp_path, z="projection").fields["file_dna"].str.startswith("P1/TimePoint_1/ZStep_0/").all()


def test_a_plane_that_a_plate_lacks_is_a_problem(tmp_path: Path) -> None:
    stacked(tmp_path)
    write_map(tmp_path, *MAP, "P2,B02,taxol,0.3,tubulin")
    touch(tmp_path / "P2", *named(["B02"]))
    problem = 'plate P2: no picture of z-plane 3. Allowed (screen.z): "projection"'
    assert read(tmp_path, z=3).problems == (problem,)
    with pytest.raises(
        DataError, match=r"plate P1: no picture of z-plane 4\. Allowed \(screen\.z\): \"projection\", 1"
    ):
        read(tmp_path, z=4)


def test_a_wavelength_of_a_single_plane_is_read_beside_stacks(tmp_path: Path) -> None:
    stacked(tmp_path)
    touch(tmp_path / "P1" / "TimePoint_1" / "ZStep_1", *named(waves=[4]))
    screen = read(tmp_path, z="projection", channels={"dna": 1, "er": 4})
    require_sound(screen)
    assert screen.fields["file_er"].str.startswith("P1/TimePoint_1/ZStep_1/").all()
    assert "plate P1: one plane alone, which is read whatever screen.z is: wavelength 4" in screen.notes


def test_one_time_point_is_read(tmp_path: Path) -> None:
    make(tmp_path)
    touch(tmp_path / "P1" / "TimePoint_2", *named())
    assert read(tmp_path).fields["file_dna"].str.startswith("P1/TimePoint_1/").all()
    assert read(tmp_path, time_point=2).fields["file_dna"].str.startswith("P1/TimePoint_2/").all()
    with pytest.raises(DataError, match=r"plate P1: no picture of time point 3\. Allowed \(screen\.time_point\): 1, 2"):
        read(tmp_path, time_point=3)


def test_two_pictures_of_one_wavelength_are_a_problem(tmp_path: Path) -> None:
    make(tmp_path)
    again = f"my screen_B03_s2_w1{GUID}.tif"
    touch(tmp_path / "P1" / "TimePoint_1", again)
    before = next(name for name in named() if "B03_s2_w1" in name)
    screen = read(tmp_path)
    assert screen.problems == (
        "plate P1, well B03, site 2: wavelength 1 has 2 pictures, not one: "
        f"P1/TimePoint_1/{again}, P1/TimePoint_1/{before}",
    )
    assert len(screen.fields) == 8


def test_a_plate_that_was_taken_twice_is_a_problem(tmp_path: Path) -> None:
    write_map(tmp_path)
    for date in ("2015-02-03", "2015-02-04"):
        touch(tmp_path / "P1" / date, *named(["B02"]))
    problems = read(tmp_path, plate_pattern="^([^/]+)/").problems
    assert len(problems) == 4
    assert "site 1: wavelength 1 has 2 pictures, not one: P1/2015-02-03/my screen_B02" in problems[0]


def test_a_site_that_lacks_a_wavelength_is_told_and_can_be_skipped(tmp_path: Path) -> None:
    make(tmp_path)
    gone = [name for name in named() if "B04_s1_w2" in name or "B05_s2_w1" in name]
    for name in gone:
        (tmp_path / "P1" / "TimePoint_1" / name).unlink()
    screen = read(tmp_path)
    folder = tmp_path / "P1" / "TimePoint_1"
    line = f"{folder}: 2 of 16 pictures are missing: my screen_B04_s1_w2.tif, my screen_B05_s2_w1.tif"
    assert screen.problems == screen.missing == (line,)
    require_sound(screen, allow_missing=True)
    with pytest.raises(DataError, match=r'set convert\.on_bad_field = "skip"'):
        require_sound(screen)


def test_a_wavelength_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UsageError) as fault:
        read(tmp_path, channels={"dna": 1, "er": 5})
    assert str(fault.value) == "screen.channels.er: no picture is of wavelength 5. There are: 1, 2."


def test_channels_keep_their_order_and_others_are_not_read(tmp_path: Path) -> None:
    write_map(tmp_path)
    touch(tmp_path / "P1", *named(waves=(1, 2, 4)))
    screen = read(tmp_path, channels={"er": 4, "dna": 1})
    assert screen.channels == ("er", "dna")
    assert screen.notes[0] == "wavelengths: 1 is dna, 2 is not read, 4 is er"


def test_the_htd_file_names_the_wavelengths(tmp_path: Path) -> None:
    make(tmp_path)
    lines = ['"HTSInfoFile", Version 1.0', '"NWavelengths", 2', '"WaveName1", "DAPI"', '"WaveName2", "Größe 5 µm"']
    text = "\r\n".join([*lines, '"WaveCollect1", 1', '"EndFile"', ""])
    (tmp_path / "P1" / "my screen.HTD").write_bytes(text.encode("latin-1"))
    assert read(tmp_path).notes[0] == "wavelengths: 1 (DAPI) is dna, 2 (Größe 5 µm) is actin"
    with pytest.raises(UsageError, match=r"no picture is of wavelength 3\. There are: 1 \(DAPI\), 2 \(Größe 5 µm\)\."):
        read(tmp_path, channels={"dna": 3})
    # Plates that name them in different ways may have been taken in another order: the note shows both.
    touch(tmp_path / "P2", "b.htd")
    (tmp_path / "P2" / "b.htd").write_text('"WaveName1", "FITC"\n')
    assert read(tmp_path).notes[0] == "wavelengths: 1 (DAPI or FITC) is dna, 2 (Größe 5 µm) is actin"


def test_a_map_without_plates_holds_for_all(tmp_path: Path) -> None:
    write_map(tmp_path, "b2,DMSO,w1,r1", "B3,taxol,w1,r2", header="Well,Drug,Week,Rep")
    for plate in ("P1", "P2"):
        touch(tmp_path / plate, *named(["B02", "B03"]))
    columns = {"well": "Well", "compound": "Drug", "batch": "Week", "replicate": "Rep"}
    screen = read(tmp_path, columns=columns)
    assert screen.problems == ()
    assert screen.fields.groupby(["plate", "well"])["compound"].first().to_list() == ["DMSO", "taxol"] * 2
    assert set(screen.fields["batch"]) == {"w1"}
    assert screen.fields["replicate"].to_list() == ["r1", "r1", "r2", "r2"] * 2
    assert set(screen.fields["role"]) == {"dmso", "unlabelled"}
    assert "no field has a label: there is nothing to be learnt" in screen.notes


def test_wells_of_one_side_alone_are_noted(tmp_path: Path) -> None:
    make(tmp_path, *MAP[:3], "P1,H12,taxol,1,tubulin", "P3,A01,taxol,1,tubulin")
    screen = read(tmp_path)
    assert screen.problems == ()
    assert len(screen.fields) == 6
    assert screen.notes[:2] == (
        "fields of wells that map.csv does not name, left out: 2, of P1 B05",
        "wells of map.csv without a picture: P1 H12, P3 A01",
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("P1,B,taxol,1,tubulin", "map.csv row 4: 'B' is no well, as A01 to AF48"),
        ("P1,,taxol,1,tubulin", "map.csv row 4: '' is no well, as A01 to AF48"),
        ("P1,A49,taxol,1,tubulin", "map.csv row 4: 'A49' is no well, as A01 to AF48"),
        ("P1,AG01,taxol,1,tubulin", "map.csv row 4: 'AG01' is no well, as A01 to AF48"),
        (",B04,taxol,1,tubulin", "map.csv row 4: the plate is empty"),
        ("P1,B04,,1,tubulin", "map.csv row 4: the compound is empty"),
        ("P1,b2,taxol,1,tubulin", "map.csv row 4: well P1 B02 stands a second time"),
        ("P1,B04,taxol,high,tubulin", "map.csv row 4: the concentration is 'high', which is no number"),
        ("P1,B04,taxol,,tubulin", "map.csv row 4: the concentration is empty"),
        ("P1,B04,taxol,0.3,actin", "treatment taxol 0.3 uM: conflicting labels: actin, tubulin"),
        ("P1,B04,Taxol,0.3,tubulin", "compound 'taxol' and 'Taxol': one compound, 2 spellings? Write it in one"),
    ],
)
def test_a_bad_row_of_the_map_is_told_once(tmp_path: Path, row: str, expected: str) -> None:
    make(tmp_path, *MAP[:2], row, MAP[3])
    assert read(tmp_path).problems == (expected,)


def test_a_map_that_can_not_be_read_says_what_to_change(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=r"no column 'Compound' \(screen\.columns\.compound = \"Compound\"\)"):
        read(tmp_path, columns=COLUMNS | {"compound": "Compound"})
    with pytest.raises(DataError, match=r"is ';' its separator\? Set screen\.separator"):
        read(tmp_path, separator=";")
    with pytest.raises(DataError, match=r"Tables in this folder: map\.csv\. Set screen\.table, or screen\.tables"):
        read(tmp_path, table="other.csv")


def test_a_name_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "P1" / os.fsdecode(b"Gr\xf6\xdfe_B02_s3_w1.tif")).touch()
    problem = r"'P1/Gr\udcf6\udcdfe_B02_s3_w1.tif': the name is no text in UTF-8. Rename it"
    assert read(tmp_path).problems == (problem,)


def test_links_to_plates_are_followed_and_never_in_circles(tmp_path: Path) -> None:
    make(tmp_path / "store")
    (tmp_path / "plates").mkdir()
    (tmp_path / "plates" / "P1").symlink_to(tmp_path / "store" / "P1")
    (tmp_path / "store" / "P1" / "up").symlink_to(tmp_path / "plates")
    screen = read(tmp_path / "plates", tables=tmp_path / "store")
    require_sound(screen)
    assert len(screen.fields) == 8


def test_folders_are_listed_and_no_picture_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    listed: list[Path] = []
    scandir = os.scandir
    monkeypatch.setattr("os.scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr(tifffile, "TiffFile", None)
    read_screen(settings(tmp_path), check_files=False)
    assert sorted(listed) == [tmp_path] * 2 + [tmp_path / "P1", tmp_path / "P1" / "TimePoint_1"]  # and that of the map


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"z": "max"}, "screen.z: found 'max'. Allowed are \"projection\" and the number of a z-step, from 1."),
        ({"z": 0}, 'screen.z: found 0. Allowed are "projection" and the number of a z-step, from 1.'),
        ({"channels": {"dna": 1, "er": 1}}, "screen: channels gives two channels one wavelength: 1, 1."),
        ({"channels": {"dna": 0}}, "screen.channels.dna: found 0. Input should be greater than or equal to 1."),
        ({"channels": {}}, "screen.channels: "),
        ({"channels": {name: ord(name) for name in "abcdef"}}, "screen.channels: "),
        ({"plate_pattern": "P1"}, "screen: plate_pattern 'P1' has no group; put the plate in round brackets."),
        ({"plate_pattern": "("}, "screen: plate_pattern '(' is no regular expression: "),
        ({"columns": {"well": "Well"}}, "screen.columns.compound: missing. Name of the compound; on control wells"),
        (
            {"columns": COLUMNS | {"field": "Site"}},
            "screen.columns.field: unknown key. Valid here: plate, well, compound, concentration, label, batch, repl",
        ),
    ],
)
def test_wrong_settings_are_one_clear_sentence(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    screen = settings(tmp_path).model_dump(exclude_none=True) | {"path": str(tmp_path)} | keys
    with pytest.raises(UsageError) as fault:
        parse_job({"study": {"name": "s", "folder": str(tmp_path)}, "screen": screen}, "job.toml")
    assert str(fault.value).startswith(f"job.toml: {message}")
    assert len(str(fault.value).splitlines()) == 1


def job_file(folder: Path) -> Path:
    text = f"""
[study]
name = "plates"
folder = "{folder / "study"}"
[screen]
layout = "metaxpress"
path = "{folder}"
table = "map.csv"
channels = {{ dna = 1, actin = 2 }}
[screen.columns]
plate = "Plate"
well = "Well"
compound = "Drug"
concentration = "Dose"
label = "Target"
"""
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def test_inspect_shows_the_plates_and_fails_on_problems(tmp_path: Path) -> None:
    make(tmp_path)
    told = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["inspect", str(job_file(tmp_path))])
    assert told.exit_code == 0, told.output
    assert f"Pictures: 16 files found, 0 missing, in {tmp_path}" in told.output
    assert "Control wells on each plate: 1. Channels: dna, actin." in told.output
    assert "No problems found." in told.output
    touch(tmp_path / "P1", f"my screen_B03_s2_w1{GUID}.tif")
    told = CliRunner().invoke(cli, ["inspect", str(job_file(tmp_path)), "--json"])
    assert told.exit_code == 1
    facts = json.loads(told.stdout)
    assert (facts["fields"], facts["wells"], facts["plates"], facts["labels"], facts["sound"]) == (8, 4, 1, 2, False)
    assert "well B03, site 2: wavelength 1 has 2 pictures, not one" in facts["problems"][0]


def test_a_conversion_of_plates_is_planned(tmp_path: Path) -> None:
    write_map(tmp_path)
    folder = tmp_path / "P1" / "TimePoint_1"
    folder.mkdir(parents=True)
    pixels = np.arange(64 * 80, dtype=np.uint16).reshape(64, 80)
    for name in named():
        tifffile.imwrite(folder / name, pixels)
    screen = read_screen(load_job(job_file(tmp_path)).screen)
    require_sound(screen)
    plan = plan_conversion(ConvertSettings(), screen, [32], tmp_path / "store")
    assert str(plan.format) == "64 x 80 uint16"
    assert plan.channels == ("dna", "actin")
    assert (plan.totals()["fields"], plan.totals()["dmso_fields"]) == (6, 2)


def test_the_example_job_is_valid() -> None:
    screen = load_job(Path(__file__).parents[1] / "jobs" / "metaxpress.toml").screen
    assert isinstance(screen, MetaxpressScreen)
    assert list(screen.channels.items()) == [("dna", 1), ("tubulin", 2), ("actin", 4)]
