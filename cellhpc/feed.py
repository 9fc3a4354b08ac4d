"""Batches of tiles for a network: in which order, and fetched while it is busy with those before.

Tiles in memory come in an order that is drawn over all of them, a batch at a time.

Tiles that stay in their shards come in shuffled windows: the shards are put into a random order, their tiles one
behind the other are cut into windows of so many tiles, and each window is shuffled. Each window is read and decoded
whole, straight into the places that its batches have, while the network works on the window before: a rank holds two
windows of its own share of the batches, however large the store is. An epoch begins with smaller windows, so that the
network need not wait for long.

Either order is a function of the run's seed and the epoch, the same on all ranks, each of which takes its share of
every batch: a continuation draws it again and skips what is done, without decoding it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cellhpc.shards import Shards

Pixels = np.ndarray | Shards
"""Tiles uint8 (n, y, x, channel): in memory, or in their shards; or in memory what a network says of each."""


def whole_batches(window_tiles: int | None, batch_size: int) -> int:
    """Batches of a window, at least one; tiles in memory come batch by batch."""
    return max(1, (window_tiles or 0) // batch_size)


def windows(batches: int, together: int) -> list[slice]:
    """Cut batches into windows of `together`; the first four are smaller, as the network has to wait for the first."""
    smaller = [size for size in (together // 8, together // 8, together // 4, together // 2) if size]
    edges = [0]
    while edges[-1] < batches:
        edges.append(edges[-1] + (smaller.pop(0) if smaller else together))
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def shuffle(pixels: Pixels, rows: np.ndarray, seed: Sequence[int], batch_size: int, together: int) -> np.ndarray:
    """Draw the order of an epoch.

    Parameters
    ----------
    pixels
        All tiles.
    rows
        Numbers of those that are used, (n,).
    seed
        Of the run and the epoch.
    batch_size, together
        Tiles of a batch, and batches of a window, for tiles in shards.

    Returns
    -------
    ndarray
        The rows in their order, (n,).
    """
    random = np.random.default_rng(seed)
    if not isinstance(pixels, Shards):
        return random.permutation(rows)
    _, shard = np.unique(pixels.shard[rows], return_inverse=True)
    place = random.permutation(shard.max(initial=0) + 1)
    order = rows[np.argsort(place[shard], kind="stable")]
    for window in windows(-(-len(order) // batch_size), together):
        random.shuffle(order[window.start * batch_size : window.stop * batch_size])
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
    cut = windows(len(batches), together)
    groups = [group for window in cut if (group := batches[max(window.start, start) : window.stop])]
    most = max((sum(map(len, group)) for group in groups), default=0)
    # Two in turn: one is filled while the batches of the other are used.
    kind = np.uint8 if isinstance(pixels, Shards) else pixels.dtype
    buffers = [np.empty((most, *pixels.shape[1:]), kind) for _ in groups[:2]]
    stop = threading.Event()

    def fetch(number: int) -> list[np.ndarray]:
        rows, buffer = np.concatenate(groups[number]), buffers[number % 2]
        if isinstance(pixels, Shards):
            pixels.decode(rows, buffer, stop=stop)
        else:
            pixels.take(rows, axis=0, out=buffer[: len(rows)], mode="clip")  # others go through a buffer of NumPy's
        ends = np.cumsum([len(batch) for batch in groups[number]])
        return [buffer[end - len(batch) : end] for end, batch in zip(ends, groups[number], strict=True)]

    def fetched(coming: Future[list[np.ndarray]]) -> Iterator[np.ndarray]:
        for number in range(1, len(groups) + 1):
            ready = coming.result()
            if number < len(groups):
                coming = ahead.submit(fetch, number)
            yield from ready

    with ThreadPoolExecutor(1, "feed") as ahead:
        try:
            yield fetched(ahead.submit(fetch, 0)) if groups else iter(())
        finally:
            stop.set()
