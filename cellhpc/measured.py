"""What was measured of trainings: by the site file's `[measured]`, else by the finished runs of a study.

A finished run tells in its history how fast it trained and predicted, and by the times of its files what it took
beside. The first run of a process also tells what the process took before it, and what the first epoch, in which
graphs are made, took more than the others.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellhpc.attempts import ABOUT, finished
from cellhpc.errors import UsageError, listing
from cellhpc.ledger import DONE, read_json
from cellhpc.networks import NETWORKS, parse_network
from cellhpc.site import ANY_NETWORK, MeasuredSettings

_RUNS = 30
"""Finished runs of a network that are looked at."""


@dataclass(frozen=True)
class Figure:
    """A measured number, who says so, and of its job the ranks."""

    value: float
    source: str
    ranks: int


@dataclass(frozen=True)
class Parts:
    """What is known of trainings of one network; None what isn't. The keys are those of `[measured]`."""

    images_per_s: Figure | None = None
    predicted_per_s: Figure | None = None
    start_seconds: Figure | None = None
    run_seconds: Figure | None = None


def parts_of(
    networks: Iterable[str], ranks: int, site: MeasuredSettings, units: Iterable[tuple[str, Path]]
) -> dict[str, Parts]:
    """Find what is known of networks: what the site file says goes before what runs tell.

    Parameters
    ----------
    networks
        As text.
    ranks
        Those that will train a run.
    site
        The site file's `[measured]`.
    units
        Network and folder of runs that may be finished.

    Raises
    ------
    UsageError
        The site file names what is no network.
    """
    speeds, predicted = _by_network(site, "images_per_s"), _by_network(site, "predicted_per_s")
    measured_ranks = site.ranks or ranks
    names = list(dict.fromkeys(networks))
    told = _told_by_runs(names, ranks, units)

    def said(key: str, value: float | None) -> Figure | None:
        return None if value is None else Figure(value, f"measured.{key} of the site file", measured_ranks)

    return {
        name: Parts(
            said("images_per_s", speeds.get(name, speeds.get(ANY_NETWORK))) or told[name].images_per_s,
            said("predicted_per_s", predicted.get(name, predicted.get(ANY_NETWORK))) or told[name].predicted_per_s,
            said("start_seconds", site.start_seconds) or told[name].start_seconds,
            said("run_seconds", site.run_seconds) or told[name].run_seconds,
        )
        for name in names
    }


def _by_network(site: MeasuredSettings, key: str) -> dict[str, float]:
    """Give the speeds by networks as `sweep.networks` has them, however they are spaced."""
    found = {}
    for name, speed in getattr(site, key).items():
        try:
            found[name if name == ANY_NETWORK else parse_network(name).text] = speed
        except UsageError:
            raise UsageError(
                f"measured.{key} of the site file: {name!r} is no network. Write it as in sweep.networks, or "
                f'"{ANY_NETWORK}" for those that are not named. Allowed: {listing(sorted(NETWORKS), 40)}.'
            ) from None
    return found


@dataclass(frozen=True)
class _Told:
    """What one finished run tells.

    Attributes
    ----------
    epochs, ranks, where
        Its history, the ranks that trained it, and their threads and host.
    predicted_tiles
        Tiles that it predicted after each epoch.
    after_start
        Seconds of its process before it; None unless it was the first there.
    beside
        Seconds beside its steps and predictions; None when several attempts made it.
    """

    epochs: list[dict[str, Any]]
    ranks: int
    where: str
    predicted_tiles: int
    after_start: float | None
    beside: float | None

    @classmethod
    def read(cls, unit: Path) -> _Told | None:
        folder = finished(unit)
        if folder is None:
            return None
        try:
            about, record = read_json(folder / ABOUT), read_json(folder / "run.json")
            epochs = read_json(folder / "history.json")["epochs"]
            told = sum(epoch["seconds"] + epoch["predict_seconds"] for epoch in epochs)
            # Both times are the file system's, whose clock may not be the node's.
            whole = (unit / DONE).stat().st_mtime - (folder / ABOUT).stat().st_mtime
            after_start = about["began"] - about["started"] if "started" in about else None
            beside = max(0.0, whole - told) if record["attempts"] == 1 else None
            where, predicted = f"{record['threads']} thread(s) on {record['host']}", record["held_out_tiles"]
        except (FileNotFoundError, KeyError):  # of an earlier version, or removed just now
            return None
        return cls(epochs, record["ranks"], where, predicted, after_start, beside)

    def more_in_first_epoch(self, speed: float) -> float:
        """Seconds that the first epoch took more than its images take at full speed."""
        first = self.epochs[0]
        return max(0.0, float(first["seconds"] * (1 - first["images_per_s"] / speed)))


def _told_by_runs(names: Sequence[str], ranks: int, units: Iterable[tuple[str, Path]]) -> dict[str, Parts]:
    """Find what finished runs tell of each network: those with as many ranks, else with the most usual number."""
    runs: dict[str, list[_Told]] = defaultdict(list)
    for network, unit in units:
        if len(runs[network]) < _RUNS and (told := _Told.read(unit)):
            runs[network].append(told)
    found = {}
    for name in names:
        counts = Counter(told.ranks for told in runs[name])
        chosen = ranks if counts[ranks] else max(counts, key=lambda number: counts[number], default=ranks)
        found[name] = _parts([told for told in runs[name] if told.ranks == chosen], chosen)
    return found


def _parts(runs: list[_Told], ranks: int) -> Parts:
    if not runs:
        return Parts()
    # In the first epoch of a process graphs are made.
    speed = statistics.median(epoch["images_per_s"] for run in runs for epoch in run.epochs[1:] or run.epochs)
    predicted = [
        run.predicted_tiles / epoch["predict_seconds"] for run in runs for epoch in run.epochs[1:] or run.epochs
    ]
    every = [run.beside for run in runs if run.beside is not None]
    later = [run.beside for run in runs if run.beside is not None and run.after_start is None]
    beside = statistics.median(later or every) if every else None
    starts = [
        run.after_start + run.more_in_first_epoch(speed) + max(0.0, run.beside - (beside or 0.0))
        for run in runs
        if run.after_start is not None and run.beside is not None
    ]

    where = " and ".join(sorted({run.where for run in runs}))

    def figure(value: float | None) -> Figure | None:
        return None if value is None else Figure(value, f"finished runs of this study, {where}", ranks)

    start = statistics.median(starts) if starts else None
    return Parts(figure(speed), figure(statistics.median(predicted)), figure(start), figure(beside))
