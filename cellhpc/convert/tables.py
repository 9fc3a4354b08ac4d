"""The tables of a store: the markers of all tasks become `tiles.parquet`, `fields.parquet` and, last, `store.json`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cellhpc.convert.plan import ConversionPlan, Plate
from cellhpc.convert.tasks import dmso_id, read_marker
from cellhpc.ledger import provenance, write_json, write_table
from cellhpc.record import STORE

QUALITY = ("low", "high", "mean")


def write_tables(plan: ConversionPlan) -> dict[str, Any]:
    """Collect what the tasks of a conversion found, all being done.

    ``tiles.parquet`` has a row for each tile, near-empty and bad ones included: the columns of the fields table, and

    - tile, its place in the field, row-major from 0; row, its place in the plate's array;
    - signal_fraction, the fraction of its values that are signal (NaN in bad fields); kept, whether it is to be used.

    ``fields.parquet`` has a row for each field that was read, DMSO fields too: the columns of the fields table, and

    - bytes of its files; bad, why it was set aside ("" if it was not); near_empty, how many of its tiles are;
    - low_, high_ and mean_<channel> of the raw pixels.

    Returns
    -------
    dict
        The document of ``store.json``: digest, identity, field_format, counts, plates (with the statistics of their
        DMSO pixels), bad_fields, versions.

    Raises
    ------
    RuntimeError
        A task has no marker.
    """
    parts, plates, bad = [], {}, []
    tasks = pd.Series(plan.tasks).groupby([task.plate for task in plan.tasks]).agg(list)
    for plate in plan.plates:
        marker = _marker(plan, dmso_id(plate.name), plate.digest) if plan.normalised else {"fields": []}
        records = [("dmso", record) for record in marker["fields"]]
        for task in tasks[plate.name]:
            records += [("treatment", record) for record in _marker(plan, task.id, task.digest)["fields"]]
        bad += [_bad_field(plate.name, role, record) for role, record in records if record["bad"]]
        plates[plate.name] = {"fields": plate.fields, "dmso_fields": len(plate.dmso)} | {
            f"dmso_{key}": marker[key] for key in ("mean", "std") if key in marker
        }
        parts.append(_plate_records(plan, plate, records))
    found = pd.concat(parts, ignore_index=True)
    fields = plan.fields.merge(found, on=["plate", "well", "field", "role"], validate="one_to_one")
    tiles = _tiles(plan, fields)
    fields = fields.drop(columns="signal")
    used = fields["role"] == "treatment"
    good = used & (fields["bad"] == "")
    made = {key: value for key, value in provenance().items() if key in ("versions", "python", "commit", "dirty")}
    record = {
        "digest": plan.digest,
        "identity": plan.identity,
        "field_format": vars(plan.format),
        "counts": {
            "plates": len(plates),
            "fields": int(good.sum()),
            "bad_fields": len(bad),
            "tiles": len(tiles),
            "kept_tiles": int(tiles["kept"].sum()),
            "near_empty_tiles": int(fields.loc[good, "near_empty"].sum()),
        },
        "plates": plates,
        "bad_fields": bad,
        **made,
    }
    write_table(plan.store / "fields.parquet", fields)
    write_table(plan.store / "tiles.parquet", tiles)
    write_json(plan.store / STORE, record)
    return record


def _marker(plan: ConversionPlan, name: str, digest: str) -> dict[str, Any]:
    marker = read_marker(plan.store, name, digest)
    if marker is None:
        raise RuntimeError(f"{plan.store}: {name} is not done")
    return marker


def _bad_field(plate: str, role: str, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "plate": plate,
        "well": record["well"],
        "field": record["field"],
        "role": role,
        "reason": record["bad"],
        "files": record["files"],
        "bytes": record["bytes"],
    }


def _plate_records(plan: ConversionPlan, plate: Plate, records: list[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    nothing = [float("nan")] * plan.tiles_per_field
    rows = []
    for role, record in records:
        signal = record.get("signal", nothing)
        row = {"plate": plate.name, "well": record["well"], "field": record["field"], "role": role}
        row |= {"bytes": record["bytes"], "bad": record["bad"], "signal": signal}
        row["near_empty"] = int(np.sum(np.array(signal) <= plan.settings.empty_fraction))
        for key in QUALITY:
            values = record.get(key, [float("nan")] * len(plan.channels))
            row |= {f"{key}_{channel}": float(value) for channel, value in zip(plan.channels, values, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows)


def _tiles(plan: ConversionPlan, fields: pd.DataFrame) -> pd.DataFrame:
    """Make a row for each tile of the treatment fields, in the order of the arrays."""
    used = fields[fields["role"] == "treatment"].reset_index(drop=True)
    count = plan.tiles_per_field
    names = [f"file_{channel}" for channel in plan.channels]
    table = plan.fields.drop(columns=names).columns
    tiles = used.loc[used.index.repeat(count), table].reset_index(drop=True)
    tiles["tile"] = np.tile(np.arange(count), len(used))
    tiles["row"] = tiles.groupby("plate").cumcount()
    tiles["signal_fraction"] = np.concatenate([np.asarray(signal, float) for signal in used["signal"]])
    tiles["kept"] = tiles["signal_fraction"] > plan.settings.empty_fraction  # False where it is NaN
    return tiles
