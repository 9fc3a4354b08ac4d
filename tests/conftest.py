"""What several tests need: the real data, where it is, and a cellhpc command run as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# A shell starts what runs in the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.slurm_cluster"]

Cellhpc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cellhpc_data() -> Path:
    """Folder of the real test data, named by the environment variable CELLHPC_DATA."""
    folder = os.environ.get("CELLHPC_DATA")
    if not folder:
        pytest.skip("the environment variable CELLHPC_DATA names no folder of real data")
    return Path(folder).absolute()


@pytest.fixture(scope="session")
def cellhpc() -> Cellhpc:
    """Run the command `cellhpc` with these words; returns its code, output and errors."""

    def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cellhpc.cli", *map(str, words)],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "160", **environment},
            timeout=540,
            check=False,
        )

    return command
