"""What tests need of the machine: in CI on Debian it is installed, elsewhere they are skipped without it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def may_install() -> bool:
    """Whether this is CI, as root, on Debian."""
    return os.environ.get("CI") == "true" and os.geteuid() == 0 and bool(shutil.which("apt-get"))


def install(*command: str | Path) -> None:
    """Run a command that installs packages: one at a time, as tests run in several processes and apt in one."""
    with (Path(tempfile.gettempdir()) / "cellhpc-tests-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(command, check=True, timeout=540, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
