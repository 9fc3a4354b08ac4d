"""Overviews of plates and montages, by their pixels; what is written beside them, and the report's part."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cellhpc.aggregate import aggregate
from cellhpc.convert import convert, plan_conversion
from cellhpc.convert import execute as convert_module
from cellhpc.errors import DataError
from cellhpc.ledger import read_json
from cellhpc.montage import choose_tiles, montage
from cellhpc.overview import place, plate_format, plate_overview, well_box
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
from cellhpc.sheet import channel_colours
from cellhpc.tiles import Store
from tests import one_process
from tests.conftest import Cellhpc
from tests.made_up import make_study
from tests.small import tiles as made_up_tiles

CHANNELS = ("dna", "tubulin", "actin")
SIDE_PX, DARK, BRIGHT = 32, 100, 1100
CONTROLS = (100, 200, 300, 500, 700, 900, 1100, 1300)
"""Brightness of the fields of the controls: of all kinds, so that no field stands out by its own."""
COMPOUNDS = {"B03": ("one", "A"), "C05": ("two", "B"), "G11": ("three/and more", "B")}
"""Compound and label of each well: in the first, the first channel is bright, and so on."""


def make_store(root: Path, channels: Sequence[str] = CHANNELS, wells: Sequence[str] = tuple(COMPOUNDS)) -> Store:
    """Make a plate P1 of which A01 and H12 are controls; in each other well another channel is bright.

    The lowest quarter of its fields is dark, and the upper left tile of its second field twice as bright. The third
    field of the first well is torn, and the lower right tile of its fourth is near-empty.
    """
    root.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number, well in enumerate(("A01", "H12", *wells)):
        control = number < 2
        compound, label = ("DMSO", "") if control else [*COMPOUNDS.values()][(number - 2) % 3]
        for field in (1, 2, 3, 4):
            pixels = random.normal(1, 0.2, (SIDE_PX, SIDE_PX, len(channels)))
            pixels *= CONTROLS[4 * number + field - 1] if control else DARK
            if not control:
                bright = (number - 2) % len(channels)
                pixels[: SIDE_PX * 3 // 4, :, bright] *= BRIGHT / DARK
                if field == 2:
                    pixels[: SIDE_PX // 2, : SIDE_PX // 2, bright] *= 2
            if (number, field) == (2, 4):
                pixels[SIDE_PX // 2 :, SIDE_PX // 2 :] = 0
            files = {f"file_{channel}": f"{well}_{field}_{channel}.png" for channel in channels}
            for plane, file in enumerate(files.values()):
                Image.fromarray(pixels[..., plane].astype(np.uint16)).save(root / file)
                if (number, field) == (2, 3):
                    (root / file).write_bytes((root / file).read_bytes()[:-100])
            rows.append({
                "plate": "P1", "batch": "", "well": well, "field": field, "compound": compound, "concentration": 1.0,
                "unit": "uM", "treatment": compound if control else f"{compound} 1 uM", "label": label,
                "replicate": "1", "role": "dmso" if control else "treatment", **files,
            })  # fmt: skip
    settings = ConvertSettings(preprocessing="zscore", zscore_range=(-3.0, 5.0), on_bad_field="skip")
    screen = Screen(pd.DataFrame(rows), tuple(channels), root)
    plan = plan_conversion(settings, screen, (16, 32), root / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "_cluster", one_process.cluster)
        convert(plan, workers=1)
    return Store.open(plan.store)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("made") / "raw")


@pytest.fixture(scope="module")
def drawn(store: Store, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The overview of the plate, as read from its file."""
    path = tmp_path_factory.mktemp("pictures") / "overview.png"
    png = plate_overview(store, "P1").save(path)
    assert path.read_bytes() == png
    return np.asarray(Image.open(path))


def well_of(drawn: np.ndarray, well: str, columns: int = 12) -> np.ndarray:
    row, column = place(well) or (0, 0)
    x, y, side = well_box(row, column, columns)
    return drawn[y : y + side, x : x + side]


