from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from cellhpc.errors import DataError, UsageError
from cellhpc.folds import check_folds, plan_folds, read_folds, write_folds
from cellhpc.profiles import folds as baseline_folds
from cellhpc.screens import read_screen
from cellhpc.settings import Bbbc021Screen, FoldsSettings, load_job
from tests import small


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
        assert folds.named(fold.name) is fold
    assert folds.named("c1").held_out == ()


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


class TestInnerCompounds:
    """Those on which a search chooses."""

    def test_without_a_search_there_are_none_and_the_split_is_what_it_was(self) -> None:
        folds = plan_folds(TABLE, FoldsSettings())
        assert folds.document()["folds"] == [{"name": name, "held_out": (name,)} for name in ("a1", "a2", "b1", "b2")]
        assert folds.sha256 == "0648a8d303c06e3ce2180fb489bf3876ff4985f7c9c03709886cf72b697b63ad"

    def test_one_of_each_label_that_can_spare_it_on_the_real_screen(self, cellhpc_data: Path) -> None:
        settings = Bbbc021Screen(layout="bbbc021", path=cellhpc_data, tables=cellhpc_data / "bbbc021_metadata")
        fields = read_screen(settings).fields
        folds = plan_folds(fields, FoldsSettings(), search=True)
        label_of = {compound: label for compound, (label,) in folds.labels.items()}
        for fold in folds.folds:
            left = Counter(label for compound, label in label_of.items() if compound not in fold.held_out)
            able = sorted(label for label, count in left.items() if count >= 2)
            assert sorted(label_of[compound] for compound in fold.inner) == able
            assert folds.cannot_spare(fold) == sorted(set(folds.classes) - set(able))
            assert not set(fold.inner) & set(fold.held_out)
        assert min(len(fold.inner) for fold in folds.folds) == 11

    def test_a_search_holds_them_out_and_does_not_touch_the_outer_ones(self) -> None:
        table = small.tiles()
        folds = plan_folds(table, FoldsSettings(), search=True)
        for fold in folds.folds:
            inner = fold.searching()
            training, asked = folds.training(table, inner), folds.held_out(table, inner)
            outer = folds.held_out(table, fold)
            assert (training.astype(int) + asked + outer == 1).all()
            assert set(table.loc[asked, "compound"]) == set(fold.inner)
            assert set(table.loc[training, "label"]) == set(folds.classes)

    def test_they_depend_on_the_fold_alone(self) -> None:
        few = plan_folds(small.tiles(), FoldsSettings(), search=True)
        more = pd.concat([small.tiles(), fields({"z1": "Z", "z2": "Z", "z3": "Z"})], ignore_index=True)
        shuffled = more.sample(frac=1, random_state=0)
        grown = {fold.name: fold for fold in plan_folds(shuffled, FoldsSettings(), search=True).folds}
        for fold in few.folds:
            assert set(fold.inner) < set(grown[fold.name].inner)
        assert len({fold.inner for fold in few.folds}) > 1

    def test_a_value_of_several_labels_is_spared_only_if_each_is_left(self) -> None:
        table = TABLE.assign(batch=["w1", "w2", "w1", "w2"] * 2)
        table = pd.concat([table, table.assign(batch=table["batch"].replace({"w1": "w3", "w2": "w4"}))])
        folds = plan_folds(table, FoldsSettings(by="batch"), search=True)
        assert all(len(fold.inner) == 1 for fold in folds.folds)
        message = r"2 fold\(s\) have nothing to choose on: \[search\] needs a label with two batchs besides"
        with pytest.raises(DataError, match=message):
            plan_folds(TABLE.assign(batch=["w1", "w2", "w1", "w2"] * 2), FoldsSettings(by="batch"), search=True)

    def test_the_file_carries_them_in_its_hash(self, tmp_path: Path) -> None:
        path = tmp_path / "folds.json"
        folds = plan_folds(small.tiles(), FoldsSettings(), search=True)
        write_folds(path, folds)
        assert read_folds(path) == folds
        assert folds.sha256 != plan_folds(small.tiles(), FoldsSettings()).sha256
        document = json.loads(path.read_text())
        document["folds"][0]["inner"] = document["folds"][0]["inner"][:1]
        path.write_text(json.dumps(document))
        with pytest.raises(DataError, match="the file was changed"):
            read_folds(path)

    def test_a_search_that_conversion_left_without_a_label_is_refused(self) -> None:
        table = TABLE.assign(batch=["w1", "w2", "w1", "w2"] * 2)
        table = pd.concat([table, table.assign(batch="w3"), table.assign(batch="w4")])
        folds = plan_folds(table, FoldsSettings(by="batch"), search=True)
        check_folds(folds, table)
        kept = table[(table["label"] == "A") | table["batch"].isin(["w3", "w4"])]
        with pytest.raises(DataError, match=r"without batch w\d, in its search: no tile of B is left to learn from"):
            check_folds(folds, kept)


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


