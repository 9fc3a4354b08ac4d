"""Tables of what `scores.json` says, a row each: accuracies, calibration, conformal coverage, rejection, curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from cellhpc.names import model_name

Row = dict[str, Any]


def tables_of(document: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Make the tables of a document, by file name; those that it has nothing for are empty.

    - `accuracy.csv`: `model`, `of` (the ensemble or a seed), `level` and its accuracy with intervals; macro accuracies,
      ensembles of networks and baselines too.
    - `calibration.csv` and `reliability.csv`: figures and bins, `as predicted` and `after temperature`.
    - `conformal.csv`: coverage and size of the sets, over all labels and by label, at every alpha.
    - `rejection.csv`: share of wrong calls where the least certain treatments are not called.
    - `curves.csv`: right and asked after each epoch, pooled (`all`) and by seed.
    - `unknown.csv`: known against unknown labels.
    """
    models = [(model_name(model), model) for model in document["models"]]
    doubts = [(name, model["uncertainty"]) for name, model in models if model.get("uncertainty")]
    return {
        "accuracy.csv": flat_intervals([*_accuracies(models), *_accuracies_beside(document)]),
        "calibration.csv": flat_intervals([row for name, found in doubts for row in _calibrations(name, found)]),
        "reliability.csv": flat_intervals([row for name, found in doubts for row in _bins(name, found)]),
        "conformal.csv": flat_intervals([row for name, found in doubts for row in _sets(name, found)]),
        "rejection.csv": flat_intervals([row for name, found in doubts for row in _rejections(name, found)]),
        "curves.csv": flat_intervals([row for name, model in models for row in _curves(name, model)]),
        "unknown.csv": flat_intervals([row for name, found in doubts for row in _unknown(name, found)]),
    }


def flat_intervals(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a table of entries whose intervals become two columns each, and whose entries become columns of theirs.

    Counts stay whole numbers where some rows have none.
    """
    flat = [dict(_flat(row)) for row in rows]
    table = pd.DataFrame(flat)
    columns = [str(name) for name in table.columns]
    counts = [name for name in columns if {type(row[name]) for row in flat if row.get(name) is not None} == {int}]
    return table.astype(dict.fromkeys(counts, "Int64"))


def _flat(row: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if key.endswith("95"):
            low, high = value or (None, None)
            yield from ((f"{above}{key}_low", low), (f"{above}{key}_high", high))
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}_")
        else:
            yield f"{above}{key}", value


def _without(row: Mapping[str, Any], *names: str) -> Row:
    return {key: value for key, value in row.items() if key not in names}


def _accuracies(models: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Row]:
    for name, model in models:
        several = len(model["seeds"]) > 1
        seeds = [(f"seed {seed}", entry) for seed, entry in model["by_seed"].items()] if several else []
        for of, entry in ((model["levels_of"], model), *seeds):
            for level, at in entry["levels"].items():
                yield {"model": name, "of": of, "level": level, **at}
        for what, at in (model.get("macro") or {}).items():
            yield {"model": name, "of": model["levels_of"], "level": f"mean over {what}s", **_without(at, "of")}


def _accuracies_beside(document: Mapping[str, Any]) -> Iterator[Row]:
    for one in document.get("ensembles", ()):
        yield {"model": one["name"], "of": "ensemble of networks", "level": "treatment", **one["treatment"]}
    for row in document["baselines"].get("table", ()):
        yield {"model": row["words"], "of": "baseline", "level": "treatment", **_without(row, "name", "words")}


def _states(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if at := found.get("calibration"):
        yield "as predicted", at
        if at["after_temperature"]:
            yield "after temperature", at["after_temperature"]


def _calibrations(name: str, found: Mapping[str, Any]) -> Iterator[Row]:
    for state, at in _states(found):
        yield {"model": name, "state": state, **_without(at, "bins", "after_temperature")}


def _bins(name: str, found: Mapping[str, Any]) -> Iterator[Row]:
    for state, at in _states(found):
        for one in at["bins"]:
            yield {"model": name, "state": state, **one}


def _sets(name: str, found: Mapping[str, Any]) -> Iterator[Row]:
    for kind in ("marginal", "by_label"):
        for at in (found.get("conformal") or {}).get(kind, ()):
            yield {"model": name, "kind": kind, "label": "", **_without(at, "per_label")}
            for row in at.get("per_label", ()):
                yield {"model": name, "kind": kind, "alpha": at["alpha"], **row}


def _rejections(name: str, found: Mapping[str, Any]) -> Iterator[Row]:
    for point in (found.get("rejection") or {}).get("curve", ()):
        yield {"model": name, **point}


def _curves(name: str, model: Mapping[str, Any]) -> Iterator[Row]:
    for seed, levels in model["curves"].items():
        for level, counts in levels.items():
            for epoch, (correct, total) in enumerate(zip(counts["correct"], counts["total"], strict=True), 1):
                yield {"model": name, "seed": seed, "epoch": epoch, "level": level, "correct": correct, "total": total}


def _unknown(name: str, found: Mapping[str, Any]) -> Iterator[Row]:
    if at := found.get("unknown"):
        yield {"model": name, "label": "", **_without(at, "per_label")}
        for row in at["per_label"]:
            yield {"model": name, **row}
