"""Writing one shard of an array: whole, on the disk, and under its name at once.

Zarr writes a shard where it is to lie, and what is killed meanwhile leaves half of one. Here it is written by Zarr into
an array of one shard's own in a hidden folder beside, and moved.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import zarr

METADATA = "zarr.json"


_RUST, _PYTHON = "zarrs.ZarrsCodecPipeline", "zarr.core.codec_pipeline.BatchedCodecPipeline"
_opening = threading.Lock()


def write_shard(array: Path, name: str, region: Any, block: np.ndarray, beside: Path) -> dict[str, Any]:
    """Write a shard, in place of what was there under its name.

    Parameters
    ----------
    array
        Folder of the array; its `zarr.json` is there.
    name
        File name of the shard in it, as `c.3.0.0.0`.
    region
        Index of the shard's part of the array; what it holds beyond `block` becomes the array's fill value.
    block
        Values of the region.
    beside
        Folder on the same file system for the hidden folder, `.NAME.*`, which a kill leaves behind.

    Returns
    -------
    dict
        Its `bytes`, and their `sha256`.

    Raises
    ------
    OSError
        It can't be written.
    """
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=beside) as temporary:
        hidden = Path(temporary)
        shutil.copyfile(array / METADATA, hidden / METADATA)
        whole = _open(hidden, block)
        try:
            whole[region] = block
        except RuntimeError as fault:  # zarrs' own of a full disk
            raise OSError(str(fault)) from None
        with (hidden / name).open("rb") as file:
            os.fsync(file.fileno())
            found = {
                "bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
        (hidden / name).replace(array / name)
    return found


def _open(array: Path, block: np.ndarray) -> zarr.Array:
    """Open an array to write a block, by one thread for each call: a worker has as many tasks as threads.

    Zarr's engine in Rust takes half the time. It writes nothing where all is zero, and a shard that is not there is
    lost, and not taken for one of zeros: such a one is written by Zarr's own.
    """
    settings = {"codec_pipeline.path": _RUST if block.any() else _PYTHON, "threading.max_workers": 1}
    with _opening, zarr.config.set(settings):  # the array keeps its engine
        return zarr.open_array(array, mode="r+").with_config({"write_empty_chunks": True})


def remove_leftovers(name: str, beside: Path) -> None:
    """Remove what killed attempts at a shard left."""
    for leftover in beside.glob(f".{name}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)  # somebody who was taken for dead may clean up as well
        else:
            leftover.unlink(missing_ok=True)
