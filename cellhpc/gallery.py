"""Tiles for the report's page: of treatments that were called wrong, and which pixels spoke for a call.

Each channel is on one scale over all tiles that are shown, in the colours of the montage. A picture is a JPEG of
`TILE_PX`: what is kept of them is what fits into the page.
"""

from __future__ import annotations

import base64
import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from PIL import Image

from cellhpc import ledger
from cellhpc.attributions import ATTRIBUTIONS
from cellhpc.errors import UserError
from cellhpc.folds import Folds
from cellhpc.montage import draw_lots, read_resized
from cellhpc.names import model_name
from cellhpc.sheet import channel_colours, in_colour, resize
from cellhpc.tiles import Store

TILE_PX = 96
"""Side of a tile on the page."""
PER_TREATMENT = 6
"""Tiles of a treatment, and of those with a map, at most."""
MOST = 600
"""Pictures in all, at most."""

_QUALITY = 80  # of JPEG
_MARKUP_BYTES = 400  # of the page for a picture, beside its data; a generous bound
_HEAT = mpl.colormaps["inferno"]  # from dark to light: it can be read without colours too


@dataclass(frozen=True)
class Shown:
    """A tile on the page.

    Attributes
    ----------
    treatment
        What the cells were treated with.
    place
        Where they lie: plate, well, field and tile.
    jpeg
        The tile in colours.
    map_jpeg
        The tile in grey, and over it what spoke for the call; empty without a map.
    model, call
        With a map: whose it is, and for which call.
    fold
        The fold that holds it out; empty where that is not known.
    """

    treatment: str
    place: str
    jpeg: bytes
    map_jpeg: bytes = b""
    model: str = ""
    call: str = ""
    fold: str = ""

    @property
    def data(self) -> str:
        """The tile for the page, in base 64."""
        return base64.b64encode(self.jpeg).decode("ascii")

    @property
    def map_data(self) -> str:
        """The map for the page, in base 64."""
        return base64.b64encode(self.map_jpeg).decode("ascii")

    @property
    def bytes_on_page(self) -> int:
        """Bytes that it takes on the page, at most."""
        return 4 * (len(self.jpeg) + len(self.map_jpeg)) // 3 + 8 + _MARKUP_BYTES


@dataclass(frozen=True)
class Gallery:
    """The tiles of a page.

    Attributes
    ----------
    shown
        What matters most first: one tile of each treatment, then a second one of each, and so on.
    channels
        Name and colour (#rrggbb) of each channel.
    left_out
        How many tiles were left out, as the page would be too large.
    cautions
        Sentences: what could not be shown, and why.
    """

    shown: tuple[Shown, ...] = ()
    channels: tuple[tuple[str, str], ...] = ()
    left_out: int = 0
    cautions: tuple[str, ...] = ()

    def within(self, room_bytes: int) -> Gallery:
        """Keep the first tiles that fit into so many bytes of the page."""
        used = np.cumsum([one.bytes_on_page for one in self.shown])
        kept = int(np.searchsorted(used, room_bytes, side="right"))
        return replace(self, shown=self.shown[:kept], left_out=self.left_out + len(self.shown) - kept)

    @cached_property
    def by_treatment(self) -> dict[str, list[Shown]]:
        """The tiles of each treatment: those without a map, then those with one, by model."""
        found: dict[str, list[Shown]] = {}
        for one in sorted(self.shown, key=lambda one: one.model):
            found.setdefault(one.treatment, []).append(one)
        return found


def make_gallery(
    store: Store | None, treatments: Sequence[str], runs: Iterable[Path] = (), folds: Folds | None = None
) -> Gallery:
    """Pick and encode tiles.

    Parameters
    ----------
    store
        What the runs learnt from; None where it isn't at hand.
    treatments
        Those to show, the most important first.
    runs
        Folders of the outputs of runs, which may hold attributions.
    folds
        The study's folds, of which each tile is in one (with `folds.unknown` in several, which are not told apart).

    Returns
    -------
    Gallery
        At most `MOST` tiles. What can't be read is named there: scores don't need the tiles.
    """
    cautions: list[str] = []
    tiles, more = _tiles_of(store, treatments, folds, cautions)
    explained, more_explained = _explained(runs, cautions)
    rows = sorted([*tiles, *explained], key=lambda row: row["turn"])[:MOST]  # stable: of a turn, tiles come first
    left_out = more + more_explained + len(tiles) + len(explained) - len(rows)
    if not rows:
        return Gallery(left_out=left_out, cautions=tuple(cautions))
    count = rows[0]["pixels"].shape[-1]
    known = store is not None and len(store.channels) == count
    names = store.channels if store and known else tuple(f"channel {number}" for number in range(1, count + 1))
    pictures = in_colour([row["pixels"] for row in rows], names)
    shown = tuple(
        Shown(
            row["treatment"],
            f"plate {row['plate']}, well {row['well']}, field {row['field']}, tile {row['tile']}",
            _jpeg(picture),
            fold=row["fold"],
            **({"map_jpeg": _jpeg(_over(picture, row["map"])), "model": row["model"], "call": row["call"]}
               if "map" in row else {}),
        )
        for row, picture in zip(rows, pictures, strict=True)
    )  # fmt: skip
    colours = (mpl.colors.to_hex(hue) for hue in channel_colours(names))
    return Gallery(shown, tuple(zip(names, colours, strict=True)), left_out, tuple(cautions))


