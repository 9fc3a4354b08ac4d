"""The input alone, in tiles of 224 pixels a second: what a network gets that takes no time for itself.

From memory, against copying the same bytes; in shuffled windows from shards, in the page cache and cold, against a bare
loop of two threads that decodes the same shards, and against Zarr's own reading of whole shards. Then how long a
network waits that is half as fast as the loop, and what a process holds while it reads stores of several sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pandas as pd
import zarr
from numcodecs import blosc

from cellhpc.codecs import CODECS
from cellhpc.feed import Pixels, feed, shuffle
from cellhpc.shards import Shards

TILE, SHARD, BATCH, WINDOW = (224, 224, 3), 64, 32, 512
REPEATS, THREADS = 3, 2
TILES, GROWING = 4096, (2560, 5120, 10240)


def make_store(folder: Path, tiles: int, few: np.ndarray) -> Shards:
    """Write a plate of these few tiles, again and again; shards that are there already stay."""
    array = folder / "A" / f"tiles_{TILE[0]}"
    shape, chunk, shards = (tiles, *TILE), (1, *TILE), (SHARD, *TILE)
    if array.exists():
        made = zarr.open_array(array, mode="r+")
    else:
        made = zarr.create_array(
            array, shape=shape, chunks=chunk, shards=shards, dtype="uint8", compressors=CODECS["zstd"],
            chunk_key_encoding={"name": "default", "separator": "."},
        )  # fmt: skip
    made.resize(shape)
    for first in range(0, tiles, SHARD):
        if not (array / f"c.{first // SHARD}.0.0.0").exists():
            made[first : first + SHARD] = np.roll(few, first // SHARD, axis=0)
    os.sync()
    return open_store(folder, tiles)


def open_store(folder: Path, tiles: int) -> Shards:
    return Shards(folder, pd.DataFrame({"plate": "A", "row": np.arange(tiles)}), TILE)


def forget(shards: Shards) -> None:
    """Have the kernel drop the shards from its page cache."""
    for number in range(shards.count):
        with shards.path(number).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bare_loop(shards: Shards, out: np.ndarray) -> None:
    """Two threads read a shard after the other and decode its tiles, in their order."""

    def decode(number: int) -> None:
        raw = memoryview(shards.path(number).read_bytes())
        index = np.frombuffer(raw[-(16 * SHARD + 4) : -4], "<u8").reshape(-1, 2)
        for place, (offset, size) in enumerate(index.tolist(), number * SHARD):
            blosc.decompress(raw[offset : offset + size], out[place])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(decode, range(shards.count)))


def by_zarr(shards: Shards, out: np.ndarray) -> None:
    array = zarr.open_array(shards.path(0).parent, mode="r")
    for first in range(0, len(out), SHARD):
        out[first : first + SHARD] = array[first : first + SHARD]


def epoch(pixels: Pixels, window: int = WINDOW, step_seconds: float = 0.0) -> float:
    """Take every batch of an epoch; returns the share of its time that was spent waiting."""
    began, waited = time.perf_counter(), 0.0
    together = window // BATCH if isinstance(pixels, Shards) else 1
    order = shuffle(pixels, np.arange(pixels.shape[0]), [0, 1], BATCH, together)
    with feed(pixels, list(order.reshape(-1, BATCH)), together) as fetched:
        asked = time.perf_counter()
        for _ in fetched:
            waited += time.perf_counter() - asked
            time.sleep(step_seconds)
            asked = time.perf_counter()
    return waited / (time.perf_counter() - began)


def timed(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds, the best of some."""
    seconds = []
    for _ in range(REPEATS):
        before()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def beside(work: Callable[[], object]) -> float:
    """Speed of a plain Python loop while another thread works, of its speed alone: near a half if that held the GIL."""

    def loop(seconds: float = 1.0) -> int:
        until, turns = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            turns += 1
        return turns

    over = threading.Event()

    def again() -> None:
        while not over.is_set():
            work()

    alone = loop()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(again)
        share = loop() / alone
        over.set()
        working.result()
    return share


