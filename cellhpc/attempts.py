"""Attempts at a unit of work, fenced: what was cut off can't overwrite what its successor writes.

A unit that is long enough to be interrupted holds a folder for each attempt, numbered as they begin, and the marker::

    runs/RUN/
      001/          one attempt: all its outputs, and `attempt.json`: where and when it began
      002/          the attempt that continued it
      done.json     digest, and the attempt whose outputs count
      failed.json   why the last attempt failed; removed when another one begins

An attempt writes in its own folder only, and asks before every write whether a newer one has begun. Folders are made
and the marker is published by operations of which one caller wins (mkdir, link), also on network file systems. A node
that was cut off and goes on (its job has long been queued again) thus harms nothing; it ends at its next write.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellhpc import ledger
from cellhpc.errors import DataError, UserError

if TYPE_CHECKING:
    import pandas as pd

FAILED = "failed.json"
"""Why the last attempt at a unit failed; beside the attempts' folders."""
ABOUT = "attempt.json"
_DRAFT = "publish.json"
_NUMBER = re.compile(r"\d{3,}")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Superseded(UserError):
    """A newer attempt at the same unit has begun: this one must end, and leave everything as it is."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a unit of work.

    Attributes
    ----------
    unit
        Folder of the unit.
    number
        Number of the attempt, from 1.
    """

    unit: Path
    number: int

    @classmethod
    def claim(cls, unit: Path, digest: str, about: Mapping[str, Any] | None = None) -> Attempt:
        """Begin the next attempt; whatever attempt came before is superseded from now on.

        Parameters
        ----------
        unit
            Folder of the unit; made if need be.
        digest
            Digest of all that goes into the unit; a marker with another one is stale and is removed.
        about
            What else is known of this attempt (host, process and time are noted here): its job.

        Returns
        -------
        Attempt
            With its own, new folder.
        """
        unit.mkdir(parents=True, exist_ok=True)
        number = 1 + max(_numbers(unit), default=0)
        while True:
            attempt = cls(unit, number)
            try:
                attempt.folder.mkdir()
                break
            except FileExistsError:  # another process began at the same moment
                number += 1
        began = {"digest": digest, "host": platform.node(), "pid": os.getpid(), "began": time.time()}
        attempt.write_json(ABOUT, {**began, **(about or {})})
        if finished(unit, digest) is None:
            (unit / ledger.DONE).unlink(missing_ok=True)
        (unit / FAILED).unlink(missing_ok=True)
        return attempt

    @property
    def name(self) -> str:
        """The number as the folder is named: `001`."""
        return f"{self.number:03d}"

    @property
    def folder(self) -> Path:
        """Folder of the attempt, in which nothing else writes."""
        return self.unit / self.name

    def require_current(self) -> None:
        """Raise `Superseded` if a newer attempt has begun, or the folder was removed."""
        newest = max(_numbers(self.unit), default=0)
        if newest > self.number:
            raise Superseded(f"attempt {self.name} of {self.unit.name} was superseded by {newest:03d}")
        if newest < self.number:
            raise Superseded(f"attempt {self.name} of {self.unit.name} was superseded: its folder is gone")

    def earlier(self) -> list[Path]:
        """Folders of the attempts before this one, the newest first."""
        numbers = sorted((number for number in _numbers(self.unit) if number < self.number), reverse=True)
        return [Attempt(self.unit, number).folder for number in numbers]

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON document of this attempt atomically, unless it was superseded."""
        with self._fenced(name):
            ledger.write_json(self.folder / name, document, make_folder=False)

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table of this attempt atomically, unless it was superseded."""
        with self._fenced(name):
            ledger.write_table(self.folder / name, table, make_folder=False)

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Give a temporary path for a file of this attempt, as `ledger.replacing` does, unless it was superseded."""
        with self._fenced(name), ledger.replacing(self.folder / name, make_folder=False) as temporary:
            yield temporary

    @contextlib.contextmanager
    def _fenced(self, name: str) -> Iterator[None]:
        self.require_current()
        try:
            yield
        except OSError as fault:
            if isinstance(fault, FileNotFoundError):
                self.require_current()  # a successor may have finished, and removed this folder, in the meantime
            fault.filename = str(self.folder / name)  # not the temporary one; and a full disk names none
            raise

    def publish(self, digest: str, **facts: Any) -> bool:
        """Mark the unit as done with the outputs of this attempt, then remove those of earlier attempts.

        Parameters
        ----------
        digest
            Digest of all that went into the unit.
        facts
            What else the marker says.

        Returns
        -------
        bool
            False if another attempt has published the same digest: then its outputs count.

        Raises
        ------
        Superseded
            A newer attempt has begun.
        """
        marker = self.unit / ledger.DONE
        self.write_json(_DRAFT, {"digest": digest, "attempt": self.name, **facts})
        draft = self.folder / _DRAFT
        try:
            while not _link(draft, marker):
                if finished(self.unit, digest) is not None:
                    return False
                published = _read_marker(self.unit).get("attempt", "")
                if (
                    _NUMBER.fullmatch(published) and int(published) > self.number
                ):  # a network file system may list newer folders late
                    raise Superseded(f"attempt {self.name} of {self.unit.name} was superseded by {published}")
                marker.unlink(missing_ok=True)  # left late by an older attempt, which had other settings
        except FileNotFoundError:
            self.require_current()  # a successor may have finished, and removed this folder, in the meantime
            raise
        finally:
            draft.unlink(missing_ok=True)
        for folder in self.earlier():
            shutil.rmtree(folder, ignore_errors=True)  # a cut-off process may still write there
        return True


def finished(unit: Path, digest: str | None = None) -> Path | None:
    """Folder of the outputs that count, or None: not done, or done with another digest than the one that is given."""
    marker = _read_marker(unit)
    if not marker or (digest is not None and marker["digest"] != digest):
        return None
    folder = unit / marker["attempt"]
    return folder if folder.is_dir() else None


def newest(unit: Path) -> Path | None:
    """Folder of the newest attempt, finished or not."""
    number = max(_numbers(unit), default=0)
    return Attempt(unit, number).folder if number else None


def _read_marker(unit: Path) -> dict[str, str]:
    """Read a unit's marker; empty if there is none, or not one of an attempt."""
    try:
        marker = ledger.read_json(unit / ledger.DONE)
        return {**marker, "digest": str(marker["digest"]), "attempt": str(marker["attempt"])}
    except (FileNotFoundError, NotADirectoryError, DataError, KeyError, TypeError):
        return {}


def _numbers(unit: Path) -> list[int]:
    """Numbers of the attempts whose folders are there."""
    try:
        return [int(entry.name) for entry in os.scandir(unit) if _NUMBER.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name, unless that is taken; tell whether it has it now."""
    try:
        os.link(source, target)
    except FileExistsError:
        # A network file system may answer so when it repeats a request that had succeeded.
        return source.stat().st_nlink > 1
    except OSError as fault:
        if fault.errno not in _NO_LINKS:
            raise
        # A file system without links: all that can collide here is two markers of the same digest.
        if target.exists():
            return False
        with ledger.replacing(target) as temporary:
            shutil.copyfile(source, temporary)
    return True
