"""The tables of a plate: the markers of its tasks become `fields.parquet`, `tiles.parquet` and, last, `plate.json`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cellhpc.convert.plan import ConversionPlan, Plate, tiled_roles
from cellhpc.convert.tasks import STATISTICS, read_marker, shard_name
from cellhpc.ledger import provenance, write_json, write_table
from cellhpc.record import FIELDS, PLATE, TILES, plate_folder

QUALITY = ("low", "high", "mean", "saturated", "focus")


def write_tables(plan: ConversionPlan, plate: Plate) -> None:
    """Collect what the tasks of a plate found, all being done.

    ``fields.parquet`` has a row for each field that was read, DMSO fields too: the columns of the fields table, and

    - bytes of its files, and modified_ns, when the last of them was written (0 in bad fields);
    - bad, why it was set aside ("" if it was not); near_empty, how many of its tiles are;
    - the figures of `cellhpc.quality`, each as <figure>_<channel>.

    ``tiles.parquet`` has a row for each tile, near-empty and bad ones included, and with `convert.controls` those of
    role "dmso" after the others: the columns of the fields table without the files, and

    - tile, its place in the field, row-major from 0; row, its place in the plate's array;
    - signal_fraction, the fraction of its values that are signal (NaN in bad fields); kept, whether it is to be used.

    ``plate.json`` has digest, labels (the digest of its part of the fields table), counts (those of fields and tiles
    without controls, which are counted for themselves if they were cut), statistics, bad_fields, the root of its
    pictures, and the versions that it was made by.

    Raises
    ------
    RuntimeError
        A task has no marker.
    """
    statistics = _marker(plan, plate, STATISTICS, plate.reference_digest) if plan.normalised else {"fields": []}
    tiled = tiled_roles(plan.settings)
    records = [record for record in statistics["fields"] if record["role"] not in tiled]
    for task in plan.tasks:
        if task.plate == plate.name:
            records += _marker(plan, plate, shard_name(task), task.digest)["fields"]
    found = pd.DataFrame([_row(plan, record) for record in records])
    mine = plan.fields[plan.fields["plate"] == plate.name]
    fields = mine.merge(found, on=["well", "field", "role"], validate="one_to_one")
    tiles = _tiles(plan, fields)
    fields = fields.drop(columns="signal")
    good = (fields["role"] == "treatment") & (fields["bad"] == "")
    used = tiles["role"] == "treatment"
    controls = {"control_tiles": int((~used).sum()), "kept_control_tiles": int(tiles.loc[~used, "kept"].sum())}
    controls = controls if plan.settings.controls else {}
    bad = [_bad_field(record) for record in records if record["bad"]]
    made = {key: value for key, value in provenance().items() if key in ("versions", "python", "commit", "dirty")}
    record = {
        "digest": plate.digest,
        "labels": plate.labels_digest,
        "root": str(plan.root),
        "counts": {
            "fields": int(good.sum()),
            "bad_fields": len(bad),
            "tiles": int(used.sum()),
            "kept_tiles": int(tiles.loc[used, "kept"].sum()),
            "near_empty_tiles": int(fields.loc[good, "near_empty"].sum()),
            **controls,
        },
        "statistics": statistics.get("statistics", {}),
        "bad_fields": bad,
        **made,
    }
    folder = plate_folder(plan.store, plate.name)
    write_table(folder / FIELDS, fields)
    write_table(folder / TILES, tiles)
    write_json(folder / PLATE, record)


def _marker(plan: ConversionPlan, plate: Plate, name: str, digest: str) -> dict[str, Any]:
    marker = read_marker(plan.store, plate.name, name, digest)
    if marker is None:
        raise RuntimeError(f"{plan.store}: {plate.name} {name} is not done")
    return marker


def _bad_field(record: dict[str, Any]) -> dict[str, Any]:
    return {"reason": record["bad"], **{key: record[key] for key in ("well", "field", "role", "files", "bytes")}}


def _row(plan: ConversionPlan, record: dict[str, Any]) -> dict[str, Any]:
    nothing = float("nan")
    signal = record.get("signal", [nothing] * plan.tiles_per_field)
    row = {key: record[key] for key in ("well", "field", "role", "bytes", "bad")}
    row |= {"modified_ns": record.get("modified_ns", 0), "signal": signal}
    row["near_empty"] = int(np.sum(np.array(signal) <= plan.settings.empty_fraction))
    for key in QUALITY:
        values = record.get(key, [nothing] * len(plan.channels))
        row |= {f"{key}_{channel}": float(value) for channel, value in zip(plan.channels, values, strict=True)}
    return row


def _tiles(plan: ConversionPlan, fields: pd.DataFrame) -> pd.DataFrame:
    """Make a row for each tile, in the order of the array."""
    used = pd.concat([fields[fields["role"] == role] for role in tiled_roles(plan.settings)], ignore_index=True)
    count = plan.tiles_per_field
    names = [f"file_{channel}" for channel in plan.channels]
    table = plan.fields.drop(columns=names).columns
    tiles = used.loc[used.index.repeat(count), table].reset_index(drop=True)
    tiles["tile"] = np.tile(np.arange(count), len(used))
    tiles["row"] = np.arange(len(tiles))
    tiles["signal_fraction"] = np.concatenate([np.asarray(signal, float) for signal in used["signal"]])
    tiles["kept"] = tiles["signal_fraction"] > plan.settings.empty_fraction  # False where it is NaN
    return tiles
