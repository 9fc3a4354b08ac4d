"""Finished runs: what each left, and whether they belong together.

The records of all runs are read before any prediction. Of a run its names are kept; what it measured is added to that
of its model and seed at once.
"""

from __future__ import annotations

import statistics
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellhpc import ledger
from cellhpc.errors import DataError, listing
from cellhpc.folds import Folds

CURVES = ("tile", "field", "well", "treatment")
"""Levels of the learning curves."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What is kept of a finished run's `run.json` and `history.json`.

    Attributes
    ----------
    id, folder
        Its name, and where its outputs lie.
    network, initialisation, weights, seed, fold
        Which run it is.
    held_out
        What its fold holds out.
    trained_on_also
        Values of `Folds.also` that it trained on.
    epochs
        Number of its epochs.
    search
        How it chose its settings, if it did.
    combine
        How it combined probabilities where it counted calls after an epoch.
    """

    id: str
    folder: Path
    network: str
    initialisation: str
    weights: str
    seed: int
    fold: str
    held_out: tuple[str, ...]
    trained_on_also: tuple[str, ...]
    epochs: int
    search: dict[str, Any] | None
    combine: str

    @property
    def model(self) -> tuple[str, str]:
        """Network and initialisation."""
        return self.network, self.initialisation


class Course:
    """What the trainings of one model and seed counted, epoch by epoch, and what they took; run added to run.

    Attributes
    ----------
    runs
        Their number.
    """

    def __init__(self) -> None:
        self.runs = 0
        self._counts = np.zeros((1, len(CURVES), 2), np.int64)
        self._seconds = 0.0
        self._speeds = array("d")
        self._ranks: set[int] = set()
        self._memory_mb: float | None = None

    def add(self, facts: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
        """Add what a `run.json` and the epochs, at least one, of its `history.json` say.

        Raises
        ------
        KeyError, TypeError, ValueError
            Something is not in them, or no number; then nothing was added.
        """
        counts = [
            [[epoch["held_out"][level][of] for of in ("correct", "total")] for level in CURVES] for epoch in epochs
        ]
        speeds = [float(epoch["images_per_s"]) for epoch in epochs[1:] or epochs]
        seconds = facts.get("seconds") or sum(epoch["seconds"] for epoch in epochs)
        searched = facts["search"]["seconds"] if facts.get("search") else 0.0
        seconds, ranks = float(seconds + searched), int(facts.get("ranks", 1))
        memory_mb = max(filter(None, (self._memory_mb, facts.get("memory_mb"))), default=None)
        self._counts = _sum(self._counts, np.array(counts, np.int64))
        self._speeds.extend(speeds)
        self._seconds += seconds
        self._ranks.add(ranks)
        self._memory_mb = memory_mb
        self.runs += 1

    @classmethod
    def together(cls, courses: Iterable[Course]) -> Course:
        """Add up those of several seeds."""
        found = cls()
        for one in courses:
            found.runs += one.runs
            found._counts = _sum(found._counts, one._counts)
            found._seconds += one._seconds
            found._speeds.extend(one._speeds)
            found._ranks |= one._ranks
            found._memory_mb = max(filter(None, (found._memory_mb, one._memory_mb)), default=None)
        return found

    def curves(self) -> dict[str, dict[str, list[int]]]:
        """Held-out counts of each epoch at each level; a run that chose fewer epochs stays at its last."""
        return {
            level: {count: self._counts[:, at, of].tolist() for of, count in enumerate(("correct", "total"))}
            for at, level in enumerate(CURVES)
        }

    def cost(self) -> dict[str, Any]:
        """Time (of searches too), speed and size; a run whose record holds no time counts with its epochs'."""
        return {
            "runs": self.runs,
            "epochs": len(self._counts),
            "hours": self._seconds / 3600,
            "images_per_s": float(statistics.median(self._speeds)),
            "ranks": sorted(self._ranks),
            "memory_mb": self._memory_mb,
        }


Courses = dict[tuple[str, str], dict[int, Course]]
"""Of each model (network and initialisation), of each seed."""


def _sum(one: NDArray, other: NDArray) -> NDArray:
    """Add counts (epochs, levels, 2); what has fewer epochs stays at its last."""
    epochs = np.arange(max(len(one), len(other)))
    return sum(part[np.minimum(epochs, len(part) - 1)] for part in (one, other))


class Origin:
    """Distinct hosts, commits and versions of runs; a commit with changed files ends in `+`."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] = {"hosts": set(), "commits": set(), "python": set()}
        self._versions: dict[str, set[str]] = defaultdict(set)

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add what a `run.json` says."""
        if "host" in facts:
            self._found["hosts"].add(facts["host"])
        if "python" in facts:
            self._found["python"].add(facts["python"])
        if "commit" in facts:
            self._found["commits"].add(facts["commit"] + ("+" if facts.get("dirty") else ""))
        for package, version in facts.get("versions", {}).items():
            self._versions[package].add(version)

    def document(self) -> dict[str, Any]:
        """Give it as JSON-ready data."""
        versions = {package: sorted(found) for package, found in sorted(self._versions.items())}
        return {**{name: sorted(found) for name, found in self._found.items()}, "versions": versions}


def read_runs(
    outputs: Mapping[Path, Path], classes: Sequence[str], folds: Folds
) -> tuple[list[FinishedRun], Courses, Origin, list[str]]:
    """Read the records of finished runs.

    Parameters
    ----------
    outputs
        For the folder of each run, the folder of its outputs.
    classes, folds
        What they must have been trained for.

    Returns
    -------
    runs
        Those whose records could be read.
    courses
        What they counted and took.
    origin
        Where they were trained.
    problems
        One line for each thing that is wrong.
    """
    runs: list[FinishedRun] = []
    problems: list[str] = []
    courses: Courses = defaultdict(lambda: defaultdict(Course))
    origin, shared = Origin(), _Tuples()
    for unit, folder in outputs.items():
        try:
            facts = ledger.read_json(folder / "run.json")
            epochs = ledger.read_json(folder / "history.json")["epochs"]
            problems += [f"{unit.name}: {problem}" for problem in _problems_of(facts, epochs, classes, folds)]
            run = _kept(unit.name, folder, facts, len(epochs), shared)
            if epochs:  # else that is named as a problem
                courses[run.model][run.seed].add(facts, epochs)
        except (OSError, DataError, ValueError, KeyError, TypeError) as fault:
            problems.append(f"{unit.name}: {unreadable(fault)}")
            continue
        runs.append(run)
        origin.add(facts)
    return runs, courses, origin, problems + _problems_between(runs, folds)


class _Tuples(dict[tuple[str, ...], tuple[str, ...]]):
    """One tuple for all that are equal: thousands of runs share a few."""

    def __call__(self, values: Iterable[Any]) -> tuple[str, ...]:
        found = tuple(map(str, values))
        return self.setdefault(found, found)


def _kept(name: str, folder: Path, facts: Mapping[str, Any], epochs: int, shared: _Tuples) -> FinishedRun:
    return FinishedRun(
        id=name,
        folder=folder,
        network=sys.intern(facts["network"]),
        initialisation=sys.intern(facts["initialisation"]),
        weights=sys.intern(str(facts["weights"])),
        seed=int(facts["seed"]),
        fold=sys.intern(str(facts["fold"]["name"])),
        held_out=shared(facts["fold"]["held_out"]),
        trained_on_also=shared(facts.get("trained_on_also", ())),
        epochs=epochs,
        search=facts.get("search"),
        combine=sys.intern(str(facts.get("combine", "mean"))),
    )


def unreadable(fault: Exception) -> str:
    """Say in one line why something can't be read."""
    return f"can't be read: {fault!s}".splitlines()[0]


def _problems_of(
    facts: Mapping[str, Any], epochs: Sequence[Any], classes: Sequence[str], folds: Folds
) -> Iterator[str]:
    """Say what is wrong with the record of one run, by itself and against the split."""
    if facts["folds_sha256"] != folds.sha256:
        yield f"split {facts['folds_sha256'][:12]}, the study's folds.json has {folds.sha256[:12]}"
    yield from problems_of_classes("run.json", facts["classes"], classes)
    name, held_out = str(facts["fold"]["name"]), set(facts["fold"]["held_out"])
    fold = folds.named(name)
    if set(fold.held_out) != held_out:
        yield f"fold {name} holds out {listing(held_out)}; folds.json: {listing(fold.held_out)}"
    if (unknown := facts["fold"].get("unknown", "")) != fold.unknown:
        yield f"fold {name} leaves out the label {unknown or 'none'}; folds.json: {fold.unknown or 'none'}"
    for name in ("trained_on", *(["trained_on_also"] if folds.also else [])):
        if name not in facts:
            yield f"run.json does not say {name}: nobody can tell whether it was trained on what it predicts"
    if trained := held_out & set(facts.get("trained_on", ())):
        yield f"holds out {folds.by} {listing(trained)}, which it trained on: a leak"
    inner = set(fold.inner)
    search = facts.get("search")
    if search is None:
        if inner:
            yield "folds.json names inner compounds to choose on, and it did not choose"
    else:
        asked, learnt = set(search["asked"]), set(search["trained_on"])
        if leaked := held_out & (asked | learnt):
            yield f"holds out {folds.by} {listing(leaked)}, which took part in its search: a leak"
        if asked != inner:
            yield f"chose on {folds.by} {listing(asked)}; folds.json: {listing(inner)}"
        if both := asked & learnt:
            yield f"its search trained on {folds.by} {listing(both)}, on which it chose: a leak"
        if len(epochs) != (chosen := facts["settings"]["epochs"]):
            yield f"its history has {len(epochs)} epochs, and it chose {chosen}"
    if not epochs:
        yield "its history has no epochs"


def problems_of_classes(where: str, found: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    """Say whether classes are other ones than expected, or in another order."""
    if list(found) != list(classes):
        order = " in another order" if sorted(found) == sorted(classes) else ""
        yield f"classes in {where} are {', '.join(found)}; expected{order}: {', '.join(classes)}"


def _problems_between(runs: Sequence[FinishedRun], folds: Folds) -> list[str]:
    """List what is wrong among runs: held out twice by one model and seed, or histories of different lengths."""
    problems, labels_left_out = [], folds.unknown
    held_out: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    epochs: dict[tuple[str, str], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for value in run.held_out:
            # Where labels are left out, what is known is held out by several folds.
            held_out[(*run.model, run.seed, value, run.fold if labels_left_out else "")].append(run.id)
        if run.search is None:  # else epochs may have been what it chose
            epochs[run.model][run.epochs].append(run.id)
    for (network, start, seed, value, _), ids in held_out.items():
        if len(ids) > 1:
            problems.append(
                f"{network}, {start}, seed {seed}: {value} is held out by {len(ids)} runs: {', '.join(ids)}"
            )
    for model, lengths in epochs.items():
        if len(lengths) > 1:
            found = "; ".join(f"{length} epochs in {listing(ids, 3)}" for length, ids in sorted(lengths.items()))
            problems.append(f"{', '.join(model)}: histories of different lengths: {found}")
    return problems
