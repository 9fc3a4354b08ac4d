"""BBBC014v1: translocation of NFkB in two cell lines under TNF-alpha, one 96-well plate of the Broad collection.

Pictures are `Channel {1|2}-NN-R-CC-00.Bmp` (or .tif): channel 1 NFkB, channel 2 DNA; NN counts the wells 01 to 96
along the rows. Rows A to D are MCF7, E to H A549: four replicates each. Columns 1 to 12 run from 1e-7 to 1e-13 M. As in
Kensert et al. (2019), columns 1 to 4 are labelled positive, 9 to 12 negative, and those between not at all. A batch is
a cell line.

The published pictures carry no doses: without `BBBC014_plate_map.csv` (columns well, cell_line, compound,
concentration_M) they are set in even steps of the logarithm, to three digits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import pandas as pd

from cellhpc.errors import DataError
from cellhpc.screens.pictures import list_folder
from cellhpc.screens.sheets import find_table, read_sheet
from cellhpc.screens.table import Screen, assemble, parse_concentrations
from cellhpc.settings import Bbbc014Screen

PLATE_MAP = "BBBC014_plate_map.csv"
PLATE = "BBBC014"
CHANNELS = ("nfkb", "dna")
COMPOUND = "TNF-alpha"
UNIT = "M"
ROWS, COLUMNS = "ABCDEFGH", 12
POSITIVE, NEGATIVE = range(1, 5), range(9, 13)

_PICTURE = re.compile(r"Channel (?P<channel>[12])-(?P<number>\d\d)-(?P<row>[A-H])-(?P<column>\d\d)-00(?P<ending>\.\w+)")
_ENDINGS = (".bmp", ".tif", ".tiff")
_MAP_COLUMNS = ("well", "cell_line", "compound", "concentration_M")


def read_bbbc014(settings: Bbbc014Screen) -> Screen:
    """Read BBBC014's pictures' names, and its plate map if there is one; see `cellhpc.screens.read_screen`."""
    problems: list[str] = []
    pictures = _pictures(settings, problems)
    if list_folder(settings.tables_folder) & {PLATE_MAP, f"{PLATE_MAP}.gz"}:
        draft = _from_plate_map(settings, pictures, problems)
    elif pictures:
        draft = _from_pictures(pictures)
    else:
        raise DataError(
            f"{settings.path}: no picture is named as Channel 1-01-A-01-00.Bmp, and there is no {PLATE_MAP}.",
            remedy="Set screen.path to the folder of BBBC014's pictures.",
        )
    endings = Counter(name[name.rfind(".") :] for files in pictures.values() for name in files.values())
    ending = endings.most_common(1)[0][0] if endings else ".Bmp"
    columns = draft["well"].str[1:].astype(int)
    draft["label"] = ["positive" if c in POSITIVE else "negative" if c in NEGATIVE else "" for c in columns]
    draft["plate"] = PLATE
    draft["batch"] = draft["cell_line"]
    draft["field"] = 1
    draft["replicate"] = draft["well"].str[0]
    for number, channel in enumerate(CHANNELS, start=1):
        # A picture that is not there keeps the name that it should have, and is told of as missing.
        draft[f"file_{channel}"] = [
            pictures.get(well, {}).get(number, _file_name(number, well, ending)) for well in draft["well"]
        ]
    return assemble(draft, settings, CHANNELS, UNIT, problems=problems, extra=("cell_line",))


def _pictures(settings: Bbbc014Screen, problems: list[str]) -> dict[str, dict[int, str]]:
    """Names of the pictures in the folder, by well and channel."""
    found: dict[str, dict[int, str]] = {}
    for name in sorted(list_folder(settings.path)):
        match = _PICTURE.fullmatch(name)
        if match is None or match["ending"].lower() not in _ENDINGS:
            continue
        well, channel = match["row"] + match["column"], int(match["channel"])
        if not 1 <= int(match["column"]) <= COLUMNS or int(match["number"]) != _number(well):
            problems.append(f"{name}: picture number {match['number']} is not that of well {well}")
        elif channel in found.setdefault(well, {}):
            problems.append(f"{name}: well {well} has another picture of channel {channel}: {found[well][channel]}")
        else:
            found[well][channel] = name
    return found


def _from_pictures(pictures: Mapping[str, object]) -> pd.DataFrame:
    wells = sorted(pictures)
    draft = pd.DataFrame({"well": wells}, index=[f"well {well}" for well in wells], dtype=object)
    draft["cell_line"] = ["MCF7" if well[0] in ROWS[:4] else "A549" for well in wells]
    draft["compound"] = COMPOUND
    draft["concentration"] = [_dose(int(well[1:])) for well in wells]
    return draft


def _from_plate_map(settings: Bbbc014Screen, pictures: Mapping[str, object], problems: list[str]) -> pd.DataFrame:
    sheet = read_sheet(find_table(settings.tables_folder, PLATE_MAP, "screen.tables"))
    sheet.require_columns(dict.fromkeys(_MAP_COLUMNS, ""), f"Remove {PLATE_MAP} to set doses by the column of a well.")
    draft = sheet.rows[list(_MAP_COLUMNS)].rename(columns={"concentration_M": "concentration"})
    known = draft["well"].str.fullmatch(r"[A-H](0[1-9]|1[0-2])")
    problems += [
        f"{where}: {well!r} is no well of a 96-well plate, as A01 to H12"
        for where, well in draft.loc[~known, "well"].items()
    ]
    draft = draft[known].copy()
    if draft.empty:
        raise DataError(f"{sheet.path}: no row names a well.", problems)
    problems += [f"{where}: the cell_line is empty" for where in draft.index[draft["cell_line"] == ""]]
    problems += [
        f"{PLATE_MAP}: no row for well {well}, which has pictures" for well in pictures.keys() - {*draft["well"]}
    ]
    draft["concentration"] = parse_concentrations(draft["concentration"], problems)
    return draft


def _dose(column: int) -> float:
    return float(f"{10 ** (-7 - 6 * (column - 1) / (COLUMNS - 1)):.3g}")


def _number(well: str) -> int:
    return ROWS.index(well[0]) * COLUMNS + int(well[1:])


def _file_name(channel: int, well: str, ending: str) -> str:
    return f"Channel {channel}-{_number(well):02d}-{well[0]}-{well[1:]}-00{ending}"
