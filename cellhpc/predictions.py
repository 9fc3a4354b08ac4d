"""Predictions from anywhere, scored as those of a study are.

A table (CSV, TSV or Parquet) has one row a tile, field, well or treatment: its compound, concentration and true label,
and one column of probability for each class, named `p_<class>` or as the label itself. It may say more: `unit`,
`treatment`, `plate`, `well`, `field`, `tile`, `batch`, `replicate`, `fold`, `model`, `initialisation` and `seed`.
What is not there is made of what is: a treatment of compound and concentration, a well of treatment and replicate.
With `trained_on`, the compounds that the network of a row was trained on, separated by semicolons, no row may predict
one of them.

Into the results folder go the files that `cellhpc.aggregate` describes, but for learning curves and what runs alone can
tell. `scores.json` has instead::

    table.{name, bytes, sha256, rows, level}      the file, and of what a row is
    models[].curves, cost                         empty, null
    runs                                          none: done and expected are 0
    folds.{by, total}                             "fold", or "compound" without such a column
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from cellhpc import figures, ledger, scores
from cellhpc.aggregate import SCHEMA, caution_of_shared, headline, slug, tell_apart
from cellhpc.compare import comparisons, ensembles
from cellhpc.errors import DataError, UsageError, listing
from cellhpc.levels import PREFIX, How, Ladder, check_probabilities
from cellhpc.results import GROWING, GrowingTables, Name, write_results
from cellhpc.runs import Origin
from cellhpc.settings import PREDICTION_COLUMNS
from cellhpc.tally import ModelTally, Predicted

GIVEN = "from a table"
"""Initialisation of a model whose table does not tell it."""
UNSEEN = "The predictions were given: what was trained on is not known here, and a leak can't be seen."
_NUMBERS = ("concentration", "field", "tile", "seed")
_WHOLE = (
    "compound", "label", "treatment", "concentration", "well", "fold", "model", "initialisation", "trained_on",
)  # fmt: skip
"""Columns that, where they are there, every row has a value of."""


def read_predictions(
    path: Path, names: Mapping[str, str] | None = None, classes: Sequence[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Read a table of predictions.

    Parameters
    ----------
    path
        The file.
    names
        For those of `PREDICTION_COLUMNS` that are called otherwise in the file, their names there.
    classes
        Columns of probability, in the order of the classes; by default those that begin with `p_`, or else those that
        are called as a label is.

    Returns
    -------
    table
        The columns of `PREDICTION_COLUMNS` that are there or can be made, and `p_<class>`, float64.
    classes
        Classes, in the order of the columns.

    Raises
    ------
    UsageError
        There is no such file, or a column that was named is not in it.
    DataError
        The file is no such table: it can't be read, is empty, lacks columns or values, or a compound has two labels.
    """
    names = dict(names or {})
    raw = _read(path, {names.get(name, name) for name in PREDICTION_COLUMNS if name not in _NUMBERS})
    absent = [name for name in (*names.values(), *classes) if name not in raw]
    if absent:
        raise UsageError(f"{path} has no column {listing(absent)}. Found: {listing(raw.columns, 30)}.")
    if raw.empty:
        raise DataError(f"{path}: the table has no rows.")
    table = pd.DataFrame(
        {name: raw[names.get(name, name)] for name in PREDICTION_COLUMNS if names.get(name, name) in raw}
    )
    _require_columns(path, table, raw)
    _refuse_two_labels(path, table)
    _refuse_leaks(path, table)
    table = _complete(table)
    columns = list(classes) or [str(name) for name in raw if str(name).startswith(PREFIX)]
    columns = columns or [str(name) for name in raw if str(name) in set(table["label"])]
    if not columns:
        raise DataError(
            f"{path}: there is no column of probability: one for each class, named p_<class> or as the label.",
            [f"labels: {listing(set(table['label']))}"],
            f"Found: {listing(raw.columns, 30)}. Name them with --class.",
        )
    found = [column.removeprefix(PREFIX) for column in columns]
    values = raw[columns].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    by_label = not classes and not columns[0].startswith(PREFIX)
    if by_label and (sums := values.sum(axis=1)).between(0, 0.999).mean() > 0.5:
        raise DataError(
            f"{path}: the columns that are called as labels don't sum to one, but to {sums.median():.3g} (median).",
            [f"taken as a class: {name}" for name in columns],
            "A class of which no row has the label is not found so: name all columns of classes, each with --class.",
        )
    return pd.concat([table, values.set_axis([PREFIX + name for name in found], axis=1)], axis=1), found


