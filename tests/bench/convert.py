"""Conversion of full-size synthetic plates, against what one could write instead.

One table, in MB/s of raw pixels (the files' bytes, each field counted once; the conversion reads DMSO fields twice):

- floor: reading and decoding the files alone, in two processes
- loop: the same arithmetic by hand over two processes, quality figures and codec too, no framework and no store
- cellhpc: this conversion, from the command's plan to the finished store
- dask: the transform of the paper with dask.array and `to_zarr`, as a user would write it first; of 84 fields

Then what the archive costs beside, in MB/s of the pixels that it holds:

- codec: compression of the fields from memory alone, in two processes
- disk: writing as many bytes as the archive has, past the page cache, in two processes, a file for each field
- added: the archive in the same pass, from the seconds that it adds to the conversion
- alone: the archive of a store that is there, reading every file again
- ome-zarr-py: the same fields written by OME's own library in two processes, as its documentation does, no pyramid;
  of 84 fields

And Zarr's own sharded write with and without the `zarrs` codec pipeline. ``--archive`` asks for what the archive costs
alone, ``--plates 1,4,16`` how time and the scheduler's memory grow. ``--fields N`` treatment fields a plate, with 24 of
DMSO: 300, or 60 with --plates.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

if __name__ != "__mp_main__":  # as which Dask's workers read this file again: they need none of it
    import cv2
    import numpy as np
    import pandas as pd
    import psutil
    import tifffile
    import zarr
    import zarr.codecs
    from numcodecs import Blosc

    from cellhpc.convert import ConversionPlan, convert, plan_conversion
    from cellhpc.correct import TileRecipe, anscombe, cut_tiles, histograms, plate_statistics
    from cellhpc.pixels import read_field
    from cellhpc.quality import measure
    from cellhpc.screens import Screen
    from cellhpc.settings import ConvertSettings

    CODEC = Blosc("zstd", 1, Blosc.BITSHUFFLE)  # what tiles and archive have, without Zarr

SIZE = (1024, 1280)
CHANNELS = ("dna", "tubulin", "actin")
DMSO_FIELDS = 24
TILE_PX = 224
WORKERS = 2
PLATES, COPIED = 12, 1
REPEATS = 3


def make_plates(root: Path, plates: int, fields: int, copied: int = 1000) -> Screen:
    """Write plates of 16-bit TIFFs: a few noisy pictures of cells, each under many names.

    So many plates are `copied`; the others are hard links to their files: the page cache must hold what is read, or the
    disk is measured.
    """
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(4):
        cells = np.zeros((3, *SIZE), np.float32)
        for y, x in zip(random.integers(40, SIZE[0] - 40, 250), random.integers(40, SIZE[1] - 40, 250), strict=True):
            cells[:, y - 12 : y + 12, x - 12 : x + 12] += random.uniform(200, 3000, (3, 1, 1)).astype(np.float32)
        smooth = np.stack([cv2.GaussianBlur(plane, (0, 0), 4) for plane in cells])
        pictures.append(random.poisson(smooth + 120).astype(np.uint16))
    for number, picture in enumerate(pictures):
        for channel, name in enumerate(CHANNELS):
            tifffile.imwrite(root / f"{number}_{name}.tif", picture[channel])
    rows = []
    for plate in range(plates):
        folder = root / f"P{plate:02d}"
        folder.mkdir()
        for number in range(fields + DMSO_FIELDS):
            names = {f"file_{name}": f"{folder.name}/{number:03d}_{name}.tif" for name in CHANNELS}
            for name in CHANNELS:
                file = folder / f"{number:03d}_{name}.tif"
                if plate < copied:
                    file.write_bytes((root / f"{number % 4}_{name}.tif").read_bytes())
                else:
                    file.hardlink_to(root / f"P{plate % copied:02d}" / file.name)
            control = number >= fields
            rows.append(
                {
                    "plate": folder.name, "batch": "", "well": f"{'ABCDEFGH'[number // 48]}{number // 4 % 12 + 1:02d}",
                    "field": number % 4 + 1, "compound": "DMSO" if control else "c", "concentration": 1.0, "unit": "uM",
                    "treatment": "DMSO" if control else "c 1 uM", "label": "" if control else "m", "replicate": "1",
                    "role": "dmso" if control else "treatment", **names,
                }
            )  # fmt: skip
    return Screen(pd.DataFrame(rows), CHANNELS, root)


def plan_of(screen: Screen, store: Path, archive: Path | None = None) -> ConversionPlan:
    return plan_conversion(ConvertSettings(archive=archive), screen, (TILE_PX,), store)


# ---- the floor and the hand-written loop; each process takes every other field


def read_all(plan: ConversionPlan, rank: int) -> None:
    sources = [source for task in plan.tasks for source in task.fields] + [s for p in plan.plates for s in p.reference]
    for source in sources[rank::WORKERS]:
        read_field(plan.root, source.files, plan.format)


def loop_dmso(plan: ConversionPlan, rank: int) -> dict[str, np.ndarray]:
    counts = {}
    for plate in plan.plates:
        counts[plate.name] = np.zeros((len(CHANNELS), 65536), np.int64)
        for source in plate.reference[rank::WORKERS]:
            pixels = read_field(plan.root, source.files, plan.format)
            measure(pixels)
            counts[plate.name] += histograms(pixels)
    return counts


def loop_tiles(plan: ConversionPlan, counts: dict[str, np.ndarray], folder: Path, rank: int) -> None:
    """Tiles of every other task, compressed tile by tile into one file for each task."""
    cv2.setNumThreads(1)
    recipe = TileRecipe((2, 2), (TILE_PX,))
    statistics = {name: plate_statistics(one) for name, one in counts.items()}
    for task in plan.tasks[rank::WORKERS]:
        with (folder / task.id).open("wb") as file:
            for source in task.fields:
                pixels = read_field(plan.root, source.files, plan.format)
                measure(pixels)
                cut = cut_tiles(pixels, recipe, statistics[task.plate])
                for tile in cut.tiles[TILE_PX]:
                    file.write(CODEC.encode(np.ascontiguousarray(tile)))


def in_two(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    with concurrent.futures.ProcessPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, *[[argument] * WORKERS for argument in arguments], range(WORKERS)))


def loop(plan: ConversionPlan, folder: Path) -> None:
    folder.mkdir()
    parts = in_two(loop_dmso, plan)
    in_two(loop_tiles, plan, {name: sum(part[name] for part in parts) for name in parts[0]}, folder)


# ---- what a user would write first


def obvious_dask(plan: ConversionPlan, store: Path) -> None:
    """The paper's steps in dask.array: full-resolution floats, one chunk a field, tiles by a resize of each."""
    import dask
    import dask.array as da

    def load(files: Sequence[str]) -> da.Array:
        lazy = dask.delayed(lambda: np.stack([tifffile.imread(plan.root / name) for name in files], -1))()
        return da.from_delayed(lazy, (*SIZE, 3), np.uint16)[None]

    def cut(block: np.ndarray) -> np.ndarray:
        grey = (block[0] - block.min()) / (block.max() - block.min()) * 255
        tiles = [grey[y : y + 512, x : x + 640] for y in (0, 512) for x in (0, 640)]
        return np.stack([cv2.resize(tile, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA) for tile in tiles]).astype(
            np.uint8
        )[None]

    for plate in plan.plates:
        dmso = anscombe_dask(da.concatenate([load(source.files) for source in plate.reference]))
        mean, std = dask.compute(dmso.mean((0, 1, 2)), dmso.std((0, 1, 2)), scheduler="processes", num_workers=WORKERS)
        mine = [source for task in plan.tasks if task.plate == plate.name for source in task.fields]
        fields = (anscombe_dask(da.concatenate([load(source.files) for source in mine])) - mean) / std
        tiles = fields.map_blocks(cut, dtype=np.uint8, chunks=((1,) * len(mine), 4, TILE_PX, TILE_PX, 3), new_axis=4)
        with dask.config.set(scheduler="processes", num_workers=WORKERS):
            tiles.to_zarr(str(store / plate.name))


