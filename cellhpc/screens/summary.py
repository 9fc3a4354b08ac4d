"""What a screen's tables say, in counts: for `cellhpc inspect`, as a JSON document or for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cellhpc.screens.table import ROLES, Screen

SHOWN = 20
"""Problems and notes that a terminal shows of each; JSON has them all."""


def summary(screen: Screen) -> dict[str, Any]:
    """Count what a screen has.

    Parameters
    ----------
    screen
        As read by `cellhpc.screens.read_screen`.

    Returns
    -------
    dict
        Ready for JSON. `fields`, `plates`, `batches`, `wells` and `labelled_fields` count everything in the tables;
        `fields_used`, `wells_used`, `plates_used`, `batches_used`, `treatments`, `compounds` and `labels` what has the
        role "treatment", as do `compounds_per_label`, `treatments_per_label` and `fields_per_label`. Pictures count
        files. `sound` says that there are no problems; pictures that lie elsewhere are none.
    """
    fields = screen.fields
    used = fields[fields["role"] == "treatment"]
    roles = fields["role"].value_counts()
    controls = fields[fields["role"] == "dmso"].drop_duplicates(["plate", "well"]).groupby("plate").size()
    controls = controls.reindex(fields["plate"].unique(), fill_value=0)
    by_label = used.groupby("label", sort=True)
    return {
        "fields": len(fields),
        "plates": _distinct(fields, "plate"),
        "batches": _distinct(fields[fields["batch"] != ""], "batch"),
        "wells": _distinct(fields, "plate", "well"),
        "labelled_fields": int((fields["label"] != "").sum()),
        "fields_used": len(used),
        "wells_used": _distinct(used, "plate", "well"),
        "plates_used": _distinct(used, "plate"),
        "batches_used": _distinct(used[used["batch"] != ""], "batch"),
        "treatments": _distinct(used, "treatment"),
        "compounds": _distinct(used, "compound"),
        "labels": _distinct(used, "label"),
        "fields_per_role": {role: int(roles.get(role, 0)) for role in ROLES},
        "compounds_per_label": {str(label): int(count) for label, count in by_label["compound"].nunique().items()},
        "treatments_per_label": {str(label): int(count) for label, count in by_label["treatment"].nunique().items()},
        "fields_per_label": {str(label): int(count) for label, count in by_label.size().items()},
        "dmso_wells_per_plate": {"min": int(controls.min()), "max": int(controls.max())},
        "channels": list(screen.channels),
        "pictures": {
            "root": str(screen.root),
            "checked": screen.pictures_checked,
            "found": screen.pictures_expected - screen.pictures_missing,
            "missing": screen.pictures_missing,
        },
        "problems": list(screen.problems),
        "notes": list(screen.notes),
        "sound": not screen.problems,
    }


def render_summary(counts: Mapping[str, Any]) -> RenderableType:
    """Show a summary in a terminal.

    Parameters
    ----------
    counts
        What `summary` returned.
    """
    parts: list[RenderableType] = [_count_table(counts)]
    if counts["labels"]:
        parts += [Text(), _label_table(counts)]
    parts += [Text(), _pictures_line(counts["pictures"]), _control_line(counts)]
    parts += _lines("Notes", counts["notes"], "yellow") + _lines("Problems", counts["problems"], "red")
    if not counts["problems"]:
        parts += [Text(), Text("No problems found.", style="green")]
    return Group(*parts)


def _distinct(table: Any, *columns: str) -> int:
    return len(table[list(columns)].drop_duplicates())


def _count_table(counts: Mapping[str, Any]) -> Table:
    table = Table("", "fields", "wells", "plates", "batches", "treatments", "compounds", "labels", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("in the tables", *(f"{counts[key]:,}" for key in ("fields", "wells", "plates", "batches")))
    table.add_row("with a label", f"{counts['labelled_fields']:,}")
    keys = ("fields_used", "wells_used", "plates_used", "batches_used", "treatments", "compounds", "labels")
    table.add_row("used", *(f"{counts[key]:,}" for key in keys), style="bold")
    names = {"dmso": "controls", "unlabelled": "unlabelled", "left out": "left out"}
    for role, name in names.items():
        table.add_row(name, f"{counts['fields_per_role'][role]:,}")
    return table


def _label_table(counts: Mapping[str, Any]) -> Table:
    table = Table("label", "compounds", "treatments", "fields", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, compounds in counts["compounds_per_label"].items():
        treatments, fields = counts["treatments_per_label"][label], counts["fields_per_label"][label]
        table.add_row(Text(label), f"{compounds:,}", f"{treatments:,}", f"{fields:,}")
    return table


def _pictures_line(pictures: Mapping[str, Any]) -> Text:
    if not pictures["checked"]:
        return Text("Pictures: not looked for")
    if not pictures["found"]:
        return Text(f"Pictures: none of {pictures['missing']:,} files in {pictures['root']}")
    return Text(f"Pictures: {pictures['found']:,} files found, {pictures['missing']:,} missing, in {pictures['root']}")


def _control_line(counts: Mapping[str, Any]) -> Text:
    least, most = counts["dmso_wells_per_plate"]["min"], counts["dmso_wells_per_plate"]["max"]
    wells = f"{least}" if least == most else f"{least} to {most}"
    return Text(f"Control wells on each plate: {wells}. Channels: {', '.join(counts['channels'])}.")


def _lines(title: str, lines: list[str], style: str) -> list[RenderableType]:
    if not lines:
        return []
    shown: list[RenderableType] = [Text(), Text(f"{title} ({len(lines):,})", style=f"bold {style}")]
    # Text, not markup: a line may hold square brackets.
    shown += [Text(f"  - {line}") for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(Text(f"  ... and {len(lines) - SHOWN:,} more; --json has them all"))
    return shown
