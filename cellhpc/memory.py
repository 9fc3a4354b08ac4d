"""Memory for tiles: how much a job may use of it on a host, and whether its tiles fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARE = 0.6
"""Share of a job's memory for tiles, unless `sweep.memory_gb` says otherwise: networks need the rest."""


@dataclass(frozen=True)
class Allowed:
    """Memory for the tiles of a job on a host: bytes, and who says so."""

    bytes: float
    why: str


def allowed(memory_gb: float | None, whole: tuple[float, str] | None = None, jobs: int = 1) -> Allowed:
    """Say how much memory tiles may take on a host.

    Parameters
    ----------
    memory_gb
        `sweep.memory_gb`.
    whole
        Memory of a job there (bytes), and who says so; by default what holds for this process.
    jobs
        Jobs that share it.
    """
    if memory_gb is not None:
        return Allowed(memory_gb * 1e9, "sweep.memory_gb")
    size, who = whole or memory_here()
    shared = f", shared by {jobs} jobs" if jobs > 1 else ""
    return Allowed(SHARE * size / jobs, f"{SHARE:.0%} of the {size / 1e9:,.1f} GB of {who}{shared}")


def memory_here() -> tuple[float, str]:
    """Memory that this process and those beside it may use (bytes), and who says so."""
    limits = [(float(psutil.virtual_memory().total), "this machine"), *_of_slurm(os.environ)]
    limits += [(float(size), "the control group") for size in _of_groups(Path("/proc/self/cgroup"))]
    return min(limits)


def held_bytes(tiles: int, tile_bytes: int, window_tiles: int | None) -> int:
    """Bytes of tiles that a host holds: all of them, or two windows."""
    return tile_bytes * (2 * min(tiles, window_tiles) if window_tiles else tiles)


def window_that_fits(tile_bytes: int, limit: Allowed) -> int:
    """Tiles of the largest window, a power of two up to 8,192, of which a host can hold two; at least one."""
    fits = int(limit.bytes / 2 / tile_bytes)
    return min(8192, 2 ** max(0, fits.bit_length() - 1))


def too_large(
    needed: int, tile_bytes: int, limit: Allowed, window_tiles: int | None, copies: int = 1, bound: bool = True
) -> str:
    """Say that tiles don't fit into memory, and what to type; empty when they do.

    `copies` are those of ranks that share none; `bound` tells whether the study is bound to what it began with.
    """
    if needed * copies <= limit.bytes:
        return ""
    window = window_that_fits(tile_bytes, limit)
    what = "Two windows of tiles" if window_tiles else "The tiles"
    where = ", in a new study.folder with convert.store of this one" if bound else ""
    times = f" in each of {copies} ranks" if copies > 1 else ""
    return (
        f"{what} take {needed / 1e9:,.2f} GB{times} on a host, and {limit.bytes / 1e9:,.2f} GB are for them "
        f"({limit.why}). Read them in windows with --set train.window_tiles={window}{where}; or, with more memory, "
        "change --set sweep.memory_gb=GB."
    )


def _of_slurm(environ: os._Environ[str] | dict[str, str]) -> list[tuple[float, str]]:
    """Memory of the job on this node, where it asked for some; Slurm counts in MiB."""
    if per_node := int(environ.get("SLURM_MEM_PER_NODE", "0")):
        return [(per_node * 2.0**20, "the job")]
    per_core, cores = (int(environ.get(name, "0")) for name in ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"))
    return [(per_core * cores * 2.0**20, "the job")] if per_core and cores else []


def _of_groups(listed: Path, top: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Limits of this process's control groups and of those around them, of version 1 and 2."""
    try:
        lines = listed.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = top / controllers
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            try:
                text = (folder / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text().strip()
            except OSError:  # in a container, the path may be that of the host
                text = "max"
            if text.isdigit():
                yield int(text)
            if folder == root:
                break
