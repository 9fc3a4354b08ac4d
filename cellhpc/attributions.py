"""Which pixels spoke for a wrong call: tiles of the treatments that a run calls wrong, each with a map.

A run of a study with `sweep.attributions` leaves them as `attributions.npz` (NumPy's archive, no pickle), a row for
each tile:

- `pixels` uint8 (n, y, x, channel): the tile;
- `map` float16 (n, y, x), 0..1: how much each pixel spoke for the call, beside the one that spoke most
  (`cellhpc.step.Graphs.attribution`, of the tile as it is, not of its rotations);
- `treatment`, `compound`, `label`, `call`, `plate`, `well` (strings) and `field`, `tile` (integers).

A treatment is called by the mean of its tiles' fields and wells, as `scores.combine` has it. What is unknown to a fold
(`folds.unknown`) has no right answer and hence no wrong one.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from cellhpc.scores import PREFIX, combine
from cellhpc.settings import How

ATTRIBUTIONS = "attributions.npz"
_TEXTS = ("treatment", "compound", "label", "call", "plate", "well")
_NUMBERS = ("field", "tile")


def wrong_tiles(predictions: pd.DataFrame, most: int, unknown: str = "", how: How = "mean") -> pd.DataFrame:
    """Choose the tiles that spoke most for the wrong calls of a run.

    Parameters
    ----------
    predictions
        A row a held-out tile (see `cellhpc.scores`).
    most
        Tiles of a treatment.
    unknown
        Label that has no right answer.
    how
        How tiles make the call of a treatment.

    Returns
    -------
    DataFrame
        Of each treatment that is called wrong, the rows with the highest probability of the call, the highest first;
        with a further column `call`, the treatment's.
    """
    known = predictions[predictions["label"] != unknown]
    treatments = combine(known, how)["treatment"]
    wrong = treatments[~treatments["correct"].to_numpy(dtype=bool)]
    parts = [known.iloc[:0].assign(call="")]
    for treatment, call in zip(wrong["treatment"], wrong["call"], strict=True):
        own = known[known["treatment"] == treatment].assign(call=call)
        parts.append(own.sort_values(PREFIX + call, ascending=False, kind="stable").iloc[:most])
    return pd.concat(parts)


def to_arrays(tiles: pd.DataFrame, pixels: np.ndarray, maps: np.ndarray) -> dict[str, np.ndarray]:
    """Name the arrays of a file: the rows of `wrong_tiles`, with their pixels and maps."""
    texts = {name: tiles[name].to_numpy().astype(str) for name in _TEXTS}
    numbers = {name: tiles[name].to_numpy().astype(np.int64) for name in _NUMBERS}
    return {"pixels": pixels, "map": maps.astype(np.float16), **texts, **numbers}
