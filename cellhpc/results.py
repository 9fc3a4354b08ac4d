"""What is written of scores: tables that grow fold by fold, figures, the document and the page."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cellhpc import figures, ledger
from cellhpc.errors import DataError
from cellhpc.folds import Folds
from cellhpc.gallery import make_gallery
from cellhpc.levels import PREFIX, Ladder, Scored, called_units
from cellhpc.montage import montage
from cellhpc.names import model_name
from cellhpc.outliers import outliers
from cellhpc.report import render_report
from cellhpc.report.compounds import wrong_treatments
from cellhpc.score_tables import flat_intervals, tables_of
from cellhpc.tally import ModelTally
from cellhpc.tiles import Store
from cellhpc.uncertainty_figures import conformal_figure, rejection_figure, reliability_figure

Name = tuple[str, str]
"""Network and initialisation of a model."""
GROWING = {"well": "wells.csv", "field": "fields.csv"}
"""Tables that are too large to be kept."""
_PICTURE = (".png", ".svg")


class GrowingTables:
    """Tables of wells and fields, written as their folds come; under their names only when all is there.

    Parameters
    ----------
    folder
        Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, tuple[Any, list[str]]] = {}
        self._described: tuple[Ladder | None, dict[str, list[tuple[Any, ...]]]] = (None, {})
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> GrowingTables:
        return self

    def __exit__(self, *fault: Any) -> bool | None:
        return self._stack.__exit__(*fault)

    def add(self, model: Name, ladder: Ladder, climbed: Mapping[str, Scored]) -> None:
        """Append the wells and fields of a fold, as `levels.unit_table` gives them with the model's name before.

        Columns that the first fold lacks are left out. The rows are put together here, for speed: what describes the
        units is the same for all models of a fold.
        """
        if self._described[0] is not ladder:
            self._described = (ladder, {})
        for level in GROWING.keys() & climbed.keys():
            described, calls, rank, probabilities = called_units(ladder, level, climbed[level])
            writer, columns = self._open.get(level) or self._begin(level, described, ladder.classes)
            if level not in self._described[1]:
                self._described[1][level] = [*zip(*(_written(described, name) for name in columns), strict=True)]
            parts = (part.tolist() for part in (calls, rank == 0, rank < 2, probabilities))
            writer.writerows(
                (*model, *units, ladder.classes[call], right, near, *values)
                for units, call, right, near, values in zip(self._described[1][level], *parts, strict=True)
            )

    def _begin(self, level: str, described: pd.DataFrame, classes: Sequence[str]) -> tuple[Any, list[str]]:
        temporary = self._stack.enter_context(ledger.replacing(self._folder / GROWING[level]))
        file = self._stack.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        writer, columns = csv.writer(file, lineterminator="\n"), list(described.columns)
        called = ["call", "correct", "top2", *(PREFIX + name for name in classes)]
        writer.writerow(["network", "initialisation", *columns, *called])
        self._open[level] = (writer, columns)
        return self._open[level]


def _written(table: pd.DataFrame, column: str) -> list[Any]:
    """Values of a column, empty where there is none."""
    if column not in table:
        return [""] * len(table)
    return ["" if lacks else value for value, lacks in zip(table[column], table[column].isna(), strict=True)]


def named(model: Name, table: pd.DataFrame) -> pd.DataFrame:
    """Put the model's name before the columns of a table."""
    whose = {"network": model[0], "initialisation": model[1]}
    return pd.concat([pd.DataFrame(whose, index=table.index), table], axis=1)