def quarter(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """One of the four parts of a picture, without its rim."""
    half = len(picture) // 2
    return picture[row * half + 4 : (row + 1) * half - 4, column * half + 4 : (column + 1) * half - 4]


def test_places_of_wells() -> None:
    assert [place(well) for well in ("A01", "b6", "H12", "P24", "AA1", "AF48")] == [
        (0, 0), (1, 5), (7, 11), (15, 23), (26, 0), (31, 47),
    ]  # fmt: skip
    assert [place(well) for well in ("", "7", "A", "A00", "A001x", "B-2", "ABC1", "Ä1")] == [None] * 8


@pytest.mark.parametrize(
    ("wells", "expected"),
    [(["B02"], (8, 12)), (["H12"], (8, 12)), (["A13"], (16, 24)), (["I01"], (16, 24)), (["B02", "AF48"], (32, 48))],
)
def test_the_smallest_plate_that_holds_the_wells(wells: list[str], expected: tuple[int, int]) -> None:
    assert plate_format(wells) == expected


def test_a_well_of_no_plate_is_told() -> None:
    with pytest.raises(DataError, match="no plate of 96, 384 or 1,536 wells has A49, well 3; wells are named as B06"):
        plate_format(["A01", "well 3", "A49"])


def test_each_well_has_its_pictures_at_its_place(drawn: np.ndarray) -> None:
    for well, hue in zip(COMPOUNDS, channel_colours(CHANNELS), strict=True):
        for field in range(2):
            means = quarter(well_of(drawn, well), 0, field).mean((0, 1))
            assert means.max() > 80
            assert means / means.max() == pytest.approx(hue, abs=0.15)
    second = quarter(well_of(drawn, "C05"), 0, 1)[..., 1]  # the second field, twice as bright in its upper left tile
    assert second[:20, :20].mean() > 1.5 * second[:20, 30:].mean()
    assert second[:20, :20].mean() > 1.5 * second[26:34, :20].mean()
    assert second[-6:].mean() < 30


def test_wells_without_pictures_are_plain_and_controls_are_empty_frames_with_a_name(drawn: np.ndarray) -> None:
    assert np.ptp(well_of(drawn, "E06")) == 0
    control = well_of(drawn, "A01")
    assert (control[20:40, 20:-20] == 255).all()  # nothing above the name
    assert (control[50:66] < 160).any()  # the name
    assert 0.3 < (control[1:3, :, 0] < 200).mean() < 0.9  # a dashed frame


def test_what_was_set_aside_is_crossed_out_and_near_empty_tiles_are_grey(drawn: np.ndarray) -> None:
    well = well_of(drawn, "B03").astype(int)
    torn, grey = quarter(well, 1, 0), quarter(well, 1, 1)[30:, 30:]
    vermilion = (abs(torn - (0xD5, 0x5E, 0x00)) < 30).all(-1)
    size = len(torn)
    assert all(vermilion[n - 1 : n + 3, n - 1 : n + 3].any() for n in range(2, size - 3))  # from corner to corner
    assert vermilion.mean() < 0.2
    assert np.median(torn) == well_of(drawn, "E06")[9, 9, 0]  # as plain as a well without pictures
    assert np.ptp(grey) <= 3
    assert 100 < grey.mean() < 130
    assert not (abs(well_of(drawn, "C05").astype(int) - (0xD5, 0x5E, 0x00)) < 30).all(-1).any()


def test_a_field_that_stands_out_has_a_marked_corner(drawn: np.ndarray) -> None:
    well = well_of(drawn, "B03").astype(int)  # its fourth field, for its near-empty tile
    orange = (abs(well - (0xE6, 0x9F, 0x00)) < 40).all(-1)
    rows, columns = np.nonzero(orange)
    half = len(well) // 2
    assert len(rows) > 30
    assert rows.min() >= half
    assert columns.min() >= half
    assert max(rows.max(), columns.max()) < half + 20


def test_a_small_plate_of_384_wells_has_smaller_wells(store: Store, tmp_path: Path) -> None:
    wider = make_store(tmp_path / "raw", wells=("B03", "P24"))
    plate_overview(wider, "P1").save(tmp_path / "p.png")
    drawn = np.asarray(Image.open(tmp_path / "p.png"))
    assert well_of(drawn, "P24", 24)[4:24, 4:24].mean((0, 1)).argmax() == 1
    assert well_of(drawn, "B03", 24)[4:24, 4:24].mean((0, 1)).argmax() == 2
    assert np.ptp(well_of(drawn, "P23", 24)) == 0


@pytest.mark.parametrize("channels", [("dna",), ("nfkb", "dna"), ("w1", "w2", "w3", "DAPI"), ("1", "2", "3", "4", "5")])
def test_stores_of_other_numbers_of_channels(channels: tuple[str, ...], tmp_path: Path) -> None:
    wells = [f"C{column:02d}" for column in range(3, 3 + len(channels))]
    made = make_store(tmp_path / "raw", channels, wells)
    hues = channel_colours(channels)
    assert len(np.unique(hues, axis=0)) == len(channels)
    plate_overview(made, "P1").save(tmp_path / "p.png")
    drawn = np.asarray(Image.open(tmp_path / "p.png"))
    for well, hue in zip(wells, hues, strict=True):
        lit = quarter(well_of(drawn, well), 0, 0).mean((0, 1))
        assert lit / lit.max() == pytest.approx(hue, abs=0.15), (well, lit, hue)
    montage(made).save(tmp_path / "m.png")
    assert np.asarray(Image.open(tmp_path / "m.png")).shape[2] == 3


def test_colours_follow_the_names_of_channels() -> None:
    def brightest(*channels: str) -> list[str]:
        return [("red", "green", "blue")[hue.argmax()] for hue in channel_colours(channels)]

    assert brightest(*CHANNELS) == ["blue", "green", "red"]
    assert brightest("actin", "tubulin", "dna") == ["red", "green", "blue"]
    assert brightest("nfkb", "dna") == ["green", "blue"]
    assert brightest("w2_GFP", "other", "w1 Hoechst") == ["green", "red", "blue"]
    assert channel_colours(("anything",)).tolist() == [[1, 1, 1]]


SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What the colour-blind see of linear red, green and blue (Machado, Oliveira & Fernandes 2009, IEEE TVCG 15(6))."""


@pytest.mark.parametrize("blindness", SEEN)
def test_colour_blind_readers_tell_channels_apart(blindness: str) -> None:
    def differences(colours: np.ndarray) -> list[float]:
        """Distances in CIE 1976 L*a*b* of each two of the colours (1: just noticeable), as they are seen."""
        linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
        seen = np.clip(linear @ np.array(SEEN[blindness]).T, 0, 1)
        seen = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
        return [float(np.linalg.norm(one - other)) for one, other in itertools.combinations(lab, 2)]

    assert min(differences(channel_colours(CHANNELS))) > 45
    assert min(differences(channel_colours("12345"))) > 30
    if blindness == "deuteranopia":
        assert min(differences(np.eye(3))) < 30  # red and green


def chosen(
    tiles: pd.DataFrame, labels: Sequence[str] = ("dim", "bright"), per_label: int = 2
) -> list[tuple[object, ...]]:
    drawn = choose_tiles(tiles, labels, per_label)
    return [*drawn[["label", "compound", "well", "field", "tile"]].itertuples(index=False, name=None)]


def test_the_choice_does_not_depend_on_the_order_of_rows_nor_on_other_labels() -> None:
    tiles = made_up_tiles()
    first = chosen(tiles)
    assert [label for label, *_ in first] == ["bright", "bright", "dim", "dim"]
    assert len({compound for _, compound, *_ in first}) == 4
    for seed in range(3):
        assert chosen(tiles.sample(frac=1, random_state=seed)) == first
    assert chosen(tiles, ("dim",)) == first[2:]
    assert chosen(tiles[tiles["label"] != "middle"]) == first
    assert len(chosen(tiles, per_label=9)) == 6


def test_a_montage_shows_tiles_below_their_labels(store: Store, tmp_path: Path) -> None:
    sheet = montage(store, per_label=2)
    sheet.save(tmp_path / "m.png")
    drawn = np.asarray(Image.open(tmp_path / "m.png"))
    written = {text.get_text(): text.get_position() for text in sheet.axes.texts}
    for label, name, colour in (("A", "one", 2), ("B", "three/and", 0), ("B", "two", 1)):
        x, y = written[name]
        tile = drawn[int(y) - 130 : int(y) - 20, int(x) : int(x) + 110].mean((0, 1))
        assert tile.argmax() == colour
        assert written[label][1] < y - 130
    assert {"more", "1 uM"} <= set(written)
    assert written["three/and"][0] == written["B"][0] < written["two"][0]


def test_words_do_not_overlap(store: Store) -> None:
    for sheet in (plate_overview(store, "P1"), montage(store)):
        sheet.canvas.draw()
        words = [*sheet.axes.texts, *sheet.axes.get_legend().get_texts()]
        boxes = [text.get_window_extent() for text in words]
        assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.shrunk(0.98, 0.98).overlaps(b)]
        height, width = sheet.pixels.shape[:2]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


def test_the_command_says_what_it_wrote(store: Store, tmp_path: Path, cellhpc: Cellhpc) -> None:
    done = cellhpc("pictures", store.folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = ["outliers.csv", "montage.png", "overview_P1.png"]
    assert done.stdout.splitlines() == [f"wrote {tmp_path / 'out' / name}" for name in names]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    table = pd.read_csv(tmp_path / "out/outliers.csv")
    assert ("P1", "B03", 4, "near_empty") in table[["plate", "well", "field", "figure"]].itertuples(
        index=False, name=None
    )
    refused = cellhpc("pictures", store.folder, "--plate", "P7", "--out", tmp_path / "none")
    assert refused.returncode == 2
    assert "has no finished plate P7. It has: P1." in refused.stderr
    assert not (tmp_path / "none").exists()


def test_a_plate_that_has_no_layout_does_not_keep_the_others_from_being_written(
    store: Store, tmp_path: Path, cellhpc: Cellhpc
) -> None:
    folder = shutil.copytree(store.folder, tmp_path / "store")
    for part in ("plates", "tiles.zarr"):
        shutil.copytree(folder / part / "P1", folder / part / "P0")
    for name in ("fields.parquet", "tiles.parquet"):
        table = pd.read_parquet(folder / "plates/P0" / name).assign(plate="P0")
        table.replace({"well": {"C05": "five"}}).to_parquet(folder / "plates/P0" / name)
    said = cellhpc("pictures", folder, "--out", tmp_path / "out")
    assert said.returncode == 1
    assert "plate P0: no plate of 96, 384 or 1,536 wells has five" in said.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"outliers.csv", "montage.png", "overview_P1.png"}


def test_the_report_shows_the_montage_and_names_fields(store: Store, tmp_path: Path) -> None:
    compounds = {compound: label for compound, label in COMPOUNDS.values()}
    runs = make_study(tmp_path / "study", compounds=compounds, classes=("A", "B"))
    results = tmp_path / "study/results"
    document = aggregate(tmp_path / "study", "made", runs, ("A", "B"), store=store)
    assert [row["name"] for row in document["baselines"]["table"]][-2:] == ["intensity", "intensity_neighbour"]
    quality = document["quality"]
    assert (quality["plates"], quality["fields"], quality["controls"], quality["set_aside"]) == (1, 20, 8, 1)
    assert ("B03", 4) in {(row["well"], row["field"]) for row in quality["shown"]}
    page = (results / "report.html").read_text()
    assert "<h2>Tiles by label</h2>" in page
    assert "1 near-empty tile" in page.split("<h2>Quality of the pictures</h2>")[1]
    assert len(pd.read_csv(results / "outliers.csv").drop_duplicates(["well", "field"])) == quality["stand_out"]
    assert (results / "montage.png").is_file()
    assert read_json(results / "scores.json")["quality"] == quality


def test_scores_do_not_need_the_tiles(store: Store, tmp_path: Path) -> None:
    folder = shutil.copytree(store.folder, tmp_path / "store")
    shutil.rmtree(folder / "tiles.zarr")
    compounds = {compound: label for compound, label in COMPOUNDS.values()}
    runs = make_study(tmp_path / "study", compounds=compounds, classes=("A", "B"))
    aggregate(tmp_path / "study", "made", runs, ("A", "B"), store=Store.open(folder))
    page = (tmp_path / "study/results/report.html").read_text()
    assert "<h2>Tiles by label" not in page
    assert f"There is no picture of tiles by label: {folder}" in page.replace("&#39;", "'")
    assert "Quality of the pictures" in page
