"""BBBC021v1: MCF7 cells under 113 compounds, as published by the Broad Bioimage Benchmark Collection.

`BBBC021_v1_image.csv` names three 16-bit TIFFs of each field (DAPI, tubulin, actin) in `Week*/Week*_*` folders, and
`BBBC021_v1_moa.csv` the mechanism of action of 103 treatments (Ljosa et al. 2013, J. Biomol. Screen. 18, 1321). Both
are also read gzipped. A batch is a week.
"""

from __future__ import annotations

import pandas as pd

from cellhpc.errors import listing
from cellhpc.screens.sheets import find_table, read_sheet
from cellhpc.screens.table import Screen, assemble, parse_concentrations, parse_fields
from cellhpc.settings import Bbbc021Screen

IMAGE_TABLE = "BBBC021_v1_image.csv"
MOA_TABLE = "BBBC021_v1_moa.csv"
CHANNELS = {"dna": "DAPI", "tubulin": "Tubulin", "actin": "Actin"}
UNIT = "uM"
CONTROL = "DMSO"
POSITIVE_CONTROL = "taxol"
MOAS = (
    "Actin disruptors",
    "Aurora kinase inhibitors",
    "Cholesterol-lowering",
    "DNA damage",
    "DNA replication",
    "Eg5 inhibitors",
    "Epithelial",
    "Kinase inhibitors",
    "Microtubule destabilizers",
    "Microtubule stabilizers",
    "Protein degradation",
    "Protein synthesis",
)

_COLUMNS = {
    "plate": "Image_Metadata_Plate_DAPI",
    "well": "Image_Metadata_Well_DAPI",
    "compound": "Image_Metadata_Compound",
    "concentration": "Image_Metadata_Concentration",
    "replicate": "Replicate",
}
_FILE_NAME = r"(?:^|_)(?P<well>[A-P]\d\d)_s(?P<site>\d+)_w\d"
_AS_PUBLISHED = (
    'Layout "bbbc021" reads the tables as published; for other tables set screen.layout = "manifest" and name their '
    "columns in [screen.columns]."
)


def read_bbbc021(settings: Bbbc021Screen) -> Screen:
    """Read BBBC021's two tables; see `cellhpc.screens.read_screen`."""
    problems: list[str] = []
    notes: list[str] = []
    sheet = read_sheet(find_table(settings.tables_folder, IMAGE_TABLE, "screen.tables"))
    file_columns = [f"Image_{kind}_{stain}" for stain in CHANNELS.values() for kind in ("FileName", "PathName")]
    sheet.require_columns(dict.fromkeys([*_COLUMNS.values(), *file_columns], ""), _AS_PUBLISHED)
    rows = sheet.rows

    draft = pd.DataFrame({name: rows[column] for name, column in _COLUMNS.items()}, dtype=object)
    draft["concentration"] = parse_concentrations(draft["concentration"], problems, draft["compound"] == CONTROL)
    draft["batch"] = draft["plate"].str.extract(r"^(Week\d+)_", expand=False)
    unclear = draft["batch"].isna() & (draft["plate"] != "")
    problems += [
        f"{where}: the plate {plate!r} does not begin with its week, as Week4_27481"
        for where, plate in draft.loc[unclear, "plate"].items()
    ]
    draft["batch"] = draft["batch"].fillna("")
    draft["field"] = _sites(rows, problems)
    for channel, stain in CHANNELS.items():
        folders, names = rows[f"Image_PathName_{stain}"], rows[f"Image_FileName_{stain}"]
        draft[f"file_{channel}"] = (folders + "/" + names).where(names != "", "")
    draft["label"] = _labels(draft, settings, problems, notes)
    draft["left_out"] = _taxol_rule(draft, settings, notes)
    return assemble(draft, settings, tuple(CHANNELS), UNIT, CONTROL, problems, notes)


def _sites(rows: pd.DataFrame, problems: list[str]) -> pd.Series:
    """Take the site from the names of the files, which alone tell it; the three of a row must agree."""
    parts = {stain: rows[f"Image_FileName_{stain}"].str.extract(_FILE_NAME) for stain in CHANNELS.values()}
    first = parts["DAPI"]
    wells = rows[_COLUMNS["well"]]
    for stain, part in parts.items():
        names = rows[f"Image_FileName_{stain}"]
        unclear = part["site"].isna() & (names != "")
        problems += [
            f"{where}: the name {name!r} does not tell well and site, as G10_s1_w1...tif"
            for where, name in names[unclear].items()
        ]
        told = part["site"].notna()
        other = told & (
            (part["well"] != wells) & (wells != "") | (part["site"] != first["site"]) & first["site"].notna()
        )
        problems += [
            f"{where}: the {stain} picture {name!r} is not of the row's well and site"
            for where, name in names[other].items()
        ]
    # A row without a site has been told of; it must not be told of again as no number.
    return parse_fields(first["site"].fillna(""), []).rename("field")


def _labels(draft: pd.DataFrame, settings: Bbbc021Screen, problems: list[str], notes: list[str]) -> pd.Series:
    """Mechanism of each row's compound at its concentration, "" where the table has none."""
    sheet = read_sheet(find_table(settings.tables_folder, MOA_TABLE, "screen.tables"))
    sheet.require_columns({"compound": "", "concentration": "", "moa": ""}, _AS_PUBLISHED)
    moas = sheet.rows[sheet.rows["compound"] != CONTROL]
    # Both sides are rounded to six digits, so that 0.1 and 0.100000 are one concentration, and 0.1 and 0.10001 are two.
    values = parse_concentrations(moas["concentration"], problems)
    known: dict[tuple[str, float], str] = {}
    for where, compound, concentration, moa in zip(moas.index, moas["compound"], values, moas["moa"], strict=True):
        if moa not in MOAS:
            problems.append(f"{where}: unknown label {moa!r}. Allowed: {listing(MOAS)}")
        before = known.setdefault((compound, concentration), moa)
        if before != moa:
            problems.append(f"{where}: {compound} {concentration:g} {UNIT}: conflicting labels: {before}, {moa}")
    keys = list(zip(draft["compound"], draft["concentration"], strict=True))
    unseen = sorted(f"{compound} {value:g} {UNIT}" for compound, value in known.keys() - set(keys) if value == value)
    if unseen:
        notes.append(f"{MOA_TABLE}: treatments with a label that {IMAGE_TABLE} does not have: {listing(unseen)}")
    return pd.Series([known.get(key, "") for key in keys], index=draft.index, dtype=object)


def _taxol_rule(draft: pd.DataFrame, settings: Bbbc021Screen, notes: list[str]) -> pd.Series:
    """Rows of taxol to leave out.

    Taxol stands on every plate and would swamp its class. Kensert et al. (2019, SLAS Discovery 24, 466) keep its
    dose series alone: plates of Week1, wells D0x.
    """
    taxol = draft["compound"] == POSITIVE_CONTROL
    if settings.taxol == "all":
        return pd.Series(False, index=draft.index)
    kept = taxol & (draft["batch"] == "Week1") & draft["well"].str.startswith("D0")
    if taxol.any() and not (kept & (draft["label"] != "")).any():
        notes.append('the taxol rule leaves no labelled field of taxol; set screen.taxol = "all" to keep them all')
    return taxol & ~kept