def score_predictions(
    path: Path,
    folder: Path,
    how: How = "mean",
    names: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a table of predictions, and write what `cellhpc.aggregate` writes of a study.

    Parameters
    ----------
    path, names, classes
        As of `read_predictions`.
    folder
        Where the results go; with the same table and settings a second call does nothing.
    how
        How probabilities are combined.

    Returns
    -------
    dict
        The document of `scores.json`.

    Raises
    ------
    UsageError
        There is no such table or column, or the folder holds something else.
    DataError
        The table is wrong.
    """
    _require_free(folder)
    table, found = read_predictions(path, names, classes)
    about = {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path), "rows": len(table)}
    settings = {"how": how, "columns": dict(names or {}), "classes": found, "version": metadata.version("cellhpc")}
    inputs = ledger.digest({"schema": SCHEMA, "table": about, **settings})
    if ledger.is_done(folder, inputs) and (folder / "scores.json").exists():
        document: dict[str, Any] = ledger.read_json(folder / "scores.json")
        return document
    checked = "trained_on" in table
    table = table.drop(columns="trained_on", errors="ignore")
    split = _split_differently(table) if "fold" in table else []
    if split:  # what one leaves out together, another does not
        table = table.drop(columns="fold")
    by = "fold" if "fold" in table else "compound"
    models, entries, asked = {}, [], []
    with GrowingTables(folder) as tables:
        for name, own in _models(table, path.stem).items():
            members = {seed: _member(part, found) for seed, part in _seeds(own).items()}
            models[name] = ModelTally(found, how, "compound" if checked else "")
            ladder, climbed = models[name].add(members)
            tables.add(name, ladder, climbed)
            asked.append(ladder.table)
            entries.append(_entry(name, models[name], own, by, set(table[by])))
        (folder / ledger.DONE).unlink(missing_ok=True)  # the tables take their names now
    tell_apart(entries)
    for level in GROWING.keys() - ladder.units.keys():
        (folder / GROWING[level]).unlink(missing_ok=True)  # of another table, that had more
    treatments = pd.concat(asked, ignore_index=True)
    described = [name for name in ("fold", "treatment", "compound", "label", "batch") if name in treatments]
    treatments = treatments[described].drop_duplicates()
    cautions = [] if checked else [UNSEEN]
    cautions += split or (caution_of_shared(treatments, "fold") if by == "fold" else [])
    missing = sorted({name for entry in entries for of in entry["by_seed"].values() for name in of["folds"]["missing"]})
    lacking = [f"Incomplete: {by} {listing(missing, 6)} not predicted by every model and seed."] if missing else []
    treatments_of = {name: model.treatments for name, model in models.items()}
    document = {
        "schema": SCHEMA,
        "study": path.stem,
        "complete": not missing,
        "headline": lacking + headline(entries, by) + cautions,
        "cautions": cautions,
        "combine": how,
        "curves_combined": [],
        "classes": found,
        "abbreviations": figures.abbreviate(found),
        "folds": {
            "by": by,
            "also": "",
            "sha256": "",
            "total": table[by].nunique(),
            "not_scorable": {},
            "unknown": False,
        },
        "runs": {"done": 0, "expected": 0, "missing": []},
        "table": {**about, "level": next(iter(ladder.units))},
        "models": entries,
        "comparisons": comparisons(treatments_of),
        "ensembles": ensembles(treatments_of, found),
        "baselines": scores.baselines(treatments, found),
        "conversion": {},
        "quality": {},
        "no_montage": "",
        "provenance": {"runs": Origin().document(), "aggregate": ledger.provenance()},
        "settings": {},
    }
    write_results(folder, document, models, inputs)
    return document


def _read(path: Path, texts: Collection[str]) -> pd.DataFrame:
    """Read a file; the columns in `texts` as they are written, never as numbers."""
    if not path.is_file():
        raise UsageError(f"{path}: no such table. A CSV, TSV or Parquet file is wanted.")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            return table.assign(**{name: table[name].astype(object).map(_text) for name in texts if name in table})
        kinds: dict[Any, type[str]] = dict.fromkeys(texts, str)
        between = "\t" if ".tsv" in path.suffixes else ","
        return pd.read_csv(path, sep=between, dtype=kinds, keep_default_na=False, na_values=[""])
    except pd.errors.EmptyDataError:
        raise DataError(f"{path}: the file is empty.") from None
    except (OSError, ValueError, pa.ArrowException) as fault:
        raise DataError(
            f"{path}: can't be read: {str(fault).splitlines()[0]}",
            remedy="A CSV, TSV or Parquet file is wanted, by the ending of its name.",
        ) from None


def _text(value: Any) -> Any:
    return value if value is None or value != value else str(value)


def _require_columns(path: Path, table: pd.DataFrame, raw: pd.DataFrame) -> None:
    missing = [name for name in ("compound", "label") if name not in table]
    missing += ["treatment or concentration"] if not {"treatment", "concentration"} & set(table) else []
    if missing:
        raise DataError(
            f"{path}: the table lacks columns.",
            [f"no column {name}" for name in missing],
            f"Found: {listing(raw.columns, 30)}. Say what is called otherwise, as --label-column NAME.",
        )
    for name in (name for name in _WHOLE if name in table):
        if (gaps := table[name].isna()).any():
            lines = [f"line {row + 2}" for row in np.flatnonzero(gaps)]
            raise DataError(f"{path}: {len(lines)} of {len(table)} rows have no {name}.", lines)
    if "seed" in table and not pd.api.types.is_integer_dtype(table["seed"]):
        raise DataError(f"{path}: seeds are whole numbers, found: {listing(table['seed'].unique())}.")


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """Make the keys that are not there of those that are."""
    if "treatment" not in table:
        doses = pd.to_numeric(table["concentration"], errors="coerce")
        texts = [
            str(given) if np.isnan(dose) else f"{dose:g}"
            for given, dose in zip(table["concentration"], doses, strict=True)
        ]
        table = table.assign(treatment=table["compound"] + " " + texts)
        if "unit" in table:
            table["treatment"] += " " + table["unit"].fillna("")
    if "well" not in table and "replicate" in table:
        table = table.assign(well=table["treatment"] + ", " + table["replicate"])
    if "tile" in table and "field" not in table:
        table = table.rename(columns={"tile": "field"})
    return table


def _refuse_two_labels(path: Path, table: pd.DataFrame) -> None:
    labels = table.groupby("compound")["label"].unique()
    if len(several := labels[labels.map(len) > 1]):
        raise DataError(
            f"{path}: a compound has one label, but some have several.",
            [f"{compound}: {listing(own)}" for compound, own in several.items()],
            "Where doses of one compound do different things, name a column that tells them apart: --compound-column.",
        )


def _refuse_leaks(path: Path, table: pd.DataFrame) -> None:
    """Refuse rows of compounds that their network was trained on, where that is said."""
    if "trained_on" not in table:
        return
    learnt = {text: {name.strip() for name in text.split(";")} for text in table["trained_on"].unique()}
    pairs = zip(table["compound"], table["trained_on"], strict=True)
    leaks = Counter(compound for compound, text in pairs if compound in learnt[text])
    if leaks:
        raise DataError(
            f"{path}: {leaks.total()} row(s) predict a compound that their network was trained on: a leak.",
            [f"{compound}: {count} row(s)" for compound, count in leaks.items()],
            "Such calls are no held-out accuracy. Leave these rows out, or mend trained_on.",
        )


def _models(table: pd.DataFrame, name: str) -> dict[Name, pd.DataFrame]:
    """Rows of each model, by network and initialisation."""
    networks = table["model"] if "model" in table else pd.Series(name, index=table.index)
    starts = table["initialisation"] if "initialisation" in table else pd.Series(GIVEN, index=table.index)
    return {(str(one), str(other)): own for (one, other), own in table.groupby([networks, starts], sort=False)}


def _seeds(table: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Rows of each seed of a model."""
    if "seed" not in table:
        return {0: table}
    return {int(str(seed)): own for seed, own in table.groupby("seed")}


def _member(table: pd.DataFrame, classes: Sequence[str]) -> Predicted:
    """Units and probabilities of one seed."""
    table = table.drop(columns=["model", "initialisation", "seed"], errors="ignore").reset_index(drop=True)
    values = check_probabilities(table)
    return Predicted(Ladder(table.drop(columns=[PREFIX + name for name in classes]), classes), values)


def _entry(name: Name, model: ModelTally, own: pd.DataFrame, by: str, every: set[str]) -> dict[str, Any]:
    """Make the entry of one model in `scores.json`."""
    found = model.document()
    if "seed" not in own:
        found["levels_of"] = "as given"
    for seed, part in _seeds(own).items():
        here = set(part[by])
        found["by_seed"][str(seed)]["folds"] = {
            "done": len(here),
            "total": len(every),
            "missing": sorted(every - here),
        }
    network, start = name
    whose = {"network": network, "initialisation": start, "weights": "", "slug": slug(network, start)}
    return {**whose, **found, "curves": {}, "cost": None}


def _split_differently(table: pd.DataFrame) -> list[str]:
    """Say so where models or seeds were split differently."""
    whose = [name for name in ("model", "initialisation", "seed") if name in table]
    splits = table.groupby([*whose, "compound"])["fold"].unique().map(frozenset)
    different = splits.groupby("compound").nunique()
    if not (different > 1).any():
        return []
    names = listing(different.index[different > 1], 6)
    return [f"Models or seeds were split differently; not in the same folds of all: {names}. Folds are not looked at."]


def _require_free(folder: Path) -> None:
    """Refuse a folder that holds something else than the scores of a table."""
    try:
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    except OSError as fault:
        raise UsageError(f"{folder} is no folder that can be used: {fault.strerror}. Choose another --out.") from None
    if not names or names <= {*GROWING.values(), "treatments.csv", "compounds.csv"}:  # an earlier call was cut off
        return
    scored = ledger.read_json(folder / "scores.json") if "scores.json" in names else {}
    if "table" not in scored:
        raise UsageError(f"{folder} holds something else than the scores of a table. Choose another --out.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