def write_results(
    results: Path,
    document: dict[str, Any],
    models: Mapping[Name, ModelTally],
    inputs: str,
    store: Store | None = None,
    outputs: Iterable[Path] = (),
    folds: Folds | None = None,
) -> None:
    """Write tables, figures, the document and the page, the marker last; remove what an earlier aggregation had more.

    Parameters
    ----------
    results
        Where they go.
    document
        That of `scores.json`.
    models
        Of each model its tables.
    inputs
        Digest of all that went into them.
    store
        What the runs learnt from, for the montage and the quality of the pictures.
    outputs
        Folders of the outputs of runs, which may hold attributions.
    folds
        The folds of the study.
    """
    (results / ledger.DONE).unlink(missing_ok=True)
    classes = document["classes"]
    for name, table in _tables(document, models).items():
        if table.empty:
            (results / name).unlink(missing_ok=True)
        else:
            ledger.write_table(results / name, table)
    matrices, pictures = {}, {}
    drawn_of = [(model_name(model), f"confusion-{model['slug']}", model) for model in document["models"]]
    drawn_of += [(one["name"], f"confusion-ensemble-{number}", one) for number, one in enumerate(document["ensembles"])]
    for title, name, one in drawn_of:
        matrix = pd.DataFrame(one["confusion"], index=pd.Index(classes, name="label"), columns=classes)
        matrices[title] = matrix
        pictures[name] = figures.save(figures.confusion_figure(matrix, title), results / f"{name}.png")
        ledger.write_table(results / f"{name}.csv", matrix.reset_index())
    pictures["confusion"] = figures.save(figures.confusions_figure(matrices), results / "confusion.png")
    if all(model["curves"] for model in document["models"]):
        curves = figures.learning_curves_figure(document["models"], len(classes), document["curves_combined"])
        pictures["learning-curves"] = figures.save(curves, results / "learning-curves.png")
    drawn = {
        "reliability": reliability_figure(document["models"]),
        "conformal": conformal_figure(document["models"], len(classes)),
        "rejection": rejection_figure(document["models"]),
    }
    for name, figure in drawn.items():
        if figure is not None:
            pictures[name] = figures.save(figure, results / f"{name}.png")
    for name in ("outliers.csv", "montage.png"):
        (results / name).unlink(missing_ok=True)
    if store:
        ledger.write_table(results / "outliers.csv", outliers(store.fields))
        try:
            pictures["montage"] = montage(store, classes).save(results / "montage.png")
        except (DataError, OSError) as fault:  # scores don't need the tiles, which may be gone by now
            document["no_montage"] = str(fault)
    ledger.write_json(results / "scores.json", document)
    tables = {entry["slug"]: models[entry["network"], entry["initialisation"]] for entry in document["models"]}
    page = render_report(
        document,
        pictures,
        {slug: model.treatments for slug, model in tables.items()},
        {slug: p for slug, model in tables.items() if len(p := model.assessment.p_values)},
        make_gallery(store, wrong_treatments(document), outputs, folds),
    )
    ledger.write_text(results / "report.html", page)
    for path in (*results.glob("confusion-*"), *(results / f"{name}{end}" for name in drawn for end in _PICTURE)):
        if path.stem not in pictures:
            path.unlink(missing_ok=True)
    ledger.mark_done(results, inputs)


def _tables(document: Mapping[str, Any], models: Mapping[Name, ModelTally]) -> dict[str, pd.DataFrame]:
    """Tables of all models together, by file name."""
    entries = {(entry["network"], entry["initialisation"]): entry for entry in document["models"]}
    names = ("treatments.csv", "compounds.csv", "by_label.csv", "p_values.csv", "repeat.csv", "uncertainty.csv")
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
    for name, model in models.items():
        parts["p_values.csv"].append(named(name, model.assessment.p_values))
        parts["repeat.csv"].append(named(name, model.assessment.repeat))
        parts["uncertainty.csv"].append(named(name, model.assessment.treatments))
        compounds = model.compounds
        parts["treatments.csv"].append(named(name, model.treatments))
        counts = pd.DataFrame(entries[name]["by_compound"]).rename(columns={"correct": "right", "total": "treatments"})
        if compounds is not None:
            counts = compounds.merge(counts.drop(columns="label"), on="compound", how="left")
        parts["compounds.csv"].append(named(name, counts))
        parts["by_label.csv"].append(named(name, flat_intervals(entries[name]["by_label"])))
    found = {name: _below(tables) for name, tables in parts.items()}
    return {**found, "comparisons.csv": flat_intervals(document["comparisons"]), **tables_of(document)}


def _below(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put tables one below the other; some may be empty, or lack all values of a column."""
    rows = [row for table in tables for row in table.to_dict("records")]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(name for table in tables for name in table.columns)))
