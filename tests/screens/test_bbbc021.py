"""BBBC021's reader: the published tables in their exact counts, and tiny tables with one thing wrong."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from cellhpc.errors import DataError, UsageError
from cellhpc.screens import Screen, read_screen, require_sound
from cellhpc.settings import Bbbc021Screen

CHANNELS = {"DAPI": 1, "Tubulin": 2, "Actin": 4}
WELLS = (
    ("Week1_22123", "B02", "DMSO", "0"),
    ("Week1_22123", "B11", "taxol", "0.3"),
    ("Week1_22123", "D05", "taxol", "0.3"),
    ("Week1_22123", "C05", "ALLN", "3"),
    ("Week1_22123", "C06", "emetine", "0.10"),
    ("Week2_24121", "B02", "DMSO", "0"),
    ("Week2_24121", "B11", "taxol", "0.3"),
    ("Week2_24121", "C05", "acyclovir", "3"),
)
MOAS = (
    ("taxol", "0.300000", "Microtubule stabilizers"),
    ("ALLN", "3.000000", "Protein degradation"),
    ("emetine", "0.100000", "Protein synthesis"),
    ("DMSO", "0.000000", "DMSO"),
)
Alter = Callable[[pd.DataFrame], object]


def image_table() -> pd.DataFrame:
    rows = []
    for plate, well, compound, concentration in WELLS:
        week = plate.split("_")[0]
        for site in (1, 2):
            row = {}
            for stain, number in CHANNELS.items():
                row[f"Image_FileName_{stain}"] = f"{week}_150607_{well}_s{site}_w{number}{plate[-5:]}{well}.tif"
                row[f"Image_PathName_{stain}"] = f"{week}/{plate}"
            row |= {"Image_Metadata_Plate_DAPI": plate, "Image_Metadata_Well_DAPI": well, "Replicate": "1"}
            row |= {"Image_Metadata_Compound": compound, "Image_Metadata_Concentration": concentration}
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def moa_table() -> pd.DataFrame:
    return pd.DataFrame(MOAS, columns=["compound", "concentration", "moa"], dtype=object)


def touch_pictures(folder: Path) -> None:
    table = image_table()
    for stain in CHANNELS:
        for part, name in zip(table[f"Image_PathName_{stain}"], table[f"Image_FileName_{stain}"], strict=True):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / name).touch()


def read(folder: Path, images: Alter | None = None, moas: Alter | None = None, **settings: object) -> Screen:
    """Write the two tables, changed in place as asked, and read them."""
    for name, table, alter in (("image", image_table(), images), ("moa", moa_table(), moas)):
        if alter:
            alter(table)
        table.to_csv(folder / f"BBBC021_v1_{name}.csv", index=False)
    return read_screen(Bbbc021Screen(layout="bbbc021", path=folder, **settings))


def put(column: str, row: int, value: str) -> Alter:
    return lambda table: table.__setitem__(column, table[column].where(table.index != row, value))


def test_the_published_tables_give_the_published_counts(cellhpc_data: Path) -> None:
    screen = read_screen(Bbbc021Screen(layout="bbbc021", path=cellhpc_data / "bbbc021_metadata"))
    fields = screen.fields
    used = fields[fields["role"] == "treatment"]

    assert len(fields) == 13_200
    assert fields["plate"].nunique() == 55
    assert fields["batch"].nunique() == 10
    assert (fields["label"] != "").sum() == 2_528
    assert len(used) == 1_208
    assert len(used[["plate", "well"]].drop_duplicates()) == 302
    assert used["plate"].nunique() == 49
    assert used["treatment"].nunique() == 103
    assert used["compound"].nunique() == 38
    assert used["label"].nunique() == 12
    wells_of_treatments = used.drop_duplicates(["plate", "well"]).groupby("treatment").size()
    assert wells_of_treatments.value_counts().to_dict() == {3: 96, 2: 7}
    controls = fields[fields["role"] == "dmso"].groupby("plate")["well"].nunique()
    assert set(controls) == {6}
    assert len(controls) == 55
    assert screen.problems == ()
    assert not screen.pictures_found
    assert screen.pictures_missing == 39_600
    assert "the tables were read alone" in screen.notes[0]


def test_all_taxol_wells_are_kept_when_asked(cellhpc_data: Path) -> None:
    folder = cellhpc_data / "bbbc021_metadata"
    screen = read_screen(Bbbc021Screen(layout="bbbc021", path=folder, taxol="all"), check_files=False)
    used = screen.fields[screen.fields["role"] == "treatment"]
    assert len(used) == 2_528
    assert used.loc[used["treatment"] == "taxol 0.3 uM"].groupby(["plate", "well"]).ngroups == 333


def test_a_field_has_its_site_its_batch_and_its_three_files(tmp_path: Path) -> None:
    touch_pictures(tmp_path)
    screen = read(tmp_path)
    require_sound(screen)
    field = screen.fields[screen.fields["compound"] == "emetine"].iloc[1]
    assert field["treatment"] == "emetine 0.1 uM"
    assert (field["plate"], field["batch"], field["well"], field["field"]) == ("Week1_22123", "Week1", "C06", 2)
    assert field["label"] == "Protein synthesis"
    assert field["file_tubulin"] == "Week1/Week1_22123/Week1_150607_C06_s2_w222123C06.tif"
    assert screen.channels == ("dna", "tubulin", "actin")
    assert screen.pictures_expected == 48
    assert screen.pictures_missing == 0


def test_taxol_is_kept_on_week_1_in_wells_d0x_alone(tmp_path: Path) -> None:
    fields = read(tmp_path).fields
    taxol = fields[fields["compound"] == "taxol"]
    kept = taxol[taxol["role"] == "treatment"]
    assert set(zip(kept["plate"], kept["well"], strict=True)) == {("Week1_22123", "D05")}
    assert set(taxol.loc[taxol["well"] == "B11", "role"]) == {"left out"}
    assert set(taxol["label"]) == {"Microtubule stabilizers"}
    assert set(fields.loc[fields["compound"] == "acyclovir", "role"]) == {"unlabelled"}


def test_a_gzipped_table_is_read_as_the_plain_one(tmp_path: Path) -> None:
    plain = read(tmp_path)
    table = tmp_path / "BBBC021_v1_image.csv"
    table.with_name(f"{table.name}.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    settings = Bbbc021Screen(layout="bbbc021", path=tmp_path)
    pd.testing.assert_frame_equal(read_screen(settings).fields, plain.fields)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, images=lambda table: table.drop(columns=["Replicate", "Image_FileName_Actin"], inplace=True))
    message = str(error.value)
    assert "2 of the 11 columns needed are missing" in message
    assert "no column 'Replicate'" in message
    assert "no column 'Image_FileName_Actin'" in message
    assert "Its columns are: Image_FileName_DAPI" in message
    assert 'screen.layout = "manifest"' in message


def test_a_missing_table_says_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"BBBC021_v1_image.csv: the table is missing") as error:
        read_screen(Bbbc021Screen(layout="bbbc021", path=tmp_path))
    assert "Tables in this folder: other.csv. Set screen.tables." in str(error.value)


@pytest.mark.parametrize(
    ("images", "moas", "expected"),
    [
        (
            put("Image_Metadata_Concentration", 6, "3 uM"),
            None,
            "BBBC021_v1_image.csv row 8: the concentration is '3 uM', which is no number",
        ),
        (
            put("Image_Metadata_Concentration", 6, "0,3"),
            None,
            "row 8: the concentration is '0,3', which is no number (write a decimal point)",
        ),
        (put("Image_Metadata_Concentration", 6, ""), None, "row 8: the concentration is empty"),
        (put("Image_Metadata_Well_DAPI", 6, ""), None, "BBBC021_v1_image.csv row 8: the well is empty"),
        (put("Image_Metadata_Compound", 6, ""), None, "BBBC021_v1_image.csv row 8: the compound is empty"),
        (put("Image_Metadata_Plate_DAPI", 6, ""), None, "BBBC021_v1_image.csv row 8: the plate is empty"),
        (
            put("Image_Metadata_Plate_DAPI", 6, "22123"),
            None,
            "row 8: the plate '22123' does not begin with its week, as Week4_27481",
        ),
        (
            lambda table: table.__setitem__(slice(7, 8), table.iloc[6].tolist()),
            None,
            "row 8: plate Week1_22123, well C05, field 1 stands 2 times, also at BBBC021_v1_image.csv row 9",
        ),
        (put("Image_FileName_Actin", 6, "plate.tif"), None, "row 8: the name 'plate.tif' does not tell well and site"),
        (
            put("Image_FileName_Actin", 6, "Week1_150607_C05_s2_w4A.tif"),
            None,
            "row 8: the Actin picture 'Week1_150607_C05_s2_w4A.tif' is not of the row's well and site",
        ),
        (
            put("Image_PathName_DAPI", 6, "../../etc"),
            None,
            "row 8: the picture '../../etc/Week1_150607_C05_s1_w122123C05.tif' lies outside of screen.path",
        ),
        (
            None,
            put("moa", 1, "Protein folding"),
            "BBBC021_v1_moa.csv row 3: unknown label 'Protein folding'. Allowed: Actin disruptors, Aurora kinase",
        ),
        (
            None,
            lambda table: table.loc.__setitem__(4, ("ALLN", "3.0", "Epithelial")),
            "row 6: ALLN 3 uM: conflicting labels: Protein degradation, Epithelial",
        ),
        (None, put("concentration", 1, "three"), "BBBC021_v1_moa.csv row 3: the concentration is 'three'"),
        (
            put("Image_Metadata_Compound", 6, "emetine"),
            None,
            "plate Week1_22123, well C05: its fields have different treatments: ALLN 3 uM, emetine 3 uM",
        ),
    ],
)
def test_a_bad_cell_is_told_with_its_row(tmp_path: Path, images: Alter, moas: Alter, expected: str) -> None:
    screen = read(tmp_path, images, moas)
    assert expected in "\n".join(screen.problems)
    with pytest.raises(DataError) as error:
        require_sound(screen)
    assert expected in str(error.value)


def test_every_problem_is_listed_and_not_the_first_alone(tmp_path: Path) -> None:
    def spoil(table: pd.DataFrame) -> None:
        put("Image_Metadata_Concentration", 6, "?")(table)
        put("Image_Metadata_Well_DAPI", 10, "")(table)

    problems = "\n".join(read(tmp_path, spoil, put("moa", 2, "")).problems)
    assert "BBBC021_v1_image.csv row 8: the concentration is '?'" in problems
    assert "BBBC021_v1_image.csv row 12: the well is empty" in problems
    assert "BBBC021_v1_moa.csv row 4: unknown label ''" in problems


def test_concentrations_match_when_rounding_differs_and_not_when_they_differ(tmp_path: Path) -> None:
    fields = read(tmp_path, put("Image_Metadata_Concentration", 8, "0.10000000001")).fields
    assert list(fields.loc[fields["compound"] == "emetine", "label"]) == ["Protein synthesis"] * 2
    fields = read(tmp_path, lambda table: table.replace({"0.10": "0.1001"}, inplace=True)).fields
    assert set(fields.loc[fields["compound"] == "emetine", "label"]) == {""}


def test_missing_pictures_are_counted_and_named_by_folder(tmp_path: Path) -> None:
    touch_pictures(tmp_path)
    for number in (1, 2):
        (tmp_path / f"Week1/Week1_22123/Week1_150607_C06_s1_w{number}22123C06.tif").unlink()
    screen = read(tmp_path)
    assert screen.pictures_missing == 2
    assert screen.problems == screen.missing
    with pytest.raises(DataError) as error:
        require_sound(screen)
    message = str(error.value)
    assert "Week1/Week1_22123: 2 of 30 pictures are missing: Week1_150607_C06_s1_w122123C06.tif, Week1" in message
    assert 'set convert.on_bad_field = "skip"' in message
    require_sound(screen, allow_missing=True)


def test_tables_alone_can_be_inspected_but_not_used(tmp_path: Path) -> None:
    screen = read(tmp_path)
    assert screen.problems == ()
    assert not screen.pictures_found
    with pytest.raises(DataError, match="none of the 48 pictures that the tables name is here"):
        require_sound(screen, allow_missing=True)


def test_compounds_can_be_kept_or_dropped(tmp_path: Path) -> None:
    fields = read(tmp_path, compounds=("ALLN", "emetine"), drop_compounds=("emetine",)).fields
    roles = fields.groupby("compound")["role"].unique().map(list).to_dict()
    assert roles == {
        "ALLN": ["treatment"],
        "DMSO": ["dmso"],
        "acyclovir": ["unlabelled"],
        "emetine": ["left out"],
        "taxol": ["left out"],
    }


def test_an_unknown_compound_in_the_job_file_names_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read(tmp_path, compounds=("Emetin",), drop_compounds=("qqq", "DMSO"))
    message = str(error.value)
    assert "screen.compounds: the screen has no compound 'Emetin'. Near: emetine." in message
    assert "screen.drop_compounds: the screen has no compound 'qqq'. Its compounds are: ALLN, DMSO" in message
    assert "'DMSO' is the control, and controls are always kept" in message


def test_notes_tell_of_what_the_run_will_stumble_over(tmp_path: Path) -> None:
    def no_control_on_week_2(table: pd.DataFrame) -> None:
        table.loc[table["Image_Metadata_Plate_DAPI"] == "Week2_24121", "Image_Metadata_Compound"] = "acyclovir"

    notes = "\n".join(read(tmp_path, no_control_on_week_2).notes)
    assert "1 plate without DMSO wells: Week2_24121. Normalisation needs them" in notes
    assert "label Protein degradation: a single compound (ALLN)" in notes
    assert 'set folds.on_single_compound = "drop"' in notes
