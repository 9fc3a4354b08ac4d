"""A study's folder: what lies where, and to which job file it belongs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cellhpc.errors import UsageError
from cellhpc.ledger import held, read_json, write_json
from cellhpc.settings import Job, parse_job

LOCK = ".lock"
FIXED_SECTIONS = ("screen", "convert", "folds", "train", "search")
"""Sections that a study's folder is bound to; a sweep may grow, and results may be aggregated anew."""
SETTLED_LATER = "train.window_tiles"
"""Key that may be open (None) until the first training is asked for: then it is settled for where the runs will be."""
FREE_KEYS = {
    *("screen.path", "screen.tables", "convert.store", "convert.on_bad_field", "convert.controls"),
    *("convert.archive", "convert.archive_codec", "convert.archive_pixel_um", "train.preset"),
}
"""Keys of these sections that may change: where things lie, what the digests of store and archive tell apart, and where
settings came from."""


@dataclass(frozen=True)
class StudyFolder:
    """Where everything of a study lies."""

    path: Path

    @property
    def job(self) -> Path:
        """The resolved job file."""
        return self.path / "job.json"

    @property
    def folds(self) -> Path:
        """The compound splits."""
        return self.path / "folds.json"

    @property
    def plates(self) -> Path:
        """Names of the plates that the study uses; its store may hold others."""
        return self.path / "plates.json"

    @property
    def site(self) -> Path:
        """The resolved site file of the last submission."""
        return self.path / "site.json"

    @property
    def runs(self) -> Path:
        """One folder for each run."""
        return self.path / "runs"

    @property
    def jobs(self) -> Path:
        """One folder for each job: what it was told to do, and its logs."""
        return self.path / "jobs"

    @property
    def results(self) -> Path:
        """Scores, tables, figures and the report."""
        return self.path / "results"

    def read_job(self) -> Job:
        """Read the resolved job file."""
        return parse_job(read_json(self.job), str(self.job))

    def store(self, job: Job) -> Path:
        """Folder of the converted store."""
        return job.convert.store or self.path / "store"

    def claim(self, job: Job) -> None:
        """Bind the folder to a job file, or check that it is bound to this one.

        Raises
        ------
        UsageError
            The folder belongs to another job file; the message names what differs.
        """
        document = job.model_dump(mode="json")
        if not self.job.exists():
            if self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir()):
                raise UsageError(
                    f"study.folder {self.path} is not empty and holds no study. "
                    "Choose another with --set study.folder=..."
                )
            self.open_to("private")
            write_json(self.job, document)
            return
        known = read_json(self.job)
        differing = [
            line
            for section in FIXED_SECTIONS
            for line in _differences(section, known.get(section, {}), document[section])
        ]
        if known["study"]["name"] != job.study.name:
            differing.insert(0, f"study.name is {job.study.name!r}, there {known['study']['name']!r}")
        if differing:
            raise UsageError(
                "\n  - ".join([f"study.folder {self.path} belongs to another job file:", *differing])
                + "\nChoose another folder with --set study.folder=..., or remove this one."
            )
        if known != document:
            write_json(self.job, document)

    def open_to(self, share: Literal["private", "group"]) -> None:
        """Let only the owner into the folder, or also the owner's group."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o750 if share == "group" else 0o700)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the study for this process: two commands at once would compute the same runs.

        Raises
        ------
        UsageError
            The folder can't be made or written, or another command holds it.
        """
        taken = f"another cellhpc command is at work in {self.path}. Wait for it, or stop it."
        return held(self.path / LOCK, f"study.folder {self.path}", taken)

    def is_held(self) -> bool:
        """Tell whether a command holds the study now."""
        if not (self.path / LOCK).exists():
            return False
        try:
            with self.locked():
                return False
        except UsageError:
            return True


def _differences(where: str, known: Any, now: Any) -> list[str]:
    if where in FREE_KEYS or (where == SETTLED_LATER and known is None):
        return []
    if isinstance(known, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*known, *now})
            for line in _differences(f"{where}.{key}", known.get(key), now.get(key))
        ]
    return [] if known == now else [f"{where} is {now!r}, there {known!r}"]
