"""Units of work on disk: digests, done markers, atomic writes, provenance.

A unit of work is a folder. Its outputs are written first, each by an atomic rename; its marker `done.json` comes last
and carries the digest of all that went into it. A unit whose marker holds the expected digest is finished;
anything else is done again. Nothing is ever half there under its final name.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellhpc.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd

DONE = "done.json"


def digest(document: Any) -> str:
    """SHA-256, in hexadecimal, of a document's canonical JSON (sorted keys, no blanks)."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def replacing(path: Path, make_folder: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the name `path` at once, on failure it is removed."""
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    temporary.touch(exist_ok=False)  # who may read it is the umask's decision, as for any file
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, make_folder: bool = True) -> None:
    """Write a text file atomically."""
    with replacing(path, make_folder) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any, make_folder: bool = True) -> None:
    """Write a JSON document atomically, indented."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n", make_folder)


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises
    ------
    DataError
        The file holds something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise DataError(
            f"{path}: not a JSON document: {fault}", remedy="Remove the file and what was made with it."
        ) from None


def write_table(path: Path, table: pd.DataFrame, make_folder: bool = True) -> None:
    """Write a table atomically, as Parquet or CSV by the ending of its name."""
    with replacing(path, make_folder) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)


def is_done(unit: Path, expected: str) -> bool:
    """Tell whether a unit of work is finished with the digest that is expected now."""
    return done_digest(unit) == expected


def done_digest(unit: Path) -> str | None:
    """Digest with which a unit was finished; None when it was not."""
    try:
        return read_json(unit / DONE)["digest"]
    except (FileNotFoundError, DataError, KeyError, NotADirectoryError):
        return None


def mark_done(unit: Path, unit_digest: str, **facts: Any) -> None:
    """Mark a unit of work as finished; the last thing that is written of it."""
    write_json(unit / DONE, {"digest": unit_digest, **facts})


class Taken(UsageError):
    """Another process holds a lock."""


@contextlib.contextmanager
def held(lock: Path, where: str, taken: str) -> Iterator[None]:
    """Hold a lock file for this process; it is free again when the process ends, however it ends.

    Raises
    ------
    Taken
        Another process holds it; the message is `taken`.
    UsageError
        The file can't be made, or not locked; the message begins with `where`.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        opened = lock.open("w")
    except OSError as fault:
        raise UsageError(f"{where} can't be written: {fault.strerror}. Choose another folder.") from None
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Taken(taken) from None
        except OSError as fault:
            raise UsageError(
                f"{where}: its file system gives no locks ({fault.strerror}). Choose another folder, or have it "
                "mounted with locks (of Lustre: the option flock)."
            ) from None
        yield


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions, host, commit and image that a result is made with; as they were when a process first asked."""
    packages = (
        "cellhpc", "tensorflow-cpu", "tensorflow", "keras", "horovod", "numpy", "zarr", "dask", "scikit-learn",
        "opencv-python-headless", "tifffile", "imagecodecs", "pillow",
    )  # fmt: skip
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **_commit(),
        **({"image": image} if (image := os.environ.get("CELLHPC_IMAGE")) else {}),
    }


def _commit() -> dict[str, Any]:
    """Commit that cellhpc runs from, and whether files differ from it; nothing when it is installed without one."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        commit, _, dirty = os.environ.get("CELLHPC_COMMIT", "").partition("-")  # a container's
        return {"commit": commit, "dirty": bool(dirty)} if commit not in ("", "unknown") else {}
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "dirty": bool(changed.strip())}
