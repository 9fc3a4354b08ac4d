"""The closing table of a study, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cellhpc.names import model_name
from cellhpc.scores import counted, percent


def render_scores(scores: Mapping[str, Any]) -> Table:
    """Make the closing table of a study for the terminal: one row a model, then the baselines and chance.

    Parameters
    ----------
    scores
        The document of `scores.json`.
    """
    title = f"{escape(scores['study'])}: accuracy on what was held out"
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("Model", overflow="fold")
    table.add_column("Treatments", justify="right", no_wrap=True)
    table.add_column("%", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    for heading in ("Wells", "Fields", "Tiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in scores["models"]:
        levels = model["levels"]
        seeds = f", {len(model['seeds'])} seeds" if len(model["seeds"]) > 1 else ""
        name = Text(model_name(model) + seeds)
        rest = [
            f"{percent(levels[level]['accuracy'])} % of {levels[level]['total']}" if level in levels else ""
            for level in ("well", "field", "tile")
        ]
        table.add_row(name, *counted(levels["treatment"]), *rest)
    for row in scores["ensembles"]:
        table.add_row(Text(row["name"]), *counted(row["treatment"]), "", "", "")
    table.add_section()
    for row in scores["baselines"]["table"]:
        table.add_row(Text(row["words"]), *counted(row), "", "", "", style="dim")
    chance = scores["baselines"]["chance"]
    table.add_row(f"chance, 1 of {len(scores['classes'])} classes", "", percent(chance), "", "", "", "", style="dim")
    if not scores["complete"]:
        table.caption = Text(scores["headline"][0], style="bold yellow")
        table.caption_justify = "left"
    return table
