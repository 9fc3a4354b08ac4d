"""The integer arithmetic against a plain, slow reference in floating point, written from the recipe."""

from __future__ import annotations

import numpy as np
import pytest

from cellhpc.correct import FieldTiles, Preprocessing, TileRecipe, cut_tiles, histograms, plate_statistics


def reference(
    field: np.ndarray, dmso: np.ndarray | None, recipe: TileRecipe, percentiles: tuple[float, float] = (0.1, 99.9)
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (float) and signal fractions of a field (y, x, c); `dmso` (n, y, x, c) are all DMSO pixels of the plate."""
    grey = field.astype(np.float64)
    if recipe.preprocessing == "percentile":
        low, high = np.percentile(dmso, percentiles, axis=(0, 1, 2))
        grey = np.clip((grey - low) / (high - low), 0, 1) * 255
    elif dmso is not None:
        transformed = 2 * np.sqrt(dmso + 0.375)
        grey = (2 * np.sqrt(field + 0.375) - transformed.mean((0, 1, 2))) / transformed.std((0, 1, 2))
        low, high = (grey.min(), grey.max()) if recipe.preprocessing == "kensert2019" else recipe.zscore_range
        grey = np.clip((grey - low) / (high - low), 0, 1) * 255
    rows, columns = recipe.grid
    height, width, px = field.shape[0] // rows, field.shape[1] // columns, recipe.tile_sizes_px[0]
    tiles, signal = [], []
    for row in range(rows):
        for column in range(columns):
            cut = grey[row * height : (row + 1) * height, column * width : (column + 1) * width]
            signal.append((cut > recipe.empty_above).mean())
            small = np.einsum("ay,yxc,bx->abc", areas(height, px), cut, areas(width, px))
            tiles.append(small if signal[-1] > recipe.empty_fraction else np.zeros_like(small))
    return np.array(tiles), np.array(signal)


def areas(size: int, px: int) -> np.ndarray:
    """Weights (px, size) of an area average: how much of each pixel lies in each larger one."""
    edges = np.arange(px + 1) * size / px
    left, right = edges[:-1, None], edges[1:, None]
    overlap = np.minimum(right, np.arange(1, size + 1)) - np.maximum(left, np.arange(size))
    return np.clip(overlap, 0, None) * px / size


def cells(seed: int, size: tuple[int, int], dtype: str = "uint16", brightness: float = 3000) -> np.ndarray:
    """A noisy picture (y, x, 3) of some blobs."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    spots = [
        np.exp(-((y - random.uniform(0, size[0])) ** 2 + (x - random.uniform(0, size[1])) ** 2) / 90) for _ in "123"
    ]
    field = np.stack([brightness * (channel + 1) / 3 * sum(spots) + 20 for channel in range(3)], -1)
    return np.minimum(random.poisson(field), np.iinfo(dtype).max).astype(dtype)


def by_cellhpc(field: np.ndarray, dmso: np.ndarray, recipe: TileRecipe) -> FieldTiles:
    return cut_tiles(field, recipe, plate_statistics(sum(histograms(picture) for picture in dmso)))


def raw(grid: tuple[int, int], tile_sizes_px: tuple[int, ...], **settings: int) -> TileRecipe:
    """The recipe that takes pixels as they are."""
    return TileRecipe(grid, tile_sizes_px, "none", **settings)  # type: ignore[arg-type]


SETTINGS = [
    pytest.param((128, 160), "uint16", 3000, (2, 2), 28, id="anisotropic, as 512x640 to 224"),
    pytest.param((128, 160), "uint16", 30, (2, 2), 37, id="faint"),
    pytest.param((128, 160), "uint16", 60_000, (2, 2), 32, id="bright"),
    pytest.param((96, 96), "uint8", 150, (1, 1), 32, id="8 bits, one tile"),
    pytest.param((96, 128), "uint16", 3000, (4, 4), 24, id="16 tiles"),
    pytest.param((96, 96), "uint16", 3000, (2, 2), 48, id="no resize"),
]


