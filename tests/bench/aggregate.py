"""Aggregation of 10 to 1,000 finished runs (with --large, 10,000), as a sweep leaves them: seconds and peak memory.

A run predicts 500 held-out tiles of 12 classes, five treatments of five wells. Each study is aggregated in a process of
its own, once by `cellhpc.aggregate` and once by the group-by in pandas that one would write first: read all,
concatenate, mean by level, highest probability. Both must count the same. The group-by ends there. Of an aggregation
that is the first part, `count`, which checks all that it reads besides. What the group-by does not do: `scores`, which
are intervals, conformal sets and the tables of wells and fields that are written while it counts; and `figures` with
the page. Peak memory is that of the whole, above a process that has imported all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pandas as pd

from cellhpc import aggregate as aggregation
from cellhpc import counting, scores
from cellhpc.attempts import finished
from cellhpc.folds import Fold, Folds, write_folds
from cellhpc.ledger import read_json

STUDIES = {10: (1, 2, 1, 5), 100: (1, 2, 2, 25), 1_000: (2, 2, 10, 25), 10_000: (2, 2, 50, 50)}
"""Networks, initialisations, seeds and folds of a study of so many runs."""
CLASSES = tuple(f"class {number:02d}" for number in range(12))
TREATMENTS, WELLS, FIELDS, TILES, EPOCHS = 5, 5, 5, 4, 10
LEVELS = ("tile", "field", "well", "treatment")


def make_keys(compound: str, label: str, batch: str) -> pd.DataFrame:
    """Tiles of one compound."""
    rows = [
        (f"{batch}_{replicate + 1}", batch, f"{'BCDEF'[dose]}{int(compound[1:]) + 1:02d}", field + 1, tile, compound,
         10.0**dose, "uM", f"{compound} {10.0**dose:g} uM", str(replicate + 1), label)
        for dose in range(TREATMENTS) for replicate in range(WELLS) for field in range(FIELDS) for tile in range(TILES)
    ]  # fmt: skip
    described = ["compound", "concentration", "unit", "treatment", "replicate", "label"]
    return pd.DataFrame(rows, columns=["plate", "batch", "well", "field", "tile", *described])


def make_study(folder: Path, networks: int, starts: int, seeds: int, folds: int) -> list[Path]:
    """Write a study of finished runs, each with its files; give the folders of the runs."""
    names = [f"c{number:03d}" for number in range(folds)]
    labels = {name: (CLASSES[number % len(CLASSES)],) for number, name in enumerate(names)}
    split = Folds("compound", CLASSES, labels, (), tuple(Fold(name, (name,)) for name in names))
    folder.mkdir()
    write_folds(folder / "folds.json", split)
    keys = [make_keys(name, labels[name][0], f"Week{number % 10 + 1}") for number, name in enumerate(names)]
    truth = [CLASSES.index(labels[name][0]) for name in names]
    columns = [scores.PREFIX + name for name in CLASSES]
    random, units = np.random.default_rng(0), []
    total = {"tile": len(keys[0]), "field": len(keys[0]) // TILES, "well": TREATMENTS * WELLS, "treatment": TREATMENTS}
    for network in ("ResNet50", "InceptionV3")[:networks]:
        for start in ("imagenet", "xavier")[:starts]:
            for seed in range(seeds):
                for number, fold in enumerate(split.folds):
                    unit = folder / "runs" / f"{network}_{start}_s{seed}_f{number:02d}"
                    own = unit / "001"
                    own.mkdir(parents=True)
                    drawn = random.gamma(0.6, size=(len(keys[number]), len(CLASSES)))
                    drawn[:, truth[number]] += random.gamma(0.4 + 0.4 * (start == "imagenet"), size=len(drawn))
                    drawn /= drawn.sum(axis=1, keepdims=True)
                    table = pd.DataFrame(drawn.astype(np.float32), columns=columns)
                    pd.concat([keys[number], table], axis=1).to_parquet(own / "predictions.parquet", index=False)
                    counts = {level: {"correct": of // 2, "total": of} for level, of in total.items()}
                    epoch = {"loss": 1.0, "seconds": 30.0, "images_per_s": 100.0, "held_out": counts}
                    history = [{"epoch": 1 + number, **epoch} for number in range(EPOCHS)]
                    (own / "history.json").write_text(json.dumps({"epochs": history}, indent=2))
                    facts = {
                        "id": unit.name, "network": network, "weights": start, "initialisation": start, "seed": seed,
                        "fold": {"name": fold.name, "held_out": [fold.name]}, "folds_sha256": split.sha256,
                        "digest": unit.name, "classes": list(CLASSES), "ranks": 1, "memory_mb": 900.0,
                        "trained_on": [name for name in names if name != fold.name], "versions": {"numpy": "2.0.2"},
                        "settings": {"epochs": EPOCHS, "batch_size": 32},
                    }  # fmt: skip
                    (own / "run.json").write_text(json.dumps(facts, indent=2))
                    (unit / "done.json").write_text(json.dumps({"digest": unit.name, "attempt": "001"}))
                    units.append(unit)
    return units


def ours(study: Path, units: list[Path]) -> dict[str, Any]:
    """Aggregate; tell the time to count from that of tables and scores, and that of figures and the page."""
    began, at = time.perf_counter(), {"tables": 0.0}
    count, write, add = aggregation.count, aggregation.write_results, counting.GrowingTables.add

    def added(*arguments: Any) -> None:
        start = time.perf_counter()
        add(*arguments)
        at["tables"] += time.perf_counter() - start

    def counted(*arguments: Any) -> Any:
        found = count(*arguments)
        at["counted"] = time.perf_counter() - began
        return found

    def written(*arguments: Any) -> None:
        at["scored"] = time.perf_counter() - began
        write(*arguments)

    aggregation.count, aggregation.write_results, counting.GrowingTables.add = counted, written, added  # type: ignore
    document = aggregation.aggregate(study, "bench", units, CLASSES)
    whole = time.perf_counter() - began
    right = {
        f"{model['network']} {model['initialisation']}": [model["levels"][level]["correct"] for level in LEVELS]
        for model in document["models"]
    }
    count_s = at["counted"] - at["tables"]
    parts = {"count_s": count_s, "scores_s": at["scored"] - count_s, "figures_s": whole - at["scored"]}
    return {"right": right, **parts}


def plain(study: Path, units: list[Path]) -> dict[str, Any]:
    """Count with pandas what is right at each level: of each seed, and of the mean of the seeds."""
    tables = []
    for unit in units:
        folder = finished(unit)
        assert folder is not None
        facts = read_json(folder / "run.json")
        model = f"{facts['network']} {facts['initialisation']}"
        tables.append(pd.read_parquet(folder / "predictions.parquet").assign(model=model, seed=facts["seed"]))
    tiles = pd.concat(tables)
    columns = [scores.PREFIX + name for name in CLASSES]
    right: dict[str, list[int]] = {}
    for whose in (["model", "seed"], ["model"]):
        described = [*whose, "compound", "treatment", "label"]
        right, found = {}, tiles
        for keys in (["plate", "well", "field", "tile"], ["plate", "well", "field"], ["plate", "well"], []):
            found = found.groupby([*described, *keys], as_index=False)[columns].mean()
            calls = np.array(CLASSES)[found[columns].to_numpy().argmax(axis=1)]
            for model, count in (calls == found["label"]).groupby(found["model"]).sum().items():
                right.setdefault(str(model), []).append(int(count))
    return {"right": right}


def measured(do: Callable[[Path, list[Path]], dict[str, Any]], study: Path, units: list[Path]) -> dict[str, Any]:
    """Do it in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, do, study, units).result()


