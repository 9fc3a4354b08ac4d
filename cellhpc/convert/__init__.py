"""Raw fields to 8-bit tiles.

`planning` makes a `plan`, which is data; `tasks` are what workers do; `bases` finds out what a plate is normalised by;
`execute` carries out a plan, `running` its jobs, on Dask's `workers`; `tables` indexes what was made; `archiving` sees
that all of it is in the archive, if there is one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellhpc.convert.execute import convert
    from cellhpc.convert.plan import ConversionPlan
    from cellhpc.convert.planning import plan_conversion

__all__ = ["ConversionPlan", "convert", "plan_conversion"]

_HOMES = {"convert": "execute", "ConversionPlan": "plan", "plan_conversion": "planning"}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: a worker needs `tasks` alone, and starts in a fifth of the time."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
