"""What `cellhpc inspect` says of a screen: counts for JSON, and the same in a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from cellhpc.screens import Screen, read_screen, render_summary, summary
from cellhpc.settings import Bbbc021Screen, ManifestScreen

TABLE = """Plate,Well,Drug,Dose,Target,File
P1,B02,DMSO,,,a
P1,B03,DMSO,,,b
P1,B04,taxol,0.3,tubulin,c
P1,B04,taxol,0.3,tubulin,d
P1,B05,nocodazole,1,tubulin,e
P2,B05,cisplatin,10,dna [repair],f
P2,B06,aspirin,10,,g
P2,B07,etoposide,10,dna [repair],h
"""


def read(folder: Path, table: str = TABLE) -> Screen:
    (folder / "fields.csv").write_text(table)
    columns = {"plate": "Plate", "well": "Well", "compound": "Drug", "concentration": "Dose", "label": "Target"}
    files = {"all": "{File}.png"}
    return read_screen(
        ManifestScreen(
            layout="manifest",
            path=folder,
            table="fields.csv",
            columns=columns,
            channels=("dna",),
            files=files,
            drop_compounds=("etoposide",),
        )
    )


def shown(screen: Screen) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render_summary(summary(screen)))
    return console.file.getvalue()


def test_counts_are_json_and_tell_everything(tmp_path: Path) -> None:
    for name in "abcdefg":
        (tmp_path / f"{name}.png").touch()
    counts = summary(read(tmp_path))
    assert json.loads(json.dumps(counts)) == counts
    problem = f"{tmp_path}: 1 of 8 pictures are missing: h.png"
    notes = counts.pop("notes")
    assert len(notes) == 2
    assert counts == {
        "fields": 8,
        "plates": 2,
        "batches": 0,
        "wells": 7,
        "labelled_fields": 5,
        "fields_used": 4,
        "wells_used": 3,
        "plates_used": 2,
        "batches_used": 0,
        "treatments": 3,
        "compounds": 3,
        "labels": 2,
        "fields_per_role": {"treatment": 4, "dmso": 2, "unlabelled": 1, "left out": 1},
        "compounds_per_label": {"dna [repair]": 1, "tubulin": 2},
        "treatments_per_label": {"dna [repair]": 1, "tubulin": 2},
        "fields_per_label": {"dna [repair]": 1, "tubulin": 3},
        "dmso_wells_per_plate": {"min": 0, "max": 2},
        "channels": ["dna"],
        "pictures": {"root": str(tmp_path), "checked": True, "found": 7, "missing": 1},
        "problems": [problem],
        "sound": False,
    }


def test_the_terminal_shows_counts_notes_and_problems(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    text = shown(read(tmp_path, TABLE.replace("10,,g", "ten,,g")))
    assert "dna [repair]" in text
    assert "Control wells on each plate: 0 to 2" in text
    assert "Notes (2)" in text
    assert "label dna [repair]: a single compound (cisplatin)" in text
    assert "Problems (2)" in text
    assert "fields.csv row 8: the concentration is 'ten', which is no number" in text
    assert "Pictures: 1 files found, 7 missing" in text


def test_many_problems_are_cut_short_in_the_terminal_alone(tmp_path: Path) -> None:
    rows = [f"P1,B{number},d{number},x,tubulin,{number}" for number in range(30)]
    screen = read(tmp_path, "\n".join([TABLE.strip(), *rows]))
    assert len(summary(screen)["problems"]) == 30
    assert "... and 10 more; --json has them all" in shown(screen)


def test_the_published_bbbc021_is_told_as_published(cellhpc_data: Path) -> None:
    screen = read_screen(Bbbc021Screen(layout="bbbc021", path=cellhpc_data / "bbbc021_metadata"))
    counts = summary(screen)
    expected = {
        "fields": 13_200,
        "plates": 55,
        "batches": 10,
        "wells": 3_300,
        "labelled_fields": 2_528,
        "fields_used": 1_208,
        "wells_used": 302,
        "plates_used": 49,
        "treatments": 103,
        "compounds": 38,
        "labels": 12,
        "dmso_wells_per_plate": {"min": 6, "max": 6},
        "sound": True,
    }
    assert {key: counts[key] for key in expected} == expected
    assert counts["compounds_per_label"]["Eg5 inhibitors"] == 2
    assert counts["compounds_per_label"]["Cholesterol-lowering"] == 2
    text = shown(screen)
    assert "Pictures: none of 39,600 files" in text
    assert "No problems found." in text
