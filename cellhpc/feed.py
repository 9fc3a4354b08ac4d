"""Batches of tiles for a network: in which order, and fetched while it is busy with those before.

Tiles in memory (`train.window_tiles` not set) come in an order that is drawn over all of them, a batch at a time.

Tiles that stay in their shards come in shuffled windows: the shards are put into a random order, their tiles one
behind the other are cut into windows of so many tiles, and each window is shuffled. Each window is read and decoded
whole, straight into the places that its batches have, while the network works on the window before: a rank holds two
windows of its own share of the batches, however large the store is.

Either order is a function of the run's seed and the epoch, the same on all ranks, each of which takes its share of
every batch: a continuation draws it again and skips what is done, without decoding it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cellhpc.shards import Shards

Pixels = np.ndarray | Shards
"""Tiles uint8 (n, y, x, channel): in memory, or in their shards."""


def whole_batches(window_tiles: int | None, batch_size: int) -> int:
    """Batches of a window, at least one; tiles in memory come batch by batch."""
    return max(1, (window_tiles or 0) // batch_size)


def shuffle(pixels: Pixels, rows: np.ndarray, seed: Sequence[int], window: int) -> np.ndarray:
    """Draw the order of an epoch: the numbers of tiles `rows` (n,), in windows of `window` tiles if in shards."""
    random = np.random.default_rng(seed)
    if not isinstance(pixels, Shards):
        return random.permutation(rows)
    _, shard = np.unique(pixels.shard[rows], return_inverse=True)
    place = random.permutation(shard.max(initial=0) + 1)
    order = rows[np.argsort(place[shard], kind="stable")]
    for start in range(0, len(order), window):
        random.shuffle(order[start : start + window])
    return order


@contextlib.contextmanager
def feed(
    pixels: Pixels, batches: Sequence[np.ndarray], together: int = 1, start: int = 0
) -> Iterator[Iterator[np.ndarray]]:
    """Fetch batches ahead, for as long as the context lasts.

    Parameters
    ----------
    pixels
        The tiles.
    batches
        Numbers of the tiles of each batch (m,).
    together
        Batches that are fetched at once: those of a window.
    start
        The batch to begin with, of all.

    Yields
    ------
    iterator
        The pixels of each batch, uint8 (m, y, x, channel); they hold until the next one is asked for. What goes wrong
        while one is fetched is raised where it is asked for.
    """
    windows = [batches[max(first, start) : first + together] for first in range(0, len(batches), together)]
    windows = [window for window in windows if window]
    most = max((sum(map(len, window)) for window in windows), default=0)
    # Two in turn: one is filled while the batches of the other are used.
    buffers = [np.empty((most, *pixels.shape[1:]), np.uint8) for _ in windows[:2]]
    stop = threading.Event()

    def fetch(number: int) -> list[np.ndarray]:
        rows, buffer = np.concatenate(windows[number]), buffers[number % 2]
        if isinstance(pixels, Shards):
            pixels.decode(rows, buffer, stop=stop)
        else:
            pixels.take(rows, axis=0, out=buffer[: len(rows)], mode="clip")  # others go through a buffer of NumPy's
        ends = np.cumsum([len(batch) for batch in windows[number]])
        return [buffer[end - len(batch) : end] for end, batch in zip(ends, windows[number], strict=True)]

    def fetched(coming: Future[list[np.ndarray]]) -> Iterator[np.ndarray]:
        for number in range(1, len(windows) + 1):
            ready = coming.result()
            if number < len(windows):
                coming = ahead.submit(fetch, number)
            yield from ready

    with ThreadPoolExecutor(1, "feed") as ahead:
        try:
            yield fetched(ahead.submit(fetch, 0)) if windows else iter(())
        finally:
            stop.set()
