"""Any screen that has one table: a row for each field, or for each channel of a field.

The job file names the columns. File names are templates over them, as `images/{Plate}/{File}.tif`; a first column
without a name is `{index}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pandas as pd

from cellhpc.errors import UsageError, listing
from cellhpc.screens.sheets import Sheet, find_table, read_sheet, remedy_of_columns
from cellhpc.screens.table import COLUMNS, Screen, assemble, parse_concentrations, parse_fields
from cellhpc.settings import ManifestScreen

_PLACE = re.compile(r"\{([^{}]+)\}")
_FIELD = ["plate", "well", "field"]
_TAKEN = (*COLUMNS, "tile", "row", "kept", "signal_fraction", "channel", "file", "left_out")


def read_manifest(settings: ManifestScreen) -> Screen:
    """Read a screen from one table; see `cellhpc.screens.read_screen`."""
    problems: list[str] = []
    notes: list[str] = []
    path = find_table(settings.tables_folder, settings.table, "screen.table, or screen.tables")
    sheet = read_sheet(path, settings.separator, "screen.separator")
    _require_columns(sheet, settings)
    rows = sheet.rows

    draft = pd.DataFrame(index=rows.index)
    for name, column in settings.columns.model_dump(exclude_none=True).items():
        draft[name] = rows[column]
    for column in settings.extra_columns:
        draft[column] = rows[column]
    if settings.columns.label is None:
        draft["label"] = ""
    if settings.columns.batch is None:
        draft["batch"] = _batches(draft["plate"], settings.batch_pattern, problems)
    problems += _unknown_labels(draft, settings)
    if settings.columns.concentration is None:
        draft["concentration"] = math.nan
    else:
        may_be_empty = (draft["label"] == "") | (draft["compound"] == settings.control)
        draft["concentration"] = parse_concentrations(draft["concentration"], problems, may_be_empty)

    by_channel = settings.rows == "channel"
    if by_channel:
        draft["channel"] = _filled(settings.files["channel"], rows)
    if settings.columns.field is None:
        # Fields have no number: they count in the order of their rows, within the well (and the channel).
        draft["field"] = draft.groupby(["plate", "well", "channel"] if by_channel else ["plate", "well"]).cumcount() + 1
    else:
        draft["field"] = parse_fields(draft["field"], problems)
    if by_channel:
        draft["file"] = _filled(settings.files["all"], rows)
        draft = _join_channels(draft, settings, problems, notes)
    else:
        for channel in settings.channels:
            template = settings.files.get("all") or settings.files[channel]
            draft[f"file_{channel}"] = _filled(template, rows)
    return assemble(
        draft,
        settings,
        settings.channels,
        settings.unit,
        settings.control,
        problems,
        notes,
        extra=settings.extra_columns,
    )


def _require_columns(sheet: Sheet, settings: ManifestScreen) -> None:
    taken = [name for name in settings.extra_columns if name in _TAKEN or name.startswith(("file_", "p_"))]
    if taken:
        raise UsageError(
            f"screen.extra_columns: cellhpc has columns of these names: {listing(taken)}. Rename the table's."
        )
    wanted = {}
    for key, template in settings.files.items():
        for name in _PLACE.findall(template):
            wanted[name] = f'screen.files.{key} = "{template}"'
    for name in settings.extra_columns:
        wanted[name] = "screen.extra_columns"
    for key, name in settings.columns.model_dump(exclude_none=True).items():
        wanted[name] = f'screen.columns.{key} = "{name}"'
    sheet.require_columns(wanted, remedy_of_columns(sheet, settings.separator))


def _filled(template: str, rows: pd.DataFrame) -> list[str]:
    """Fill a template with each row's cells; "" where one of them is empty."""
    names = list(dict.fromkeys(_PLACE.findall(template)))
    if not names:
        return [template] * len(rows)
    return [
        _fill(template, dict(zip(names, cells, strict=True))) if all(cells) else ""
        for cells in rows[names].itertuples(index=False, name=None)
    ]


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: values[place[1]], template)


def _batches(plates: pd.Series, pattern: str | None, problems: list[str]) -> pd.Series:
    if pattern is None:
        return pd.Series("", index=plates.index, dtype=object)
    batches = plates.map({plate: _batch(plate, pattern) for plate in plates.unique()})
    problems += [
        f"{where}: the plate {plate!r} does not match screen.batch_pattern {pattern!r}"
        for where, plate in plates[(batches == "") & (plates != "")].drop_duplicates().items()
    ]
    return batches


def _batch(plate: str, pattern: str) -> str:
    match = re.search(pattern, plate)
    return (match[1] or "") if match else ""


def _unknown_labels(draft: pd.DataFrame, settings: ManifestScreen) -> list[str]:
    if not settings.labels:
        return []
    labels = draft["label"][draft["compound"] != settings.control]
    unknown = labels[(labels != "") & ~labels.isin(settings.labels)]
    return [
        f"{where}: unknown label {label!r}. Allowed (screen.labels): {listing(settings.labels, 40)}"
        for where, label in unknown.items()
    ]


def _join_channels(
    draft: pd.DataFrame, settings: ManifestScreen, problems: list[str], notes: list[str]
) -> pd.DataFrame:
    """Bring the rows of a field's channels together in one: that of the first, with a file for each channel."""
    others = sorted(set(draft["channel"]) - {*settings.channels, ""})
    if others:
        notes.append(f"{settings.table}: channels that screen.channels does not name are not read: {listing(others)}")
    problems += [f"{where}: the channel is empty" for where in draft.index[draft["channel"] == ""]]
    wanted = draft[draft["channel"].isin(settings.channels)].copy()
    if wanted.empty:
        # Nothing to join; what is left has no files, and each row says so.
        return draft.assign(**{f"file_{channel}": "" for channel in settings.channels})
    again = wanted.duplicated([*_FIELD, "channel"])
    telling = again & (wanted["field"] >= 0)  # rows without a number have been told of
    problems += [
        f"{where}: plate {plate}, well {well}, field {field} has channel {channel} a second time"
        for where, plate, well, field, channel in wanted.loc[telling, [*_FIELD, "channel"]].itertuples(name=None)
    ]
    wanted = wanted[~again]
    told = [name for name in wanted.columns if name not in (*_FIELD, "channel", "file")]
    variants = wanted[[*_FIELD, *told]].drop_duplicates()
    for key, group in variants[variants.duplicated(_FIELD, keep=False)].groupby(_FIELD):
        differ = listing(name for name in told if group[name].nunique(dropna=False) > 1)
        problems.append("plate {}, well {}, field {}: the rows of its channels differ in ".format(*key) + differ)
    fields = wanted.drop_duplicates(_FIELD).drop(columns=["channel", "file"])
    keys = list(fields[_FIELD].itertuples(index=False, name=None))
    for channel in settings.channels:
        of_channel = wanted[wanted["channel"] == channel]
        files = dict(zip(of_channel[_FIELD].itertuples(index=False, name=None), of_channel["file"], strict=True))
        fields[f"file_{channel}"] = [files.get(key, "") for key in keys]
    return fields