def compare(shards: Shards) -> dict[str, Any]:
    tiles = shards.shape[0]
    held, batch = np.empty(shards.shape, np.uint8), np.empty((BATCH, *TILE), np.uint8)

    def copy() -> None:
        for first in range(0, tiles, BATCH):
            np.copyto(batch, held[first : first + BATCH])

    bare_loop(shards, held)
    read = np.empty((BATCH, *TILE), np.uint8)
    shards.decode(np.arange(100, 100 + BATCH), read)
    assert (read == held[100 : 100 + BATCH]).all()
    seconds = {
        "copying": timed(copy),
        "memory": timed(lambda: epoch(held)),
        "loop": timed(lambda: bare_loop(shards, held)),
        "shards": timed(lambda: epoch(shards)),
        "zarr": timed(lambda: by_zarr(shards, held)),
        "loop, cold": timed(lambda: bare_loop(shards, held), lambda: forget(shards)),
        "shards, cold": timed(lambda: epoch(shards), lambda: forget(shards)),
    }
    speeds = {name: tiles / spent for name, spent in seconds.items()}
    print(f"{tiles:,} tiles of {' x '.join(map(str, TILE))}, windows of {WINDOW}")
    print(f"{'':14} {'tiles/s':>9} {'MB/s':>8}")
    for name, speed in speeds.items():
        print(f"{name:14} {speed:9,.0f} {speed * np.prod(TILE) / 1e6:8,.0f}")
    of_the_loop = {"shards": speeds["shards"] / speeds["loop"], "cold": speeds["shards, cold"] / speeds["loop, cold"]}
    print(f"of the loop: shards {of_the_loop['shards']:.0%}, cold {of_the_loop['cold']:.0%}")
    batch_of_one = np.empty((1, *TILE), np.uint8)
    free = beside(lambda: [shards.decode(np.array([tile]), batch_of_one) for tile in range(tiles)])
    print(f"a Python loop runs at {free:.0%} of its speed beside one thread that decodes")
    waiting = {}
    for name, pixels in (("memory", held), ("shards", shards)):
        waiting[name] = epoch(pixels, step_seconds=2 * BATCH / speeds["loop"])
        print(f"a network half as fast as the loop waits {waiting[name]:.1%} of its time: {name}")
    return {"tiles_per_s": speeds, "of_the_loop": of_the_loop, "python_beside": free, "waiting": waiting}


def peak_mb() -> float:
    """Peak of this process alone; getrusage counts also what the one held that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1e3


def grow(folder: Path, few: np.ndarray) -> dict[str, Any]:
    """Read larger and larger stores in a window of a tenth of the middle one, each in a process of its own."""
    window = GROWING[1] // 10 // BATCH * BATCH
    rows = []
    print(f"{'tiles':>7} {'MB':>7} {'of a window':>12} {'peak MB':>8} {'for tiles':>10}")
    bare = None
    for tiles in (BATCH, *GROWING):
        make_store(folder, max(tiles, GROWING[0]), few)
        words = [sys.executable, __file__, "--stream", str(folder), str(tiles), str(min(window, tiles))]
        peak = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["peak_mb"]
        bare = peak if bare is None else bare
        size_mb = tiles * float(np.prod(TILE)) / 1e6
        rows.append({"tiles": tiles, "mb": size_mb, "peak_mb": peak, "for_tiles_mb": peak - bare})
        print(f"{tiles:7,} {size_mb:7,.0f} {tiles / min(window, tiles):12.1f} {peak:8,.0f} {peak - bare:10,.0f}")
    print(f"two windows of {window} tiles: {2 * window * float(np.prod(TILE)) / 1e6:,.0f} MB")
    return {"window_tiles": window, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=TILES)
    parser.add_argument("--stream", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stream:
        folder, tiles, window = Path(given.stream[0]), int(given.stream[1]), int(given.stream[2])
        epoch(open_store(folder, tiles), window)
        print(json.dumps({"peak_mb": peak_mb()}))
        return
    from tests.bench.codec import make_tiles

    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        few = make_tiles(top / "raw")
        found = compare(make_store(top / "store", given.tiles, few))
        found["memory"] = grow(top / "store", few)
    print(json.dumps({"bench": "feed", "cores": os.cpu_count(), **found}))


if __name__ == "__main__":
    main()
