from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from PIL import Image

from cellhpc.convert import convert, plan_conversion, planning, tasks
from cellhpc.convert import execute as convert_module
from cellhpc.correct import TileRecipe, cut_tiles, histograms, plate_statistics
from cellhpc.errors import DataError, UsageError, UserError
from cellhpc.pixels import read_field
from cellhpc.record import finished_plates
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
from cellhpc.tiles import Store
from tests import one_process

SIZE = (64, 80)
CHANNELS = ("dna", "tubulin", "actin")
WORKERS = convert_module._cluster  # the real one, with processes


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests that are not about processes have a cluster that starts at once."""
    monkeypatch.setattr(convert_module, "_cluster", one_process.cluster)


def pixels(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    field = random.poisson(200, (*SIZE, 3))
    for _ in range(12):
        y, x = random.integers(4, 60), random.integers(4, 76)
        field[y - 4 : y + 4, x - 4 : x + 4] += random.integers(500, 3000, 3)
    return field.astype(np.uint16)


def make_screen(root: Path, plates: int = 2, fields: int = 5, dmso: int = 2) -> Screen:
    """Plates of 16-bit TIFFs, one for each channel; `dmso` fields of each plate are controls."""
    rows = []
    for plate in range(plates):
        (root / f"P{plate}").mkdir(parents=True, exist_ok=True)
        for number in range(fields + dmso):
            control = number >= fields
            files = {f"file_{name}": f"P{plate}/{number:02d}_{name}.tif" for name in CHANNELS}
            field = pixels(100 * plate + number)
            for channel, file in enumerate(files.values()):
                tifffile.imwrite(root / file, field[..., channel])
            rows.append(row(f"P{plate}", number, control) | files)
    return Screen(pd.DataFrame(rows), CHANNELS, root)


def row(plate: str, number: int, control: bool = False) -> dict[str, Any]:
    return {
        "plate": plate,
        "batch": "",
        "well": f"B{number // 2 + 1:02d}",
        "field": number % 2 + 1,
        "compound": "DMSO" if control else "taxol",
        "concentration": float("nan") if control else 0.3,
        "unit": "uM",
        "treatment": "DMSO" if control else "taxol 0.3 uM",
        "label": "" if control else "Microtubule stabilizers",
        "replicate": "1",
        "role": "dmso" if control else "treatment",
    }


SETTINGS = ConvertSettings(shard_fields=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What comes out


def test_tiles_are_those_of_the_plain_arithmetic(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    plan = plan_conversion(SETTINGS, screen, (24, 16), tmp_path / "store")
    assert not plan.is_finished
    assert plan.counts() == {}
    convert(plan, workers=2)
    assert plan.is_finished
    assert plan.counts() == {
        "plates": 2, "fields": 10, "bad_fields": 0, "tiles": 40, "kept_tiles": 40, "near_empty_tiles": 0,
        "set_aside": [],
    }  # fmt: skip
    store = Store.open(plan.store)
    assert store.content_digest == plan.content_digest
    for plate in (0, 1):
        statistics = plate_statistics(sum(histograms(pixels(100 * plate + number)) for number in (5, 6)))
        for number in range(5):
            wanted = cut_tiles(pixels(100 * plate + number), TileRecipe((2, 2), (16, 24)), statistics)
            mine = store.tiles.query(
                f"plate == 'P{plate}' and well == 'B0{number // 2 + 1}' and field == {number % 2 + 1}"
            )
            assert list(mine["tile"]) == [0, 1, 2, 3]
            np.testing.assert_array_equal(mine["signal_fraction"], wanted.signal)
            for px in (16, 24):
                np.testing.assert_array_equal(store.read(mine, px), wanted.tiles[px])


def test_one_file_for_each_shard_chunks_of_one_tile_and_a_padded_end(tmp_path: Path) -> None:
    plan = plan_conversion(SETTINGS, make_screen(tmp_path / "raw"), (16,), tmp_path / "store")
    convert(plan)
    array = zarr.open_array(tmp_path / "store/tiles.zarr/P0/tiles_16", mode="r")
    assert array.shape == (20, 16, 16, 3)
    assert array.chunks == (1, 16, 16, 3)
    assert array.shards == (8, 16, 16, 3)
    assert array.attrs["channels"] == list(CHANNELS)
    names = {path.name for path in (tmp_path / "store/tiles.zarr/P0/tiles_16").iterdir()}
    assert names == {"zarr.json", "c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0"}
    written = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(written) == plan.totals()["files"]


def test_the_plan_counts_before_anything_is_written(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    plan = plan_conversion(SETTINGS, screen, (16, 24), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    totals = plan.totals()
    assert (totals["fields"], totals["dmso_fields"], totals["tiles"], totals["tasks"]) == (10, 4, 40, 6)
    assert totals["bytes_in"] == sum(path.stat().st_size for path in (tmp_path / "raw").rglob("*.tif"))
    assert totals["bytes_out"] == 40 * 3 * (16**2 + 24**2)
    assert "10 fields of 2 plates, 64 x 80 uint16, 3 channels (dna, tubulin, actin)" in plan.render()
    assert "4 DMSO fields for the statistics" in plan.render()


def test_fields_carry_quality_figures_and_near_empty_tiles_are_set_aside(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    half = pixels(0)
    half[:32] = 100  # the upper tiles hold nothing
    for channel, name in enumerate(CHANNELS):
        tifffile.imwrite(tmp_path / f"raw/P0/00_{name}.tif", half[..., channel])
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    store = Store.open(tmp_path / "store")
    first = store.fields.iloc[0]
    assert (first["near_empty"], first["bad"]) == (2, "")
    assert (first["low_dna"], first["high_dna"]) == (half[..., 0].min(), half[..., 0].max())
    assert first["mean_actin"] == pytest.approx(half[..., 2].mean())
    controls = store.fields[store.fields["role"] == "dmso"]
    assert controls.iloc[1]["mean_dna"] == pytest.approx(pixels(6)[..., 0].mean())
    assert len(store.tiles) == 18
    every = pd.read_parquet(tmp_path / "store/plates/P0/tiles.parquet")
    assert list(every["kept"][:4]) == [False, False, True, True]
    assert not store.read(every[:2], 16).any()


def test_fields_without_a_label_are_not_converted(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    screen.fields.loc[[0, 3], "role"] = ["unlabelled", "left out"]
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    assert len(Store.open(tmp_path / "store").tiles) == 12


def make_rgb_screen(root: Path, mode: str = "RGB") -> Screen:
    root.mkdir()
    rows = []
    for number in range(3):
        grey = (pixels(number) // 16).astype(np.uint8)
        (Image.fromarray(grey) if mode == "RGB" else Image.fromarray(pixels(number)[..., 0])).save(
            root / f"{number}.png"
        )
        rows.append(row("P0", number) | {f"file_{name}": f"{number}.png" for name in CHANNELS})
    return Screen(pd.DataFrame(rows), CHANNELS, root)


def test_rgb_pictures_as_they_are(tmp_path: Path) -> None:
    screen = make_rgb_screen(tmp_path / "raw")
    settings = ConvertSettings(preprocessing="none", tile_grid=(4, 5))
    convert(plan_conversion(settings, screen, (16,), tmp_path / "store"))
    store = Store.open(tmp_path / "store")
    every = pd.read_parquet(store.folder / "plates/P0/tiles.parquet")
    whole = (pixels(0) // 16).astype(np.uint8)
    tiles = whole.reshape(4, 16, 5, 16, 3).swapaxes(1, 2).reshape(20, 16, 16, 3)
    kept = every["kept"][:20].to_numpy()
    assert 0 < kept.sum() < 20
    np.testing.assert_array_equal(store.read(every[:20], 16), tiles * kept[:, None, None, None])


# Killed, continued, repeated


PROGRAM = """
import sys
from pathlib import Path
import pandas as pd
from cellhpc.convert import convert, plan_conversion
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
if __name__ == "__main__":
    root, store = map(Path, sys.argv[1:])
    fields = pd.read_parquet(root / "fields.parquet")
    screen = Screen(fields, ("dna", "tubulin", "actin"), root)
    convert(plan_conversion(ConvertSettings(shard_fields=1), screen, (16, 24), store), workers=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_continued_is_byte_identical(tmp_path: Path, how: signal.Signals) -> None:
    screen = make_screen(tmp_path / "raw", plates=2, fields=10)
    screen.fields.to_parquet(tmp_path / "raw/fields.parquet")
    settings = ConvertSettings(shard_fields=1)
    convert(plan_conversion(settings, screen, (16, 24), tmp_path / "whole"), workers=2)

    (tmp_path / "program.py").write_text(PROGRAM)
    work = tmp_path / "killed/plates"
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "raw", tmp_path / "killed"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    while len(list(work.glob("P?/000*.json"))) < 3:
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.002)
    workers = children(process.pid)
    assert workers
    process.send_signal(how)
    process.wait(timeout=60)
    wait_until_gone(workers)
    assert not list(work.glob("P?/plate.json"))
    with pytest.raises(UsageError, match=r"its conversion is not finished. Type: cellhpc convert JOB.toml"):
        Store.open(tmp_path / "killed")

    markers = [json.loads(path.read_text()) for path in work.glob("P?/000*.json")]
    finished = [tmp_path / "killed/tiles.zarr" / shard for marker in markers for shard in marker["shards"]]
    assert 0 < len(finished) < 40
    before = {path: path.stat().st_mtime_ns for path in finished}
    torn = tmp_path / "killed/tiles.zarr/P1/tiles_16/c.9.0.0.0"  # as a system without atomic renames could leave it
    if torn not in before:
        torn.write_bytes(b"half a shard")
    convert(plan_conversion(settings, screen, (16, 24), tmp_path / "killed"), workers=2)
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_disk_that_fills_up_ends_it_with_that_reason_and_the_rest_is_byte_identical(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("a small disk is mounted, which only root may do")
    screen = make_screen(tmp_path / "raw", plates=2, fields=10)
    settings = ConvertSettings(shard_fields=1)
    convert(plan_conversion(settings, screen, (16, 24), tmp_path / "whole"), workers=2)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(disk)], check=True)
    try:
        plan = plan_conversion(settings, screen, (16, 24), disk / "store")  # which fits: then others fill the disk
        others = disk / "others"
        free = shutil.disk_usage(disk).free
        others.write_bytes(bytes(free - 200_000))
        with pytest.raises(UserError, match="No space left on device"):
            convert(plan, workers=2)
        done = [path.name for path in (disk / "store/plates").glob("P?/000*.json")]
        assert 0 < len(done) < 20
        assert finished_plates(disk / "store") == []
        others.unlink()
        convert(plan_conversion(settings, screen, (16, 24), disk / "store"), workers=2)
        assert contents(disk / "store") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def children(process: int) -> list[int]:
    """All descendants, as the system lists them."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(tuple(map(int, line.split())) for line in table.splitlines())
    found, fresh = [], [process]
    while fresh:
        fresh = [child for child, parent in parents.items() if parent in fresh]
        found += fresh
    return found


def wait_until_gone(processes: list[int], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if is_running(process)]:
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return not re.search(r"\) [ZX] ", Path(f"/proc/{process}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_worker_processes_end_with_the_conversion_and_with_its_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "_cluster", WORKERS)
    screen = make_screen(tmp_path / "raw", plates=1)
    broken = tmp_path / "raw/P0/01_dna.tif"
    broken.write_bytes(broken.read_bytes()[:1000])
    before = children(os.getpid())
    with pytest.raises(DataError, match=r"01_dna.tif: truncated"):
        convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"), workers=1)
    wait_until_gone([process for process in children(os.getpid()) if process not in before and is_worker(process)])


def test_the_dashboard_can_be_looked_at_on_loopback_and_its_report_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_module, "_cluster", WORKERS)
    screen = make_screen(tmp_path / "raw", plates=1)
    settings = ConvertSettings(shard_fields=2, dashboard=True, performance_report=True)
    pages: list[str] = []

    def look() -> bool:
        told = re.search(r"Dask's dashboard: (\S+)", capsys.readouterr().err)
        if told and not pages:
            assert told[1].startswith("http://127.0.0.1:")
            with urllib.request.urlopen(told[1], timeout=20) as page:  # noqa: S310
                pages.append(page.read().decode())
        return False

    convert(plan_conversion(settings, screen, (16,), tmp_path / "store"), workers=1, stop=look)
    assert "Task Stream" in pages[0]
    report = (tmp_path / "store" / "performance.html").read_text()
    assert "Dask Performance Report" in report
    assert "count_pixels" in report  # each task is in it
    assert "convert_shard" in report
    assert not re.findall(r"<script[^>]+src=|<link[^>]+stylesheet", report)  # nothing is fetched from elsewhere


def is_worker(process: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_finished_store_is_left_alone_even_without_its_raw_pictures(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    convert(plan_conversion(SETTINGS, screen, (16, 24), tmp_path / "store"))
    before = contents(tmp_path / "store")
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    plan = plan_conversion(SETTINGS, screen, (24,), tmp_path / "store")  # fewer sizes than it holds
    assert plan.is_finished
    convert(plan)
    assert "already converted" in plan.render()
    assert contents(tmp_path / "store") == before


def test_two_conversions_never_meet_in_a_store(tmp_path: Path) -> None:
    plan = plan_conversion(SETTINGS, make_screen(tmp_path / "raw"), (16,), tmp_path / "store")
    with convert_module._locked(tmp_path / "store"), pytest.raises(UsageError, match="another process converts"):
        convert(plan)


def test_a_store_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = plan_conversion(SETTINGS, make_screen(tmp_path / "raw"), (16,), tmp_path / "file" / "store")
    with pytest.raises(UserError, match="can't be written: Not a directory"):
        convert(plan)


def test_a_plan_whose_tasks_do_not_own_whole_shards_is_refused(tmp_path: Path) -> None:
    plan = plan_conversion(SETTINGS, make_screen(tmp_path / "raw"), (16,), tmp_path / "store")
    first = plan.tasks[0]
    half = dataclasses.replace(first, fields=first.fields[:1])
    for some in ((half, *plan.tasks[1:]), plan.tasks[1:], (first, *plan.tasks), plan.tasks[:-1]):
        with pytest.raises(ValueError, match=r"does not own exactly|belong to no task"):
            dataclasses.replace(plan, tasks=some)


# Other settings, other folders


def test_a_store_of_other_settings_names_what_differs(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    other = ConvertSettings(shard_fields=2, empty_above=60)
    with pytest.raises(UsageError) as fault:
        plan_conversion(other, screen, (16, 24), tmp_path / "store")
    assert "empty_above: 50 in the store, 60 wanted now" in str(fault.value)
    assert "tile_sizes_px: [16] in the store, [16, 24] wanted now" in str(fault.value)
    assert "--set convert.store=FOLDER" in str(fault.value)


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    with pytest.raises(UsageError, match="is there and is no store of tiles"):
        plan_conversion(SETTINGS, screen, (16,), tmp_path / "raw")


def test_settings_that_do_not_fit_the_pixels(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    with pytest.raises(
        UsageError, match=r"3 rows x 2 columns of tiles do not divide a field of 64 x 80 .* example 2 x 2"
    ):
        plan_conversion(ConvertSettings(tile_grid=(3, 2)), screen, (16,), tmp_path / "store")
    with pytest.raises(DataError, match='"none" takes 8-bit pixels as they are; the fields are uint16'):
        plan_conversion(ConvertSettings(preprocessing="none"), screen, (16,), tmp_path / "store")


def test_nothing_to_convert_and_nothing_that_can_be_read(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    unlabelled = dataclasses.replace(screen, fields=screen.fields.assign(role="unlabelled"))
    with pytest.raises(DataError, match="no labelled field is left to convert"):
        plan_conversion(SETTINGS, unlabelled, (16,), tmp_path / "store")
    with pytest.raises(DataError, match="not one field can be read") as fault:
        plan_conversion(SETTINGS, dataclasses.replace(screen, root=tmp_path), (16,), tmp_path / "store")
    assert "plate P0: P0/00_dna.tif: missing" in fault.value.problems


def test_a_field_without_a_signal_and_one_that_is_still_written_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = make_screen(tmp_path / "raw", plates=1)
    tifffile.imwrite(tmp_path / "raw/P0/00_dna.tif", np.zeros(SIZE, np.uint16))

    def read_while_it_is_written(root: Path, files: tuple[str, ...], expected: Any) -> np.ndarray:
        field = read_field(root, files, expected)
        if files[0] == "P0/03_dna.tif":
            os.utime(root / files[0])
        return field

    monkeypatch.setattr(tasks, "read_field", read_while_it_is_written)
    with pytest.raises(DataError) as fault:
        convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    assert fault.value.problems == (
        "plate P0: well B01 field 1: P0/00_dna.tif: every pixel of a channel is 0",
        "plate P0: well B02 field 2: P0/03_dna.tif: changed while it was read",
    )


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = make_screen(tmp_path / "raw")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage._replace(free=30_000))
    with pytest.raises(UsageError, match=r"the tiles need up to 30.7 kB, and its disk has 30 kB free. Choose another"):
        plan_conversion(SETTINGS, screen, (16,), tmp_path / "store")
    assert not (tmp_path / "store").exists()


# Plates come and go


def test_a_plate_is_added_without_touching_the_others(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw", plates=3)
    two = dataclasses.replace(screen, fields=screen.fields[screen.fields["plate"] != "P1"])
    first = plan_conversion(SETTINGS, two, (16,), tmp_path / "store")
    convert(first)
    before, digest = contents(tmp_path / "store"), first.content_digest
    grown = plan_conversion(SETTINGS, screen, (16,), tmp_path / "store")
    assert [plate.name for plate in grown.unfinished()] == ["P1"]
    convert(grown)
    after = contents(tmp_path / "store")
    assert {name: after[name] for name in before} == before
    assert set(Store.open(tmp_path / "store").tiles["plate"]) == {"P0", "P1", "P2"}
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "at once"))
    assert after == contents(tmp_path / "at once")
    # A study of two plates does not see the third.
    again = plan_conversion(SETTINGS, two, (16,), tmp_path / "store")
    assert again.is_finished
    assert again.content_digest == digest != grown.content_digest
    assert set(Store.open(tmp_path / "store", ["P0", "P2"]).tiles["plate"]) == {"P0", "P2"}


def test_a_plate_of_other_fields_is_refused_and_other_labels_are_written_without_a_pixel(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    plan = plan_conversion(SETTINGS, screen, (16,), tmp_path / "store")
    convert(plan)
    fewer = dataclasses.replace(screen, fields=screen.fields.drop(index=0))
    with pytest.raises(UsageError) as fault:
        plan_conversion(SETTINGS, fewer, (16,), tmp_path / "store")
    assert "has P0 from other fields or files than the screen's tables name now" in str(fault.value)
    assert f"cellhpc remove {tmp_path / 'store'} P0" in str(fault.value)
    before, digest = contents(tmp_path / "store"), plan.content_digest
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    relabelled = dataclasses.replace(screen, fields=screen.fields.assign(label="another"))
    plan = plan_conversion(SETTINGS, relabelled, (16,), tmp_path / "store")
    assert not plan.is_finished
    convert(plan)
    assert set(Store.open(tmp_path / "store").tiles["label"]) == {"another"}
    assert plan.content_digest != digest
    after = contents(tmp_path / "store")
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {f"plates/P{plate}/{name}" for plate in (0, 1) for name in
                       ("fields.parquet", "tiles.parquet", "plate.json")}  # fmt: skip


# Bad fields


def spoil(root: Path) -> None:
    """Four fields of two plates, each in its own way."""
    whole = (root / "P0/00_tubulin.tif").read_bytes()
    (root / "P0/00_tubulin.tif").write_bytes(whole[: len(whole) // 2])
    tifffile.imwrite(root / "P0/03_actin.tif", np.zeros((64, 81), np.uint16))
    tifffile.imwrite(root / "P1/01_dna.tif", np.zeros(SIZE, np.uint8))
    (root / "P1/04_dna.tif").unlink()


def mend(root: Path, good: Path) -> None:
    """Put back what was there before."""
    shutil.rmtree(root)
    shutil.copytree(good, root)  # with the times of the files


SPOILT = (
    r"plate P0: well B01 field 1: P0/00_tubulin.tif: truncated",
    r"plate P0: well B02 field 2: P0/03_actin.tif: has 64 x 81 pixels, the other fields have 64 x 80",
    r"plate P1: well B01 field 2: P1/01_dna.tif: is uint8, the other fields are uint16",
    r"plate P1: well B03 field 1: P1/04_dna.tif: missing",
)


def test_fail_lists_every_bad_field_of_every_plate(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", tmp_path / "good")
    spoil(tmp_path / "raw")
    with pytest.raises(DataError) as fault:
        convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    assert len(fault.value.problems) == 4
    for found, wanted in zip(fault.value.problems, SPOILT, strict=True):
        assert found.startswith(wanted)
    assert 'set convert.on_bad_field = "skip"' in str(fault.value)
    assert not list((tmp_path / "store/plates").glob("*/plate.json"))

    mend(tmp_path / "raw", tmp_path / "good")  # what is missing is done, and nothing tells of the detour
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "whole"))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_skip_sets_bad_fields_aside_and_counts_them(tmp_path: Path) -> None:
    screen = make_screen(tmp_path / "raw")
    spoil(tmp_path / "raw")
    skip = ConvertSettings(shard_fields=2, on_bad_field="skip")
    plan = plan_conversion(skip, screen, (16,), tmp_path / "store")
    convert(plan)
    counts = plan.counts()
    assert counts["bad_fields"] == 4
    assert [bad["plate"] + bad["well"] for bad in counts["set_aside"]] == ["P0B01", "P0B02", "P1B01", "P1B03"]
    assert "truncated" in counts["set_aside"][0]["reason"]
    store = Store.open(tmp_path / "store")
    assert len(store.tiles) == 24
    every = pd.concat([pd.read_parquet(store.folder / f"plates/P{plate}/tiles.parquet") for plate in (0, 1)])
    assert len(every) == 40  # bad fields keep their place
    assert not every.loc[every["signal_fraction"].isna(), "kept"].any()
    assert (store.fields["bad"] != "").sum() == 4
    assert plan_conversion(skip, screen, (16,), store.folder).is_finished
    assert not plan_conversion(SETTINGS, screen, (16,), store.folder).is_finished  # here bad fields are not allowed

    make_screen(tmp_path / "raw")  # mended: the next call takes them in
    plan = plan_conversion(skip, screen, (16,), store.folder)
    convert(plan)
    assert plan.counts()["kept_tiles"] == 40


def make_screen_with_a_bad_control(folder: Path) -> Screen:
    """Make a plate whose raw folder has a DMSO field that can't be read, and beside it a `good` copy."""
    screen = make_screen(folder / "raw", plates=1)
    shutil.copytree(folder / "raw", folder / "good")
    control = folder / "raw/P0/06_dna.tif"
    control.write_bytes(control.read_bytes()[:500])
    return screen


