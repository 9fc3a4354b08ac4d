"""Which pictures of a fields table are there: each folder is listed once, no file is opened."""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cellhpc.errors import DataError

NAMED = 5
"""Missing files that are named, for each folder."""


@dataclass(frozen=True)
class Presence:
    """Which pictures of the tables are there: counts of files, and a line for each folder that lacks some."""

    expected: int
    missing: int
    lines: tuple[str, ...]


def tidy_path(path: str, outside: bool = False) -> str | None:
    """Normalise a path relative to the pictures' folder, with "/"; None when it is empty, or leads out and may not.

    Tables made under Windows have backslashes, which are read as separators.
    """
    normal = posixpath.normpath(path.replace("\\", "/")) if path else ".."
    leads_out = normal.startswith(("/", "../"))
    refused = normal in (".", "..") or re.match(r"[A-Za-z]:", normal) or (leads_out and not outside)
    return None if refused else normal


def look_for(root: Path, paths: Iterable[str]) -> Presence:
    """Look which files are there, by one listing of each folder.

    Parameters
    ----------
    root
        Folder that the paths start from.
    paths
        Tidy paths; those that repeat count once.

    Raises
    ------
    DataError
        A folder is there and can't be listed.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        folder, name = posixpath.split(path)
        wanted[folder].append(name)
    missing, lines = 0, []
    for folder, names in sorted(wanted.items()):
        there = list_folder(root / folder)
        absent = sorted(name for name in names if name not in there)
        missing += len(absent)
        if absent:
            which = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
            lines.append(f"{root / folder}: {len(absent):,} of {len(names):,} pictures are missing: {which}")
    return Presence(sum(map(len, wanted.values())), missing, tuple(lines))


def list_folder(folder: Path) -> set[str]:
    """Names of what is in a folder, but for folders; none when it does not exist.

    The kind of an entry comes with the listing, so that no file is touched: on a parallel file system that is the
    difference between seconds and minutes.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as fault:
        raise DataError(f"{folder}: the folder can't be listed: {fault.strerror}.") from None
