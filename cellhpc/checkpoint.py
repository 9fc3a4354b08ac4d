"""Checkpoints within a run: all that its continuation needs to be the same run, to the last digit.

A checkpoint is one file of numbers (`checkpoint.npz`, never a pickle) in the folder of an attempt. It holds the weights
and the optimiser, which are the same on all ranks; for each rank its own moving statistics, which differ within an
epoch, and states of its dropout; and where the run is. Order of the tiles and augmentation follow from seed and step.
The one before it is kept too, in case that it is damaged: every part of a file carries a checksum.

What is written here is written by rank 0. A checkpoint is written by a thread while the steps go on, from a copy of the
variables; what went wrong is told with the next thing that is written. When the ranks are to stop they wait for it:
none ends before the file is on disk.
"""

from __future__ import annotations

import json
import math
import platform
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellhpc import ledger
from cellhpc.attempts import ABOUT, Attempt, Superseded
from cellhpc.curves import Curves
from cellhpc.errors import DataError, UserError
from cellhpc.ranks import Ranks

CHECKPOINT, BEFORE = "checkpoint.npz", "checkpoint-before.npz"
"""The newest checkpoint of an attempt, and the one that it took the place of."""
WEIGHTS = "weights.npz"
"""What a finished run keeps of its network, if it is asked to; `networks.set_weights` reads it."""
FORMAT = 1
_OK, _SUPERSEDED, _FAULT = range(3)


class Interrupted(Exception):
    """A stop was asked: all ranks ended at the same step, and a checkpoint is on disk."""


@dataclass
class Progress:
    """Where a run is, and what it has seen.

    Attributes
    ----------
    epoch, step
        The epoch that is under way, from 1, and how many of its steps are done.
    losses
        Losses of these steps.
    seconds, waiting_seconds, checkpoint_seconds
        Time that these steps took, of it waiting for data; and of checkpoints between them, which is in neither.
    history
        The entries of the epochs before.
    """

    epoch: int = 1
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def next_epoch(self, entry: dict[str, Any]) -> None:
        """Close the epoch that is under way with its entry of the history."""
        self.history.append(entry)
        self.epoch, self.step, self.losses = self.epoch + 1, 0, []
        self.seconds = self.waiting_seconds = self.checkpoint_seconds = 0.0


