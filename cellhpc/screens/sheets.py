"""Tables as text: CSV (also gzipped) and Parquet, every cell a string, every row with the place where it stands.

Numbers are parsed later, cell by cell, so that a bad one can be named by its row instead of turning its whole column
into text. Rows count as in a spreadsheet: the header of a CSV table is row 1.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow

from cellhpc.errors import DataError, listing
from cellhpc.screens.pictures import list_folder

UNNAMED = "index"
"""Name given to a first column that has none, as pandas writes its index."""


@dataclass(frozen=True)
class Sheet:
    """A table as text.

    Attributes
    ----------
    path
        The file that was read.
    rows
        Cells as stripped strings, "" where empty; the index says where each row stands, as "labels.csv row 17".
    """

    path: Path
    rows: pd.DataFrame

    def require_columns(self, wanted: Mapping[str, str], remedy: str) -> None:
        """Refuse the table when columns are missing.

        Parameters
        ----------
        wanted
            For each column's name, who asks for it (a key of the job file), or "".
        remedy
            What to change.

        Raises
        ------
        DataError
            Names every missing column with who asks for it, and the columns that are there.
        """
        missing = [name for name in wanted if name not in self.rows.columns]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of the {len(wanted)} columns needed are missing.",
                [f"no column {name!r}" + (f" ({wanted[name]})" if wanted[name] else "") for name in missing],
                f"Its columns are: {listing(self.rows.columns, 40)}.\n{remedy}",
            )


def remedy_of_columns(sheet: Sheet, separator: str) -> str:
    """Say what to change where keys of the job file name columns that are missing."""
    remedy = "Change the keys in brackets to columns of the table."
    if len(sheet.rows.columns) != 1:
        return remedy
    return f"It has one column only: is {separator!r} its separator? Set screen.separator.\n{remedy}"


def find_table(folder: Path, name: str, key: str) -> Path:
    """Path of a table, or of the same name with `.gz`; `key` is the setting that leads to it.

    Raises
    ------
    DataError
        There is no such file; the tables that are there are listed.
    """
    path = folder / name
    there = list_folder(path.parent)
    for candidate in (path.name, f"{path.name}.gz"):
        if candidate in there:
            return path.with_name(candidate)
    tables = [other for other in there if other.endswith((".csv", ".csv.gz", ".tsv", ".txt", ".parquet"))]
    found = f"Tables in this folder: {listing(tables)}." if tables else "This folder has no table, or does not exist."
    raise DataError(f"{path}: the table is missing.", remedy=f"{found} Set {key}.")


def read_sheet(path: Path, separator: str = ",", separator_key: str = "") -> Sheet:
    """Read a table: Parquet by its ending, otherwise CSV in UTF-8.

    Raises
    ------
    DataError
        The file can't be read, has no rows, or has rows of another length than its header (all are listed).
    """
    parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        rows = _read_parquet(path) if parquet else _read_csv(path, separator, separator_key)
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{path}: not text in UTF-8 ({fault.reason} at byte {fault.start}). Save it as UTF-8."
        ) from None
    except (OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException) as fault:
        raise DataError(f"{path}: can't be read: {fault}") from None
    if rows.empty:
        raise DataError(f"{path}: the table has a header and no rows.")
    return Sheet(path, rows)


def _read_csv(path: Path, separator: str, separator_key: str) -> pd.DataFrame:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
        records = list(enumerate(csv.reader(lines, delimiter=separator), start=1))
    if not records or not records[0][1]:
        raise DataError(f"{path}: the first line, which should name the columns, is empty.")
    header = _column_names(path, records[0][1])
    body = [(number, [cell.strip() for cell in cells]) for number, cells in records[1:] if any(map(str.strip, cells))]
    ragged = [
        f"row {number}: {len(cells)} values where the header has {len(header)}"
        for number, cells in body
        if len(cells) != len(header)
    ]
    if ragged:
        hint = f"Is {separator!r} the separator? It is set by {separator_key}." if separator_key else ""
        raise DataError(f"{path}: rows differ in length from the header.", ragged, hint)
    where = [f"{path.name} row {number}" for number, _ in body]
    return pd.DataFrame([cells for _, cells in body], columns=header, index=where, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    # Nullable types keep an integer column with gaps an integer one: "7" must not become "7.0" in a file's name.
    table = pd.read_parquet(path, dtype_backend="numpy_nullable")
    if not isinstance(table.index, pd.RangeIndex) or table.index.name is not None:
        table = table.reset_index()
    table.columns = pd.Index(_column_names(path, [str(name) for name in table.columns]))
    rows = pd.DataFrame({name: ["" if pd.isna(cell) else str(cell).strip() for cell in table[name]] for name in table})
    rows.index = pd.Index([f"{path.name} row {number}" for number in range(1, len(rows) + 1)])
    return rows


def _column_names(path: Path, header: Sequence[str]) -> list[str]:
    names = [name.strip() for name in header]
    if names and not names[0] and UNNAMED not in names:
        names[0] = UNNAMED
    twice = [name for name, count in Counter(name for name in names if name).items() if count > 1]
    if twice:
        raise DataError(f"{path}: columns of the same name: {listing(twice)}. Rename or remove one of each.")
    return [name or f"column {position}" for position, name in enumerate(names, start=1)]
