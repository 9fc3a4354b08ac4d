"""What models are called, and names that must differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_name(model: Mapping[str, Any]) -> str:
    """Name a model for those who read of it: its `network` and its `initialisation`."""
    return f"{model['network']}, {model['initialisation']}"


def told_apart(names: Sequence[str]) -> list[str]:
    """Give names that others have too a number, the first of them none; capital letters tell no names apart.

    They are of files and of links, and some file systems don't tell them apart either.
    """
    found: dict[str, str] = {}
    for name in names:
        numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, len(names) + 1))
        free = next(one for one in numbered if one.lower() not in found)
        found[free.lower()] = free
    return [*found.values()]