WEEKS = {"a1": "W1", "a2": "W2", "b1": "W1", "b2": "W2", "b3": "W3", "c1": "W3", "c2": "W3"}
"""Two fields of each compound; all that is left of c without its week is nothing."""


def weekly() -> pd.DataFrame:
    table = fields({name: name[0].upper() for name in WEEKS})
    return table.assign(batch=table["compound"].map(WEEKS), treatment=table["compound"] + " 1 uM")


def test_the_batch_can_be_left_out_with_the_compound() -> None:
    table = weekly()
    folds = plan_folds(table, FoldsSettings(also="batch"))
    assert [fold.name for fold in folds.folds] == ["a1", "a2", "b1", "b2", "b3"]
    assert folds.not_scorable == {"c1": 1, "c2": 1}
    assert folds.classes == ("A", "B", "C")
    for fold in folds.folds:
        held_out, training = folds.held_out(table, fold), folds.training(table, fold)
        assert set(table.loc[held_out, "compound"]) == {fold.name}
        assert (training == ((table["compound"] != fold.name) & (table["batch"] != WEEKS[fold.name]))).all()
    check_folds(folds, table)  # without b3 no tile of C is left, and none of C is asked
    with pytest.raises(DataError) as fault:
        check_folds(folds, table[table["compound"] != "a2"])
    assert fault.value.problems == (
        "without compound a1: no tile of A is left to learn from",
        "compound a2: none of its tiles was kept",
    )


def test_a_compound_of_several_batches_is_left_out_with_all_of_them() -> None:
    table = weekly()
    table.loc[table.index[table["compound"] == "a1"][1], "batch"] = "W4"
    folds = plan_folds(table, FoldsSettings(also="batch"))
    assert folds.folds[0].also == ("W1", "W4")
    assert set(table.loc[folds.training(table, folds.folds[0]), "batch"]) == {"W2", "W3"}


def test_the_folds_without_batches_are_those_of_the_baseline_of_features() -> None:
    table = weekly()
    folds = plan_folds(table, FoldsSettings(also="batch"))
    known = dict(zip(sorted(WEEKS), baseline_folds(table.sort_values("compound"), "compound_and_batch"), strict=True))
    for fold in folds.folds:
        _, training = known[fold.name]
        assert set(table.loc[folds.training(table, fold), "compound"]) == set(
            table.sort_values("compound")["compound"][training]
        )


def test_batches_that_are_not_known_or_leave_nothing_are_refused() -> None:
    table = weekly()
    with pytest.raises(UsageError, match=r"folds.also is 'week', which is no column.*Allowed: batch, compound"):
        plan_folds(table, FoldsSettings(also="week"))
    with pytest.raises(DataError, match=r"folds.also is 'batch', which is not known of 1 compound\(s\)") as fault:
        plan_folds(table.assign(batch=table["batch"].where(table["compound"] != "b2", "")), FoldsSettings(also="batch"))
    assert fault.value.problems == ("b2",)
    with pytest.raises(DataError, match="Nothing can be held out together with its batch"):
        plan_folds(table.assign(batch="W1"), FoldsSettings(also="batch"))


def test_the_file_keeps_what_is_left_out_besides(tmp_path: Path) -> None:
    folds = plan_folds(weekly(), FoldsSettings(also="batch"))
    write_folds(tmp_path / "folds.json", folds)
    assert read_folds(tmp_path / "folds.json") == folds
    # A split without it has the hash that it always had.
    assert set(plan_folds(TABLE, FoldsSettings()).document()) == {"by", "classes", "labels", "dropped", "folds"}


def test_49_of_the_real_treatments_can_be_scored_without_their_week(cellhpc_data: Path) -> None:
    job = load_job(Path(__file__).parents[1] / "jobs" / "bbbc021_subset.toml", ["folds.also=batch"])
    folds = plan_folds(read_screen(job.screen).fields, job.folds)
    assert folds.not_scorable == {"mevinolin/lovastatin": 3, "simvastatin": 3}
    assert len(folds.folds) == 16


MECHANISMS = {"a1": "A", "a2": "A", "a3": "A", "b1": "B", "b2": "B", "c1": "C"}
"""Of C there is one compound: it can be unknown, and is never spared."""


