"""What is held out, as data: a hashed file of compound splits that every result carries.

The split is made from the fields table before a pixel is read. A fold holds out every field of one compound (or of one
value of another column, as a cell line); all other used fields are its training set. With `folds.also`, those that
share the batch of what is held out are left out of it too. With a `[search]`, a fold also names its inner values, one
of each label that can spare it: on them its run chooses, without what the fold holds out. With `folds.unknown`, a fold
holds out all compounds of one label, which is unknown to its network, and one of each other label that can spare it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
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
    """One fold.

    Attributes
    ----------
    name
        Its name.
    held_out
        The values of `Folds.by` that are held out.
    inner
        Those of its training set that a search holds out in turn; none without a search.
    untouched
        Values that take no part at all, neither in training nor in predictions.
    also
        Values of `Folds.also` of what is held out: nothing that has one of them is trained on.
    unknown
        Label that is held out altogether; what else is held out is known. Empty without `folds.unknown`.
    """

    name: str
    held_out: tuple[str, ...]
    inner: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    unknown: str = ""

    def searching(self) -> Fold:
        """Give the fold of this one's search: it holds out the inner values, and does not touch the outer ones."""
        return Fold(self.name, self.inner, untouched=self.held_out)


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
    also
        Column of which training shares no value with what is held out; empty without.
    not_scorable
        Values of `by` that are not held out, each with its number of treatments: with `also`, no other value with its
        label would be left to learn from.
    """

    by: str
    classes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    dropped: tuple[str, ...]
    folds: tuple[Fold, ...]
    also: str = ""
    not_scorable: dict[str, int] = field(default_factory=dict)

    @property
    def unknown(self) -> bool:
        """Whether each fold leaves out a label altogether."""
        return any(fold.unknown for fold in self.folds)

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole split."""
        return digest(self.document())

    @cached_property
    def _by_name(self) -> dict[str, Fold]:
        return {fold.name: fold for fold in self.folds}

    def named(self, name: str) -> Fold:
        """Give the fold of a name; one that holds nothing out where there is none."""
        return self._by_name.get(name, Fold(name, ()))

    def document(self) -> dict[str, Any]:
        """Return the split as JSON-ready data; what only some splits have is named only if there is some."""
        folds = [
            {key: value for key, value in asdict(fold).items() if value or key == "held_out"} for fold in self.folds
        ]
        also = {"also": self.also, "not_scorable": self.not_scorable} if self.also else {}
        fixed = {name: getattr(self, name) for name in ("by", "classes", "labels", "dropped")}
        return {**fixed, "folds": folds, **also}

    def cannot_spare(self, fold: Fold) -> list[str]:
        """List the labels of which a search of this fold is asked nothing."""
        asked = {label for value in fold.inner for label in self.labels[value]}
        return sorted(set(self.classes) - asked)

    def used(self, table: pd.DataFrame) -> np.ndarray:
        """Rows of a table of fields or tiles that take part in the study, as a boolean array (n,)."""
        return ((table["role"] == "treatment") & table["label"].isin(self.classes)).to_numpy()

    def held_out(self, table: pd.DataFrame, fold: Fold) -> np.ndarray:
        """Rows that `fold` holds out, as a boolean array (n,)."""
        return self.used(table) & self._holds(table, fold.held_out)

    def training(self, table: pd.DataFrame, fold: Fold) -> np.ndarray:
        """Rows that `fold` trains on, as a boolean array (n,)."""
        training = self.used(table) & ~self._holds(table, (*fold.held_out, *fold.untouched))
        return training & ~table[self.also].astype(str).isin(fold.also).to_numpy() if self.also else training

    def _holds(self, table: pd.DataFrame, values: tuple[str, ...]) -> np.ndarray:
        return table[self.by].astype(str).isin(values).to_numpy()


def plan_folds(fields: pd.DataFrame, settings: FoldsSettings, search: bool = False) -> Folds:
    """Split a fields table.

    Parameters
    ----------
    fields, settings
        The table, and what is held out.
    search
        Whether the folds get inner values to choose on.

    Raises
    ------
    UsageError
        `settings.by` or `settings.also` is not a column of the table.
    DataError
        Nothing is labelled, a label has a single compound, which can't be held out, a fold can spare none for its
        search, nothing is left to hold out with `settings.also`, or labels can't be left out altogether.
    """
    by = settings.by
    for key, name in (("by", by), ("also", settings.also)):
        if name and name not in fields.columns:
            columns = [name for name in fields.columns if not name.startswith("file_")]
            raise UsageError(
                f"folds.{key} is {name!r}, which is no column of the fields table. Allowed: {listing(columns, 40)}."
            )
    used = fields[fields["role"] == "treatment"]
    groups = used.groupby("label")[by].unique()
    single = {str(label): values[0] for label, values in groups.items() if len(values) == 1}
    if settings.unknown and settings.on_single_compound == "fail":
        single = {}  # can be unknown
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
    if settings.also:
        return _without_also(Folds(by, classes, labels, tuple(sorted(single)), (), settings.also), used)
    if settings.unknown:
        return Folds(by, classes, labels, tuple(sorted(single)), _without_labels(by, classes, labels))
    folds = tuple(Fold(name, (name,), _spare(labels, name, (name,)) if search else ()) for name in sorted(labels))
    if search and (poor := [fold.name for fold in folds if not fold.inner]):
        raise DataError(
            f"{len(poor)} fold(s) have nothing to choose on: [search] needs a label with two {by}s besides what is "
            "held out.",
            [f"without {by} {name}: no label can spare one" for name in poor],
            f"Leave [search] out, or add {by}s.",
        )
    return Folds(by=by, classes=classes, labels=labels, dropped=tuple(sorted(single)), folds=folds)


