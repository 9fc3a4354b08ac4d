"""Plates as MetaXpress leaves them (ImageXpress microscopes of Molecular Devices): the pictures' names tell all.

A picture is `NAME_E07_s1_w2GUID.tif`: well, site, wavelength, and 36 characters that make it unique. `_s1` is missing
where a well has one site, `_w2` where there is one wavelength, the GUID in exports; `_thumb` marks a thumbnail.
Pictures lie in the folder of their plate, or below it in `TimePoint_N`, `ZStep_N` or both. The projection of a z-stack
lies beside the ZStep folders, in exports in `ZStep_0`. A plate's `.HTD` file, if it is there, tells the names of the
wavelengths. What is in the wells stands in a plate map, a table of the user's own.
"""

from __future__ import annotations

import contextlib
import math
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import pandas as pd

from cellhpc.errors import DataError, UsageError, listing
from cellhpc.screens.sheets import find_table, read_sheet, remedy_of_columns
from cellhpc.screens.table import Screen, assemble, parse_concentrations
from cellhpc.settings import MetaxpressScreen

EXAMPLE = "P1_E07_s1_w2.tif"

_GUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
# Rows Q to Z, of 1536 wells, are capitals: in a name that lacks the well, "_s1" and "_w1" must not pass for one.
_PICTURE = re.compile(
    r"(?P<stem>(?:.*?_)?(?P<well>(?:(?i:[A-P]|A[A-F])|[Q-Z])\d{1,2})(?i:_s(?P<site>\d+))?)"
    rf"(?i:_w(?P<wave>\d+))?(?i:{_GUID})?(?P<ending>(?i:\.tiff?))"
)
_THUMBNAIL = re.compile(rf".*_thumb(?:{_GUID})?\.tiff?", re.IGNORECASE)
_WELL = re.compile(r"([A-Z]|A[A-F])0*([1-9]|[1-3]\d|4[0-8])", re.IGNORECASE)
_STEP = re.compile(r"(TimePoint|ZStep)_(\d+)", re.IGNORECASE)
_HTD = re.compile(r".*\.htd", re.IGNORECASE)
_WAVE_NAME = re.compile(r'^\s*"WaveName(\d+)"\s*,\s*"?([^"\n]*)', re.MULTILINE)
_FIELD = ["plate", "well", "field"]
_PROJECTION = 0

Files = dict[str, list[str]]
"""Names of the files in each folder, by the folder's path from `screen.path`."""


def read_metaxpress(settings: MetaxpressScreen) -> Screen:
    """Read the names of MetaXpress' pictures, and a plate map; see `cellhpc.screens.read_screen`."""
    problems: list[str] = []
    notes: list[str] = []
    plate_map = _read_plate_map(settings, problems)
    files = _walk(settings.path)
    draft = _pictures(files, settings, problems, notes)
    if len(draft):
        draft = _of_channels(draft, files, settings, notes)
        draft = _of_plane(draft, settings, problems, notes)
        draft = _join_channels(draft, settings, problems)
        draft = _with_contents(draft, plate_map, settings.table, notes)
    if draft.empty:
        raise DataError(
            f"{settings.path}: no picture is of a well of {settings.table}.",
            [*problems, *notes],
            f"Pictures are named as {EXAMPLE}. See screen.path, screen.columns and screen.plate_pattern.",
        )
    channels, unit, control = tuple(settings.channels), settings.unit, settings.control
    return assemble(draft, settings, channels, unit, control, problems, notes)


def _read_plate_map(settings: MetaxpressScreen, problems: list[str]) -> pd.DataFrame:
    """Read what is in the wells: a row for each, with the columns that the settings name."""
    path = find_table(settings.tables_folder, settings.table, "screen.table, or screen.tables")
    sheet = read_sheet(path, settings.separator, "screen.separator")
    columns = settings.columns.model_dump(exclude_none=True)
    sheet.require_columns(
        {name: f'screen.columns.{key} = "{name}"' for key, name in columns.items()},
        remedy_of_columns(sheet, settings.separator),
    )
    rows = pd.DataFrame({key: sheet.rows[name] for key, name in columns.items()}, dtype=object)

    key = [name for name in ("plate", "well") if name in rows]
    tidy = rows["well"].map(_tidy_well)
    problems += [f"{where}: {well!r} is no well, as A01 to AF48" for where, well in rows["well"][tidy == ""].items()]
    rows = rows.assign(well=tidy, **{name: rows[name].map(_composed) for name in key[:-1]})
    for name in (*key[:-1], "compound"):
        problems += [f"{where}: the {name} is empty" for where in rows.index[rows[name] == ""]]
    rows = rows[(rows[[*key, "compound"]] != "").all(axis=1)]
    again = rows.loc[rows.duplicated(key), key].itertuples(name=None)
    problems += [f"{where}: well {' '.join(well)} stands a second time" for where, *well in again]
    rows = rows.drop_duplicates(key).assign(**{name: "" for name in ("label", "batch") if name not in rows})
    if "concentration" not in rows:
        return rows.assign(concentration=math.nan)
    may_be_empty = (rows["label"] == "") | (rows["compound"] == settings.control)
    return rows.assign(concentration=parse_concentrations(rows["concentration"], problems, may_be_empty))


