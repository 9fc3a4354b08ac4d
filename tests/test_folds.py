from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from cellhpc.errors import DataError, UsageError
from cellhpc.folds import check_folds, plan_folds, read_folds, write_folds
from cellhpc.screens import read_screen
from cellhpc.settings import Bbbc021Screen, FoldsSettings


def fields(labels: dict[str, str], role: str = "treatment") -> pd.DataFrame:
    """Two fields of each compound."""
    rows = [{"compound": name, "label": label, "role": role, "plate": "P1"} for name, label in labels.items()] * 2
    return pd.DataFrame(rows)


TABLE = fields({"a1": "A", "a2": "A", "b1": "B", "b2": "B"})


def test_every_compound_is_held_out_once_and_never_trained_on() -> None:
    folds = plan_folds(TABLE, FoldsSettings())
    assert [fold.name for fold in folds.folds] == ["a1", "a2", "b1", "b2"]
    for fold in folds.folds:
        held_out, training = folds.held_out(TABLE, fold), folds.training(TABLE, fold)
        assert set(TABLE.loc[held_out, "compound"]) == {fold.name}
        assert fold.name not in set(TABLE.loc[training, "compound"])
        assert (held_out ^ training).all()


def test_controls_and_fields_that_were_left_out_take_no_part() -> None:
    table = pd.concat([TABLE, fields({"a1": "A"}, "left out"), fields({"DMSO": ""}, "dmso")], ignore_index=True)
    folds = plan_folds(table, FoldsSettings())
    assert folds.used(table).sum() == len(TABLE)
    assert folds == plan_folds(TABLE, FoldsSettings())


def test_the_real_screen_has_38_folds_of_12_mechanisms(cellhpc_data: Path) -> None:
    settings = Bbbc021Screen(layout="bbbc021", path=cellhpc_data, tables=cellhpc_data / "bbbc021_metadata")
    folds = plan_folds(read_screen(settings).fields, FoldsSettings())
    assert (len(folds.folds), len(folds.classes)) == (38, 12)


def test_a_label_with_a_single_compound_is_refused_or_dropped() -> None:
    table = pd.concat([TABLE, fields({"c1": "C"})], ignore_index=True)
    message = r"1 label\(s\) have a single compound.*\n  - C: only c1\n.*--set folds.on_single_compound=\"drop\""
    with pytest.raises(DataError, match=message):
        plan_folds(table, FoldsSettings())
    folds = plan_folds(table, FoldsSettings(on_single_compound="drop"))
    assert folds.dropped == ("C",)
    assert folds.classes == ("A", "B")
    assert folds.used(table).sum() == len(TABLE)


def test_another_column_can_be_held_out() -> None:
    table = TABLE.assign(cell_line=["MCF7", "MCF7", "MCF7", "MCF7", "A549", "A549", "A549", "A549"])
    folds = plan_folds(table, FoldsSettings(by="cell_line"))
    assert [fold.name for fold in folds.folds] == ["A549", "MCF7"]
    assert folds.labels["MCF7"] == ("A", "B")
    with pytest.raises(
        UsageError, match=r"folds.by is 'cellline', which is no column.*Allowed: compound, label, plate, role"
    ):
        plan_folds(TABLE, FoldsSettings(by="cellline"))


def test_numbers_can_be_held_out_too() -> None:
    table = TABLE.assign(dose=[0.1, 0.3, 0.1, 0.3] * 2)
    folds = plan_folds(table, FoldsSettings(by="dose"))
    assert [fold.name for fold in folds.folds] == ["0.1", "0.3"]
    assert folds.held_out(table, folds.folds[0]).sum() == folds.training(table, folds.folds[0]).sum() == 4


def test_a_fold_that_conversion_left_empty_is_refused() -> None:
    folds = plan_folds(TABLE, FoldsSettings())
    check_folds(folds, TABLE)
    kept = TABLE[TABLE["compound"] != "a1"]
    with pytest.raises(DataError) as fault:
        check_folds(folds, kept)
    assert fault.value.problems == (
        "compound a1: none of its tiles was kept",
        "without compound a2: no tile of A is left to learn from",
    )


def test_one_label_is_not_enough() -> None:
    with pytest.raises(DataError, match=r"1 label\(s\) remain to tell apart, at least two are needed"):
        plan_folds(fields({"a1": "A", "a2": "A"}), FoldsSettings())


def test_the_file_carries_a_hash_that_an_edit_breaks(tmp_path: Path) -> None:
    path = tmp_path / "folds.json"
    folds = plan_folds(TABLE, FoldsSettings())
    write_folds(path, folds)
    assert read_folds(path) == folds
    document = json.loads(path.read_text())
    assert document["sha256"] == folds.sha256
    document["folds"][0]["held_out"] = ["a2"]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="the file was changed"):
        read_folds(path)