@pytest.mark.parametrize("preprocessing", ["kensert2019", "zscore", "percentile"])
@pytest.mark.parametrize(("size", "dtype", "brightness", "grid", "px"), SETTINGS)
@pytest.mark.parametrize(("above", "fraction"), [(50, 0.002), (50, 0.05), (0, 0), (200, 0.01)])
def test_within_one_grey_level(
    size: tuple[int, int], dtype: str, brightness: float, grid: tuple[int, int], px: int, above: int, fraction: float,
    preprocessing: Preprocessing,
) -> None:  # fmt: skip
    field = cells(0, size, dtype, brightness)
    dmso = np.stack([cells(seed, size, dtype, brightness) for seed in (1, 2, 3)])
    recipe = TileRecipe(grid, (px,), preprocessing, empty_above=above, empty_fraction=fraction)
    made = by_cellhpc(field, dmso, recipe)
    tiles, signal = reference(field, dmso, recipe)
    assert made.tiles[px].dtype == np.uint8
    assert np.abs(made.tiles[px] - tiles).max() <= 1
    np.testing.assert_array_equal(made.signal, signal)


def test_a_field_of_two_neighbouring_values_keeps_its_precision() -> None:
    field = np.random.default_rng(0).integers(60_000, 60_002, (64, 64, 2)).astype(np.uint16)
    dmso = np.random.default_rng(1).integers(100, 4000, (2, 64, 64, 2)).astype(np.uint16)
    made = by_cellhpc(field, dmso, TileRecipe((2, 2), (20,)))
    tiles, signal = reference(field, dmso, TileRecipe((2, 2), (20,)))
    assert np.abs(made.tiles[20] - tiles).max() <= 1
    np.testing.assert_array_equal(made.signal, signal)


def test_pixels_as_they_are() -> None:
    field = cells(0, (96, 120), "uint8", 150)
    made = cut_tiles(field, raw((2, 2), (48, 24)))
    for px in (48, 24):
        tiles, signal = reference(field, None, raw((2, 2), (px,)))
        assert np.abs(made.tiles[px] - tiles).max() <= 1
        np.testing.assert_array_equal(made.signal, signal)
    untouched = cut_tiles(field[:96, :96], raw((1, 1), (96,)))
    np.testing.assert_array_equal(untouched.tiles[96][0], field[:96, :96])


@pytest.mark.parametrize("value", [0, 700, 65_535])
def test_a_constant_field_is_near_empty(value: int) -> None:
    dmso = np.random.default_rng(1).integers(100, 4000, (1, 32, 32, 1)).astype(np.uint16)
    made = by_cellhpc(np.full((32, 32, 1), value, np.uint16), dmso, TileRecipe((2, 2), (16,)))
    assert made.signal == (0, 0, 0, 0)
    assert not made.tiles[16].any()


def test_a_tile_at_the_threshold_is_near_empty_and_one_value_more_keeps_it() -> None:
    field = np.zeros((20, 50, 1), np.uint8)
    field[0, :2] = 51  # 2 of 1000 values: exactly the fraction 0.002
    field[1, :9] = 50  # 50 is not above 50
    assert not cut_tiles(field, raw((1, 1), (20,))).tiles[20].any()
    field[2, 0] = 51
    assert cut_tiles(field, raw((1, 1), (20,))).tiles[20].any()


def test_statistics_are_exact_and_histograms_add_up() -> None:
    dmso = np.stack([cells(seed, (64, 80)) for seed in range(4)])
    whole = plate_statistics(histograms(dmso.reshape(-1, 80, 3)))
    parts = plate_statistics(sum(histograms(field) for field in dmso[::-1]))
    assert whole == parts
    transformed = 2 * np.sqrt(dmso + 0.375)
    np.testing.assert_allclose(whole.mean, transformed.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(whole.std, transformed.std((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("percentiles", [(0.1, 99.9), (0.0, 100.0), (25.0, 50.0), (33.3, 66.6)])
def test_percentiles_are_those_of_all_pixels(percentiles: tuple[float, float]) -> None:
    dmso = np.stack([cells(seed, (64, 80)) for seed in range(3)])
    found = plate_statistics(sum(histograms(field) for field in dmso), percentiles)
    low, high = np.percentile(dmso, percentiles, axis=(0, 1, 2))
    np.testing.assert_allclose(found.low, low, rtol=1e-12)
    np.testing.assert_allclose(found.high, high, rtol=1e-12)


def test_a_channel_that_is_the_same_everywhere_is_named() -> None:
    dmso = cells(0, (64, 80))
    dmso[..., 1] = 700
    dmso[0, 0, 1] = 701  # enough for a deviation, and not for percentiles
    found = plate_statistics(histograms(dmso))
    assert (found.flat("kensert2019"), found.flat("percentile")) == ([], [1])


def test_a_threshold_that_no_value_exceeds_leaves_every_tile_near_empty() -> None:
    field = np.full((32, 32, 3), 255, np.uint8)
    assert cut_tiles(field, raw((2, 2), (16,), empty_above=255)).signal == (0, 0, 0, 0)
