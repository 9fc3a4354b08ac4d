"""What is held out, as data: a hashed file of compound splits that every result carries.

The split is made from the fields table before a pixel is read. A fold holds out every field of one compound (or of one
value of another column, as a cell line); all other used fields are its training set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellhpc.errors import DataError, UsageError, listing
from cellhpc.ledger import digest, read_json, write_json
from cellhpc.settings import FoldsSettings

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class Fold:
    """One fold: its name and the values of `Folds.by` that are held out."""

    name: str
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Folds:
    """All folds of a study.

    Attributes
    ----------
    by
        Column of the fields table that is split.
    classes
        Labels, sorted: the order of every probability column.
    labels
        Label(s) of each value of `by`, as they were when the split was made.
    dropped
        Labels that were dropped because a single value of `by` carries them.
    folds
        The folds, sorted by name.
    """

    by: str
    classes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    dropped: tuple[str, ...]
    folds: tuple[Fold, ...]

    @property
    def sha256(self) -> str:
        """Hash of the whole split."""
        return digest(asdict(self))

    def used(self, table: pd.DataFrame) -> np.ndarray:
        """Rows of a table of fields or tiles that take part in the study, as a boolean array (n,)."""
        return ((table["role"] == "treatment") & table["label"].isin(self.classes)).to_numpy()

    def held_out(self, table: pd.DataFrame, fold: Fold) -> np.ndarray:
        """Rows that `fold` holds out, as a boolean array (n,)."""
        return self.used(table) & self._holds(table, fold)

    def training(self, table: pd.DataFrame, fold: Fold) -> np.ndarray:
        """Rows that `fold` trains on, as a boolean array (n,)."""
        return self.used(table) & ~self._holds(table, fold)

    def _holds(self, table: pd.DataFrame, fold: Fold) -> np.ndarray:
        return table[self.by].astype(str).isin(fold.held_out).to_numpy()


def plan_folds(fields: pd.DataFrame, settings: FoldsSettings) -> Folds:
    """Split a fields table.

    Raises
    ------
    UsageError
        `settings.by` is not a column of the table.
    DataError
        Nothing is labelled, or a label has a single compound, which can't be held out.
    """
    by = settings.by
    if by not in fields.columns:
        columns = [name for name in fields.columns if not name.startswith("file_")]
        raise UsageError(
            f"folds.by is {by!r}, which is no column of the fields table. Allowed: {listing(columns, 40)}."
        )
    used = fields[fields["role"] == "treatment"]
    groups = used.groupby("label")[by].unique()
    single = {str(label): values[0] for label, values in groups.items() if len(values) == 1}
    if single and settings.on_single_compound == "fail":
        raise DataError(
            f"{len(single)} label(s) have a single {by}, which can't be held out: nothing would be left to learn from.",
            [f"{label}: only {single[label]}" for label in sorted(single)],
            'Drop such labels with --set folds.on_single_compound="drop", or add compounds.',
        )
    classes = tuple(sorted(set(groups.index) - set(single)))
    if len(classes) < 2:
        raise DataError(
            f"{len(classes)} label(s) remain to tell apart, at least two are needed.",
            [f"label {label}: {len(values)} {by}(s)" for label, values in groups.items()],
            "Check the labels of the screen with: cellhpc inspect JOB.toml",
        )
    used = used[used["label"].isin(classes)]
    labels = {str(value): tuple(sorted(set(rows))) for value, rows in used.groupby(used[by].astype(str))["label"]}
    return Folds(
        by=by,
        classes=classes,
        labels=labels,
        dropped=tuple(sorted(single)),
        folds=tuple(Fold(name, (name,)) for name in sorted(labels)),
    )


def check_folds(folds: Folds, tiles: pd.DataFrame) -> None:
    """Check that every fold can be learnt and asked with the tiles that conversion kept.

    Raises
    ------
    DataError
        A fold holds out no tile, or trains on none of some label; lists all of these.
    """
    problems = []
    for fold in folds.folds:
        if not folds.held_out(tiles, fold).any():
            problems.append(f"{folds.by} {fold.name}: none of its tiles was kept")
        unseen = set(folds.classes) - set(tiles.loc[folds.training(tiles, fold), "label"])
        problems += [
            f"without {folds.by} {fold.name}: no tile of {label} is left to learn from" for label in sorted(unseen)
        ]
    if problems:
        raise DataError(
            f"{len(problems)} fold(s) can't be trained with the tiles that were kept.",
            problems,
            "Keep more with a lower convert.empty_fraction, mend the fields that were set aside, or leave these out "
            "with screen.drop_compounds; in a new study.folder.",
        )


def write_folds(path: Path, folds: Folds) -> None:
    """Write the split with its hash."""
    write_json(path, {**asdict(folds), "sha256": folds.sha256})


def read_folds(path: Path) -> Folds:
    """Read a split.

    Raises
    ------
    DataError
        The file's content does not have the hash that it states: it was edited.
    """
    document: dict[str, Any] = read_json(path)
    stated = document.pop("sha256", None)
    folds = Folds(
        by=document["by"],
        classes=tuple(document["classes"]),
        labels={value: tuple(labels) for value, labels in document["labels"].items()},
        dropped=tuple(document["dropped"]),
        folds=tuple(Fold(fold["name"], tuple(fold["held_out"])) for fold in document["folds"]),
    )
    if folds.sha256 != stated:
        raise DataError(
            f"{path}: its content hashes to {folds.sha256[:12]}, it states {str(stated)[:12]}: the file was changed.",
            remedy="Remove the study's folder and start again, or put the original file back.",
        )
    return folds
