"""What a trained network says of tiles: probabilities, those of Monte Carlo dropout, and which pixels spoke."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd

from cellhpc.attributions import to_arrays, wrong_tiles
from cellhpc.data import Data
from cellhpc.feed import Pixels, feed, whole_batches
from cellhpc.networks import HEAD_LOGITS
from cellhpc.ranks import Ranks
from cellhpc.scores import PREFIX
from cellhpc.settings import How
from cellhpc.step import Graphs, thinned_kernels

KEYS = (
    "plate", "batch", "well", "field", "tile", "compound", "concentration", "unit", "treatment", "replicate", "label",
)  # fmt: skip
"""Columns of the predictions before the probabilities `p_<class>`; what the folds hold out follows if it isn't here."""
PREDICTIONS, DRAWS = "predictions.parquet", "draws.parquet"
"""Files of a run: what it predicts, and with `train.dropout_draws` each draw of it."""
PREDICT_TILES = 64
"""Tiles in one prediction step of a rank."""
FEATURE_TILES = 512
"""Tiles between two looks whether a stop was asked for."""


class Predictor:
    """Asks a network of tiles; its graphs are traced once.

    Parameters
    ----------
    graphs
        The network.
    data
        The tiles.
    ranks
        The processes that share the tiles to be predicted. All of them call each verb, and get the whole answer.
    """

    def __init__(self, graphs: Graphs, data: Data, ranks: Ranks) -> None:
        self.graphs, self.data, self.ranks = graphs, data, ranks
        self.given: Pixels = data.pixels
        """What the steps take of each tile; of a network that is `cached`, set it to what `features` gives."""
        self.step = graphs.prediction()

    @cached_property
    def _draws(self) -> Any:
        return self.graphs.draws()

    @cached_property
    def _features(self) -> Any:
        return self.graphs.features()

    @cached_property
    def _attribute(self) -> Any:
        return self.graphs.attribution()

    def predict(self, rows: np.ndarray) -> pd.DataFrame:
        """Predict tiles by their row numbers (n,): a table of their keys and a probability for each class."""
        return self._table(rows, self._ask(rows, self.step))

    def draw(self, rows: np.ndarray, seed: int) -> pd.DataFrame:
        """Predict tiles by their row numbers (n,) as often as `train.dropout_draws` says, with features dropped.

        Returns
        -------
        DataFrame
            As that of `predict`, one draw after the other, with their number from 0 in a column `draw`.
        """
        settings = self.graphs.settings
        draws, classes = settings.dropout_draws, len(self.data.classes)
        kernel = self.graphs.model.get_layer(HEAD_LOGITS).kernel.numpy()
        kernels = thinned_kernels(kernel, settings.dropout, draws, seed)
        values = self._ask(rows, partial(self._draws, kernels=kernels), (draws, classes))
        table = pd.concat([self._table(rows, values[:, draw]) for draw in range(draws)], ignore_index=True)
        table.insert(table.shape[1] - classes, "draw", np.repeat(np.arange(draws), len(rows)))
        return table

    def features(self, stop: Callable[[], bool]) -> np.ndarray | None:
        """Let the backbone say its features of all tiles: float32 (n, views, d), as `Graphs.features`.

        `stop` is asked now and then; None as soon as it says so on any rank.
        """
        count, shape = len(self.data.tiles), (self.graphs.views, self.graphs.width)
        said = np.empty((count, *shape), np.float32)
        for start in range(0, count, FEATURE_TILES):
            if self.ranks.gather(np.array([stop()], np.int32)).any():
                return None
            rows = np.arange(start, min(start + FEATURE_TILES, count))
            said[rows] = self._ask(rows, self._features, shape, self.data.pixels)
        return said

    def attribute(
        self, rows: np.ndarray, predictions: pd.DataFrame, most: int, unknown: str, how: How = "mean"
    ) -> dict[str, np.ndarray]:
        """Say which pixels spoke for wrong calls of treatments; gives the arrays of `attributions.ATTRIBUTIONS`.

        Every rank does all of it: these tiles are few, and so none waits for another.

        Parameters
        ----------
        rows, predictions
            Row numbers of the held-out tiles (n,), and what `predict` said of them.
        most, unknown, how
            As of `attributions.wrong_tiles`.
        """
        tiles = wrong_tiles(predictions, most, unknown, how)
        classes = np.array([self.data.classes.index(call) for call in tiles["call"]], np.int32)
        chosen = rows[tiles.index.to_numpy(dtype=int)]
        pixels = np.zeros((len(tiles), *self.data.pixels.shape[1:]), np.uint8)
        maps = np.zeros(pixels.shape[:3], np.float32)
        parts = [slice(start, start + PREDICT_TILES) for start in range(0, len(tiles), PREDICT_TILES)]
        with feed(self.data.pixels, [chosen[part] for part in parts]) as fetched:
            for part, own in zip(parts, fetched, strict=True):
                pixels[part], maps[part] = own, self._attribute(own, classes[part])
        return to_arrays(tiles, pixels, maps)

    def _ask(
        self, rows: np.ndarray, step: Callable[[Any], Any], shape: tuple[int, ...] = (), given: Pixels | None = None
    ) -> np.ndarray:
        """Let a step answer for tiles by their row numbers (n,): (n, classes), or (n, *shape)."""
        count, size = len(rows), self.ranks.size
        mine = rows[self.ranks.rank :: size]
        batches = [mine[start : start + PREDICT_TILES] for start in range(0, len(mine), PREDICT_TILES)]
        together = whole_batches(self.graphs.settings.window_tiles, PREDICT_TILES * size)
        with feed(self.given if given is None else given, batches, together) as fetched:
            parts = [np.asarray(step(pixels)) for pixels in fetched]
        own = np.concatenate(parts) if parts else np.zeros((0, *(shape or (len(self.data.classes),))), np.float32)
        gathered = self.ranks.gather(own)
        order = np.concatenate([np.arange(count)[rank::size] for rank in range(size)])
        said = np.empty_like(gathered)
        said[order] = gathered
        return said

    def _table(self, rows: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
        """Put the keys of tiles by their row numbers (n,) before their probabilities (n, classes)."""
        keys = list(dict.fromkeys([*KEYS, self.data.by]))
        table = self.data.tiles.iloc[rows][keys].reset_index(drop=True)
        columns = [PREFIX + label for label in self.data.classes]
        return pd.concat([table, pd.DataFrame(probabilities, columns=columns)], axis=1)
