from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cellhpc.convert import convert, plan_conversion
from cellhpc.errors import DataError, UsageError
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
from cellhpc.tiles import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two plates of six fields of four tiles, two fields a shard; the grey level tells plate, field and tile."""
    root = tmp_path_factory.mktemp("raw")
    rows = []
    for plate in range(2):
        for number in range(6):
            field = np.zeros((16, 16), np.uint8)
            for tile in range(4):
                field[tile // 2 * 8 :, tile % 2 * 8 :] = grey(plate, number, tile)
            Image.fromarray(field).save(root / f"{plate}{number}.png")
            rows.append(
                {
                    "plate": f"P{plate}",
                    "batch": "",
                    "well": f"B{6 - number:02d}",  # the table is not in the order of the wells
                    "field": 1,
                    "compound": "c",
                    "concentration": 1.0,
                    "unit": "uM",
                    "treatment": "c 1 uM",
                    "label": "m",
                    "replicate": "1",
                    "role": "treatment",
                    "file_dna": f"{plate}{number}.png",
                }
            )
    settings = ConvertSettings(preprocessing="none", shard_fields=2)
    plan = plan_conversion(settings, Screen(pd.DataFrame(rows), ("dna",), root), (8, 4), root / "store")
    convert(plan, workers=1)
    return Store.open(plan.store)


def grey(plate: int, number: int, tile: int) -> int:
    return 100 + plate * 50 + number * 8 + tile if tile or number else 20  # the first tile of the first fields is dark


def expected(tiles: pd.DataFrame) -> np.ndarray:
    plate, well = tiles["plate"].str[1:].astype(int), tiles["well"].str[1:].astype(int)
    return np.array([grey(*key) for key in zip(plate, 6 - well, tiles["tile"], strict=True)])


def test_the_index_holds_the_kept_tiles_in_order(store: Store) -> None:
    assert store.tile_sizes_px == (4, 8)
    assert store.channels == ("dna",)
    assert len(store.tiles) == 46
    keys = list(store.tiles[["plate", "well", "field", "tile"]].itertuples(index=False, name=None))
    assert keys == sorted(keys)
    assert list(store.tiles.index) == list(range(46))
    assert not [column for column in store.tiles if column.startswith("file_")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 5, 46])
def test_tiles_come_in_the_order_of_the_rows(store: Store, seed: int, count: int) -> None:
    tiles = store.tiles.sample(count, random_state=seed)
    for px in (4, 8):
        read = store.read(tiles, px)
        assert read.shape == (count, px, px, 1)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, np.broadcast_to(expected(tiles)[:, None, None, None], read.shape))


def test_rows_may_repeat_and_be_none(store: Store) -> None:
    twice = pd.concat([store.tiles[10:12], store.tiles[10:12]])
    np.testing.assert_array_equal(store.read(twice, 8)[:, 0, 0, 0], expected(twice))
    assert store.read(store.tiles[:0], 8).shape == (0, 8, 8, 1)


def test_a_size_that_the_store_does_not_hold(store: Store) -> None:
    with pytest.raises(UsageError, match="holds tiles of 4, 8 pixels, none of 224"):
        store.read(store.tiles, 224)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no store of tiles is there. Type: cellhpc convert JOB.toml"):
        Store.open(tmp_path / "nowhere")


def test_a_damaged_shard_is_told_and_not_read_as_zeros(store: Store) -> None:
    shard = store.folder / "tiles.zarr/P1/tiles_8/c.1.0.0.0"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-40])
        with pytest.raises(DataError, match="P1/tiles_8: tiles 8 to 15 can't be read"):
            store.read(store.tiles, 8)
        shard.unlink()
        with pytest.raises(DataError, match=r"c.1.0.0.0 is missing"):
            store.read(store.tiles, 8)
    finally:
        shard.write_bytes(whole)