class TestUnknownLabels:
    """Folds that leave a whole label out."""

    def test_the_split_of_six_compounds_by_hand(self) -> None:
        table = fields(MECHANISMS)
        folds = plan_folds(table, FoldsSettings(unknown=True))
        assert (folds.by, folds.classes, folds.dropped, folds.unknown) == ("compound", ("A", "B", "C"), (), True)
        held_out = {fold.unknown: fold.held_out for fold in folds.folds}
        assert held_out == {"A": ("a1", "a2", "a3", "b1"), "B": ("a3", "b1", "b2"), "C": ("a1", "b1", "c1")}
        assert [fold.name for fold in folds.folds] == ["A", "B", "C"]
        for fold in folds.folds:
            training = set(table.loc[folds.training(table, fold), "compound"])
            assert training == set(MECHANISMS) - set(fold.held_out)
            assert set(table.loc[folds.held_out(table, fold), "compound"]) == set(fold.held_out)
            assert {MECHANISMS[name] for name in training} == {"A", "B", "C"} - {fold.unknown}
        check_folds(folds, table)

    def test_the_known_compounds_are_drawn_as_those_of_a_search(self) -> None:
        """Without the unknown label, the draw of its fold is that of any fold that has its name."""
        table = fields(MECHANISMS)
        folds = plan_folds(table, FoldsSettings(unknown=True))
        without = {**{name: label for name, label in MECHANISMS.items() if label != "C"}, "C": "C", "also C": "C"}
        (same,) = (fold for fold in plan_folds(fields(without), FoldsSettings(), search=True).folds if fold.name == "C")
        assert set(same.inner) == set(folds.folds[2].held_out) - {"c1"}
        more = plan_folds(fields({**MECHANISMS, "d1": "D", "d2": "D"}), FoldsSettings(unknown=True))
        for fold, grown in zip(folds.folds, more.folds, strict=False):
            assert set(fold.held_out) < set(grown.held_out)

    def test_twelve_folds_of_the_real_screen(self, cellhpc_data: Path) -> None:
        settings = Bbbc021Screen(layout="bbbc021", path=cellhpc_data, tables=cellhpc_data / "bbbc021_metadata")
        table = read_screen(settings).fields
        folds = plan_folds(table, FoldsSettings(unknown=True))
        assert [fold.unknown for fold in folds.folds] == list(folds.classes)
        assert len(folds.folds) == 12
        for fold in folds.folds:
            training = table[folds.training(table, fold)]
            assert set(training["label"]) == set(folds.classes) - {fold.unknown}
            known = Counter(folds.labels[value][0] for value in fold.held_out if folds.labels[value] != (fold.unknown,))
            assert known == dict.fromkeys(sorted(set(folds.classes) - {fold.unknown}), 1)

    def test_a_single_compound_is_dropped_if_that_is_asked(self) -> None:
        table = fields({**MECHANISMS, "d1": "D", "d2": "D"})
        folds = plan_folds(table, FoldsSettings(unknown=True, on_single_compound="drop"))
        assert (folds.classes, folds.dropped) == (("A", "B", "D"), ("C",))

    def test_the_file_keeps_them(self, tmp_path: Path) -> None:
        folds = plan_folds(fields(MECHANISMS), FoldsSettings(unknown=True))
        write_folds(tmp_path / "folds.json", folds)
        assert read_folds(tmp_path / "folds.json") == folds
        assert not plan_folds(TABLE, FoldsSettings()).unknown

    def test_what_can_not_be_left_out_is_refused(self) -> None:
        unknown = FoldsSettings(unknown=True)
        with pytest.raises(DataError, match=r"2 labels are too few for folds.unknown: without one of them, at least"):
            plan_folds(TABLE, unknown)
        lonely = fields({"a1": "A", "a2": "A", "b1": "B", "c1": "C"})
        with pytest.raises(DataError, match="Without label A, no other label can spare a compound"):
            plan_folds(lonely, unknown)
        lines = fields(MECHANISMS).assign(cell_line=["MCF7", "A549"] * 6)
        with pytest.raises(DataError, match=r"leaves out one label at a time, and 2 cell_line\(s\) have sev") as fault:
            plan_folds(lines, FoldsSettings(by="cell_line", unknown=True))
        assert fault.value.problems == ("cell_line A549: A, B, C", "cell_line MCF7: A, B")

    def test_a_fold_that_conversion_left_without_known_or_unknown_tiles_is_refused(self) -> None:
        table = fields(MECHANISMS)
        folds = plan_folds(table, FoldsSettings(unknown=True))
        with pytest.raises(DataError) as fault:
            check_folds(folds, table[~table["compound"].isin(["b1", "c1"])])
        assert fault.value.problems == (
            "without label A: no tile of what else it holds out was kept",
            "without label A: no tile of C is left to learn from",
            "without label B: no tile of C is left to learn from",
            "label C: none of its tiles was kept",
        )
