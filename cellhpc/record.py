"""The record of a finished store, `store.json`: what it was made from, and which fields had to be set aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellhpc.ledger import digest, read_json

STORE = "store.json"


def is_store(folder: Path) -> bool:
    """Tell whether a store that was finished once lies in a folder."""
    return (folder / STORE).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """Read a store's record; empty where there is none."""
    try:
        record: dict[str, Any] = read_json(folder / STORE)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return record


def content_digest(record: dict[str, Any]) -> str:
    """Digest of what a finished store holds, from its record: the plan's, and that of the fields set aside."""
    stated: str = record["digest"]
    return digest([stated, record["bad_fields"]]) if record["bad_fields"] else stated
