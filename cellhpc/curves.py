"""The history of a run as TensorBoard shows it: an event file of an attempt, whose curves begin with the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Curves:
    """Writes the epochs of a history into an event file, each of them once.

    Parameters
    ----------
    folder
        Where the file is made, with the first epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._written = 0

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the epochs that are new.

        Raises
        ------
        OSError
            The file can't be written.
        """
        import tensorflow as tf

        try:
            self._writer = self._writer or tf.summary.create_file_writer(str(self.folder))
            with self._writer.as_default():
                for entry in history[self._written :]:
                    for name, value in points(entry).items():
                        tf.summary.scalar(name, value, step=entry["epoch"])
            self._writer.flush()
        except tf.errors.OpError as fault:
            raise OSError(None, fault.message, str(self.folder)) from None
        self._written = len(history)


def points(entry: Mapping[str, Any]) -> dict[str, float]:
    """Name what an epoch adds to the curves: `run/loss` and the other numbers, and accuracies as `held_out/tile`."""
    named: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            named |= {f"{key}/{level}": of["correct"] / of["total"] for level, of in value.items() if of["total"]}
        elif key != "epoch":
            named[f"run/{key}"] = float(value)
    return named
