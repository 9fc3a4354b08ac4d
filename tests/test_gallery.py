"""Tiles that the report shows: which ones, in which colours, and how many fit."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cellhpc import gallery, ledger
from cellhpc.aggregate import aggregate
from cellhpc.attempts import finished
from cellhpc.attributions import ATTRIBUTIONS
from cellhpc.gallery import TILE_PX, Gallery, Shown, choose, make_gallery
from cellhpc.tiles import Store
from tests import small
from tests.made_up import make_study


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Nine compounds of one treatment each: two fields of four tiles in one well; dim, middle and bright ones."""
    return small.store(tmp_path_factory.mktemp("made") / "screen")[0]


def pixels(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image)


def make_attributions(folder: Path, treatments: list[str]) -> Path:
    """Make a run's folder of outputs with attributions."""
    folder.mkdir(parents=True)
    facts = {"network": "ResNet50", "initialisation": "xavier", "seed": 3, "fold": {"name": "a"}}
    ledger.write_json(folder / "run.json", facts)
    return leave_attributions(folder, treatments)


def leave_attributions(folder: Path, treatments: list[str]) -> Path:
    """Leave what a run leaves: bright tiles whose map is hot in the left half."""
    n = len(treatments)
    heat = np.zeros((n, 32, 32), np.float16)
    heat[:, :, :16] = 1
    names = {"treatment": treatments, "compound": treatments, "label": ["dim"] * n, "call": ["bright"] * n}
    places = {"plate": ["P0"] * n, "well": ["A01"] * n}
    arrays = {name: np.array(values) for name, values in (names | places).items()}
    numbers = {"field": np.arange(n), "tile": np.zeros(n, int)}
    np.savez(folder / ATTRIBUTIONS, pixels=np.full((n, 32, 32, 3), 190, np.uint8), map=heat, **arrays, **numbers)
    return folder


def test_tiles_are_of_as_many_wells_as_there_are() -> None:
    rows = [("a", well, tile) for well, tiles in (("A01", 5), ("A02", 2), ("A03", 1)) for tile in range(tiles)]
    tiles = pd.DataFrame(rows, columns=["treatment", "well", "tile"]).assign(plate="P1", field=1)
    chosen = choose(tiles, ["a"], per_treatment=5)
    assert sorted(chosen["well"][:3]) == ["A01", "A02", "A03"]
    assert sorted(chosen["well"]) == ["A01", "A01", "A02", "A02", "A03"]
    assert chosen["turn"].tolist() == [0, 1, 2, 3, 4]
    mixed = tiles.sample(frac=1, random_state=1).reset_index(drop=True)
    pd.testing.assert_frame_equal(choose(mixed, ["a"], per_treatment=5), chosen)


def test_each_treatment_has_its_first_tile_before_any_has_a_second(store: Store) -> None:
    wanted = ["bright-2 1 uM", "dim-0 1 uM"]
    chosen = choose(store.tiles, wanted, per_treatment=2)
    assert chosen["treatment"].tolist() == wanted * 2
    assert not chosen.duplicated(["plate", "well", "field", "tile"]).any()


def test_tiles_are_on_one_scale_and_as_they_lie_in_the_store(store: Store) -> None:
    made = make_gallery(store, ["dim-0 1 uM", "bright-0 1 uM"])
    assert made.cautions == ()
    assert made.left_out == 0
    assert [name for name, _ in made.channels] == list(small.CHANNELS)
    assert dict(made.channels) == {"dna": "#004cff", "tubulin": "#00ffb2", "actin": "#ff5900"}
    assert {len(tiles) for tiles in made.by_treatment.values()} == {gallery.PER_TREATMENT}
    dim, bright = (pixels(made.by_treatment[f"{name}-0 1 uM"][0].jpeg) for name in ("dim", "bright"))
    assert dim.shape == bright.shape == (TILE_PX, TILE_PX, 3)
    assert dim.mean() < 60 < 150 < bright.mean()
    tiles = store.tiles
    for one in made.shown:
        words = dict(part.split() for part in one.place.split(", "))
        row = tiles[(tiles["plate"] == words["plate"]) & (tiles["well"] == words["well"])]
        assert set(row["treatment"]) == {one.treatment}


