"""`[search]` of the job file: settings of `[train]` among which every run chooses, on compounds of its training set.

Each key of `[search]` is one of `[train]`, with a list of values; the candidates are all their combinations, on top of
what `[train]` says::

    [search]
    epochs = [8, 16, 24]
    learning_rate = [0.003, 0.01]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from pydantic import ValidationError

from cellhpc.recipe import TrainSettings

MOST = 64
"""Candidates that a search may have: each is a training of every run."""
NEVER = ("preset", "inputs", "window_tiles", "dropout_draws")
"""Keys of `[train]` that all runs of a study share: what they see, how it is read, and what is asked at last."""


@dataclass(frozen=True)
class Candidate:
    """One combination.

    Attributes
    ----------
    name
        Its number as its folder is named: `c00`.
    values
        What it changes, as in the job file.
    settings
        How it trains.
    """

    name: str
    values: dict[str, Any]
    settings: TrainSettings


def candidates(train: TrainSettings, search: Mapping[str, Sequence[Any]]) -> tuple[Candidate, ...]:
    """List the candidates of a search in the order in which they are written, the last key varying first.

    Raises
    ------
    ValueError
        A key can't be searched, a candidate is not valid, two are the same, or there are too few or too many.
    """
    if not search:
        return ()
    allowed = [key for key in TrainSettings.model_fields if key not in NEVER]
    for key, choices in search.items():
        if key not in allowed:
            raise ValueError(f"search.{key}: this can't be searched. Allowed: {', '.join(allowed)}")
        if not choices:
            raise ValueError(f"search.{key} is empty")
    count = prod(map(len, search.values()))
    if not 2 <= count <= MOST:
        raise ValueError(f"search has {count} candidate(s), the product of its lists; allowed are 2 to {MOST}")
    given = train.model_dump()
    found: list[Candidate] = []
    for number, combination in enumerate(product(*search.values())):
        values = dict(zip(search, combination, strict=True))
        try:
            settings = TrainSettings.model_validate({**given, **values})
        except ValidationError as fault:
            first = fault.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"][:1])
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"search: the candidate {describe(values)} is not allowed: {where}{message}") from None
        same = [other for other in found if other.settings == settings]
        if same:
            raise ValueError(
                f"search: the candidates {describe(same[0].values)} and {describe(values)} are the same; name it once"
            )
        found.append(Candidate(f"c{number:02d}", values, settings))
    return tuple(found)


def describe(values: Mapping[str, Any]) -> str:
    """Write a candidate's values as in a job file: `epochs = 8, learning_rate = 0.01`."""
    return ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in values.items())