def _walk(root: Path) -> Files:
    """List every folder once; hidden files, as the `._NAME.tif` that a Mac leaves beside each, are left out."""
    files: Files = {}
    waiting, seen = [""], set()
    while waiting:
        folder = root / (path := waiting.pop())
        if (real := folder.resolve()) in seen:  # reached by a link, which may lead back up
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                there = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        except OSError as fault:
            raise DataError(f"{folder}: can't be listed: {fault.strerror}.", remedy="Set screen.path.") from None
        files[path] = [name for name, is_folder in there if not is_folder]
        waiting += [posixpath.join(path, name) for name, is_folder in reversed(there) if is_folder]
    return files


def _pictures(files: Files, settings: MetaxpressScreen, problems: list[str], notes: list[str]) -> pd.DataFrame:
    """Make a table of the pictures: what their names and folders tell, and their paths."""
    rows, others, no_plate = [], [], set()
    for folder, names in files.items():
        place, time_point, plane = _steps(folder)
        plate = _plate(place, settings)
        for name in names:
            path = posixpath.join(folder, name)
            match = _PICTURE.fullmatch(name)
            well = match and _tidy_well(match["well"])
            if not match or not well:
                others += [path] if name.lower().endswith((".tif", ".tiff")) else []
            elif not plate:
                no_plate.add(f"{place or '.'!r}: screen.plate_pattern {settings.plate_pattern!r} does not match")
            elif re.search(r"[\ud800-\udfff]", path):  # what Python makes of bytes that are no UTF-8
                problems.append(f"{path!r}: the name is no text in UTF-8. Rename it")
            else:
                site, wave = int(match["site"] or 1), int(match["wave"] or 1)
                stem = posixpath.join(folder, match["stem"])
                rows.append((plate, well, site, wave, time_point, plane, path, stem, match["ending"]))
    problems += sorted(no_plate)
    unclear = [path for path in others if not _THUMBNAIL.fullmatch(path)]
    if len(others) > len(unclear):
        notes.append(f"thumbnails, which are not read: {len(others) - len(unclear):,}")
    if unclear:
        some = ", ".join(map(repr, unclear[:3]))
        notes.append(f"TIFFs that are not named as {EXAMPLE}, and not read: {len(unclear):,}, for instance {some}")
    return pd.DataFrame(rows, columns=[*_FIELD, "wave", "time_point", "plane", "file", "stem", "ending"])


def _of_channels(pictures: pd.DataFrame, files: Files, settings: MetaxpressScreen, notes: list[str]) -> pd.DataFrame:
    """Keep the pictures of the wavelengths that are channels."""
    names: dict[int, set[str]] = defaultdict(set)
    for path in (settings.path / folder / name for folder in files for name in files[folder] if _HTD.fullmatch(name)):
        with contextlib.suppress(OSError):  # it is not needed
            for wave, name in _WAVE_NAME.findall(path.read_text(encoding="latin-1")):
                names[int(wave)].add(name.strip())
    called = {wave: str(wave) for wave in sorted(pictures["wave"].unique())}
    called |= {wave: f"{wave} ({' or '.join(sorted(names[wave]))})" for wave in called if names[wave]}
    channels = {wave: channel for channel, wave in settings.channels.items()}
    for wave, channel in channels.items():
        if wave not in called:
            there = listing(called.values())
            raise UsageError(f"screen.channels.{channel}: no picture is of wavelength {wave}. There are: {there}.")
    if any(names.values()) or len(called) > len(channels):
        told = ", ".join(f"{text} is {channels.get(wave, 'not read')}" for wave, text in called.items())
        notes.append(f"wavelengths: {told}")
    return pictures[pictures["wave"].isin(channels)]