class Variables:
    """Everything in a network and its optimiser that changes while it trains.

    Parameters
    ----------
    model, optimizer
        Of Keras.
    ranks
        The processes that train together.
    """

    def __init__(self, model: Any, optimizer: Any, ranks: Ranks) -> None:
        self.shared = [variable.value for variable in [*model.trainable_variables, *optimizer.variables]]
        self.own = [variable.value for variable in model.non_trainable_variables]
        self.ranks = ranks

    def finite(self) -> bool:
        """Tell whether all numbers are finite, on all ranks. All ranks call it."""
        mine = all(np.isfinite(variable.numpy()).all() for variable in [*self.shared, *self.own])
        return bool(self.ranks.gather(np.array([mine], np.int32)).all())

    def collect(self) -> dict[str, np.ndarray]:
        """Values by name, for rank 0: `shared-i`, and `own-i` (ranks, ...) of each rank. All ranks call it."""
        arrays = {}
        if self.ranks.rank == 0:
            # Copies: the next steps change the variables while these are being written.
            arrays = {f"shared-{number}": variable.numpy().copy() for number, variable in enumerate(self.shared)}
        values = [variable.numpy() for variable in self.own]
        if values:
            rows = self.ranks.gather(_pack([value[None] for value in values]))
            arrays |= {f"own-{number}": value for number, value in enumerate(_unpack(rows, values))}
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set all variables; the arrays are rank 0's, the others give none. All ranks call it."""
        if arrays:
            for number, variable in enumerate(self.shared):
                variable.assign(arrays[f"shared-{number}"])
        self.ranks.broadcast(self.shared)
        values = [variable.numpy() for variable in self.own]
        if values:
            known = [arrays.get(f"own-{number}", value[None][:0]) for number, value in enumerate(values)]
            rows = self.ranks.gather(_pack(known))
            for variable, value in zip(self.own, _unpack(rows, values), strict=True):
                variable.assign(value[self.ranks.rank])

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raise `DataError` if an array is missing, or of another shape or type than its variable."""
        wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
            f"shared-{number}": (variable, ()) for number, variable in enumerate(self.shared)
        }
        wanted |= {f"own-{number}": (variable, (self.ranks.size,)) for number, variable in enumerate(self.own)}
        for name, (variable, ranks) in wanted.items():
            shape, dtype = (*ranks, *variable.shape), variable.dtype.as_numpy_dtype
            if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != dtype:
                raise DataError(f"{name} is missing, or no array of {dtype.__name__} of shape {shape}")


class Keeper:
    """Keeps a run while it trains: its history and its checkpoints. All ranks call its verbs; rank 0 writes.

    Making one begins an attempt.

    Parameters
    ----------
    unit
        Folder of the run.
    digest
        Digest of the run.
    variables
        What a checkpoint holds of the network.
    about
        What is known of this attempt's job, for `attempt.json`.
    tensorboard
        The history is also written for TensorBoard.
    """

    def __init__(
        self,
        unit: Path,
        digest: str,
        variables: Variables,
        about: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.unit, self.digest, self.variables = unit, digest, variables
        self.ranks = variables.ranks
        self._began = self._written_at = time.monotonic()
        self._before = {"seconds": 0.0, "interruptions": 0}
        self.attempt: Attempt | None = None  # of rank 0
        self._curves: Curves | None = None  # likewise
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

        def claim() -> None:
            self.attempt = Attempt.claim(unit, digest, {"ranks": self.ranks.size, **(about or {})})
            self._curves = Curves(self.attempt.folder) if tensorboard else None

        self.by_rank_0(claim)

    def by_rank_0(self, write: Callable[[], None]) -> None:
        """Let rank 0 write something; all ranks go on when it is done, or end together.

        Raises
        ------
        Superseded, Interrupted
            A newer attempt has begun: on rank 0, on the others.
        UserError
            A file can't be written.
        """
        said = _OK
        fault: UserError | None = None
        if self.ranks.rank == 0:
            try:
                write()
            except Superseded as caught:
                said, fault = _SUPERSEDED, caught
            except OSError as caught:
                where = caught.filename or self.unit
                said, fault = _FAULT, UserError(f"{where} can't be written: {caught.strerror or caught}.")
        said = int(self.ranks.gather(np.array([said][self.ranks.rank :], np.int32))[0])
        if fault is not None:
            raise fault
        if said == _SUPERSEDED:
            raise Interrupted(f"rank 0 found its attempt at {self.unit.name} superseded")
        if said == _FAULT:
            raise UserError(f"rank 0 can't write in {self.unit}")

    def is_due(self, every_seconds: float) -> bool:
        """Tell whether the last checkpoint is older than that, or went wrong; rank 0 asks for a new one."""
        if self.ranks.rank or (self._writing and not self._writing.done()):
            return False
        failed = self._writing is not None and self._writing.exception() is not None
        return failed or time.monotonic() - self._written_at > every_seconds

    def write_history(self, history: Sequence[dict[str, Any]]) -> None:
        """Write the history of the epochs."""

        def write() -> None:
            self._claimed.write_json("history.json", {"epochs": history})
            if self._curves:
                self._curves.write(history)

        self.by_rank_0(write)

    def write_checkpoint(self, progress: Progress, wait: bool = False) -> None:
        """Begin to write a checkpoint, and note in the progress what the steps waited for it.

        Parameters
        ----------
        progress
            Where the run is.
        wait
            Return when it is on the disk.
        """
        began = time.monotonic()
        arrays = self.variables.collect()
        about = {"format": FORMAT, "digest": self.digest, "ranks": self.ranks.size}
        about |= {"progress": asdict(progress), "until_now": self._until_now()}

        def write() -> None:
            newest = self._claimed.folder / CHECKPOINT
            with self._claimed.replacing(CHECKPOINT) as temporary:
                _save(temporary, {"about": np.array(json.dumps(about)), **arrays})
                if newest.exists():
                    newest.replace(newest.with_name(BEFORE))
            # The one before it stays, in case that this one is damaged.
            kept = [path for path in _places([self._claimed.folder, *self._claimed.earlier()]) if path.exists()]
            for path in kept[2:]:
                path.unlink(missing_ok=True)

        def begin() -> None:
            self._wait()
            self._writing = self._thread.submit(write)
            if wait:
                self._wait()

        self.by_rank_0(begin)
        self._written_at = time.monotonic()
        progress.checkpoint_seconds += self._written_at - began

    def restore(self) -> Progress:
        """Continue from the newest good checkpoint of the earlier attempts, which sets all variables.

        Returns
        -------
        Progress
            Where the run is; its start, and no variable is set, if there is no checkpoint.
        """
        progress, arrays = self._newest() if self.ranks.rank == 0 else (Progress(), {})
        text = json.dumps(asdict(progress)).encode() if arrays else b""
        text = self.ranks.gather(np.frombuffer(text, np.uint8)).tobytes()
        if not text:
            return Progress()
        self.variables.restore(arrays)
        progress = Progress(**json.loads(text))
        if progress.history:
            self.write_history(progress.history)
        return progress

    def publish(
        self,
        tables: Mapping[str, pd.DataFrame],
        archives: Mapping[str, Mapping[str, np.ndarray]],
        record: Callable[[], dict[str, Any]],
    ) -> None:
        """Write what came of the run, and mark it as done with the outputs of this attempt.

        Parameters
        ----------
        tables, archives
            Tables, and arrays by their names, each by the name of its file.
        record
            Says what the run was.
        """

        def write() -> None:
            self._wait()
            attempt = self._claimed
            for name, table in tables.items():
                attempt.write_table(name, table)
            for name, arrays in archives.items():
                with attempt.replacing(name) as temporary:
                    _save(temporary, arrays)
            same = [folder for folder in attempt.earlier() if _digest_of(folder) == self.digest]
            facts = {"attempt": attempt.name, "attempts": 1 + len(same), **self._until_now()}
            attempt.write_json("run.json", {**record(), **facts})
            attempt.publish(self.digest, host=platform.node())
            for path in _places([attempt.folder]):
                path.unlink(missing_ok=True)

        self.by_rank_0(write)

    def _wait(self) -> None:
        """Return when the last checkpoint is written, or raise what went wrong with it."""
        if self._writing is not None:
            self._writing.result()

    def _until_now(self) -> dict[str, Any]:
        """Count what led here: seconds, without what was lost, and how often the run was continued."""
        return {**self._before, "seconds": self._before["seconds"] + time.monotonic() - self._began}

    @property
    def _claimed(self) -> Attempt:
        assert self.attempt is not None  # noqa: S101 - only rank 0 comes here
        return self.attempt

    def _newest(self) -> tuple[Progress, dict[str, np.ndarray]]:
        """Read the newest good checkpoint of this run; without one, give its start and no arrays."""
        for path in _places(self._claimed.earlier()):
            try:
                about, arrays = read_checkpoint(path)
                if (about["format"], about["digest"], about["ranks"]) != (FORMAT, self.digest, self.ranks.size):
                    continue  # of other settings
                self.variables.check(arrays)
                progress = Progress(**about["progress"])
                before = {**about["until_now"], "interruptions": about["until_now"]["interruptions"] + 1}
            except FileNotFoundError:
                continue
            except (OSError, DataError, KeyError, TypeError) as fault:
                print(f"{path} is skipped: {fault}", flush=True)
                continue
            self._before = before
            print(f"continued from {path}: epoch {progress.epoch}, {progress.step} steps", flush=True)
            return progress, arrays
        return Progress(), {}


def _places(attempts: Iterable[Path]) -> list[Path]:
    """List where checkpoints may lie in folders of attempts, the newest first, as the folders are."""
    return [folder / name for folder in attempts for name in (CHECKPOINT, BEFORE)]


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a checkpoint: what it is of, and its arrays.

    Raises
    ------
    DataError
        The file is damaged; every part of it carries a checksum.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(str(arrays.pop("about"))), arrays
    except FileNotFoundError:
        raise
    except Exception as fault:  # a damaged archive makes zipfile and NumPy raise nearly anything
        raise DataError(f"damaged: {fault}") from None


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as np.savez does, which leaves an open archive behind when the disk is full."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _digest_of(attempt: Path) -> str | None:
    try:
        return str(ledger.read_json(attempt / ABOUT)["digest"])
    except (FileNotFoundError, DataError, KeyError, TypeError):
        return None


def _pack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Bytes (rows, n) of arrays (rows, ...), side by side."""
    rows = len(arrays[0])
    widths = [array.dtype.itemsize * math.prod(array.shape[1:]) for array in arrays]
    parts = [np.frombuffer(array.tobytes(), np.uint8) for array in arrays]
    return np.concatenate([part.reshape(rows, width) for part, width in zip(parts, widths, strict=True)], 1)


def _unpack(packed: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays (rows, ...) of the types and shapes of `like`, from their bytes (rows, n)."""
    arrays, at = [], 0
    for value in like:
        part = packed[:, at : at + value.nbytes].tobytes()
        arrays.append(np.frombuffer(part, value.dtype).reshape(len(packed), *value.shape))
        at += value.nbytes
    return arrays
