"""Screens and settings that are wrong in one way each: what the conversion says, and that no plate is left half-made.

The first two lines of a message say what and where; what was found, what is allowed and what to type next follow.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from cellhpc.convert import convert
from cellhpc.convert import execute as convert_module
from cellhpc.errors import DataError, UsageError, UserError
from cellhpc.ledger import write_json
from cellhpc.pipeline import plan_study
from cellhpc.record import finished_plates
from cellhpc.settings import load_job
from tests import one_process
from tests.conftest import Cellhpc

SIZE = (64, 80)
WELLS = {"B02": ("DMSO", ""), "B03": ("taxol", "up"), "B04": ("epothilone", "up"), "B05": ("ara-C", "down"),
         "B06": ("cisplatin", "down")}  # fmt: skip
JOB = """
[study]
name = "s"
folder = "study"
[screen]
layout = "manifest"
path = "raw"
table = "fields.csv"
channels = ["dna", "actin"]
files = { dna = "{Dna}", actin = "{Actin}" }
columns = { plate = "Plate", well = "Well", compound = "Drug", label = "Target", concentration = "Dose" }
[sweep]
tile_px = 32
"""
HEADER = "Plate,Well,Drug,Target,Dose,Dna,Actin"
BAD = "raw/B04_dna.tif"


@pytest.fixture(autouse=True)
def screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plate of five wells, a field each, and a job file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert_module, "_cluster", one_process.cluster)
    Path("raw").mkdir()
    rows = [HEADER]
    for number, (well, (drug, target)) in enumerate(WELLS.items()):
        rows.append(f"P1,{well},{drug},{target},{number},{well}_dna.tif,{well}_actin.tif")
        for channel, name in enumerate(("dna", "actin")):
            tifffile.imwrite(f"raw/{well}_{name}.tif", picture(10 * number + channel))
    Path("raw/fields.csv").write_text("\n".join(rows))
    Path("job.toml").write_text(JOB)


def picture(seed: int = 0, dtype: str = "uint16", size: tuple[int, ...] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).poisson(200, size).clip(0, 255).astype(dtype)


def start(*settings: str) -> None:
    job = load_job("job.toml", [f"convert.store={Path('store').absolute()}", *settings])
    convert(plan_study(job).conversion, workers=1)


def refused(case: tuple[Callable[[], object], str]) -> None:
    """Spoil the screen, and see that it is refused with this message."""
    act, message = case
    act()
    with pytest.raises(DataError) as fault:
        start()
    assert message in str(fault.value)
    assert fault.value.exit_code == 1


def test_the_screen_is_sound_when_nothing_is_done_to_it() -> None:
    start()
    assert finished_plates(Path("store")) == ["P1"]


def cut(file: str, keep: float) -> Callable[[], object]:
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[: int(keep * Path(file).stat().st_size)])


def tiff(pixels: np.ndarray, **how: object) -> Callable[[], object]:
    return lambda: tifffile.imwrite(BAD, pixels, **how)  # type: ignore[arg-type]


def two_sizes() -> None:
    with tifffile.TiffWriter(BAD) as writer:
        writer.write(picture())
        writer.write(picture(size=(32, 32)))


def huge_header() -> None:
    """A TIFF of a few hundred bytes that claims 40,000 x 40,000 pixels."""
    tifffile.imwrite(BAD, picture())
    data = bytearray(Path(BAD).read_bytes())
    with tifffile.TiffFile(BAD) as whole:
        tags = whole.pages[0].tags  # type: ignore[union-attr]
        for name in ("ImageWidth", "ImageLength"):
            struct.pack_into("<I", data, tags[name].offset + 8, 40_000)
            struct.pack_into("<H", data, tags[name].offset + 2, 4)  # type LONG
    Path(BAD).write_bytes(data)


def named(ending: str, write: Callable[[Path], object]) -> Callable[[], object]:
    """Make the picture of B04 one of another kind."""

    def act() -> None:
        write(Path(BAD).with_suffix(ending))
        table("B04_dna.tif", f"B04_dna{ending}")()

    return act


def cut_png(path: Path) -> None:
    Image.fromarray(picture()).save(path)
    cut(str(path), 0.5)()


def only(content: bytes) -> Callable[[], object]:
    return lambda: Path(BAD).write_bytes(content)


def becomes_folder() -> None:
    Path(BAD).unlink()
    Path(BAD).mkdir()


def table(old: str, new: str) -> Callable[[], object]:
    path = Path("raw/fields.csv")
    return lambda: path.write_text(path.read_text().replace(old, new))


def flat_controls() -> None:
    tifffile.imwrite("raw/B02_dna.tif", np.full(SIZE, 7, np.uint16))


PIXELS: dict[str, tuple[Callable[[], object], str]] = {
    "cut in its middle": (cut(BAD, 0.5), "well B04 field 1: B04_dna.tif: truncated"),
    "cut in its header": (cut(BAD, 0.0005), "B04_dna.tif: truncated or unreadable"),
    "empty file": (only(b""), "B04_dna.tif: truncated or unreadable"),
    "text": (only(b"<html>404 Not Found</html>"), "B04_dna.tif: truncated or unreadable"),
    "missing": (lambda: Path(BAD).unlink(), "1 of 10 pictures are missing: B04_dna.tif"),
    "a folder": (becomes_folder, "1 of 10 pictures are missing: B04_dna.tif"),
    "another size": (tiff(picture(size=(64, 64))), "has 64 x 64 pixels, the other fields have 64 x 80"),
    "another type": (tiff(picture(dtype="uint8")), "B04_dna.tif: is uint8, the other fields are uint16"),
    "floating point": (tiff(picture(dtype="float32")), "B04_dna.tif: is float32; allowed are uint8 and uint16"),
    "signed": (tiff(picture(dtype="int16")), "B04_dna.tif: is int16; allowed are uint8 and uint16"),
    "colour": (tiff(picture(size=(*SIZE, 3)), photometric="rgb"), "B04_dna.tif: has 3 planes instead of 1"),
    "focus stack": (
        tiff(picture(size=(3, *SIZE)), ome=True, metadata={"axes": "ZYX"}),
        "B04_dna.tif: has the axes ZYX of sizes (3, 64, 80); expected Y and X",
    ),
    "pictures of two sizes": (two_sizes, "B04_dna.tif: holds 2 pictures of different kinds; expected one"),
    "black": (tiff(np.zeros(SIZE, np.uint16)), "B04_dna.tif: every pixel of a channel is 0"),
    "a bomb": (huge_header, "B04_dna.tif: its header claims 40000 x 40000 pixels; at most 134,217,728 are read"),
    "flat controls": (flat_controls, "plate P1: channel dna is the same everywhere in its DMSO f"),
    "JPEG": (
        named(".jpg", lambda path: Image.fromarray(picture(dtype="uint8")).save(path)),
        "B04_dna.jpg: no kind of picture that is read here; allowed are .tif, .tiff, .png, .bmp",
    ),
    "16-bit colour": (
        named(".png", lambda path: cv2.imwrite(str(path), picture(size=(*SIZE, 3)))),
        "B04_dna.png: its pixels are of a kind that is not read here (RGB, RGB;16B)",
    ),
    "a PNG that is cut": (named(".png", cut_png), "B04_dna.png: truncated or unreadable"),
    "a PNG of 8 bits": (
        named(".png", lambda path: Image.fromarray(picture(dtype="uint8")).save(path)),
        "B04_dna.png: is uint8, the other fields are uint16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PIXELS)
def test_a_bad_picture_is_named_with_what_is_wrong_with_it(what: str) -> None:
    refused(PIXELS[what])
    assert finished_plates(Path("store")) == []


TABLES: dict[str, tuple[Callable[[], object], str]] = {
    "no table": (lambda: Path("raw/fields.csv").unlink(), "fields.csv: the table is missing"),
    "no rows": (
        lambda: Path("raw/fields.csv").write_text(HEADER),
        "fields.csv: the table has a header and no rows",
    ),
    "another separator": (table(",", ";"), "is ',' its separator? Set screen.separator"),
    "a column less": (table("Target", "Moa"), "screen.columns.label"),
    "a picture twice": (table("3,B05_dna", "3,B04_dna"), "the picture B04_dna.tif belongs to 2 fields"),
    "a label of one compound": (table("epothilone", "taxol"), "can't be held out: nothing would be left to learn from"),
    "a well of two treatments": (table("P1,B04,", "P1,B03,"), "well B03: its fields have different treatments"),
    "a treatment of two labels": (table("epothilone,up,2", "ara-C,up,3"), "ara-C 3 uM: conflicting labels: down, up"),
    "no number": (table("up,2,", "up,much,"), "fields.csv row 4: the concentration is 'much', which is no number"),
    "a decimal comma": (table("up,2,", 'up,"2,5",'), "the concentration is '2,5', which is no number (write a decimal"),
    "below zero": (table("up,2,", "up,-2,"), "the concentration is '-2', which is no concentration"),
    "a plate that is no folder": (table("P1,B04", "../P1,B04"), "the plate '../P1' can't be the name of a folder"),
    "out of the folder": (table("2,B04_dna", "2,../B04_dna"), "'../B04_dna.tif' lies outside of screen.path"),
    "an absolute path": (table("2,B04_dna", "2,/etc/B04_dna"), "'/etc/B04_dna.tif' lies outside of screen.path"),
    "two spellings": (table("epothilone,up", "Taxol,up"), "one compound, 2 spellings? Write it in one"),
    "no controls": (table("DMSO", "water"), "normalises each plate by its DMSO wells, and 1 of 1 plates have none"),
    "no compound": (table("epothilone", ""), "fields.csv row 4: the compound is empty"),
}  # fmt: skip


@pytest.mark.parametrize("what", TABLES)
def test_a_bad_table_is_told_with_its_row(what: str) -> None:
    refused(TABLES[what])
    assert not Path("store").exists()


SETTINGS = {
    'convert.codec="jpeg"': "convert.codec: found 'jpeg'. Input should be 'zstd', 'lz4' or 'none'",
    "convert.tile_grid=[3, 2]": "3 rows x 2 columns of tiles do not divide a field of 64 x 80 pixels",
    "convert.percentiles=[99, 1]": "the second must be larger than the first",
    "convert.zscore_range=[2, 2]": "the second must be larger than the first",
    'convert.preprocessing="none"': "takes 8-bit pixels as they are; the fields are uint16",
    "convert.shard_fields=0": "convert.shard_fields: found 0. Input should be greater than or equal to 1",
    "convert.shards=4": "convert.shards: unknown key. Valid here: store, preprocessing",
    'convert.archive="store/archive"': "lies in the store. Choose a folder beside it",
    'screen.channels=["dna", "dna", "actin"]': "channels names one twice: actin, dna, dna",
    'screen.channels=["dna", "gfp"]': "it needs dna, gfp, or all alone",
    'screen.files={ dna = "{Name}", actin = "{Actin}" }': 'screen.files.dna = "{Name}"',
    "sweep.weights=xavier": """found 'xavier'. A list is wanted, in square brackets: ["xavier"].""",
    'screen.compounds=["taxxol"]': "the screen has no compound 'taxxol'. Near: taxol",
    'train.inputs=["dna", "tubulin", "actin"]': "'tubulin' is no channel of the screen. Allowed: actin, dna",
    'screen.batch_pattern="(P"': "is no regular expression",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_bad_setting_is_told_with_what_is_allowed(setting: str) -> None:
    with pytest.raises(UserError) as fault:
        start(setting)
    assert SETTINGS[setting] in str(fault.value)
    assert not Path("store").exists()


def test_a_folder_that_is_no_store_is_left_alone() -> None:
    Path("store").mkdir()
    Path("store/thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is there and is no store of tiles\. Choose another folder"):
        start()
    assert [path.name for path in Path("store").iterdir()] == ["thesis.txt"]


def test_a_store_of_other_settings_is_left_alone() -> None:
    start()
    before = {path: path.read_bytes() for path in Path("store").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"empty_above: 50 in the store, 60 wanted now"):
        start("convert.empty_above=60")
    assert {path: path.read_bytes() for path in Path("store").rglob("*") if path.is_file()} == before


def test_a_store_of_a_later_version_is_left_alone() -> None:
    write_json(Path("store/store.json"), {"format": 99})
    with pytest.raises(UsageError, match=r"made by another version of cellhpc \(format 99"):
        start()


def test_the_command_says_it_in_one_message_without_a_traceback(cellhpc: Cellhpc) -> None:
    cut(BAD, 0.5)()
    words = ("--set", 'sweep.weights=["xavier"]', "--set", 'sweep.networks=["MobileNet(alpha=0.25)"]')
    said = cellhpc("convert", "job.toml", *words)
    assert said.returncode == 1
    assert "B04_dna.tif: truncated" in said.stderr
    assert 'set convert.on_bad_field = "skip"' in said.stderr
    assert "Traceback" not in said.stderr