def test_what_does_not_fit_is_left_out_and_counted(store: Store) -> None:
    made = make_gallery(store, ["dim-0 1 uM", "bright-0 1 uM"])
    room = sum(one.bytes_on_page for one in made.shown[:3])
    fits = made.within(room)
    assert (fits.shown, fits.left_out) == (made.shown[:3], len(made.shown) - 3)
    assert len(made.within(room - 1).shown) == 2
    assert made.within(10**9) == made
    assert made.within(0).shown == Gallery().within(5).shown == ()


def test_no_more_than_so_many(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MOST", 7)
    made = make_gallery(store, ["dim-0 1 uM", "bright-0 1 uM"])
    assert (len(made.shown), made.left_out) == (7, 2 * gallery.PER_TREATMENT - 7)


def test_maps_lie_over_their_tiles(store: Store, tmp_path: Path) -> None:
    names = ["dim-0 1 uM"] * (gallery.PER_TREATMENT + 1)
    runs = [make_attributions(tmp_path / "a" / "001", names), make_attributions(tmp_path / "b" / "001", names[:1])]
    made = make_gallery(store, ["dim-0 1 uM"], [*runs, tmp_path])
    explained = [one for one in made.shown if one.map_jpeg]
    assert len(explained) == gallery.PER_TREATMENT  # of a treatment and model; the others are counted
    assert made.left_out == 2
    one = explained[0]
    assert (one.model, one.call) == ("ResNet50, xavier, seed 3", "bright")
    assert one.place == "plate P0, well A01, field 0, tile 0"
    heat = pixels(one.map_jpeg).astype(int)
    left, right = heat[:, : TILE_PX // 2 - 8], heat[:, TILE_PX // 2 + 8 :]
    assert left[..., 0].mean() - left[..., 2].mean() > 30  # warm
    assert abs(right[..., 0].mean() - right[..., 2].mean()) < 3  # grey
    tiles = [bool(shown.map_jpeg) for shown in made.by_treatment["dim-0 1 uM"]]
    assert tiles == sorted(tiles)  # those without a map come first


def test_maps_need_no_store(tmp_path: Path) -> None:
    made = make_gallery(None, ["x 1 uM"], [make_attributions(tmp_path / "a" / "001", ["x 1 uM"])])
    assert [one.treatment for one in made.shown] == ["x 1 uM"]
    assert [name for name, _ in made.channels] == ["channel 1", "channel 2", "channel 3"]


def test_what_can_not_be_read_is_named(store: Store, tmp_path: Path) -> None:
    folder = shutil.copytree(store.folder, tmp_path / "store")
    shutil.rmtree(folder / "tiles.zarr")
    damaged = make_attributions(tmp_path / "run" / "001", ["dim-0 1 uM"])
    (damaged / ATTRIBUTIONS).write_bytes(b"PK nothing")
    made = make_gallery(Store.open(folder), ["dim-0 1 uM"], [damaged])
    assert made.shown == ()
    tiles, maps = made.cautions
    assert tiles.startswith("There are no tiles of the treatments that were called wrong: ")
    assert maps.startswith(f"There are no attribution maps of run/001/{ATTRIBUTIONS}, which can't be read: ")


def test_the_page_of_a_study_shows_them(store: Store, tmp_path: Path) -> None:
    compounds = {f"{label}-{number}": label for label in small.CLASSES for number in range(3)}
    runs = make_study(tmp_path, starts=("xavier",), compounds=compounds, classes=small.CLASSES)
    outputs = finished(runs[0])
    assert outputs is not None
    table = pd.read_parquet(outputs / "predictions.parquet")
    swapped = {"p_dim": table["p_bright"], "p_bright": table["p_dim"]}
    ledger.write_table(outputs / "predictions.parquet", table.assign(**swapped))
    leave_attributions(outputs, ["bright-0 1 uM"])
    document = aggregate(tmp_path, "made", runs, small.CLASSES, store=store)
    page = (tmp_path / "results" / "report.html").read_text()
    assert [row["treatment"] for row in document["models"][0]["wrong"]] == ["bright-0 1 uM", "bright-0 3 uM"]
    assert page.count('alt="tile"') == gallery.PER_TREATMENT + 1  # the store has nothing of the second
    assert page.count('alt="map"') == 1
    assert "What spoke for bright in ResNet50, xavier, seed 0:" in page


def test_nothing_to_show() -> None:
    assert make_gallery(None, ["a 1 uM"]) == make_gallery(None, []) == Gallery()
    assert Shown("a", "p", b"123", b"45").bytes_on_page > len("MTIz") + len("NDU=")
