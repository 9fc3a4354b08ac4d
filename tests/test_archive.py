"""The lossless archive: what others read of it, and that it is never half there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from cellhpc.archive import Archive, write_field
from cellhpc.convert import ConversionPlan, archiving, convert, plan_conversion, tasks
from cellhpc.convert.plan import THREADS
from cellhpc.errors import DataError, UsageError, UserError
from cellhpc.ome import image_metadata, plate_metadata, well_path
from cellhpc.pixels import FieldFormat, read_field
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings, Job
from cellhpc.study import StudyFolder
from cellhpc.wells import place
from tests import test_convert
from tests.test_convert import (
    CHANNELS,
    SETTINGS,
    children,
    contents,
    make_rgb_screen,
    make_screen,
    mend,
    pixels,
    spoil,
    wait_until_gone,
)

threads = test_convert.threads  # a cluster that starts at once


def with_archive(folder: Path, **more: Any) -> ConvertSettings:
    return ConvertSettings(**{"shard_fields": 2, "archive": folder / "archive", **more})


def plan(screen: Screen, folder: Path, **more: Any) -> ConversionPlan:
    return plan_conversion(with_archive(folder, **more), screen, (16,), folder / "store")


def metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zarr.json").read_text())["attributes"]


# What comes out


def test_every_field_is_there_as_it_was(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    made = plan(screen, tmp_path)
    assert not made.is_finished
    convert(made, workers=2)
    assert made.is_finished
    for plate in (0, 1):
        for number in range(7):  # the two DMSO fields, too
            folder = tmp_path / f"archive/P{plate}.zarr/B/{number // 2 + 1}/{number % 2 + 1}"
            array = zarr.open_array(folder / "0", mode="r")
            np.testing.assert_array_equal(np.moveaxis(array[...], 0, -1), pixels(100 * plate + number))
            assert {path.name for path in (folder / "0").iterdir()} == {"zarr.json", "c.0.0.0"}
            assert metadata(folder)["cellhpc"]["source"]["files"][1] == f"P{plate}/{number:02d}_tubulin.tif"
    written = [path for path in (tmp_path / "archive").rglob("*") if path.is_file()]
    assert len(written) == made.totals()["archive_files"] == 2 * (7 * 3 + 4 + 1 + 1) + 1
    assert made.totals()["archive_bytes"] == 14 * 64 * 80 * 3 * 2


def test_no_picture_is_read_for_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def note(root: Path, files: Sequence[str], expected: FieldFormat) -> np.ndarray:
        read.append(files[0])
        return read_field(root, files, expected)

    monkeypatch.setattr(tasks, "read_field", note)
    convert(plan(make_screen(tmp_path / "raw"), tmp_path), workers=2)
    assert len(read) == len(set(read)) == 14


def test_fields_are_archived_as_they_are_whatever_becomes_of_the_tiles(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    convert(plan(screen, tmp_path, illumination="mean", statistics="plate", preprocessing="zscore"))
    assert len(fields(tmp_path / "archive")) == 7
    for number in range(7):
        folder = tmp_path / f"archive/P0.zarr/B/{number // 2 + 1}/{number % 2 + 1}/0"
        np.testing.assert_array_equal(np.moveaxis(zarr.open_array(folder, mode="r")[...], 0, -1), pixels(number))


def test_the_plan_tells_of_it(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    without = plan_conversion(SETTINGS, screen, (16,), tmp_path / "store")
    assert "archive" not in without.render()
    assert (without.totals()["archive_files"], without.totals()["archive_bytes"]) == (0, 0)
    wanted = plan(screen, tmp_path)
    assert f"archive 14 fields as they are in {tmp_path}/archive\n" in wanted.render()
    assert "about 253 kB, at most 430 kB, in 55 files" in wanted.render()
    assert wanted.worker_bytes - without.worker_bytes == THREADS * 2 * 64 * 80 * 3 * 2
    assert not (tmp_path / "archive").exists()
    convert(wanted)
    assert "archive (2 plates are there)" in wanted.render()


@pytest.mark.parametrize(
    ("height", "width", "chunks", "shards"),
    [
        (64, 80, (64, 80), (64, 80)),
        (1024, 1280, (1024, 1280), (1024, 1280)),
        (2160, 2560, (1080, 1280), (2160, 2560)),
        (2161, 80, (1081, 80), (2162, 80)),  # a shard may stand out
    ],
)
def test_chunks_divide_the_picture(
    tmp_path: Path, height: int, width: int, chunks: tuple[int, int], shards: tuple[int, int]
) -> None:
    archive = Archive(tmp_path, ("dna", "actin"), FieldFormat(height, width, "uint8"), "lz4", None)
    field = np.random.default_rng(0).integers(0, 9, (height, width, 2), np.uint8)
    field[:, :, 1] = 0  # zeros are written, too
    write_field(archive, "P", "A01", 1, field, [(0, 8), (0, 0)], {})
    array = zarr.open_array(archive.field("P", "A01", 1) / "0", mode="r")
    assert array.chunks == (1, *chunks)
    assert array.shards == (2, *shards)
    assert array.metadata.dimension_names == ("c", "y", "x")
    np.testing.assert_array_equal(np.moveaxis(array[...], 0, -1), field)


def test_every_reader_notices_damage(tmp_path: Path) -> None:
    archive = Archive(tmp_path, ("dna",), FieldFormat(64, 80, "uint16"), "none", None)
    write_field(archive, "P", "A01", 1, pixels(0)[..., :1], [(0, 1)], {})
    shard = archive.field("P", "A01", 1) / "0/c.0.0.0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="do not match"):
        zarr.open_array(shard.parent, mode="r")[...]


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_codecs(tmp_path: Path, codec: Any) -> None:
    settings = with_archive(tmp_path, archive_codec=codec, preprocessing="none", tile_grid=(4, 5))
    convert(plan_conversion(settings, make_rgb_screen(tmp_path / "raw"), (16,), tmp_path / "store"))
    folder = tmp_path / "archive/P0.zarr/B/1/1/0"
    wanted = (pixels(0) // 16).astype(np.uint8)
    np.testing.assert_array_equal(np.moveaxis(zarr.open_array(folder, mode="r")[...], 0, -1), wanted)
    inner = json.loads((folder / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    found = [one["configuration"].get("cname") for one in inner if one["name"] == "blosc"]
    assert found == ([] if codec == "none" else [codec])


def test_wells_and_plates() -> None:
    assert [place(well) for well in ("A1", "b06", "H12", "AF48")] == [(0, 0), (1, 5), (7, 11), (31, 47)]
    assert well_path((1, 5)) == "B/6"
    for well in ("", "06", "B", "B0", "B49", "AG1", "1-2", "B 6"):
        with pytest.raises(ValueError, match="is none of A01 to AF48"):
            place(well)
    for well, shape in (("H12", (8, 12)), ("A13", (16, 24)), ("I1", (16, 24)), ("Q1", (32, 48))):
        plate = plate_metadata("P", [place("B2"), place(well)], {place("B2"): [1, 2]})["plate"]
        assert (len(plate["rows"]), len(plate["columns"])) == shape
        assert plate["wells"] == [{"path": "B/2", "rowIndex": 1, "columnIndex": 1}]
        assert plate["field_count"] == 2


def test_channels_have_names_colours_and_windows() -> None:
    image = image_metadata("P", ("DNA", "tubulin", "nfkb", "actin", "er"), [(3, 9)] * 4 + [(7, 7)], 255, 0.32)
    channels = image["omero"]["channels"]
    assert [channel["label"] for channel in channels] == ["DNA", "tubulin", "nfkb", "actin", "er"]
    assert [channel["color"] for channel in channels] == ["0000FF", "00FF00", "E69F00", "FF0000", "56B4E9"]
    assert channels[0]["window"] == {"min": 0, "max": 255, "start": 3, "end": 9}
    assert (channels[4]["window"]["start"], channels[4]["window"]["end"]) == (7, 8)  # never of no width
    multiscale = image["multiscales"][0]
    assert [axis.get("unit") for axis in multiscale["axes"]] == [None, "micrometer", "micrometer"]
    assert multiscale["datasets"][0]["coordinateTransformations"] == [{"type": "scale", "scale": [1.0, 0.32, 0.32]}]


# What others say to it


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An archive of two plates, P1 with two fields that were set aside, one of them alone in its well."""
    screen = make_screen(tmp_path / "raw")
    for name in ("00", "06"):
        (tmp_path / f"raw/P1/{name}_dna.tif").write_bytes(b"II*\0")
    convert(plan(screen, tmp_path, on_bad_field="skip"))
    return tmp_path / "archive"