def choose(tiles: pd.DataFrame, treatments: Sequence[str], per_treatment: int = PER_TREATMENT) -> pd.DataFrame:
    """Draw tiles of treatments by lot, from as many wells as there are.

    Parameters
    ----------
    tiles
        The store's index of tiles.
    treatments
        Which ones, in the order that is wanted.
    per_treatment
        How many of each, at most.

    Returns
    -------
    DataFrame
        The chosen rows with a column `turn`: 0 for the first tile of each treatment, then 1 for the second, and so on;
        sorted by it, and within it in the order of `treatments`.
    """
    rank = {name: number for number, name in enumerate(treatments)}
    known = tiles[tiles["treatment"].isin(rank)]
    drawn = known.assign(lot=draw_lots(known, "plate", "well", "field", "tile")).sort_values("lot")
    drawn["of_well"] = drawn.groupby(["treatment", "plate", "well"]).cumcount()
    drawn = drawn.sort_values(["of_well", "lot"])
    drawn["turn"] = drawn.groupby("treatment").cumcount()
    drawn["rank"] = drawn["treatment"].map(rank)
    chosen = drawn[drawn["turn"] < per_treatment].sort_values(["turn", "rank"], ignore_index=True)
    return chosen.drop(columns=["lot", "of_well", "rank"])


def _tiles_of(
    store: Store | None, treatments: Sequence[str], folds: Folds | None, cautions: list[str]
) -> tuple[list[dict[str, Any]], int]:
    """Tiles of treatments, each with its turn and its pixels; and how many there were too many."""
    if store is None or not treatments:
        return [], 0
    try:
        chosen = choose(store.tiles, treatments)
        kept = chosen[:MOST]
        pixels = read_resized(store, kept, TILE_PX)
    except (UserError, OSError) as fault:
        cautions.append(f"There are no tiles of the treatments that were called wrong: {fault}")
        return [], 0
    of = {value: fold.name for fold in folds.folds for value in fold.held_out} if folds and not folds.unknown else {}
    kept = kept.assign(fold=kept[folds.by].astype(str).map(of).fillna("") if of and folds else "")
    found = kept[["treatment", "plate", "well", "field", "tile", "turn", "fold"]].to_dict("records")
    rows: list[dict[str, Any]] = [{**row, "pixels": tile} for row, tile in zip(found, pixels, strict=True)]  # type: ignore[dict-item]
    return rows, len(chosen) - len(kept)


def _explained(runs: Iterable[Path], cautions: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Tiles with their attribution maps, each with its turn among those of its treatment and model; how many more."""
    rows: list[dict[str, Any]] = []
    turns: Counter[tuple[str, str]] = Counter()
    left_out = 0
    for folder in runs:
        if not (folder / ATTRIBUTIONS).exists():
            continue
        try:
            for row in _read(folder):
                key = row["treatment"], row["model"].rpartition(", ")[0]
                if turns[key] < PER_TREATMENT and len(rows) < MOST:
                    rows.append({**row, "turn": turns[key]})
                    turns[key] += 1
                else:
                    left_out += 1
        except (UserError, OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as fault:
            run = f"{folder.parent.name}/{folder.name}/{ATTRIBUTIONS}"
            cautions.append(f"There are no attribution maps of {run}, which can't be read: {fault}")
    return rows, left_out


def _read(folder: Path) -> list[dict[str, Any]]:
    """Read the attributions of a run: pixels and maps of `TILE_PX`, where they lie, and whose call they are of."""
    facts = ledger.read_json(folder / "run.json")
    model = f"{model_name(facts)}, seed {facts['seed']}"
    with np.load(folder / ATTRIBUTIONS, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    words = ("treatment", "call", "plate", "well", "field", "tile")
    return [
        {
            **{name: str(arrays[name][number]) for name in words},
            "model": model,
            "fold": str(facts["fold"]["name"]),
            "pixels": resize(arrays["pixels"][number], TILE_PX),
            "map": resize(arrays["map"][number].astype(np.float32)[..., None], TILE_PX)[..., 0],
        }
        for number in range(len(arrays["pixels"]))
    ]


def _over(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a map (y, x) of 0..1 over a picture (y, x, 3) in grey: the more a pixel spoke, the brighter and warmer."""
    grey = 0.5 * picture.max(axis=-1, keepdims=True)
    share = np.clip(heat, 0, 1)[..., None]
    opaque = 0.85 * np.sqrt(share)
    return (1 - opaque) * grey + opaque * _HEAT(0.25 + 0.7 * share[..., 0])[..., :3]


def _jpeg(picture: np.ndarray) -> bytes:
    """Encode a picture (y, x, 3) of 0..1."""
    file = io.BytesIO()
    pixels = np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, optimize=True, subsampling=0)
    return file.getvalue()