def _measure(do: Callable[[Path, list[Path]], dict[str, Any]], study: Path, units: list[Path]) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    found = do(study, units)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "seconds": seconds, "memory_mb": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="10,000 runs too: some minutes, 2 GB on disk")
    arguments = parser.parse_args()
    rows = []
    print(f"{'':7} {'aggregate, seconds':^40} {'':6} {'group-by':>10}")
    print(f"{'runs':>7} {'count':>9} {'scores':>9} {'figures':>9} {'all':>10} {'MB':>6} {'seconds':>10} {'MB':>7}")
    for runs, shape in STUDIES.items():
        if runs > 1_000 and not arguments.large:
            continue
        with tempfile.TemporaryDirectory() as folder:
            units = make_study(Path(folder) / "study", *shape)
            mine = measured(ours, Path(folder) / "study", units)
            theirs = measured(plain, Path(folder) / "study", units)
        assert mine.pop("right") == theirs.pop("right"), "the two count differently"
        rows.append({"runs": runs, "aggregate": mine, "pandas": theirs})
        print(
            f"{runs:7,} {mine['count_s']:9.2f} {mine['scores_s']:9.2f} {mine['figures_s']:9.2f} "
            f"{mine['seconds']:10.2f} {mine['memory_mb']:6.0f} "
            f"{theirs['seconds']:10.2f} {theirs['memory_mb']:7.0f}"
        )
    print(json.dumps({"bench": "aggregate", "cores": os.cpu_count(), "studies": rows}))


if __name__ == "__main__":
    main()
