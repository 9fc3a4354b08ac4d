"""The manifest's reader: any table whose columns the job file names, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cellhpc.errors import DataError, UsageError
from cellhpc.screens import Screen, read_screen, require_sound
from cellhpc.settings import ManifestScreen, parse_job

HEADER = "Plate,Well,Site,Drug,Dose,Target,File"
ROWS = (
    "P1,B02,1,DMSO,,,a",
    "P1,B03,1,taxol,0.3,tubulin,b",
    "P1,B03,2,taxol,0.3,tubulin,c",
    "P1,B04,1,nocodazole,1,tubulin,d",
    "P1,B05,1,cisplatin,10,dna,e",
    "P1,B06,1,etoposide,3,dna,f",
    "P1,B07,1,aspirin,3,,g",
    "P2,B03,1,taxol,0.30,tubulin,h",
)
COLUMNS = {"plate": "Plate", "well": "Well", "field": "Site", "compound": "Drug", "concentration": "Dose"}
COLUMNS["label"] = "Target"
CHANNEL_HEADER = "Plate,Well,Drug,Target,Stain,File"


def settings(folder: Path, **changes: Any) -> ManifestScreen:
    keys: dict[str, Any] = {
        "layout": "manifest",
        "path": folder,
        "table": "fields.csv",
        "columns": COLUMNS,
        "channels": ("dna", "actin"),
        "files": {"dna": "{Plate}/{File}_1.tif", "actin": "{Plate}/{File}_2.tif"},
    }
    return ManifestScreen(**(keys | changes))


def by_channel(folder: Path, *rows: str) -> ManifestScreen:
    (folder / "fields.csv").write_text("\n".join([CHANNEL_HEADER, *rows, ""]))
    return settings(
        folder,
        columns={"plate": "Plate", "well": "Well", "compound": "Drug", "label": "Target"},
        rows="channel",
        files={"all": "{File}.tif", "channel": "{Stain}"},
    )


def read(folder: Path, *rows: str, header: str = HEADER, **changes: Any) -> Screen:
    (folder / "fields.csv").write_text("\n".join([header, *(rows or ROWS), ""]))
    return read_screen(settings(folder, **changes))


def changed(row: int, text: str) -> list[str]:
    rows = list(ROWS)
    rows[row] = text
    return rows


def test_the_real_subset_has_its_counts(cellhpc_data: Path) -> None:
    screen = read_screen(
        ManifestScreen(
            layout="manifest",
            path=cellhpc_data / "bbbc021_subset",
            table="labels.csv",
            separator=";",
            columns={
                "plate": "plate",
                "well": "well",
                "compound": "compound",
                "concentration": "concentration",
                "label": "moa",
                "replicate": "replicate",
            },
            channels=("actin", "tubulin", "dna"),
            files={"all": "images/bbbc021v1_{index}.png"},
            batch_pattern=r"^(Week\d+)_",
        )
    )
    require_sound(screen)
    fields = screen.fields
    assert len(fields) == 660
    assert fields["plate"].nunique() == 30
    assert fields["compound"].nunique() == 18
    assert fields["treatment"].nunique() == 55
    assert fields["label"].nunique() == 6
    assert fields["batch"].nunique() == 7
    assert fields["field"].value_counts().to_dict() == {1: 165, 2: 165, 3: 165, 4: 165}
    assert set(fields["role"]) == {"treatment"}
    assert (fields["file_dna"] == fields["file_actin"]).all()
    assert fields.loc[fields["file_dna"] == "images/bbbc021v1_0.png", "treatment"].item() == "anisomycin 0.3 uM"
    assert (screen.pictures_expected, screen.pictures_missing) == (660, 0)
    assert "30 plates without DMSO wells" in screen.notes[0]


def test_a_row_for_each_field_becomes_the_fields_table(tmp_path: Path) -> None:
    fields = read(tmp_path).fields
    assert list(fields.columns) == [
        *("plate", "batch", "well", "field", "compound", "concentration", "unit", "treatment", "label", "replicate"),
        *("role", "file_dna", "file_actin"),
    ]
    taxol = fields[fields["compound"] == "taxol"]
    assert set(taxol["treatment"]) == {"taxol 0.3 uM"}
    # Without a column, the wells of a treatment are its replicates.
    assert list(taxol["replicate"]) == ["1", "1", "2"]
    assert list(taxol["file_actin"]) == ["P1/b_2.tif", "P1/c_2.tif", "P2/h_2.tif"]
    assert fields.set_index("compound")["role"].to_dict() == {
        "DMSO": "dmso",
        "taxol": "treatment",
        "nocodazole": "treatment",
        "cisplatin": "treatment",
        "etoposide": "treatment",
        "aspirin": "unlabelled",
    }
    assert fields.loc[0, "treatment"] == "DMSO"


def test_parquet_gives_the_same_table_as_csv(tmp_path: Path) -> None:
    as_csv = read(tmp_path)
    table = pd.read_csv(tmp_path / "fields.csv")
    table.to_parquet(tmp_path / "fields.parquet")
    as_parquet = read_screen(settings(tmp_path, table="fields.parquet"))
    pd.testing.assert_frame_equal(as_parquet.fields, as_csv.fields)


def test_whole_numbers_of_parquet_stay_whole_in_file_names(tmp_path: Path) -> None:
    table = pd.DataFrame({"Plate": ["P1", "P1"], "Well": ["B02", "B03"], "Drug": ["a", "b"], "Number": [7, None]})
    table.astype({"Number": "Int64"}).to_parquet(tmp_path / "fields.parquet")
    columns = {"plate": "Plate", "well": "Well", "compound": "Drug"}
    screen = read_screen(settings(tmp_path, table="fields.parquet", columns=columns, files={"all": "{Number}.png"}))
    assert list(screen.fields["file_dna"]) == ["7.png", ""]
    assert "fields.parquet row 2: no picture is named for channel dna" in screen.problems


def test_rows_of_channels_are_joined_to_fields(tmp_path: Path) -> None:
    rows = [f"P1,B0{well},d{well},x,{stain},{well}{stain}" for well in (2, 3) for stain in ("actin", "dna", "er")]
    # A well's second field is told from the first by the order of the rows alone.
    screen = read_screen(by_channel(tmp_path, *rows, "P1,B02,d2,x,dna,2dna2", "P1,B02,d2,x,actin,2actin2"))
    assert screen.problems == ()
    assert screen.fields[["well", "field", "file_dna", "file_actin"]].to_numpy().tolist() == [
        ["B02", 1, "2dna.tif", "2actin.tif"],
        ["B02", 2, "2dna2.tif", "2actin2.tif"],
        ["B03", 1, "3dna.tif", "3actin.tif"],
    ]
    assert "channels that screen.channels does not name are not read: er" in screen.notes[0]


def test_a_field_without_one_of_its_channels_is_a_problem(tmp_path: Path) -> None:
    screen = read_screen(by_channel(tmp_path, "P1,B02,d,x,dna,a", "P1,B02,d,x,actin,b", "P1,B03,d,x,dna,c"))
    assert screen.problems == ("fields.csv row 4: no picture is named for channel actin",)


def test_channels_of_a_field_that_contradict_each_other_are_a_problem(tmp_path: Path) -> None:
    screen = read_screen(by_channel(tmp_path, "P1,B02,d,x,dna,a", "P1,B02,other,x,actin,b"))
    assert screen.problems == ("plate P1, well B02, field 1: the rows of its channels differ in compound",)


def test_missing_columns_are_named_with_the_keys_to_change(tmp_path: Path) -> None:
    columns = COLUMNS | {"plate": "plate", "label": "MoA"}
    with pytest.raises(DataError) as error:
        read(tmp_path, columns=columns, files={"all": "{Plate}/{Name}.png"}, extra_columns=("Donor",))
    message = str(error.value)
    assert "no column 'plate' (screen.columns.plate = \"plate\")" in message
    assert "no column 'MoA' (screen.columns.label = \"MoA\")" in message
    assert "no column 'Name' (screen.files.all = \"{Plate}/{Name}.png\")" in message
    assert "no column 'Donor' (screen.extra_columns)" in message
    assert "Its columns are: Dose, Drug, File, Plate, Site, Target, Well." in message


def test_another_separator_is_suspected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is ';' its separator\? Set screen\.separator"):
        read(tmp_path, separator=";")


@pytest.mark.parametrize(
    ("row", "text", "expected"),
    [
        (1, "P1,B03,1,taxol,high,tubulin,b", "fields.csv row 3: the concentration is 'high', which is no number"),
        (1, "P1,B03,1,taxol,-1,tubulin,b", "row 3: the concentration is '-1', which is no concentration"),
        (1, "P1,B03,1,taxol,inf,tubulin,b", "row 3: the concentration is 'inf', which is no concentration"),
        (1, "P1,B03,1,taxol,,tubulin,b", "fields.csv row 3: the concentration is empty"),
        (1, "P1,B03,one,taxol,0.3,tubulin,b", "fields.csv row 3: the field is 'one', which is no whole number"),
        (
            1,
            "P1,B03,2,taxol,0.3,tubulin,b",
            "row 3: plate P1, well B03, field 2 stands 2 times, also at fields.csv row 4",
        ),
        (1, "P1,,1,taxol,0.3,tubulin,b", "fields.csv row 3: the well is empty"),
        (1, ",B03,1,taxol,0.3,tubulin,b", "fields.csv row 3: the plate is empty"),
        (1, "P1,B03,1,,0.3,tubulin,b", "fields.csv row 3: the compound is empty"),
        (1, "a/b,B03,1,taxol,0.3,tubulin,b", "row 3: the plate 'a/b' can't be the name of a folder"),
        (1, "P1,B03,1,taxol,0.3,actin,b", "treatment taxol 0.3 uM: conflicting labels: actin, tubulin"),
        (1, "P1,B03,1,taxol,3,tubulin,b", "well B03: its fields have different treatments: taxol 0.3 uM, taxol 3 uM"),
        (1, "P1,B03,1,taxol,0.3,tubulin,", "fields.csv row 3: no picture is named for channel dna"),
        (1, "P1,B03,1,taxol,0.3,tubulin,../../b", "the picture 'P1/../../b_1.tif' lies outside of screen.path"),
        (
            1,
            "P1,B03,1,taxol,0.3,tubulin,c",
            "row 3: the picture P1/c_1.tif belongs to 2 fields, also to that at fields.csv",
        ),
    ],
)
def test_a_bad_cell_is_told_with_its_row(tmp_path: Path, row: int, text: str, expected: str) -> None:
    screen = read(tmp_path, *changed(row, text))
    assert expected in "\n".join(screen.problems)
    with pytest.raises(DataError, match="The screen has"):
        require_sound(screen)


@pytest.mark.parametrize("name", ["/etc/passwd", "C:\\data\\a.tif", "..\\a.tif", "x/../../a.tif"])
def test_a_picture_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    screen = read(tmp_path, *changed(1, f"P1,B03,1,taxol,0.3,tubulin,{name}"), files={"all": "{File}"})
    assert (
        f"fields.csv row 3: the picture {name!r} lies outside of screen.path (screen.outside = true would allow it)"
        in screen.problems
    )


def test_a_picture_outside_of_the_folder_is_found_where_the_job_file_allows_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.tif", "in/b.tif", "c.tif"):
        (tmp_path / name).write_bytes(b"not looked into")
    table = "\n".join(["Plate,Well,Drug,File", f"P1,B02,a,{tmp_path}/a.tif", "P1,B03,b,b.tif", "P1,B04,c,../c.tif", ""])
    (tmp_path / "in/fields.csv").write_text(table)
    columns = {"plate": "Plate", "well": "Well", "compound": "Drug"}
    how = settings(tmp_path / "in", columns=columns, channels=("dna",), files={"all": "{File}"}, outside=True)
    screen = read_screen(how)
    assert screen.problems == ()
    assert screen.pictures_missing == 0
    assert screen.fields["file_dna"].tolist() == [f"{tmp_path}/a.tif", "b.tif", "../c.tif"]


def test_a_label_that_is_not_allowed_is_told_with_those_that_are(tmp_path: Path) -> None:
    problems = read(tmp_path, *changed(1, "P1,B03,1,taxol,0.3,tubulln,b"), labels=("dna", "tubulin")).problems
    assert "fields.csv row 3: unknown label 'tubulln'. Allowed (screen.labels): dna, tubulin" in problems


def test_a_plate_that_the_batch_pattern_does_not_match_is_told(tmp_path: Path) -> None:
    screen = read(tmp_path, batch_pattern=r"^(P1)$")
    assert set(screen.fields["batch"]) == {"P1", ""}
    assert "fields.csv row 9: the plate 'P2' does not match screen.batch_pattern '^(P1)$'" in screen.problems


def test_more_columns_are_carried_along(tmp_path: Path) -> None:
    rows = [f"{row},{donor}" for donor, row in enumerate(ROWS)]
    fields = read(tmp_path, *rows, header=f"{HEADER},Donor", extra_columns=("Donor",)).fields
    assert fields["Donor"].iloc[-1] == "7"
    with pytest.raises(UsageError, match=r"screen\.extra_columns: cellhpc has columns of these names: label"):
        read(tmp_path, extra_columns=("label",))


def test_rows_of_another_length_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 3: 3 values where the header has 7"):
        read(tmp_path, *changed(1, "P1,B03,1"))


def test_a_table_that_is_no_table_is_refused_without_a_traceback(tmp_path: Path) -> None:
    for name, content, message in (
        ("fields.csv", b"", "the first line, which should name the columns, is empty"),
        ("fields.csv", HEADER.encode(), "the table has a header and no rows"),
        ("fields.csv", HEADER.encode() + b"\n\xff\xfe,,,,,,", "not text in UTF-8"),
        ("fields.csv.gz", b"not gzipped", "can't be read"),
        ("fields.parquet", b"not parquet", "can't be read"),
        ("fields.csv", b"Plate,Plate\na,b", "columns of the same name: Plate"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_screen(settings(tmp_path, table=name))


def test_spreadsheets_leave_marks_that_do_no_harm(tmp_path: Path) -> None:
    lines = [HEADER, "", *(row.replace(",", " ,") for row in ROWS), ",,,,,,", ""]
    (tmp_path / "fields.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_screen(settings(tmp_path)).fields.equals(read(tmp_path).fields)


def test_pictures_are_looked_for_by_one_listing_of_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "P1").mkdir()
    for name in "abcdefg":
        (tmp_path / "P1" / f"{name}_1.tif").touch()
    listed = []
    scandir = __import__("os").scandir
    monkeypatch.setattr("cellhpc.screens.pictures.os.scandir", lambda path: listed.append(path) or scandir(path))
    screen = read(tmp_path)
    assert screen.pictures_missing == 9
    assert screen.pictures_found
    assert len(screen.missing) == 2
    assert listed.count(tmp_path / "P1") == 1
    assert len(listed) <= 3  # that of the table and of the two plates


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"files": {"dna": "a"}}, 'files has the keys dna; with rows = "field" it needs actin, dna, or all alone'),
        ({"rows": "channel"}, 'files has the keys actin, dna; with rows = "channel" it needs all, channel'),
        ({"rows": "channel", "files": {"all": "a", "channel": "Stain"}}, 'needs a column in braces: "{Channel}"'),
        ({"batch_pattern": "Week"}, "has no group; put the batch in round brackets"),
        ({"batch_pattern": "("}, "is no regular expression"),
        ({"columns": COLUMNS | {"batch": "Week"}, "batch_pattern": "(W)"}, "both tell the batch; keep one of them"),
        ({"channels": ["dna", "dna"], "files": {"all": "a"}}, "channels names one twice: dna, dna"),
    ],
)
def test_keys_that_do_not_agree_are_refused_with_the_job_file(tmp_path: Path, keys: dict, message: str) -> None:
    screen = settings(tmp_path).model_dump() | {"path": str(tmp_path), "tables": None} | keys
    with pytest.raises(UsageError) as error:
        parse_job({"study": {"name": "s", "folder": str(tmp_path)}, "screen": screen}, "job.toml")
    assert message in str(error.value)
    assert str(error.value).startswith("job.toml: screen")
