"""What is shown of a study's scores: a table for the terminal, and one HTML page that needs no network.

Both are made from the document of `scores.json` alone (see `cellhpc.aggregate`); the page carries its figures itself.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from rich.table import Table
from rich.text import Text

from cellhpc import figures
from cellhpc.grid import describe

SHOWN_LEVELS = ("treatment", "compound", "well", "field", "tile")


def render_scores(scores: Mapping[str, Any]) -> Table:
    """Make the closing table of a study for the terminal: one row a model, then the baselines and chance.

    Parameters
    ----------
    scores
        The document of `scores.json`.
    """
    table = Table(title=f"{scores['study']}: accuracy on what was held out", title_justify="left", show_edge=False)
    table.add_column("Model", overflow="fold")
    table.add_column("Treatments", justify="right", no_wrap=True)
    table.add_column("%", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    for heading in ("Wells", "Fields", "Tiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in scores["models"]:
        levels = model["levels"]
        seeds = f", {len(model['seeds'])} seeds" if len(model["seeds"]) > 1 else ""
        name = Text(f"{model['network']}, {model['initialisation']}{seeds}")
        rest = [
            f"{_percent(levels[level]['accuracy'])} % of {levels[level]['total']}" if level in levels else ""
            for level in ("well", "field", "tile")
        ]
        table.add_row(name, *_counted(levels["treatment"]), *rest)
    for row in scores["ensembles"]:
        table.add_row(row["name"], *_counted(row["treatment"]), "", "", "")
    table.add_section()
    for row in scores["baselines"]["table"]:
        table.add_row(row["words"], *_counted(row), "", "", "", style="dim")
    chance = scores["baselines"]["chance"]
    table.add_row(f"chance, 1 of {len(scores['classes'])} classes", "", _percent(chance), "", "", "", "", style="dim")
    if not scores["complete"]:
        table.caption = Text(scores["headline"][0], style="bold yellow")
        table.caption_justify = "left"
    return table


def render_report(scores: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Write the HTML page of a study.

    Parameters
    ----------
    scores
        The document of `scores.json`.
    pictures
        PNG files by name: `confusion`, `learning-curves`, `confusion-<slug>` of each model, and perhaps `montage`.

    Returns
    -------
    str
        A whole HTML document; nothing in it is fetched from elsewhere.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = _percent
    environment.filters["describe"] = describe
    template = environment.from_string(
        resources.files("cellhpc").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        scores=scores,
        levels=[level for level in SHOWN_LEVELS if any(level in model["levels"] for model in scores["models"])],
        pictures={name: _picture(png) for name, png in pictures.items()},
        settings=dict(_flat(scores["settings"])),
        chosen=_chosen(scores.get("search", [])),
        curves_caption=figures.CURVES_CAPTION,
        confusion_caption=figures.CONFUSION_CAPTION,
    )


def _chosen(search: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Count the runs that chose the same, the commonest choice first."""
    return Counter(describe(run["values"]) for run in search).most_common()


def _picture(png: bytes) -> dict[str, Any]:
    """Encode a PNG for the page, with the width (CSS pixels, 96 in an inch) at which its letters have their size."""
    width_px = int.from_bytes(png[16:20], "big")  # of the PNG's first chunk, IHDR
    return {"data": base64.b64encode(png).decode("ascii"), "width": round(width_px * 96 / figures.DPI)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _counted(accuracy: Mapping[str, Any]) -> tuple[str, str, str]:
    """Write counts, accuracy and Wilson interval."""
    low, high = accuracy["wilson95"]
    return (
        f"{accuracy['correct']}/{accuracy['total']}",
        _percent(accuracy["accuracy"]),
        f"{_percent(low)} to {_percent(high)}",
    )


def _flat(document: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Pairs `section.key`, value of nested settings."""
    pairs: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{above}{key}.")
        elif value not in (None, [], {}):
            pairs.append((f"{above}{key}", ", ".join(map(str, value)) if isinstance(value, list) else value))
    return pairs
