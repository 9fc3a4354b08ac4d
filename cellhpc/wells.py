"""Places of wells on plates of 96, 384 and 1,536 wells."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

PLATE_SHAPES = ((8, 12), (16, 24), (32, 48))
"""Rows and columns of the plates in use: 96, 384 and 1,536 wells."""
ROWS = (*string.ascii_uppercase, *(f"A{letter}" for letter in "ABCDEF"))

Place = tuple[int, int]
"""Row and column of a well, from 0."""


def place(well: str) -> Place:
    """Place of a well: B06 is (1, 5), AA1 is (26, 0).

    Raises
    ------
    ValueError
        No plate of up to 1,536 wells has such a well.
    """
    match = re.fullmatch(r"([A-Z]{1,2})(\d{1,3})", well.upper())
    if not match or match[1] not in ROWS or not 1 <= int(match[2]) <= PLATE_SHAPES[-1][1]:
        raise ValueError(f"well {well!r} is none of A01 to {ROWS[-1]}{PLATE_SHAPES[-1][1]}")
    return ROWS.index(match[1]), int(match[2]) - 1


def plate_shape(places: Sequence[Place]) -> tuple[int, int]:
    """Rows and columns of the smallest plate that has wells at all these places."""
    return next(shape for shape in PLATE_SHAPES if all(row < shape[0] and column < shape[1] for row, column in places))
