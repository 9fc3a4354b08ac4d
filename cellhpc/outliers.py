"""Fields that stand out of their plate: out of focus, dark or bright, saturated, or with near-empty tiles.

Each figure of `cellhpc.quality` is compared with its plate's median, in robust deviations: a deviation is 1.4826 times
the plate's median absolute deviation, which for a normal distribution is the standard one. Focus and mean are compared
by their logarithms, as blur and light multiply. Only what a fault does is named: focus that is low (blur, or hardly a
cell), a mean that is low or high, saturation that is high.

A compound changes its pictures too. Where all fields of a well stand out, it is rather the cells; where one of four
does, it is rather the picture. Nothing is dropped here: look first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

THRESHOLD = 5.0
"""Robust deviations from the plate's median beyond which a field is named."""

DEVIATION_AT_LEAST = {"focus": 0.2, "mean": 0.1, "saturated": 0.001}
"""What a deviation is at least, or fields of an even plate would be named for nothing. With the threshold above, a
field is named only if its focus is 2.7 times lower than the plate's median, its mean 1.65 times lower or higher, or
0.5 % more of its pixels are saturated."""

SHOWN = 20
"""Fields that a report names; the table names all."""

COLUMNS = (
    "plate", "well", "field", "role", "treatment", "figure", "value", "plate_median", "deviations", "named_of_well",
    "fields_of_well",
)  # fmt: skip

_FIELD, _WELL = ["plate", "well", "field"], ["plate", "well"]
_TOLD = ("figure", "value", "plate_median", "deviations")
_SMALLEST = 1e-6  # of focus and mean: a black field has no logarithm


def outliers(fields: pd.DataFrame) -> pd.DataFrame:
    """Name the fields that stand out of their plate.

    Parameters
    ----------
    fields
        The fields that were read, as in ``fields.parquet`` (see `cellhpc.convert.tables.write_tables`), of one plate or
        many.

    Returns
    -------
    DataFrame
        A row for each field and figure by which it stands out, the farthest field first, with the columns of `COLUMNS`.
        `figure` is a column of `fields`, as ``focus_dna``; ``near_empty`` counts tiles, is named from one on, and has
        no `deviations`. `named_of_well` counts the fields of the well that are named.
    """
    good = fields[fields["bad"] == ""]
    channels = [name.removeprefix("file_") for name in fields.columns if name.startswith("file_")]
    found = [_named(good, "near_empty", good["near_empty"] > 0)]
    for figure in DEVIATION_AT_LEAST:
        for channel in channels:
            away = _deviations(good, figure, channel)
            far = {"focus": -away, "mean": away.abs(), "saturated": away}[figure] > THRESHOLD
            found.append(_named(good, f"{figure}_{channel}", far, away))
    named = pd.concat(found, ignore_index=True)
    wells = named.drop_duplicates(_FIELD).groupby(_WELL).size().rename("named_of_well")
    named = named.join(wells, on=_WELL).join(good.groupby(_WELL).size().rename("fields_of_well"), on=_WELL)
    far = named["deviations"].abs().fillna(0)
    farthest = far.groupby([named[name] for name in _FIELD]).transform("max")
    named = named.assign(farthest=-farthest, far=-far).sort_values(["farthest", *_FIELD, "far", "figure"])
    return named[list(COLUMNS)].reset_index(drop=True)


def summary(fields: pd.DataFrame) -> dict[str, Any]:
    """Tell of the quality of fields for a report: counts, and which fields stand out the most, at most `SHOWN`.

    Parameters
    ----------
    fields
        As for `outliers`.
    """
    told = [*tell(outliers(fields))]
    return {
        "plates": int(fields["plate"].nunique()),
        "fields": len(fields),
        "controls": int((fields["role"] == "dmso").sum()),
        "set_aside": int((fields["bad"] != "").sum()),
        "near_empty_tiles": int(fields["near_empty"].sum()),
        "stand_out": len(told),
        "threshold": THRESHOLD,
        "shown": told[:SHOWN],
    }


def tell(named: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Tell of each field that `outliers` named: which it is, how many of its well are, and by what it stands out."""
    for _, rows in named.groupby(_FIELD, sort=False):
        first = rows.iloc[0]
        yield {
            "plate": first["plate"],
            "well": first["well"],
            "field": int(first["field"]),
            "treatment": first["treatment"],
            "of_well": f"{first['named_of_well']} of {first['fields_of_well']}",
            "figures": [_text(*row) for row in zip(*(rows[name] for name in _TOLD), strict=True)],
        }


def _deviations(fields: pd.DataFrame, figure: str, channel: str) -> pd.Series:
    """Robust deviations of each field from its plate's median."""
    values = fields[f"{figure}_{channel}"]
    if figure != "saturated":
        values = values.clip(lower=_SMALLEST).map(np.log)
    away = values - values.groupby(fields["plate"]).transform("median")
    deviation = 1.4826 * away.abs().groupby(fields["plate"]).transform("median")
    return away / deviation.clip(lower=DEVIATION_AT_LEAST[figure])


def _named(fields: pd.DataFrame, figure: str, named: pd.Series, away: pd.Series | float = np.nan) -> pd.DataFrame:
    median = fields.groupby("plate")[figure].transform("median")
    told = fields[[*_FIELD, "role", "treatment"]].assign(
        figure=figure, value=fields[figure].astype(float), plate_median=median.astype(float), deviations=away
    )
    return told[named]


def _text(figure: str, value: float, plate_median: float, deviations: float) -> str:
    if figure == "near_empty":
        return f"{value:.0f} near-empty tile" + ("s" if value > 1 else "")
    kind, channel = figure.split("_", 1)
    return f"{kind} of {channel} {value:.3g}, median {plate_median:.3g} ({deviations:+.1f})"
