from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cellhpc


def test_help_names_every_command(cellhpc: Cellhpc) -> None:
    told = cellhpc("--help")
    assert told.returncode == 0
    for command in ("synth", "inspect", "run", "convert", "train", "aggregate", "score", "features"):
        assert f"\n  {command} " in told.stdout
    assert told.stdout.count("\n  cellhpc ") == 10  # each command by itself, with what it is for
    assert "\\b" not in told.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "absent.toml"), "cellhpc: absent.toml: no such job file"),
        (("run",), "Missing argument 'JOB.toml'"),
        (("fly",), "No such command 'fly'"),
        (("run", "absent.toml", "--fast"), "No such option '--fast'"),
        (("synth", "bbbc022", "there"), "layout is 'bbbc022'. Allowed: bbbc021, bbbc014."),
        (("synth", "bbbc021", "there", "--set", "sed=1"), "sed: unknown key. Valid here: seed, "),
    ],
)
def test_a_wrong_command_line_is_one_message_and_code_2(
    cellhpc: Cellhpc, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    refused = cellhpc(*words)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_inspect_answers_in_json_and_fails_when_the_tables_are_wrong(cellhpc: Cellhpc, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        f"""
        study = {{name = "s", folder = "{tmp_path}/study"}}
        [screen]
        layout = "manifest"
        path = "{tmp_path}"
        table = "fields.csv"
        channels = ["dna"]
        files = {{dna = "{{file}}"}}
        columns = {{plate = "plate", well = "well", compound = "compound", concentration = "dose", label = "moa"}}
        """
    )
    (tmp_path / "a.tif").write_bytes(b"not looked into")
    table = tmp_path / "fields.csv"
    table.write_text("plate,well,compound,dose,moa,file\nP1,B02,one,0.1,A,a.tif\n")
    good = cellhpc("inspect", job, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["problems"] == []
    table.write_text(table.read_text().replace("0.1", "much"))
    bad = cellhpc("inspect", job, "--json")
    assert bad.returncode == 1
    (problem,) = json.loads(bad.stdout)["problems"]
    assert "much" in problem