@pytest.mark.filterwarnings("error::ome_zarr_models.exceptions.ValidationWarning")
def test_the_communitys_validator_finds_nothing(made: Path) -> None:
    from ome_zarr_models.v05 import HCS, Image, Well

    for name, wells in (("P0", 4), ("P1", 3)):
        plate = HCS.from_zarr(zarr.open_group(made / f"{name}.zarr", mode="r"))  # its wells and fields, too
        assert len(plate.ome_attributes.plate.wells) == wells
        for found in plate.ome_attributes.plate.wells:
            well = Well.from_zarr(zarr.open_group(made / f"{name}.zarr" / found.path, mode="r"))
            for field in well.ome_attributes.well.images:
                image = Image.from_zarr(zarr.open_group(made / f"{name}.zarr" / found.path / field.path, mode="r"))
                assert [axis.name for axis in image.ome_attributes.multiscales[0].axes] == ["c", "y", "x"]
                assert image.members["0"].shape == (3, 64, 80)


def test_the_validator_would_find_something(made: Path) -> None:
    from ome_zarr_models.v05 import HCS

    image = made / "P0.zarr/B/1/1/zarr.json"
    image.write_text(image.read_text().replace('"multiscales"', '"multiscale"'))
    with pytest.raises(ValueError, match="multiscales"):
        HCS.from_zarr(zarr.open_group(made / "P0.zarr", mode="r"))


