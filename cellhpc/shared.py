"""A file that the ranks of a host share, and that nobody else ever sees.

One rank makes it; as soon as the others have it open, its name is removed: its space is free again when the last of
them ends, however they end, and a kill leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellhpc.errors import UserError
from cellhpc.ranks import Ranks

_PATH_BYTES = 4096


def peers(ranks: Ranks) -> tuple[int, ...]:
    """Tell which ranks run on this rank's host, itself included. All ranks call it."""
    own = np.frombuffer(hashlib.sha256(socket.gethostname().encode()).digest(), np.uint8)[None]
    return tuple(np.flatnonzero((ranks.gather(own) == own).all(axis=1)).tolist())


def share(ranks: Ranks, mine: Sequence[int], folders: Sequence[Path], size: int) -> tuple[int, Path] | None:
    """Make a file that the ranks of each host have open. All ranks call it.

    Parameters
    ----------
    ranks
        All ranks.
    mine
        Those of this host, as `peers` tells them.
    folders
        Where it may lie; the first that has the space is taken.
    size
        Bytes, reserved at once: none will be missing later.

    Returns
    -------
    file, folder
        The open file, which is the caller's to close, and where it lies; None where no folder has the space, or where
        a rank can't see it (in a container of its own).
    """
    path, file = _make(folders, size) if ranks.rank == mine[0] else (None, None)
    named = np.frombuffer(os.fsencode(path or "").ljust(_PATH_BYTES, b"\0"), np.uint8)
    try:
        told = ranks.gather(named[None])[mine[0]].tobytes().rstrip(b"\0")
        if told and file is None:
            try:
                file = os.open(told, os.O_RDWR)
            except OSError:
                file = None
        opened = ranks.gather(np.array([file is not None], np.uint8))[list(mine)]
    finally:
        if path is not None:
            path.unlink()
    if opened.all() and file is not None:
        return file, Path(os.fsdecode(told)).parent
    if file is not None:
        os.close(file)
    return None


def _make(folders: Sequence[Path], size: int) -> tuple[Path, int] | tuple[None, None]:
    for folder in folders:
        path = folder / f"cellhpc-{secrets.token_hex(16)}"
        try:
            if shutil.disk_usage(folder).free < size:
                continue
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            continue
        try:
            os.posix_fallocate(file, 0, max(1, size))
        except OSError:
            os.close(file)
            path.unlink()
        else:
            return path, file
    return None, None


def all_well(ranks: Ranks, fault: UserError | None, what: str) -> None:
    """Wait for all ranks; where one has a fault, all end. All ranks call it.

    Raises
    ------
    UserError
        This rank's fault, or that another has one.
    """
    well = ranks.gather(np.array([fault is None], np.uint8))
    if fault is not None:
        raise fault
    if not well.all():
        raise UserError(f"rank {int(np.argmin(well))} can't read {what}: see what it said in its log.")
