"""A study so small that tests can train it: made-up tiles of three classes, three compounds each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cellhpc.convert import convert, plan_conversion
from cellhpc.folds import Folds, plan_folds
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings, FoldsSettings, TrainSettings
from cellhpc.sweep import Run
from cellhpc.tiles import Store
from cellhpc.train import Data, Watch

CLASSES = ("dim", "middle", "bright")
CHANNELS = ("dna", "tubulin", "actin")


def tiles(per_compound: int = 8) -> pd.DataFrame:
    """Index of the tiles: nine compounds, four tiles a well."""
    rows = []
    for number in range(9):
        label = CLASSES[number % 3]
        for tile in range(per_compound):
            rows.append(
                {
                    "plate": "P1", "batch": "B1", "well": f"A{number:02d}", "field": 1 + tile // 4, "tile": tile % 4,
                    "compound": f"{label}-{number // 3}", "concentration": 1.0, "unit": "uM",
                    "treatment": f"{label}-{number // 3} 1 uM", "replicate": "1", "label": label, "role": "treatment",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def data(side_px: int = 32, per_compound: int = 8) -> tuple[Data, Folds]:
    """Tiles whose grey level and grain tell their class."""
    table = tiles(per_compound)
    folds = plan_folds(table, FoldsSettings())
    random = np.random.default_rng(0)
    level = table["label"].map({"dim": 40, "middle": 110, "bright": 190}).to_numpy()
    noise = random.normal(0, 12, (len(table), side_px, side_px, 3))
    pixels = np.clip(level[:, None, None, None] + noise, 0, 255).astype(np.uint8)
    return Data(pixels, table, folds.classes, CHANNELS, folds.by), folds


def store(folder: Path, shard_fields: int = 1) -> tuple[Store, Folds]:
    """The same as a store: two fields of four tiles of 32 pixels for each compound, a plate for each third of them."""
    folder.mkdir()
    table = tiles().drop_duplicates(["compound", "field"], ignore_index=True)
    table["plate"] = "P" + table["compound"].str[-1]
    random = np.random.default_rng(0)
    for number, label in enumerate(table["label"]):
        level = {"dim": 60, "middle": 110, "bright": 190}[label]
        for channel in CHANNELS:
            grey = np.clip(random.normal(level, 12, (64, 64)), 0, 255).astype(np.uint8)
            Image.fromarray(grey).save(folder / f"{number}-{channel}.png")
            table.loc[number, f"file_{channel}"] = f"{number}-{channel}.png"
    screen = Screen(table.drop(columns="tile"), CHANNELS, folder)
    settings = ConvertSettings(preprocessing="none", shard_fields=shard_fields)
    plan = plan_conversion(settings, screen, (32,), folder / "store")
    convert(plan, workers=1)
    return Store.open(plan.store), plan_folds(screen.fields, FoldsSettings())


def run(folds: Folds, network: str, fold: int = 0, seed: int = 0, weights: str = "xavier", side_px: int = 32) -> Run:
    """One run of that study."""
    return Run(
        f"run-{fold}-{seed}", network, weights, weights, seed, side_px, folds.folds[fold], f"digest-{fold}-{seed}"
    )


class After(Watch):
    """A watch that acts after so many steps of this process: it asks for a stop, which comes with the next step."""

    def __init__(self, steps: int, act: Callable[[], None] | None = None, checkpoint_seconds: float = 600.0) -> None:
        self._after, self._act = steps, act or self.stop
        super().__init__(checkpoint_seconds=checkpoint_seconds)

    def stop(self) -> None:
        self.stop_asked = True

    @property
    def steps_done(self) -> int:
        return self._done

    @steps_done.setter
    def steps_done(self, steps: int) -> None:
        self._done = steps
        if steps == self._after:
            self._act()


SETTINGS = TrainSettings(epochs=2, batch_size=16, learning_rate=0.01, augment="none")
