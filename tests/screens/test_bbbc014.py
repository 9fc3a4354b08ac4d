"""BBBC014's reader: doses and labels by the columns of the plate, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellhpc.errors import DataError
from cellhpc.screens import Screen, read_screen, require_sound
from cellhpc.settings import Bbbc014Screen


def touch_plate(folder: Path) -> None:
    for position in range(96):
        row, column = "ABCDEFGH"[position // 12], position % 12 + 1
        for channel in (1, 2):
            (folder / f"Channel {channel}-{position + 1:02d}-{row}-{column:02d}-00.Bmp").touch()


def read(folder: Path, **settings: object) -> Screen:
    return read_screen(Bbbc014Screen(layout="bbbc014", path=folder, **settings))


def write_map(folder: Path, *rows: str) -> None:
    (folder / "BBBC014_plate_map.csv").write_text("\n".join(["well,cell_line,compound,concentration_M", *rows, ""]))


def test_the_four_real_pictures_are_two_wells(cellhpc_data: Path) -> None:
    screen = read(cellhpc_data / "bbbc014_wells")
    require_sound(screen)
    assert screen.channels == ("nfkb", "dna")
    assert list(screen.fields["well"]) == ["A01", "A12"]
    assert list(screen.fields["label"]) == ["positive", "negative"]
    assert list(screen.fields["concentration"]) == [1e-7, 1e-13]
    assert list(screen.fields["file_dna"]) == ["Channel 2-01-A-01-00.tif", "Channel 2-12-A-12-00.tif"]
    assert screen.pictures_missing == 0


def test_a_whole_plate_has_two_cell_lines_and_labels_by_column(tmp_path: Path) -> None:
    touch_plate(tmp_path)
    screen = read(tmp_path)
    fields = screen.fields
    require_sound(screen)
    assert len(fields) == 96
    assert fields.groupby("cell_line")["replicate"].unique().map("".join).to_dict() == {"A549": "EFGH", "MCF7": "ABCD"}
    assert list(fields["batch"]) == list(fields["cell_line"])
    by_column = fields.groupby(fields["well"].str[1:].astype(int))[["label", "role"]].first()
    assert list(by_column["label"]) == ["positive"] * 4 + [""] * 4 + ["negative"] * 4
    assert list(by_column["role"]) == ["treatment"] * 4 + ["unlabelled"] * 4 + ["treatment"] * 4
    doses = fields.loc[fields["well"].str[0] == "A", "concentration"]
    assert doses.iloc[0] == 1e-7
    assert doses.iloc[1] == 2.85e-8
    assert doses.iloc[-1] == 1e-13
    assert "TNF-alpha 1e-07 M" in set(fields["treatment"])
    assert "all labelled fields are of one compound, TNF-alpha" in "\n".join(screen.notes)


def test_a_plate_map_says_the_doses_even_without_pictures(tmp_path: Path) -> None:
    pictures, tables = tmp_path / "pictures", tmp_path / "tables"
    tables.mkdir()
    write_map(tables, "A01,MCF7,TNF-alpha,5e-8", "E12,A549,TNF-alpha,0")
    screen = read(pictures, tables=tables)
    assert list(screen.fields["concentration"]) == [5e-8, 0]
    assert list(screen.fields["cell_line"]) == ["MCF7", "A549"]
    assert screen.fields["file_nfkb"].iloc[1] == "Channel 1-60-E-12-00.Bmp"
    assert screen.problems == ()
    assert not screen.pictures_found


def test_a_well_without_one_of_its_channels_is_a_problem(tmp_path: Path) -> None:
    touch_plate(tmp_path)
    (tmp_path / "Channel 2-14-B-02-00.Bmp").unlink()
    screen = read(tmp_path)
    assert screen.pictures_missing == 1
    with pytest.raises(DataError, match=r"1 of 192 pictures are missing: Channel 2-14-B-02-00\.Bmp"):
        require_sound(screen)


def test_a_picture_whose_number_is_not_its_wells_is_a_problem(tmp_path: Path) -> None:
    touch_plate(tmp_path)
    (tmp_path / "Channel 1-02-A-03-00.Bmp").touch()
    (tmp_path / "Channel 1-03-A-03-00.tif").touch()
    problems = "\n".join(read(tmp_path).problems)
    assert "Channel 1-02-A-03-00.Bmp: picture number 02 is not that of well A03" in problems
    assert "Channel 1-03-A-03-00.tif: well A03 has another picture of channel 1: Channel 1-03-A-03-00.Bmp" in problems


def test_a_plate_map_with_bad_rows_lists_them(tmp_path: Path) -> None:
    touch_plate(tmp_path)
    rows = [f"{row}{column:02d},MCF7,TNF-alpha,1e-9" for row in "ABCDEFGH" for column in range(1, 13)]
    rows[0] = "A1,MCF7,TNF-alpha,1e-7"
    rows[1] = "A02,,TNF-alpha,low"
    rows[2] = rows[3]
    write_map(tmp_path, *rows)
    problems = "\n".join(read(tmp_path).problems)
    assert "BBBC014_plate_map.csv row 2: 'A1' is no well of a 96-well plate, as A01 to H12" in problems
    assert "BBBC014_plate_map.csv row 3: the cell_line is empty" in problems
    assert "BBBC014_plate_map.csv row 3: the concentration is 'low', which is no number" in problems
    assert "row 4: plate BBBC014, well A04, field 1 stands 2 times, also at BBBC014_plate_map.csv row 5" in problems
    assert "BBBC014_plate_map.csv: no row for well A01, which has pictures" in problems


def test_a_plate_map_without_a_column_names_it(tmp_path: Path) -> None:
    (tmp_path / "BBBC014_plate_map.csv").write_text("well,dose\nA01,1\n")
    with pytest.raises(DataError, match="no column 'concentration_M'"):
        read(tmp_path)


def test_a_folder_without_such_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture is named as Channel 1-01-A-01-00\.Bmp") as error:
        read(tmp_path)
    assert "Set screen.path" in str(error.value)
