"""What a newcomer's machine must have is told in one sentence, before anything is downloaded."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "-C", str(ROOT), *words], capture_output=True, text=True, env=environment, check=False, timeout=60
    )


@pytest.fixture
def old_python(tmp_path: Path) -> Path:
    """A program that says it is Python 3.9."""
    program = tmp_path / "python3.9"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    program.chmod(0o755)
    return program


def test_this_machine_has_what_is_needed() -> None:
    assert make("machine").returncode == 0


def test_a_wrong_python_is_one_sentence(old_python: Path) -> None:
    refused = make("machine", f"PYTHON={old_python}")
    assert refused.returncode != 0
    assert f"cellhpc needs Python 3.11; {old_python} is Python 3.9.2. Name another: make PYTHON=" in refused.stderr


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("PYTHON=", "needs Python 3.11, and there is no python3 here"),
        ("PYTHON=/nowhere/python3", "needs Python 3.11; /nowhere/python3 is no Python"),
        ("CXX=no-such-compiler", "needs a C++ compiler; there is no no-such-compiler. On Debian: apt-get install g++"),
    ],
)
def test_what_is_missing_is_one_sentence(word: str, message: str) -> None:
    refused = make("machine", word)
    assert refused.returncode != 0
    assert message in refused.stderr


def test_one_rank_needs_no_horovod() -> None:
    """The package's own requirements name neither Horovod nor TensorFlow; extras do."""
    text = (ROOT / "pyproject.toml").read_text()
    required = text.partition("dependencies = [")[2].partition("\n]")[0]
    assert "horovod" not in required.lower()
    assert "tensorflow" not in required.lower().replace("# tensorflow", "")
