"""Synthetic screens in the exact raw layout of real ones, for trying, testing and measuring without real data.

>>> from cellhpc.synth import choose, synth
>>> summary = synth("demo/raw", choose("bbbc021", "demo", {"seed": 7}))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cellhpc.errors import UsageError
from cellhpc.synth.bbbc014 import Bbbc014Synthetic, synth_bbbc014
from cellhpc.synth.bbbc021 import Bbbc021Synthetic, synth_bbbc021

__all__ = [
    "LAYOUTS", "PRESETS", "Bbbc014Synthetic", "Bbbc021Synthetic", "choose", "synth", "synth_bbbc014", "synth_bbbc021",
]  # fmt: skip

LAYOUTS = ("bbbc021", "bbbc014")

PRESETS: Mapping[str, Mapping[str, Bbbc021Synthetic | Bbbc014Synthetic]] = {
    "bbbc021": {
        "full": Bbbc021Synthetic(),
        "demo": Bbbc021Synthetic(
            size_px=(256, 320),
            cell_px=46,
            moas=6,
            compounds_per_moa=3,
            concentrations=2,
            labelled_concentrations=2,
            weeks=2,
            plate_sets=2,
            control_wells=1,
            fill=False,
        ),
    },
    "bbbc014": {"full": Bbbc014Synthetic(), "demo": Bbbc014Synthetic(size_px=(256, 340), cell_px=24)},
}
"""Settings by layout and preset: `full` has the real one's sizes, `demo` is made in seconds."""


def choose(
    layout: str, preset: str = "full", overrides: Mapping[str, Any] | None = None
) -> Bbbc021Synthetic | Bbbc014Synthetic:
    """Choose a preset and replace some of its settings.

    Raises
    ------
    UsageError
        There is no such layout or preset, a key is unknown (the valid ones are listed), or a value is not allowed.
    """
    if layout not in PRESETS:
        raise UsageError(f"synth: layout is {layout!r}. Allowed: {', '.join(LAYOUTS)}.")
    if preset not in PRESETS[layout]:
        raise UsageError(f"synth {layout}: preset is {preset!r}. Allowed: {', '.join(PRESETS[layout])}.")
    base = PRESETS[layout][preset]
    try:
        return type(base).model_validate(base.model_dump() | dict(overrides or {}))
    except ValidationError as fault:
        lines = []
        for error in fault.errors():
            where = f"synth {layout}: " + "".join(f"{part}: " for part in error["loc"])
            if error["type"] == "extra_forbidden":
                lines.append(f"{where}unknown key. Valid here: {', '.join(type(base).model_fields)}.")
            else:
                found = f"found {error['input']!r}. " if error["loc"] else ""
                lines.append(f"{where}{found}{error['msg'].removeprefix('Value error, ')}.")
        raise UsageError("\n".join(lines)) from None


def synth(
    folder: Path | str, settings: Bbbc021Synthetic | Bbbc014Synthetic, workers: int | None = None
) -> dict[str, Any]:
    """Make a synthetic screen; the settings' class says in which layout. See `synth_bbbc021`."""
    if isinstance(settings, Bbbc014Synthetic):
        return synth_bbbc014(Path(folder), settings, workers)
    return synth_bbbc021(Path(folder), settings, workers)