def test_omes_own_reader_finds_the_pixels(made: Path) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import OMERO, Plate, Reader
    from ome_zarr.reader import Well as WellSpec

    def read(path: Path) -> Any:
        return next(iter(Reader(parse_url(path))()))

    field = read(made / "P0.zarr/B/2/1")
    assert field.first(OMERO) is not None
    np.testing.assert_array_equal(np.moveaxis(np.asarray(field.data[0]), 0, -1), pixels(2))
    assert field.metadata["channel_names"] == list(CHANNELS)
    assert field.metadata["contrast_limits"][2] == [pixels(2)[..., 2].min(), pixels(2)[..., 2].max()]
    well = read(made / "P0.zarr/B/2")
    assert well.first(WellSpec) is not None
    side_by_side = np.concatenate([pixels(2), pixels(3)], axis=1)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(well.data[0]), 0, -1), side_by_side)
    plate = read(made / "P0.zarr")
    assert plate.first(Plate) is not None
    whole = np.moveaxis(np.asarray(plate.data[0]), 0, -1)
    assert whole.shape == (8 * 64, 12 * 80, 3)
    np.testing.assert_array_equal(whole[64:128, 80:160], pixels(2))  # well B02, its first field
    assert not whole[:64].any()


# Never half, never twice


PROGRAM = """
import sys
from pathlib import Path
import pandas as pd
from cellhpc.convert import convert, plan_conversion
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
if __name__ == "__main__":
    root, folder = map(Path, sys.argv[1:])
    fields = pd.read_parquet(root / "fields.parquet")
    screen = Screen(fields, ("dna", "tubulin", "actin"), root)
    settings = ConvertSettings(shard_fields=4, archive=folder / "archive")
    convert(plan_conversion(settings, screen, (16,), folder / "store"), workers=2)
"""


def test_killed_in_the_middle_and_continued_is_byte_identical(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=2, fields=16)
    screen.fields.to_parquet(tmp_path / "raw/fields.parquet")
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
    convert(plan(screen, tmp_path / "whole", shard_fields=4), workers=2)

    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "raw", tmp_path / "killed"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    archive = tmp_path / "killed/archive"
    while len(fields(archive)) < 6:
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    wait_until_gone(workers)
    assert not any("ome" in metadata(path) for path in archive.glob("P?.zarr"))  # no viewer takes it for a plate
    assert not list((tmp_path / "killed/store").glob("plates/*/plate.json"))

    finished, wanted = fields(archive), fields(tmp_path / "whole/archive")
    assert finished < wanted
    lost, *kept = sorted(finished)
    os.truncate(archive / lost / "0/c.0.0.0", 100)  # as a system without atomic renames could leave it
    torn = archive / min(wanted - finished)
    (torn / "0").mkdir(parents=True, exist_ok=True)
    for leftover in ("0/c.0.0.0", "0/.c.0.0.0.0123abcd.0", "0/.zarr.json.0123abcd.json", ".zarr.json.0123abcd.json"):
        (torn / leftover).write_bytes(b"half")
    before = {field: state(archive / field) for field in kept}
    convert(plan(screen, tmp_path / "killed", shard_fields=4), workers=2)
    assert {field: state(archive / field) for field in kept} == before
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def fields(archive: Path) -> set[Path]:
    """Fields that are there."""
    return {path.parent.relative_to(archive) for path in archive.glob("*.zarr/*/*/*/zarr.json")}


def state(field: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(field.rglob("*")) if path.is_file()]