def test_a_bad_dmso_field_is_refused_or_skipped_and_its_return_redoes_the_plate(tmp_path: Path) -> None:
    screen = make_screen_with_a_bad_control(tmp_path)
    with pytest.raises(DataError, match=r"plate P0: well B04 field 1: P0/06_dna.tif: truncated") as fault:
        convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"))
    assert len(fault.value.problems) == 1
    skip = ConvertSettings(shard_fields=2, on_bad_field="skip")
    convert(plan_conversion(skip, screen, (16,), tmp_path / "store"))
    without = contents(tmp_path / "store")["tiles.zarr/P0/tiles_16/c.0.0.0.0"]
    mend(tmp_path / "raw", tmp_path / "good")
    convert(plan_conversion(skip, screen, (16,), tmp_path / "store"))
    convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "whole"))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert without != contents(tmp_path / "whole")["tiles.zarr/P0/tiles_16/c.0.0.0.0"]


@pytest.mark.parametrize("on_bad_field", ["fail", "skip"])
def test_plates_that_can_not_be_normalised(tmp_path: Path, on_bad_field: Any) -> None:
    settings = ConvertSettings(on_bad_field=on_bad_field)
    screen = make_screen(tmp_path / "raw")
    bare = screen.fields[(screen.fields["plate"] != "P1") | (screen.fields["role"] != "dmso")]
    with pytest.raises(DataError) as fault:
        plan_conversion(settings, dataclasses.replace(screen, fields=bare), (16,), tmp_path / "store")
    assert fault.value.problems == ("plate P1: no DMSO field",)
    assert 'Set convert.statistics = "plate"' in str(fault.value)

    for file in (tmp_path / "raw/P0").glob("0[56]_actin.tif"):
        tifffile.imwrite(file, np.full(SIZE, 7, np.uint16))
    for file in (tmp_path / "raw/P1").glob("0[56]_dna.tif"):
        file.unlink()
    with pytest.raises(DataError) as fault:
        convert(plan_conversion(settings, screen, (16,), tmp_path / "store"))
    assert "plate P0: channel actin is the same everywhere in its DMSO fields" in str(fault.value)
    assert "plate P1: not one DMSO field can be read" in str(fault.value)


# Real pictures


def test_real_pictures(cellhpc_data: Path, tmp_path: Path) -> None:
    root = cellhpc_data / "bbbc021_subset"
    rows = [
        row("Week4_27542", number) | {f"file_{name}": f"images/bbbc021v1_{number}.png" for name in CHANNELS}
        for number in range(4)
    ]
    settings = ConvertSettings(preprocessing="none", tile_grid=(2, 2))
    plan = plan_conversion(settings, Screen(pd.DataFrame(rows), CHANNELS, root), (128, 96), tmp_path / "store")
    convert(plan)
    store = Store.open(tmp_path / "store")
    whole = np.asarray(Image.open(root / "images/bbbc021v1_2.png"))
    mine = store.tiles.query("well == 'B02' and field == 1")
    assert len(mine) == 4
    np.testing.assert_array_equal(store.read(mine, 128)[3], whole[128:, 128:])
    assert store.read(mine, 96).shape == (4, 96, 96, 3)
