"""What was imaged: readers of screens' tables, to one table with a row for each field.

``read_screen(settings)`` reads the tables of any layout and lists everything that is wrong with them; no pixel is
decoded. ``require_sound(screen)`` refuses a screen that has problems. `table` describes the columns.
"""

from __future__ import annotations

from collections.abc import Collection

from cellhpc.screens.bbbc014 import read_bbbc014
from cellhpc.screens.bbbc021 import read_bbbc021
from cellhpc.screens.manifest import read_manifest
from cellhpc.screens.metaxpress import read_metaxpress
from cellhpc.screens.summary import render_summary, summary
from cellhpc.screens.table import Screen, look_for_pictures, require_sound
from cellhpc.settings import Bbbc014Screen, Bbbc021Screen, ManifestScreen, MetaxpressScreen, ScreenSettings

__all__ = ["Screen", "read_screen", "render_summary", "require_sound", "summary"]


def read_screen(settings: ScreenSettings, check_files: bool = True, converted: Collection[str] = ()) -> Screen:
    """Read a screen's tables into its fields table.

    Parameters
    ----------
    settings
        The section `[screen]` of a job file.
    check_files
        Look whether the pictures are there. Each folder is listed once; no picture is opened.
    converted
        Plates whose pictures are not looked for: they may lie elsewhere by now.

    Returns
    -------
    Screen
        The fields, and everything that was found wrong with them, as text.

    Raises
    ------
    DataError
        A table is missing, can't be read, or lacks a column: there is no fields table to speak of.
    UsageError
        A setting does not fit the tables, as a compound that the screen does not have.
    """
    match settings:
        case Bbbc021Screen():
            screen = read_bbbc021(settings)
        case Bbbc014Screen():
            screen = read_bbbc014(settings)
        case ManifestScreen():
            screen = read_manifest(settings)
        case MetaxpressScreen():
            screen = read_metaxpress(settings)
    return look_for_pictures(screen, converted) if check_files else screen
