"""A store that is there: damage is found and named, plates go."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from cellhpc.convert import convert, plan_conversion
from cellhpc.errors import UsageError
from cellhpc.settings import ConvertSettings
from cellhpc.shards import Shards
from cellhpc.tiles import Store
from cellhpc.upkeep import remove, verify
from tests.conftest import Cellhpc
from tests.test_convert import contents, make_screen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw pictures of two plates, and the store that was made of them."""
    folder = tmp_path_factory.mktemp("made")
    screen = make_screen(folder / "raw")
    settings = ConvertSettings(shard_fields=2, illumination="mean", preprocessing="zscore")
    convert(plan_conversion(settings, screen, (16, 24), folder / "store"), workers=1)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, with the times of the files."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def test_a_sound_store(made: Path, cellhpc: Cellhpc) -> None:
    found = verify(made / "store")
    assert found.problems == ()
    assert (found.plates, found.shards, found.compared, found.without_pictures) == (2, 12, 10, 0)
    assert found.bytes == sum(path.stat().st_size for path in (made / "store").rglob("c.*"))
    said = cellhpc("verify", made / "store", "--sample", 3)
    assert said.returncode == 0, said.stderr
    assert "3 fields made anew and compared" in said.stdout
    assert said.stdout.endswith("All is well.\n")


def test_damage_is_named(folder: Path, cellhpc: Cellhpc) -> None:
    arrays = folder / "store/tiles.zarr"
    flipped = arrays / "P0/tiles_16/c.1.0.0.0"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    (arrays / "P1/tiles_24/c.0.0.0.0").unlink()
    (arrays / "P1/tiles_24/c.7.0.0.0").write_bytes(b"?")
    said = cellhpc("verify", folder / "store", "--raw", folder / "raw", "--sample", 0)
    assert said.returncode == 1
    assert "P0/tiles_16/c.1.0.0.0: its checksum is not the one that was recorded. Remove the plate" in said.stdout
    assert "P1/tiles_24/c.0.0.0.0: No such file or directory." in said.stdout
    assert "plate P1: tiles.zarr/P1/tiles_24/c.7.0.0.0 belongs to no task" in said.stdout


def test_a_field_of_a_damaged_shard_can_not_be_compared(folder: Path, cellhpc: Cellhpc) -> None:
    shard = folder / "store/tiles.zarr/P0/tiles_16/c.0.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-9])  # its index is torn
    said = cellhpc("verify", folder / "store", "--raw", folder / "raw")
    assert said.returncode == 1
    assert "P0/tiles_16/c.0.0.0.0: its checksum is not the one that was recorded" in said.stdout
    line = r"plate P0: well \w+ field \d: its tiles of 16 pixels can't be read: .*checksum do not match"
    assert re.search(line, said.stdout)
    assert "Traceback" not in said.stderr


def test_an_array_without_its_description_is_named(folder: Path) -> None:
    described = folder / "store/tiles.zarr/P1/tiles_24/zarr.json"
    described.write_bytes(described.read_bytes()[:100])
    problems = verify(folder / "store", folder / "raw").problems
    assert len(problems) == 5  # each field of the plate, and no other
    assert all(re.match(r"plate P1: .* its tiles of 24 pixels can't be read: ", problem) for problem in problems)


def test_tiles_are_read_without_our_own_decoder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an error that our writer and our decoder share would not be seen."""

    def decode(*_: object, **__: object) -> None:
        raise AssertionError("our own decoder was asked")

    monkeypatch.setattr(Shards, "decode", decode)
    found = verify(made / "store")
    assert (found.compared, found.problems) == (10, ())


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-9],
    "noise": lambda content: content[::-1],
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["fields.parquet", "tiles.parquet", "illumination.npy"])
def test_a_damaged_table_is_named_and_the_other_plates_are_verified(name: str, how: str, folder: Path) -> None:
    path = folder / "store/plates/P0" / name
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    found = verify(folder / "store", folder / "raw")
    (problem,) = found.problems
    assert problem.startswith(f"plate P0: {name} can't be read: ")
    assert problem.endswith(". Remove the plate (cellhpc remove STORE PLATE) and convert it again.")
    assert (found.plates, found.shards, found.compared) == (2, 12, 5)  # its shards too; the fields of the other plate


def test_tables_that_are_missing_or_lack_a_column(folder: Path, cellhpc: Cellhpc) -> None:
    (folder / "store/plates/P0/illumination.npy").unlink()
    tiles = folder / "store/plates/P1/tiles.parquet"
    pd.read_parquet(tiles).drop(columns="row").to_parquet(tiles)
    said = cellhpc("verify", folder / "store", "--raw", folder / "raw")
    assert (said.returncode, "Traceback" in said.stderr) == (1, False)
    assert "plate P0: illumination.npy can't be read: No such file or directory. Remove the plate" in said.stdout
    assert re.search(r"plate P1: tiles.parquet can't be read: .*'row'.* not in index", said.stdout)


def test_a_record_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "store/plates/P0/plate.json").write_text("{")
    (problem,) = verify(folder / "store", folder / "raw").problems
    assert re.match(r"plate P0: .*plate.json: not a JSON document: .* Remove the plate", problem)


def test_pictures_that_changed_or_went_away(folder: Path) -> None:
    file = folder / "raw/P0/00_dna.tif"
    os.utime(file, ns=(0, 1))
    problems = verify(folder / "store", folder / "raw").problems
    assert problems == ()  # of the three files of a field, the last one counts
    os.utime(file, ns=(0, 2**62))
    problems = verify(folder / "store", folder / "raw").problems
    assert problems == ("plate P0: well B01 field 1: its raw pictures were changed since it was converted",)
    shutil.rmtree(folder / "raw/P1")
    found = verify(folder / "store", folder / "raw")
    assert (found.compared, found.without_pictures) == (5, 5)


def test_tiles_that_are_not_those_of_the_pictures(folder: Path) -> None:
    """A plate's statistics were edited: every checksum holds, and the tiles are not what they give."""
    record = folder / "store/plates/P1/plate.json"
    text = record.read_text()
    first = text.index("[", text.index('"mean"')) + 1
    record.write_text(text[:first] + "1.0, " + text[text.index(",", first) + 1 :])
    problems = verify(folder / "store", folder / "raw").problems
    assert len(problems) == 5
    assert all("are not what its raw pictures give" in problem for problem in problems)


def test_a_plate_is_removed_and_converted_again(made: Path, folder: Path, cellhpc: Cellhpc) -> None:
    before = contents(folder / "store")
    said = cellhpc("remove", folder / "store", "P0")
    assert (said.returncode, said.stdout) == (0, "removed: P0\n")
    assert set(contents(folder / "store")) == {name for name in before if "/P0/" not in name}
    assert set(Store.open(folder / "store").tiles["plate"]) == {"P1"}
    screen = make_screen(folder / "new", plates=1)
    settings = ConvertSettings(shard_fields=2, illumination="mean", preprocessing="zscore")
    convert(plan_conversion(settings, screen, (16, 24), folder / "store"), workers=1)
    after = contents(folder / "store")
    assert after["tiles.zarr/P0/tiles_16/c.0.0.0.0"] == before["tiles.zarr/P0/tiles_16/c.0.0.0.0"]


def test_what_is_not_there(made: Path, tmp_path: Path, cellhpc: Cellhpc) -> None:
    with pytest.raises(UsageError, match=r"has no plate P7. Its plates are: P0, P1\."):
        remove(made / "store", ["P0", "P7"])
    assert Store.open(made / "store").plates == ("P0", "P1")
    refused = cellhpc("verify", tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no store of tiles is there" in refused.stderr