def anscombe_dask(fields: Any) -> Any:
    return fields.map_blocks(anscombe, dtype=np.float64)


# ---- the archive


def compress_all(plan: ConversionPlan, pictures: list[np.ndarray], rank: int) -> None:
    """Compress as many fields as there are with the archive's codec, and keep nothing."""
    sources = [source for plate in plan.plates for source in plate.sources]
    for number, _ in enumerate(sources[rank::WORKERS]):
        for plane in pictures[number % len(pictures)]:
            CODEC.encode(np.ascontiguousarray(plane))


def write_files(folder: Path, count: int, field_bytes: int, rank: int) -> None:
    """Write a file for each field, in whole pages, until it is on the disk."""
    pages = mmap.mmap(-1, -(-field_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    for number in range(rank, count, WORKERS):
        file = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        os.write(file, pages)
        os.fsync(file)
        os.close(file)


def ome_zarr_all(plan: ConversionPlan, folder: Path, rank: int) -> None:
    """Write plates as ome-zarr-py's documentation does: a group a well, an image a field."""
    from ome_zarr.writer import write_image, write_plate_metadata, write_well_metadata

    for plate in plan.plates:
        root = zarr.open_group(folder / f"{plate.name}-{rank}.zarr", mode="w", zarr_format=3)
        sources = plate.sources[rank::WORKERS]
        wells: dict[str, list[Any]] = {}
        for source in sources:
            wells.setdefault(source.well, []).append(source)
        paths = {well: f"{well[0]}/{int(well[1:])}" for well in wells}
        rows, columns = sorted({well[0] for well in wells}), sorted({str(int(well[1:])) for well in wells})
        write_plate_metadata(root, rows, columns, list(paths.values()))
        for well, fields in wells.items():
            group = root.require_group(paths[well])
            write_well_metadata(group, [str(source.field) for source in fields])
            for source in fields:
                image = group.require_group(str(source.field))
                pixels = np.moveaxis(read_field(plan.root, source.files, plan.format), -1, 0)
                write_image(pixels, image, axes="cyx", scaler=None)


def compare_archive(top: Path, screen: Screen, few: ConversionPlan) -> dict[str, Any]:
    """What the archive costs, of the first two plates."""
    screen = Screen(screen.fields[screen.fields["plate"] < "P02"], CHANNELS, screen.root)
    plan = plan_of(screen, top / "store-1")
    pictures = [np.moveaxis(read_field(plan.root, source.files, plan.format), -1, 0) for source in plan.tasks[0].fields]
    fields = sum(len(plate.sources) for plate in plan.plates)
    archived_mb = fields * pictures[0].nbytes / 1e6
    seconds = {"codec": timed(lambda: in_two(compress_all, plan, pictures[:4]))}
    with_it = plan_of(screen, top / "store-2", archive=top / "archive")
    without_s, with_s = [], []
    with Memory() as memory:
        for _ in range(REPEATS):  # in turn, as the difference of two times is small beside how they vary
            for one, spent in ((plan, without_s), (with_it, with_s)):
                shutil.rmtree(one.store, ignore_errors=True)
                shutil.rmtree(top / "archive", ignore_errors=True)
                spent.append(timed(lambda one=one: convert(one, workers=WORKERS)))  # type: ignore[misc]
    seconds["added"] = statistics.median(with_s) - statistics.median(without_s)
    shutil.rmtree(top / "archive")
    seconds["alone"] = timed(lambda: convert(plan_of(screen, top / "store-2", archive=top / "archive"), WORKERS))
    on_disk_mb = sum(path.stat().st_size for path in (top / "archive").rglob("*") if path.is_file()) / 1e6
    shutil.rmtree(top / "archive")
    (top / "disk").mkdir()
    seconds["disk"] = timed(lambda: in_two(write_files, top / "disk", fields, int(1e6 * on_disk_mb / fields)))
    shutil.rmtree(top / "disk")
    share = sum(len(plate.sources) for plate in few.plates) / fields
    seconds["ome-zarr-py"] = timed(lambda: in_two(ome_zarr_all, few, top / "ome-zarr-py")) / share
    print(f"archive of {fields} fields, {archived_mb:,.0f} MB of pixels in {on_disk_mb:,.0f} MB on the disk")
    print(f"{'':12} {'seconds':>8} {'MB/s':>7} {'of the codec':>13}")
    for name, spent in seconds.items():
        print(f"{name:12} {spent:8.1f} {archived_mb / spent:7,.0f} {seconds['codec'] / spent:12.0%}")
    print(f"a worker held {memory.worker_mb:,.0f} MB at most; the plan said {with_it.worker_bytes / 1e6:,.0f} MB")
    print(
        f"  added: from {REPEATS} conversions with it ({seconds_text(with_s)}) and without ({seconds_text(without_s)})"
    )
    return {"seconds": seconds, "of_the_codec": seconds["codec"] / seconds["added"], "worker_mb": memory.worker_mb}


# ---- Zarr's own writing


def zarr_write(folder: Path, pipeline: str | None) -> float:
    """MB/s of uint8 tiles into shards of 64, with this codec pipeline."""
    settings: dict[str, Any] = {"threading.max_workers": 1, "array.write_empty_chunks": True}
    if pipeline:
        settings["codec_pipeline.path"] = pipeline
    tiles = np.random.default_rng(0).poisson(60, (512, TILE_PX, TILE_PX, 3)).astype(np.uint8)
    with zarr.config.set(settings):
        array = zarr.create_array(
            folder, shape=tiles.shape, chunks=(1, *tiles.shape[1:]), shards=(64, *tiles.shape[1:]), dtype="uint8",
            compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
        )  # fmt: skip
        began = time.perf_counter()
        for first in range(0, len(tiles), 64):
            array[first : first + 64] = tiles[first : first + 64]
        return tiles.nbytes / 1e6 / (time.perf_counter() - began)


# ---- measuring


class Memory:
    """Peak resident memory of this process's children, by what they are for, while the block runs."""

    def __init__(self) -> None:
        self.worker_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        """Look seldom, as it costs time of what is measured: the system knows the peak of each process."""
        me = psutil.Process()
        while not self._stop.wait(1.0):
            for child in me.children(recursive=True):
                with contextlib.suppress(OSError, IndexError, psutil.Error):  # it may have ended
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
                    self.worker_mb = max(self.worker_mb, peak_kb * 1024 / 1e6)


def seconds_text(many: list[float]) -> str:
    return ", ".join(f"{one:.1f}" for one in many) + " s"


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(top: Path, fields: int) -> dict[str, Any]:
    screen = make_plates(top / "raw", PLATES, fields, COPIED)
    plan = plan_of(screen, top / "store")
    few = plan_of(make_plates(top / "few", 1, 60), top / "few-store")
    raw_mb = plan.totals()["bytes_in"] / 1e6
    share = few.totals()["bytes_in"] / 1e6 / raw_mb
    in_two(read_all, plan)  # the page cache is warm for all
    floor_s = timed(lambda: in_two(read_all, plan))
    loop_s, ours_s = [], []
    for turn in range(REPEATS):
        loop_s.append(timed(lambda turn=turn: loop(plan, top / f"loop-{turn}")))  # type: ignore[misc]
        shutil.rmtree(top / f"loop-{turn}")
        shutil.rmtree(plan.store, ignore_errors=True)
        with Memory() as memory:
            ours_s.append(timed(lambda: convert(plan, workers=WORKERS)))
    seconds = {"floor": floor_s, "loop": statistics.median(loop_s), "cellhpc": statistics.median(ours_s)}
    seconds["dask"] = timed(lambda: obvious_dask(few, top / "dask")) / share
    print(f"{len(screen.fields)} fields of {SIZE[0]} x {SIZE[1]} x 3, {raw_mb:,.0f} MB read, {WORKERS} processes")
    print(f"{'':10} {'seconds':>8} {'MB/s':>7} {'of the loop':>12}")
    for name, spent in seconds.items():
        print(f"{name:10} {spent:8.1f} {raw_mb / spent:7,.0f} {seconds['loop'] / spent:11.0%}")
    print(f"  medians: loop {seconds_text(loop_s)}, cellhpc {seconds_text(ours_s)}, in turn")
    print(f"a worker held {memory.worker_mb:,.0f} MB at most; the plan said {plan.worker_bytes / 1e6:,.0f} MB")
    archive = compare_archive(top, screen, few)
    import zarrs  # noqa: F401 - registers its pipeline

    writes = {
        "zarr": zarr_write(top / "zarr", None),
        "zarrs": zarr_write(top / "zarrs", "zarrs.ZarrsCodecPipeline"),
    }
    for name, speed in writes.items():
        print(f"sharded write by {name}: {speed:,.0f} MB/s of tiles")
    return {"raw_mb": raw_mb, "seconds": seconds, "mb_per_s": {name: raw_mb / spent for name, spent in seconds.items()},
            "of_the_loop": seconds["loop"] / seconds["cellhpc"], "times_dask": seconds["dask"] / seconds["cellhpc"],
            "worker_mb": memory.worker_mb, "archive": archive, "sharded_write_mb_per_s": writes}  # fmt: skip


def grow(top: Path, plates: list[int], fields: int) -> dict[str, Any]:
    """Convert more and more plates, each time in a process of its own, whose peak is the scheduler's."""
    rows = []
    print(f"{'plates':>7} {'seconds':>8} {'s a plate':>10} {'scheduler MB':>13}")
    for count in plates:
        raw = top / f"raw-{count}"
        make_plates(raw, count, fields).fields.to_parquet(raw / "fields.parquet")
        words = [sys.executable, __file__, "--convert", str(raw)]
        told = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        rows.append({"plates": count, **told})
        print(
            f"{count:7} {told['seconds']:8.1f} {told['seconds'] / count:10.2f} {told['scheduler_mb']:13,.0f}",
            flush=True,
        )
    return {"plates": rows}


def convert_here(raw: Path) -> None:
    """Convert in this process's name and tell its own peak."""
    screen = Screen(pd.read_parquet(raw / "fields.parquet"), CHANNELS, raw)
    plan = plan_of(screen, raw / "store")
    spent = timed(lambda: convert(plan, workers=WORKERS))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": spent, "scheduler_mb": peak_mb}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plates", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--fields", type=int)
    parser.add_argument("--archive", action="store_true")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        convert_here(given.convert)
        return
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        if given.plates:
            found = grow(top, given.plates, given.fields or 60)
        elif given.archive:
            screen = make_plates(top / "raw", 2, given.fields or 300, COPIED)
            few = plan_of(make_plates(top / "few", 1, 60), top / "few-store")
            found = {"archive": compare_archive(top, screen, few)}
        else:
            found = compare(top, given.fields or 300)
    print(json.dumps({"bench": "convert", "cores": os.cpu_count(), **found}))


if __name__ == "__main__":
    main()