def test_a_finished_store_is_archived_later_and_stays_as_it_is(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    without = plan_conversion(SETTINGS, screen, (16,), tmp_path / "store")
    convert(without)
    before, times = contents(tmp_path / "store"), state(tmp_path / "store/tiles.zarr")
    later = plan(screen, tmp_path)
    assert not later.is_finished
    assert later.unfinished() == []
    assert later.content_digest == without.content_digest != ""
    convert(later)
    assert later.is_finished
    assert (contents(tmp_path / "store"), state(tmp_path / "store/tiles.zarr")) == (before, times)
    (tmp_path / "at once").mkdir()
    convert(plan(screen, tmp_path / "at once"))
    assert contents(tmp_path / "at once/archive") == contents(tmp_path / "archive")
    assert contents(tmp_path / "at once/store") == before

    archived = state(tmp_path / "archive")
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    convert(plan(screen, tmp_path))  # nothing is to be done
    assert state(tmp_path / "archive") == archived
    other = ConvertSettings(shard_fields=2, empty_above=60, archive=tmp_path / "archive")
    (tmp_path / "elsewhere").rename(tmp_path / "raw")
    convert(plan_conversion(other, screen, (24,), tmp_path / "other"))  # another store of the same fields
    kept = [path.stat().st_mtime_ns for path in sorted((tmp_path / "archive").rglob("c.0.0.0"))]
    assert set(kept) <= set(archived)


@pytest.mark.parametrize("lacking", ["plate.json", "00001.json", "statistics.json"])
def test_tasks_that_were_done_without_an_archive(tmp_path: Path, lacking: str) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    for name in {lacking, "plate.json"}:  # killed before it was written
        (tmp_path / "store/plates/P0" / name).unlink()
    convert(plan(screen, tmp_path))
    assert len(fields(tmp_path / "archive")) == 7
    assert plan(screen, tmp_path).is_finished


def test_pictures_that_changed_or_went_away_before_they_were_archived(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", tmp_path / "good")
    skip = {"on_bad_field": "skip"}
    convert(plan_conversion(ConvertSettings(shard_fields=2, **skip), screen, (16,), tmp_path / "store"))
    before = contents(tmp_path / "store")
    tifffile.imwrite(tmp_path / "raw/P0/00_dna.tif", pixels(50)[..., 0])
    (tmp_path / "raw/P0/06_actin.tif").unlink()
    with pytest.raises(DataError, match=r"2 field\(s\) can't be archived; their tiles are there") as fault:
        convert(plan(screen, tmp_path, **skip))
    assert fault.value.problems == (
        "plate P0: well B01 field 1: P0/00_dna.tif: changed since it was converted",
        "plate P0: well B04 field 1: P0/06_actin.tif: missing",
    )
    assert f"cellhpc remove {tmp_path / 'store'} PLATE" in str(fault.value)
    assert "ome" not in metadata(tmp_path / "archive/P0.zarr")
    assert "ome" in metadata(tmp_path / "archive/P1.zarr")
    assert contents(tmp_path / "store") == before
    mend(tmp_path / "raw", tmp_path / "good")
    convert(plan(screen, tmp_path, **skip))
    assert plan(screen, tmp_path, **skip).is_finished


def test_a_field_whose_files_changed_between_two_attempts_is_written_again(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    shutil.copytree(tmp_path / "raw", tmp_path / "good")
    (tmp_path / "raw/P0/01_dna.tif").unlink()
    with pytest.raises(DataError, match=r"01_dna.tif: missing"):
        convert(plan(screen, tmp_path))
    assert len(fields(tmp_path / "archive")) == 6  # good ones are there already
    mend(tmp_path / "raw", tmp_path / "good")
    tifffile.imwrite(tmp_path / "raw/P0/00_dna.tif", pixels(50)[..., 0])
    convert(plan(screen, tmp_path))
    array = zarr.open_array(tmp_path / "archive/P0.zarr/B/1/1/0", mode="r")
    np.testing.assert_array_equal(array[0], pixels(50)[..., 0])


def test_fields_that_were_set_aside_are_not_there_and_come_back(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", tmp_path / "good")
    (tmp_path / "mended").mkdir()
    convert(plan(screen, tmp_path / "mended"))

    spoil(tmp_path / "raw")
    for control in (tmp_path / "raw/P1").glob("06_*.tif"):  # alone in its well
        control.unlink()
    skip = {"on_bad_field": "skip"}
    convert(plan(screen, tmp_path, **skip))
    first = metadata(tmp_path / "archive/P0.zarr")
    assert first["cellhpc"]["missing"] == [["B01", 1], ["B02", 2]]
    assert metadata(tmp_path / "archive/P0.zarr/B/1")["ome"]["well"]["images"] == [{"path": "2"}]
    assert not (tmp_path / "archive/P0.zarr/B/1/1").exists()
    second = metadata(tmp_path / "archive/P1.zarr")
    assert [well["path"] for well in second["ome"]["plate"]["wells"]] == ["B/1", "B/2", "B/3"]
    assert not (tmp_path / "archive/P1.zarr/B/4").exists()
    assert plan(screen, tmp_path, **skip).is_finished

    mend(tmp_path / "raw", tmp_path / "good")
    convert(plan(screen, tmp_path, **skip))
    assert contents(tmp_path / "archive") == contents(tmp_path / "mended/archive")


def test_what_is_archived_outlives_its_pictures(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", tmp_path / "good")
    convert(plan(screen, tmp_path))
    archived, times = contents(tmp_path / "archive"), state(tmp_path / "archive")
    spoil(tmp_path / "raw")
    for settings in (with_archive(tmp_path), with_archive(tmp_path, on_bad_field="skip")):
        other = plan_conversion(settings, screen, (24,), tmp_path / "other")
        with contextlib.suppress(DataError):
            convert(other)
    assert other.is_finished
    assert other.counts()["bad_fields"] == 4
    assert contents(tmp_path / "archive") == archived

    mend(tmp_path / "raw", tmp_path / "good")
    tifffile.imwrite(tmp_path / "raw/P1/02_dna.tif", pixels(50)[..., 0])
    with pytest.raises(UserError, match=r"B/2/1 was archived from files that were changed since. Remove .*/P1.zarr if"):
        convert(plan_conversion(with_archive(tmp_path), screen, (32,), tmp_path / "third"))
    assert contents(tmp_path / "archive") == archived
    assert set(times) >= {path.stat().st_mtime_ns for path in (tmp_path / "archive").rglob("c.0.0.0")}


# What is refused


def test_wells_that_ome_zarr_does_not_have(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    named = dataclasses.replace(screen, fields=screen.fields.assign(well="well 7", field=range(7)))
    with pytest.raises(UsageError, match="plate P0: well 'well 7' is none of A01 to AF48"):
        plan(named, tmp_path)
    plan_conversion(SETTINGS, named, (16,), tmp_path / "store")
    twice = screen.fields.assign(field=range(7))
    twice.loc[0, "well"] = "b1"
    with pytest.raises(UsageError, match=r"plate P0: B01, b1 are one well"):
        plan(dataclasses.replace(screen, fields=twice), tmp_path)


def test_an_archive_of_something_else_is_not_touched(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    convert(plan(screen, tmp_path))
    fewer = dataclasses.replace(screen, fields=screen.fields.drop(index=0))
    for other, settings in ((fewer, with_archive(tmp_path)), (screen, with_archive(tmp_path, archive_codec="lz4"))):
        with pytest.raises(UsageError) as fault:
            plan_conversion(settings, other, (16,), tmp_path / "another")
        assert f"{tmp_path / 'archive'} has P0" in str(fault.value)
        assert "--set convert.archive=FOLDER" in str(fault.value)
    (tmp_path / "theirs/P1.zarr").mkdir(parents=True)
    (tmp_path / "theirs/P1.zarr/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UsageError, match="theirs has P1 from other"):
        plan(screen, tmp_path, archive=tmp_path / "theirs")
    with pytest.raises(UsageError, match="lies in the store"):
        plan(screen, tmp_path, archive=tmp_path / "store/archive")


def test_two_conversions_never_meet_in_an_archive(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    other = plan_conversion(with_archive(tmp_path), screen, (16,), tmp_path / "other")
    with archiving.locked(other), pytest.raises(UsageError, match="converts into this archive"):
        convert(plan(screen, tmp_path))


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = make_screen(tmp_path / "raw")
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    plan_conversion(SETTINGS, screen, (16,), tmp_path / "store")
    with pytest.raises(UsageError, match=r"the archive needs about 253 kB, and its disk has 169 kB free"):
        plan(screen, tmp_path)


def test_an_archive_that_can_not_be_written(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    convert(plan(screen, tmp_path))
    shutil.rmtree(tmp_path / "store")
    shutil.rmtree(tmp_path / "archive/P0.zarr/B/1")
    (tmp_path / "archive/P0.zarr/B/1").write_text("no folder")
    with pytest.raises(UserError, match=r"archive: well B01 field [12] of P0 can't be written: Not a directory"):
        convert(plan(screen, tmp_path))


def test_a_study_may_take_an_archive_later(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study")
    document = {"study": {"name": "s", "folder": study.path}, "screen": {"layout": "bbbc021", "path": tmp_path}}
    study.claim(Job.model_validate(document))
    archive = {"archive": tmp_path / "archive", "archive_codec": "none", "archive_pixel_um": 0.5}
    study.claim(Job.model_validate(document | {"convert": archive}))
