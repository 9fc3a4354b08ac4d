"""A synthetic screen in the raw layout of BBBC021, so small that whole studies of it take seconds."""

from __future__ import annotations

from pathlib import Path

from cellhpc.synth import choose, synth

SCREEN = {
    "seed": 3, "size_px": [64, 80], "cell_px": 14, "compounds_per_moa": 2, "concentrations": 1,
    "labelled_concentrations": 1, "weeks": 1, "plate_sets": 1, "control_wells": 1, "fill": False,
}  # fmt: skip


def make_small_screen(raw: Path, moas: int = 2) -> Path:
    """Make it, with two compounds for each MoA, each of which is a fold; returns its folder."""
    synth(raw, choose("bbbc021", "demo", {**SCREEN, "moas": moas}))
    return raw