def _of_plane(found: pd.DataFrame, settings: MetaxpressScreen, problems: list[str], notes: list[str]) -> pd.DataFrame:
    """Keep the pictures of one time point and, of each wavelength of a plate, one plane."""
    wanted = _PROJECTION if settings.z == "projection" else settings.z
    kept = [found[:0]]
    for plate, on_plate in found.groupby("plate"):
        now = on_plate[on_plate["time_point"] == settings.time_point]
        planes = ", ".join(f"{plane}" if plane else '"projection"' for plane in sorted(now["plane"].unique()))
        single = now.groupby("wave")["plane"].transform("nunique") == 1
        chosen = now["plane"] == wanted
        if now.empty:
            points = f"{settings.time_point}. Allowed (screen.time_point): {listing(on_plate['time_point'].unique())}"
            problems.append(f"plate {plate}: no picture of time point {points}")
        elif wanted is None and not single.all():
            raise UsageError(f"screen.z: plate {plate} has several planes. Set the one to read: {planes}.")
        elif wanted is not None and not chosen.any():
            problems.append(f"plate {plate}: no picture of z-plane {settings.z}. Allowed (screen.z): {planes}")
        else:
            # Some wavelengths can be taken in a single plane where others are taken in a stack.
            instead = now[single & ~chosen]
            if wanted is not None and len(instead):
                waves = listing(instead["wave"].unique())
                notes.append(f"plate {plate}: one plane alone, which is read whatever screen.z is: wavelength {waves}")
            kept.append(now[single | chosen])
    return pd.concat(kept)


def _join_channels(pictures: pd.DataFrame, settings: MetaxpressScreen, problems: list[str]) -> pd.DataFrame:
    """Bring the pictures of a field together in a row, with a file for each channel."""
    key = [*_FIELD, "wave"]
    for (plate, well, site, wave), group in pictures[pictures.duplicated(key, keep=False)].groupby(key):
        where = f"plate {plate}, well {well}, site {site}"
        problems.append(f"{where}: wavelength {wave} has {len(group)} pictures, not one: {', '.join(group['file'])}")
    files = pictures.drop_duplicates(key).pivot(index=_FIELD, columns="wave", values="file")
    firsts = pictures.drop_duplicates(_FIELD).set_index(_FIELD)
    columns = {}
    for channel, wave in settings.channels.items():
        # A picture that is not there gets the name of an export, and is told of as missing.
        should_be = firsts["stem"] + f"_w{wave}" + firsts["ending"]
        columns[f"file_{channel}"] = files[wave].fillna(should_be) if wave in files else should_be
    return pd.DataFrame(columns).reset_index()


def _with_contents(fields: pd.DataFrame, plate_map: pd.DataFrame, table: str, notes: list[str]) -> pd.DataFrame:
    """Add what is in the wells; fields of wells that the plate map does not name are left out."""
    key = [name for name in ("plate", "well") if name in plate_map]
    joined = fields.merge(plate_map, on=key, how="outer", indicator="side")
    unknown, unseen = joined[joined["side"] == "left_only"], joined[joined["side"] == "right_only"]
    if len(unknown):
        notes.append(f"fields of wells that {table} does not name, left out: {len(unknown):,}, of {_wells(unknown)}")
    if len(unseen):
        notes.append(f"wells of {table} without a picture: {_wells(unseen)}")
    draft = joined[joined["side"] == "both"].drop(columns="side").astype({"field": int})
    where = [f"plate {plate}, well {well}, site {site}" for plate, well, site in draft[_FIELD].to_numpy()]
    return draft.set_axis(where)


def _wells(table: pd.DataFrame) -> str:
    key = [name for name in ("plate", "well") if name in table and table[name].notna().all()]
    return listing({" ".join(well) for well in table[key].itertuples(index=False, name=None)})


def _steps(folder: str) -> tuple[str, int, int]:
    """Split a folder's path into that of its plate, the time point and the plane."""
    steps = {"timepoint": 1, "zstep": _PROJECTION}
    while step := _STEP.fullmatch(posixpath.basename(folder)):
        steps[step[1].lower()] = int(step[2])
        folder = posixpath.dirname(folder)
    return folder, steps["timepoint"], steps["zstep"]


def _plate(folder: str, settings: MetaxpressScreen) -> str:
    match = re.search(settings.plate_pattern or "([^/]*)$", folder or settings.path.name)
    return _composed(match[1] or "") if match else ""


def _composed(plate: str) -> str:
    """Write an umlaut as one character: a Mac writes two in the names of folders, and tables have one."""
    return unicodedata.normalize("NFC", plate)


def _tidy_well(text: str) -> str:
    """Write a well as A01 to AF48; "" for what is none."""
    match = _WELL.fullmatch(text)
    return f"{match[1].upper()}{int(match[2]):02d}" if match else ""