def _without_also(folds: Folds, used: pd.DataFrame) -> Folds:
    """Make the folds that leave out what shares a value of `also`, too; `used` are the rows that take part."""
    by, also = folds.by, folds.also
    if unknown := sorted(set(used.loc[used[also].isin(["", None]) | used[also].isna(), by].astype(str))):
        raise DataError(
            f"folds.also is {also!r}, which is not known of {len(unknown)} {by}(s).",
            unknown,
            f"Give each field its {also} in the screen's tables, or leave folds.also out.",
        )
    made, not_scorable = [], {}
    for name in sorted(folds.labels):
        mine = used[used[by].astype(str) == name]
        fold = Fold(name, (name,), also=tuple(sorted(set(mine[also].astype(str)))))
        left = set(used.loc[folds.training(used, fold), "label"])
        if len(left) > 1 and left.issuperset(folds.labels[name]):
            made.append(fold)
        else:
            not_scorable[name] = int(mine["treatment"].nunique())
    if not made:
        raise DataError(
            f"Nothing can be held out together with its {also}: no label would be left in another {by} of another "
            f"{also}, beside another label.",
            remedy="Leave folds.also out.",
        )
    return replace(folds, folds=tuple(made), not_scorable=not_scorable)


def _without_labels(by: str, classes: tuple[str, ...], labels: dict[str, tuple[str, ...]]) -> tuple[Fold, ...]:
    """Make the folds that leave out a label altogether, and besides one value of each other label that can spare it."""
    if several := [f"{by} {value}: {', '.join(own)}" for value, own in labels.items() if len(own) > 1]:
        raise DataError(
            f"folds.unknown leaves out one label at a time, and {len(several)} {by}(s) have several.",
            several,
            'Hold out what has one label, as folds.by = "compound".',
        )
    if len(classes) < 3:
        raise DataError(
            f"{len(classes)} labels are too few for folds.unknown: without one of them, at least two must be left to "
            "tell apart.",
            remedy="Leave folds.unknown out, or add compounds of other labels.",
        )
    folds = []
    for label in classes:
        unknown = [value for value, own in labels.items() if label in own]
        known = _spare(labels, label, unknown)
        folds.append(Fold(label, tuple(sorted([*unknown, *known])), unknown=label))
        if not known:
            raise DataError(
                f"Without label {label}, no other label can spare a {by}: nothing known could be held out beside it.",
                remedy=f"Leave folds.unknown out, or add {by}s.",
            )
    return tuple(folds)


def _spare(labels: dict[str, tuple[str, ...]], fold: str, held_out: Collection[str]) -> tuple[str, ...]:
    """Draw values from what a fold does not hold out: one of each label of which another is left to learn from.

    The draw depends on the fold's name, label and value alone: another seed of a run asks the same, and so do most
    folds of a screen that has grown.
    """
    inner: list[str] = []
    for label in sorted({label for own in labels.values() for label in own}):
        if any(label in labels[value] for value in inner):
            continue
        left = [value for value in labels if value not in held_out and value not in inner]
        able = [
            value
            for value in left
            if label in labels[value]
            and all(any(own in labels[other] for other in left if other != value) for own in labels[value])
        ]
        if able:
            inner.append(min(able, key=lambda value: digest(["inner", fold, label, value])))
    return tuple(sorted(inner))


def check_folds(folds: Folds, tiles: pd.DataFrame) -> None:
    """Check that every fold can be learnt and asked with the tiles that conversion kept.

    Raises
    ------
    DataError
        A fold holds out no tile, or trains on none of some label; lists all of these.
    """
    problems = []
    for fold in folds.folds:
        asked = tiles.loc[folds.held_out(tiles, fold), "label"] == fold.unknown
        if fold.unknown and not asked.any():
            problems.append(f"label {fold.name}: none of its tiles was kept")
        elif fold.unknown and asked.all():
            problems.append(f"without label {fold.name}: no tile of what else it holds out was kept")
        elif asked.empty:
            problems.append(f"{folds.by} {fold.name}: none of its tiles was kept")
        for within in (fold, fold.searching()) if fold.inner else (fold,):
            needed = {label for name in fold.held_out for label in folds.labels[name]} if folds.also else folds.classes
            unseen = set(needed) - set(tiles.loc[folds.training(tiles, within), "label"]) - {fold.unknown}
            where = ", in its search" if within.untouched else ""
            what = "label" if fold.unknown else folds.by
            problems += [
                f"without {what} {fold.name}{where}: no tile of {label} is left to learn from"
                for label in sorted(unseen)
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
    write_json(path, {**folds.document(), "sha256": folds.sha256})


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
        folds=tuple(
            Fold(
                fold["name"],
                tuple(fold["held_out"]),
                tuple(fold.get("inner", ())),
                also=tuple(fold.get("also", ())),
                unknown=fold.get("unknown", ""),
            )
            for fold in document["folds"]
        ),
        also=document.get("also", ""),
        not_scorable=document.get("not_scorable", {}),
    )
    if folds.sha256 != stated:
        raise DataError(
            f"{path}: its content hashes to {folds.sha256[:12]}, it states {str(stated)[:12]}: the file was changed.",
            remedy="Remove the study's folder and start again, or put the original file back.",
        )
    return folds
