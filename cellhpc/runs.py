"""Finished runs: what each left, whether they belong together, and the predictions of a fold.

The records of all runs are read first, and of each only what is needed later is kept: some numbers. Predictions are
read fold by fold; runs of a fold predict the same tiles, whose keys are looked at once.
"""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellhpc import ledger
from cellhpc.errors import DataError, listing
from cellhpc.folds import Fold, Folds
from cellhpc.levels import KEYS, PREFIX, Ladder, sound
from cellhpc.predictor import DRAWS, PREDICTIONS
from cellhpc.tally import UNKNOWN, Predicted

CURVES = ("tile", "field", "well", "treatment")
"""Levels of the learning curves."""
AHEAD, READERS = 8, 2
"""Files that are read ahead, and threads that read them."""


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
    curves
        Held-out counts, int32 (epochs, levels of `CURVES`, [correct, total]).
    seconds
        Of its training, and of its search.
    speeds
        Images per second of each epoch but the first, float64.
    memory_mb, ranks
        Peak memory of rank 0; processes.
    search
        How it chose its settings, if it did.
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
    curves: NDArray
    seconds: tuple[float, ...]
    speeds: NDArray
    memory_mb: float | None
    ranks: int
    search: dict[str, Any] | None

    @property
    def model(self) -> tuple[str, str]:
        """Network and initialisation."""
        return self.network, self.initialisation


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
) -> tuple[list[FinishedRun], Origin, list[str]]:
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
    origin
        Where they were trained.
    problems
        One line for each thing that is wrong.
    """
    runs, problems, origin = [], [], Origin()
    for unit, folder in outputs.items():
        try:
            facts = ledger.read_json(folder / "run.json")
            epochs = ledger.read_json(folder / "history.json")["epochs"]
            problems += [f"{unit.name}: {problem}" for problem in _problems_of(facts, epochs, classes, folds)]
            runs.append(_kept(unit.name, folder, facts, epochs))
        except (OSError, DataError, ValueError, KeyError) as fault:
            problems.append(f"{unit.name}: {_unreadable(fault)}")
            continue
        origin.add(facts)
    return runs, origin, problems + _problems_between(runs, folds)


def _kept(name: str, folder: Path, facts: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> FinishedRun:
    counts = [[[epoch["held_out"][level][of] for of in ("correct", "total")] for level in CURVES] for epoch in epochs]
    search = facts.get("search")
    seconds = facts.get("seconds") or sum(epoch["seconds"] for epoch in epochs)
    return FinishedRun(
        id=name,
        folder=folder,
        network=sys.intern(facts["network"]),  # thousands of runs share a few names
        initialisation=sys.intern(facts["initialisation"]),
        weights=sys.intern(str(facts["weights"])),
        seed=int(facts["seed"]),
        fold=sys.intern(str(facts["fold"]["name"])),
        held_out=tuple(map(sys.intern, facts["fold"]["held_out"])),
        trained_on_also=tuple(facts.get("trained_on_also", ())),
        curves=np.array(counts, np.int32).reshape(-1, len(CURVES), 2),
        seconds=(seconds, search["seconds"]) if search else (seconds,),
        speeds=np.array([epoch["images_per_s"] for epoch in epochs[1:] or epochs]),
        memory_mb=facts.get("memory_mb") or None,
        ranks=int(facts.get("ranks", 1)),
        search=search,
    )


def _unreadable(fault: Exception) -> str:
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
            epochs[run.model][len(run.curves)].append(run.id)
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


@dataclass(frozen=True)
class _Keys:
    """The held-out tiles of a fold as runs predict them: columns as read, ladder, values of `by` and of `also`."""

    arrow: pa.Table
    ladder: Ladder
    by: frozenset[str]
    also: frozenset[str]


def _read(path: Path) -> pa.Table:
    """Read a small table in this thread: thousands of them are read."""
    with pq.ParquetFile(pa.py_buffer(path.read_bytes())) as file:
        return file.read(use_threads=False)


def read_ahead(runs: Iterable[FinishedRun]) -> Generator[Future[pa.Table], None, None]:
    """Read the predictions of runs in their order, a few ahead of the one that is asked for, in threads."""
    with ThreadPoolExecutor(READERS) as threads:
        files = (threads.submit(_read, run.folder / PREDICTIONS) for run in runs)
        ahead = deque(islice(files, AHEAD))
        while ahead:
            yield ahead.popleft()
            ahead.extend(islice(files, 1))


class FoldReader:
    """Looks at the predictions of one fold's runs; keys that runs share are checked once.

    Parameters
    ----------
    fold
        The fold.
    classes, folds
        What the runs were trained for.
    """

    def __init__(self, fold: Fold, classes: Sequence[str], folds: Folds) -> None:
        self.fold, self.classes, self.folds = fold, classes, folds
        self._known: list[_Keys] = []
        self._columns = [PREFIX + name for name in classes]

    def read(self, run: FinishedRun, file: Future[pa.Table], problems: list[str]) -> Predicted | None:
        """Give the predictions of a run.

        Parameters
        ----------
        run
            A run of this fold.
        file
            Its file, as `read_ahead` gives it.
        problems
            Gets a line for each thing that is wrong.

        Returns
        -------
        Predicted or None
            None where something is wrong.
        """
        try:
            table = file.result()
            found = [name.removeprefix(PREFIX) for name in table.column_names if name.startswith(PREFIX)]
            wrong = list(problems_of_classes("predictions", found, self.classes))
            keys = None if wrong else self._keys_of(table)
            wrong += self._leaks(run, keys) if keys else []
            if keys and not wrong:
                values = sound(self._values_of(table), keys.ladder.table)
                return Predicted(keys.ladder, values, self._draws_of(run, keys))
        except (OSError, ValueError, pa.ArrowException) as fault:
            wrong = [_unreadable(fault)]
        except DataError as fault:
            wrong = [" ".join(str(fault).split())]
        problems += [f"{run.id}: {line}" for line in wrong]
        return None

    def _values_of(self, table: pa.Table) -> NDArray:
        return np.column_stack([table.column(name).to_numpy() for name in self._columns]).astype(np.float64)

    def _draws_of(self, run: FinishedRun, keys: _Keys) -> NDArray | None:
        """Read the draws of dropout, one after the other, float64 (draws, tiles, classes); None where there are none.

        Raises
        ------
        DataError
            They are of other tiles than the predictions, or no probabilities.
        """
        if not (run.folder / DRAWS).exists():
            return None
        table = _read(run.folder / DRAWS)
        draws, rest = divmod(len(table), len(keys.arrow))
        same = not rest and {*keys.arrow.column_names, *self._columns} <= set(table.column_names)
        own = table.select(keys.arrow.column_names) if same else table
        if not same or any(
            not own.slice(n * len(keys.arrow), len(keys.arrow)).equals(keys.arrow) for n in range(draws)
        ):
            raise DataError(f"{DRAWS} holds other tiles than {PREDICTIONS}.")
        parts = self._values_of(table).reshape(draws, len(keys.arrow), -1)
        return np.stack([sound(part, keys.ladder.table) for part in parts])

    def _keys_of(self, table: pa.Table) -> _Keys:
        own = table.select([name for name in table.column_names if not name.startswith(PREFIX)])
        for keys in self._known:
            if own.equals(keys.arrow):
                return keys
        if missing := [name for name in KEYS["tile"] if name not in own.column_names]:
            raise DataError(f"{PREDICTIONS} has no column {listing(missing)}.")
        frame = own.to_pandas().assign(fold=self.fold.name)
        if self.fold.unknown:
            frame[UNKNOWN] = frame["label"] == self.fold.unknown
        by, also = (
            frozenset(frame[name].astype(str)) if name in frame else frozenset()
            for name in (self.folds.by, self.folds.also)
        )
        keys = _Keys(own, Ladder(frame, self.classes), by, also)
        self._known = [keys, *self._known[:3]]
        return keys

    def _leaks(self, run: FinishedRun, keys: _Keys) -> list[str]:
        """List what it predicts and should not, and the other way round."""
        held_out, problems = set(run.held_out), []
        if keys.by and (leaked := keys.by - held_out):
            problems.append(f"predicts {self.folds.by} {listing(leaked)}, which its fold {run.fold} trained on: a leak")
        if keys.by and (unseen := held_out - keys.by):
            problems.append(f"no predictions of {self.folds.by} {listing(unseen)}, which its fold {run.fold} holds out")
        if shared := keys.also & set(run.trained_on_also):
            problems.append(f"predicts {self.folds.also} {listing(shared)}, which it trained on: a leak")
        return problems
