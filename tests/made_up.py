"""Made-up predictions and studies whose arithmetic is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cellhpc import ledger, scores
from cellhpc.attempts import Attempt
from cellhpc.folds import Fold, Folds, write_folds

CLASSES = ("Actin disruptors", "DNA damage", "Epithelial")
COMPOUNDS = {
    "cytochalasin B": "Actin disruptors",
    "latrunculin B": "Actin disruptors",
    "chlorambucil": "DNA damage",
    "cisplatin": "DNA damage",
    "etoposide": "DNA damage",
    "PP-2": "Epithelial",
    "AZ-A": "Epithelial",
}


def predictions(
    compounds: dict[str, str] | None = None,
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    doses: Sequence[float] = (1.0, 3.0),
    skill: float = 0.5,
) -> pd.DataFrame:
    """Make tile predictions: three wells a treatment (one a plate), two fields a well, one to four tiles a field."""
    random = np.random.default_rng(seed)
    rows = []
    for number, (compound, label) in enumerate((compounds or COMPOUNDS).items()):
        for dose_number, dose in enumerate(doses):
            for replicate in "123":
                for field in (1, 2):
                    for tile in range(1 + (number + dose_number + field) % 4):
                        well = f"{'BCDEFG'[dose_number]}{number + 2:02d}"
                        batch = f"Week{1 + number // 4}"
                        plate = f"{batch}_{replicate}"
                        treatment = f"{compound} {dose:g} uM"
                        what = (compound, dose, "uM", treatment, replicate, label)
                        rows.append((plate, batch, well, field, tile, *what))
    described = ["compound", "concentration", "unit", "treatment", "replicate", "label"]
    table = pd.DataFrame(rows, columns=["plate", "batch", "well", "field", "tile", *described])
    drawn = random.dirichlet(np.full(len(classes), 0.7), len(table))
    truth = np.array([[label == name for name in classes] for label in table["label"]])
    drawn = (1 - skill) * drawn + skill * truth * random.uniform(0, 1, (len(table), 1))
    drawn /= drawn.sum(axis=1, keepdims=True)
    names = [scores.PREFIX + name for name in classes]
    return pd.concat([table, pd.DataFrame(drawn.astype(np.float32), columns=names)], axis=1)


def make_study(
    folder: Path,
    networks: Sequence[str] = ("ResNet50",),
    starts: Sequence[str] = ("imagenet", "xavier"),
    seeds: Sequence[int] = (0,),
    epochs: int = 3,
    compounds: dict[str, str] | None = None,
    classes: Sequence[str] = CLASSES,
) -> list[Path]:
    """Write a finished study: its split, its settings and all its runs; give the run folders."""
    compounds = compounds or COMPOUNDS
    names = sorted(compounds)
    labels = {name: (compounds[name],) for name in names}
    folds = Folds("compound", tuple(classes), labels, (), tuple(Fold(name, (name,)) for name in names))
    write_folds(folder / "folds.json", folds)
    settings = {"study": {"name": "made-up", "folder": str(folder)}, "train": {"epochs": epochs, "batch_size": 8}}
    ledger.write_json(folder / "job.json", settings)
    units = []
    for network in networks:
        for start in starts:
            for seed in seeds:
                skill = 0.9 if start != "xavier" else 0.35
                table = predictions(compounds, classes, seed=seed + 10 * len(network), skill=skill)
                for number, fold in enumerate(folds.folds):
                    unit = folder / "runs" / f"{network}_{start}_s{seed}_f{number:02d}"
                    own = table[table["compound"] == fold.name].reset_index(drop=True)
                    make_run(unit, own, network, start, seed, fold, folds, epochs)
                    units.append(unit)
    return units


def make_run(
    unit: Path, table: pd.DataFrame, network: str, start: str, seed: int, fold: Fold, folds: Folds, epochs: int
) -> None:
    """Write one finished run; its held-out accuracy grows to what its predictions give in the last epoch."""
    digest = f"digest of {unit.name}"
    attempt = Attempt.claim(unit, digest)
    attempt.write_table("predictions.parquet", table)
    final = scores.levels(table)
    history = [
        {
            "epoch": epoch,
            "loss": 1 / epoch,
            "learning_rate": 0.001,
            "seconds": 30.0,
            "images_per_s": 50.0 + epoch,
            "held_out": {
                level: {"correct": at["correct"] * epoch // epochs, "total": at["total"]} for level, at in final.items()
            },
        }
        for epoch in range(1, epochs + 1)
    ]
    attempt.write_json("history.json", {"epochs": history})
    document = {
        "id": unit.name,
        "network": network,
        "weights": start,
        "initialisation": start,
        "seed": seed,
        "fold": {"name": fold.name, "held_out": list(fold.held_out)},
        "folds_sha256": folds.sha256,
        "digest": digest,
        "classes": list(folds.classes),
        "trained_on": sorted(set(folds.labels) - set(fold.held_out)),
        "ranks": 2,
        "seconds": 120.0,
        "memory_mb": 900.0,
        "python": "3.11.2",
        "host": "node1",
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"numpy": "2.0.2"},
    }
    attempt.write_json("run.json", document)
    attempt.publish(digest)
