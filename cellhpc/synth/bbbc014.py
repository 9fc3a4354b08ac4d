"""A synthetic plate in the raw layout of BBBC014v1: 8-bit bitmaps of NFkB and DNA, and a plate map.

TNF-alpha makes NFkB move from the cytoplasm into the nucleus. Columns 1 to 12 are doses from 1e-7 to 1e-13 M, evenly
spaced in the logarithm; rows A to D are MCF7, E to H A549. `Channel {1|2}-NN-R-CC-00.Bmp`: channel 1 is NFkB (FITC),
channel 2 DNA (DAPI), NN counts the wells from 01 to 96 row by row, R is the row and CC the column.

The plate map is `BBBC014_plate_map.csv` with the columns well (as `A01`), cell_line, compound (`TNF-alpha`) and
concentration_M (in mol/l).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from cellhpc.sections import Settings
from cellhpc.synth.camera import expose, plate_optics
from cellhpc.synth.cells import Look, draw_cells
from cellhpc.synth.looks import hill, stream
from cellhpc.synth.writing import encoded, is_file, put_file, write_screen

COMPOUND = "TNF-alpha"
HALF_EFFECT_M = 1e-10
_REPORTER = Look(network=0.0, diffuse=1.0, inside_nucleus=0.4, elongation=0.15, round=0.02, clump=0.5)
CELL_LINES = {
    "MCF7": replace(_REPORTER, clump=0.8, count=0.75, nucleus=0.6),
    "A549": replace(_REPORTER, clump=0.3, count=0.65, size=1.2, elongation=0.3, nucleus=0.66, tubulin=0.85),
}


class Bbbc014Synthetic(Settings):
    """What a synthetic BBBC014 plate is made of."""

    seed: int = Field(0, ge=0)
    """The same settings with the same seed give the same bytes."""
    size_px: tuple[int, int] = (1024, 1360)
    """Height and width of a field in pixels."""
    cell_px: float = Field(48.0, ge=12, le=250)
    """Diameter of a cell in pixels."""
    rows: str = Field("ABCDEFGH", pattern="^A?B?C?D?E?F?G?H?$", min_length=1)
    """Rows that were imaged: A to D are MCF7, E to H are A549."""

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        if min(self.size_px) < 32:
            raise ValueError(f"size_px is {self.size_px}; allowed are at least 32 pixels in height and width")
        return self


@dataclass(frozen=True)
class Well:
    """One well of the plate."""

    row: str
    column: int

    @property
    def name(self) -> str:
        """Name as `A01`."""
        return f"{self.row}{self.column:02d}"

    @property
    def cell_line(self) -> str:
        """Which cells grow in it."""
        return "MCF7" if self.row in "ABCD" else "A549"

    @property
    def concentration_m(self) -> float:
        """TNF-alpha in mol/l."""
        return float(f"{10 ** (-7 - 6 * (self.column - 1) / 11):.3g}")

    def file_name(self, channel: int) -> str:
        """Name of the bitmap of channel 1 or 2."""
        number = 12 * "ABCDEFGH".index(self.row) + self.column
        return f"Channel {channel}-{number:02d}-{self.row}-{self.column:02d}-00.Bmp"


def synth_bbbc014(folder: Path, settings: Bbbc014Synthetic, workers: int | None = None) -> dict[str, Any]:
    """Make a synthetic plate in the raw layout of BBBC014v1.

    Parameters, result and errors are those of `synth_bbbc021`; the counts are `plates`, `wells`, `fields`, `files`,
    `bytes`, `cell_lines` and `concentrations`.
    """
    wells = [Well(row, column) for row in settings.rows for column in range(1, 13)]
    facts = {
        "plates": 1,
        "wells": len(wells),
        "fields": len(wells),
        "files": 2 * len(wells),
        "bytes": 2 * len(wells) * _bitmap_bytes(settings.size_px),
        "cell_lines": len({well.cell_line for well in wells}),
        "concentrations": 12,
    }
    lines = ["well,cell_line,compound,concentration_M"]
    lines += [f"{well.name},{well.cell_line},{COMPOUND},{well.concentration_m:g}" for well in wells]
    tables = {"BBBC014_plate_map.csv": "\n".join([*lines, ""])}
    return write_screen(Path(folder), "bbbc014", settings, facts, tables, wells, _draw_well, workers)


def _draw_well(folder: Path, settings: Bbbc014Synthetic, well: Well) -> int:
    """Make the files of a well that are missing."""
    paths = {channel: folder / well.file_name(channel) for channel in (1, 2)}
    missing = [channel for channel, path in paths.items() if not is_file(path, _bitmap_bytes(settings.size_px))]
    if missing:
        pictures = _draw_field(settings, well)
        for channel in missing:
            put_file(paths[channel], _bitmap(pictures[channel - 1]))
    return 1


def _draw_field(settings: Bbbc014Synthetic, well: Well) -> np.ndarray:
    """NFkB and DNA of one field: uint8 (2, height, width)."""
    rng = stream(settings.seed, "field", well.name)
    look = CELL_LINES[well.cell_line]
    moved = hill(well.concentration_m, HALF_EFFECT_M)
    look = replace(
        look,
        inside_nucleus=look.inside_nucleus + 1.3 * moved,
        diffuse=look.diffuse * (1 - 0.35 * moved),
        count=look.count * float(np.exp(rng.normal(0, 0.15))),
        tubulin=look.tubulin * float(np.exp(rng.normal(0, 0.12))),
    )
    dna, reporter, _ = draw_cells(look, settings.size_px, settings.cell_px, rng)
    optics = plate_optics(stream(settings.seed, "optics"), (75.0, 75.0), 9.0)
    return expose(np.stack([reporter, dna]), optics, settings.cell_px, rng, highest=255, electrons_per_count=10).astype(
        np.uint8
    )


def _bitmap(picture: np.ndarray) -> bytes:
    return encoded(lambda buffer: Image.fromarray(picture).save(buffer, format="BMP"))


@functools.cache
def _bitmap_bytes(size_px: tuple[int, int]) -> int:
    return len(_bitmap(np.zeros(size_px, np.uint8)))
