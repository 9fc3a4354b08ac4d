"""The fields table: its columns, and the checks that every layout shares.

A row is one field (site) of a well. Columns, in this order:

======================  =========================================================================================
plate, batch, well      str; `batch` is "" where a screen has none
field                   int, the site in the well
compound                str
concentration           float in `unit`, six significant digits; NaN where there is none
unit                    str
treatment               str, compound, concentration and unit: "taxol 0.3 uM"; of controls, the compound alone
label                   str, what is to be predicted; "" where unlabelled
replicate               str
role                    str: "treatment" is labelled and used; "dmso" is a control; "unlabelled" has no label;
                        "left out" has a label, and a setting puts it aside
(more)                  str, of some layouts: `cell_line`
file_<channel>          str for each channel, path from `Screen.root`; when those of a row are all equal, it is one
                        file with all channels
======================  =========================================================================================
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cellhpc.errors import DataError, UsageError, listing
from cellhpc.screens.pictures import look_for, tidy_path
from cellhpc.settings import ScreenBase

COLUMNS = (
    "plate",
    "batch",
    "well",
    "field",
    "compound",
    "concentration",
    "unit",
    "treatment",
    "label",
    "replicate",
    "role",
)
ROLES = ("treatment", "dmso", "unlabelled", "left out")


@dataclass(frozen=True)
class Screen:
    """A screen as its tables tell it.

    Attributes
    ----------
    fields
        The fields table, sorted by plate, well and field.
    channels
        Names of the channels, in the order in which they are stored.
    root
        Folder that the paths of the pictures start from.
    problems
        What is wrong and must be put right before the screen is used, a line each; missing pictures come last.
    notes
        What is good to know, a line each.
    missing
        Those lines of `problems` that tell of missing pictures.
    pictures_checked
        Whether the pictures were looked for.
    pictures_found
        False when they were looked for and not one is there: the tables were read alone.
    pictures_expected, pictures_missing
        Count of files that the tables name, and of those that are not there.
    """

    fields: pd.DataFrame
    channels: tuple[str, ...]
    root: Path
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    pictures_checked: bool = False
    pictures_found: bool = True
    pictures_expected: int = 0
    pictures_missing: int = 0


def require_sound(screen: Screen, allow_missing: bool = False) -> None:
    """Refuse a screen that has problems, or none of its pictures.

    Parameters
    ----------
    screen
        The screen as read.
    allow_missing
        Let missing pictures pass, when fields without them are to be set aside and counted.

    Raises
    ------
    DataError
        Lists every problem.
    """
    again = "Put these right, then type: cellhpc inspect JOB.toml"
    skip = 'To set such fields aside and count them, set convert.on_bad_field = "skip".'
    tolerated = set(screen.missing) if allow_missing else set()
    problems = [problem for problem in screen.problems if problem not in tolerated]
    if problems:
        remedy = f"{again}\n{skip}" if screen.missing and not allow_missing else again
        raise DataError(f"The screen has {_count(len(problems), 'problem')}.", problems, remedy)
    if not screen.pictures_found:
        raise DataError(
            f"{screen.root}: none of the {screen.pictures_expected:,} pictures that the tables name is here.",
            remedy="Set screen.path to the folder of the pictures, and screen.tables to that of the tables.",
        )


def parse_concentrations(texts: pd.Series, problems: list[str], may_be_empty: pd.Series | None = None) -> pd.Series:
    """Turn cells into numbers of six significant digits; what is no number is a problem, and becomes NaN.

    So are empty cells, but for rows that may be empty.
    """
    empty = (texts == "") if may_be_empty is None else (texts == "") & ~may_be_empty
    problems += [f"{where}: the concentration is empty" for where in texts.index[empty]]
    numbers = {text: _concentration(text) for text in texts.unique()}
    for where, text in texts.items():
        if isinstance(numbers[text], str):
            problems.append(f"{where}: the concentration is {text!r}, {numbers[text]}")
    values = {text: math.nan if isinstance(number, str) else number for text, number in numbers.items()}
    return texts.map(values).astype(float)


def _concentration(text: str) -> float | str:
    if not text:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        return "which is no number" + (" (write a decimal point)" if re.fullmatch(r"\d+,\d+", text) else "")
    if not math.isfinite(number) or number < 0:
        return "which is no concentration: allowed are finite numbers from 0"
    return float(f"{number:.6g}")


def parse_fields(texts: pd.Series, problems: list[str]) -> pd.Series:
    """Turn cells into numbers of fields; what is no whole number is a problem, and becomes -1."""
    good = texts.str.fullmatch(r"\d{1,9}(\.0+)?")
    problems += [f"{where}: the field is {text!r}, which is no whole number" for where, text in texts[~good].items()]
    return texts.where(good, "-1").astype(float).astype(int)


def assemble(
    draft: pd.DataFrame,
    settings: ScreenBase,
    channels: Sequence[str],
    unit: str,
    control: str = "DMSO",
    problems: Iterable[str] = (),
    notes: Iterable[str] = (),
    extra: Sequence[str] = (),
) -> Screen:
    """Check what a reader found, and complete it to a fields table.

    Parameters
    ----------
    draft
        A row for each field, with the columns plate, batch, well, field (int), compound, concentration (float), label,
        file_<channel>, perhaps replicate (without it, the wells of a treatment count) and left_out (bool), and those of
        `extra`. Its index says where each row stands.
    settings
        The section `[screen]`: folder of the pictures, and compounds to keep or to drop.
    channels, unit
        The channels in their order, the unit of the concentrations.
    control
        The compound of control wells.
    problems, notes
        What the reader found already.

    Raises
    ------
    UsageError
        The settings name compounds that the screen does not have, or drop the control.
    """
    files = [f"file_{channel}" for channel in channels]
    fields = draft.assign(unit=unit)
    found = [*problems, *_check_names(fields), *_check_repeats(fields)]
    paths, bad_paths = _tidy_paths(fields, files, settings.outside)
    fields = fields.assign(**paths)
    found += [*bad_paths, *_check_files(fields, files)]

    is_control = fields["compound"] == control
    fields["label"] = fields["label"].mask(is_control, "")
    fields["treatment"] = [
        compound if controls or math.isnan(value) else f"{compound} {value:g} {unit}"
        for compound, value, controls in zip(fields["compound"], fields["concentration"], is_control, strict=True)
    ]
    found += _check_treatments(fields)
    left_out = _left_out(fields, settings, control)
    if "left_out" in fields:
        left_out |= fields["left_out"]
    fields["role"] = "treatment"
    fields.loc[left_out, "role"] = "left out"
    fields.loc[fields["label"] == "", "role"] = "unlabelled"
    fields.loc[is_control, "role"] = "dmso"
    if "replicate" not in fields:
        fields["replicate"] = _count_wells(fields)
    if (fields["label"] != "").any() and not (fields["role"] == "treatment").any():
        found.append("every labelled field is left out: see screen.compounds and screen.drop_compounds")

    ordered = fields[[*COLUMNS, *extra, *files]].sort_values(["plate", "well", "field"], kind="stable")
    return Screen(
        fields=ordered.reset_index(drop=True),
        channels=tuple(channels),
        root=settings.path,
        problems=tuple(found),
        notes=(*notes, *_notes(fields, control)),
    )


def look_for_pictures(screen: Screen, converted: Collection[str] = ()) -> Screen:
    """Look whether the pictures of a screen are there, but for plates that are `converted`.

    Raises
    ------
    DataError
        A folder is there and can't be listed.
    """
    files = [f"file_{channel}" for channel in screen.channels]
    presence = look_for(screen.root, _files_of(screen.fields[~screen.fields["plate"].isin(converted)], files))
    if presence.expected and presence.missing == presence.expected:
        alone = (
            f"{screen.root}: not one of the {presence.expected:,} pictures is here: the tables were read alone. "
            "Set screen.path to the folder of the pictures."
        )
        lines: tuple[str, ...] = ()
        notes: tuple[str, ...] = (*screen.notes, alone)
    else:
        lines, notes = presence.lines, screen.notes
    return replace(
        screen,
        problems=(*screen.problems, *lines),
        notes=notes,
        missing=lines,
        pictures_checked=True,
        pictures_found=notes == screen.notes,
        pictures_expected=presence.expected,
        pictures_missing=presence.missing,
    )


def _check_names(fields: pd.DataFrame) -> list[str]:
    problems = []
    for column in ("plate", "well", "compound"):
        problems += [f"{where}: the {column} is empty" for where in fields.index[fields[column] == ""]]
    # Two spellings of one compound would be two compounds: one held out, the other trained on.
    compounds = fields["compound"].drop_duplicates()
    spellings = compounds.groupby(compounds.map(_plain))
    problems += [
        f"compound {' and '.join(repr(name) for name in names)}: one compound, {len(names)} spellings? Write it in one"
        for names in spellings.agg(list)
        if len(names) > 1
    ]
    # A plate's name becomes the name of a folder in the store.
    unusable = fields["plate"].str.contains(r"[/\\\x00-\x1f]|^\.|^__", regex=True)
    problems += [
        f"{where}: the plate {plate!r} can't be the name of a folder: no slashes, no leading '.' or '__'"
        for where, plate in fields.loc[unusable, "plate"].drop_duplicates().items()
    ]
    return problems


def _plain(name: str) -> str:
    return "".join(name.split()).casefold()


def _check_repeats(fields: pd.DataFrame) -> list[str]:
    key = ["plate", "well", "field"]
    named = fields[(fields["plate"] != "") & (fields["well"] != "") & (fields["field"] >= 0)]
    repeats = named[named.duplicated(key, keep=False)]
    return [
        f"{group.index[0]}: plate {plate}, well {well}, field {field} stands {len(group)} times, also at "
        + ", ".join(str(where) for where in group.index[1:4])
        for (plate, well, field), group in repeats.groupby(key, sort=False)
    ]


def _tidy_paths(fields: pd.DataFrame, files: Sequence[str], outside: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Normalised paths by column ("" for those that are refused), and the problems found."""
    tidy: dict[str, list[str]] = {}
    problems: dict[str, None] = {}
    for column in files:
        paths = [tidy_path(path, outside) for path in fields[column]]
        for where, path, normal in zip(fields.index, fields[column], paths, strict=True):
            if not path:
                problems[f"{where}: no picture is named for channel {column.removeprefix('file_')}"] = None
            elif normal is None:
                problems[
                    f"{where}: the picture {path!r} lies outside of screen.path (screen.outside = true would allow it)"
                ] = None
        tidy[column] = [path or "" for path in paths]
    return tidy, list(problems)


