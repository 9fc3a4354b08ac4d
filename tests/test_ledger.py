from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from cellhpc.errors import DataError
from cellhpc.ledger import digest, is_done, mark_done, provenance, read_json, replacing, write_json, write_table


def test_digest_depends_on_the_content_and_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of {}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"good": True})
    before = path.read_text()
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_unit_is_done_only_with_the_digest_that_is_expected(tmp_path: Path) -> None:
    assert not is_done(tmp_path, "one")
    mark_done(tmp_path, "one", rows=3)
    assert is_done(tmp_path, "one")
    assert not is_done(tmp_path, "two")
    (tmp_path / "done.json").write_text('{"digest": "on')
    assert not is_done(tmp_path, "one")


def test_a_torn_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"torn.json: not a JSON document"):
        read_json(tmp_path / "torn.json")


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_tables_keep_their_values(tmp_path: Path, name: str) -> None:
    table = pd.DataFrame({"well": ["B02", "B03"], "value": [0.5, 1.5]})
    write_table(tmp_path / name, table)
    read = pd.read_csv(tmp_path / name) if name.endswith("csv") else pd.read_parquet(tmp_path / name)
    pd.testing.assert_frame_equal(read, table)


def test_provenance_names_versions_and_commit() -> None:
    facts = provenance()
    assert {"cellhpc", "numpy", "zarr"} <= set(facts["versions"])
    if (Path(__file__).parents[1] / ".git").exists():
        assert len(facts["commit"]) == 40