def _files_of(fields: pd.DataFrame, files: Sequence[str]) -> list[str]:
    return [path for column in files for path in fields[column].unique() if path]


def _check_files(fields: pd.DataFrame, files: Sequence[str]) -> list[str]:
    """Check that a picture belongs to one field, and to one channel of it or to all."""
    long = fields[files].melt(ignore_index=False, value_name="file")
    long = long[long["file"] != ""]
    once = long.reset_index(names="where").drop_duplicates(["where", "file"])
    problems = [
        f"{group['where'].iloc[0]}: the picture {path} belongs to {len(group)} fields, also to that at "
        + ", ".join(group["where"].iloc[1:4])
        for path, group in once[once.duplicated("file", keep=False)].groupby("file", sort=False)
    ]
    for where, *names in fields[files].itertuples(name=None):
        if all(names) and 1 < len(set(names)) < len(names):
            problems.append(f"{where}: two channels, but not all, have the same picture")
    return problems


def _check_treatments(fields: pd.DataFrame) -> list[str]:
    problems = []
    labelled = fields[fields["label"] != ""]
    labels = labelled.groupby("treatment", sort=True)["label"].unique()
    problems += [
        f"treatment {treatment}: conflicting labels: {listing(found)}"
        for treatment, found in labels.items()
        if len(found) > 1
    ]
    wells = fields[(fields["plate"] != "") & (fields["well"] != "") & (fields["compound"] != "")]
    contents = wells[["plate", "well", "treatment"]].drop_duplicates()
    for (plate, well), group in contents[contents.duplicated(["plate", "well"], keep=False)].groupby(["plate", "well"]):
        found = listing(group["treatment"])
        problems.append(f"plate {plate}, well {well}: its fields have different treatments: {found}")
    return problems


def _left_out(fields: pd.DataFrame, settings: ScreenBase, control: str) -> pd.Series:
    known = sorted(set(fields["compound"]) - {""})
    faults = []
    for key in ("compounds", "drop_compounds"):
        for name in getattr(settings, key):
            if name not in known:
                lower = {compound.lower(): compound for compound in known}
                close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
                near = f"Near: {listing(close)}." if close else f"Its compounds are: {listing(known, 40)}."
                faults.append(f"screen.{key}: the screen has no compound {name!r}. {near}")
            elif key == "drop_compounds" and name == control:
                faults.append(f"screen.{key}: {name!r} is the control, and controls are always kept. Remove it here.")
    if faults:
        raise UsageError("\n".join(faults))
    left_out = fields["compound"].isin(settings.drop_compounds)
    if settings.compounds:
        left_out |= ~fields["compound"].isin(settings.compounds)
    return left_out


def _count_wells(fields: pd.DataFrame) -> pd.Series:
    """Count the wells of each treatment from 1, in the order of plates and wells."""
    wells = fields[["treatment", "plate", "well"]].drop_duplicates().sort_values(["plate", "well"])
    numbers = (wells.groupby("treatment").cumcount() + 1).astype(str)
    keys = wells.itertuples(index=False, name=None)
    number_of = dict(zip(keys, numbers, strict=True))
    rows = fields[["treatment", "plate", "well"]].itertuples(index=False, name=None)
    return pd.Series([number_of[row] for row in rows], index=fields.index)


def _notes(fields: pd.DataFrame, control: str) -> list[str]:
    notes = []
    used = fields[fields["role"] == "treatment"]
    if used.empty and (fields["label"] == "").all():
        notes.append("no field has a label: there is nothing to be learnt")
    compounds = used.groupby("label")["compound"].unique()
    if used["compound"].nunique() == 1 and len(compounds) > 1:
        notes.append(
            f"all labelled fields are of one compound, {used['compound'].iloc[0]}: it can't be held out. "
            "Set folds.by to another column, for example batch."
        )
    else:
        notes += [
            f"label {label}: a single compound ({names[0]}). Held out, nothing is left to learn the label from; "
            'set folds.on_single_compound = "drop" to drop the label.'
            for label, names in compounds.items()
            if len(names) == 1
        ]
    bare = sorted(set(fields["plate"]) - set(fields.loc[fields["role"] == "dmso", "plate"]))
    if bare:
        notes.append(
            f"{_count(len(bare), 'plate')} without {control} wells: {listing(bare)}. "
            'Normalisation needs them; set convert.preprocessing = "none" for pictures that are normalised already.'
        )
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
