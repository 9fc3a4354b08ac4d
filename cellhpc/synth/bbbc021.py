"""A synthetic screen in the raw layout of BBBC021v1: tables, week and plate folders, 16-bit TIFFs.

Plates are laid out as the real ones: rows B to G, columns 02 to 11; DMSO in B02, C02, D02, E11, F11 and G11; taxol, the
positive control, in B11, C11, D11, E02, F02 and G02; between them the dose series, highest dose first. A plate set is
imaged on `replicates` plates of one week, which have the same layout. The first set of Week1 has taxol's own dose
series in row D, as the real one.
"""

from __future__ import annotations

import csv
import functools
import io
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import tifffile
from pydantic import Field, model_validator

from cellhpc.sections import Settings
from cellhpc.synth.camera import Optics, expose, plate_optics
from cellhpc.synth.cells import Look, draw_cells
from cellhpc.synth.looks import MOAS, hill, stream, treated_look
from cellhpc.synth.writing import encoded, is_file, put_file, write_screen

CONTROL, DMSO = "taxol", "DMSO"
CONTROL_MOA = "Microtubule stabilizers"
CONTROL_CONCENTRATION = 0.3
DMSO_WELLS = ("B02", "C02", "D02", "E11", "F11", "G11")
CONTROL_WELLS = ("D11", "B11", "C11", "E02", "F02", "G02")
ROWS, COLUMNS = "DBCEFG", tuple(range(3, 11))  # row D is filled first: taxol's series belongs there
CHANNELS = (("DAPI", 1), ("Tubulin", 2), ("Actin", 4))
GAIN, BACKGROUND = (1500.0, 1000.0, 1100.0), 350.0


class Bbbc021Synthetic(Settings):
    """What a synthetic BBBC021 screen is made of."""

    seed: int = Field(0, ge=0)
    """The same settings with the same seed give the same bytes."""
    size_px: tuple[int, int] = (1024, 1280)
    """Height and width of a field in pixels."""
    cell_px: float = Field(90.0, ge=12, le=250)
    """Diameter of an untreated cell in pixels; a full-size field then holds about 100 cells."""
    moas: int = Field(12, ge=1, le=len(MOAS))
    """Number of mechanisms of action, in the order of `cellhpc.synth.looks.MOAS`; the first is taxol's."""
    compounds_per_moa: int = Field(3, ge=1)
    """Compounds of each mechanism; taxol is one of the microtubule stabilizers."""
    concentrations: int = Field(8, ge=1, le=8)
    """Doses of each compound, each about a third of the one above; one well a plate each."""
    labelled_concentrations: int = Field(3, ge=1, le=8)
    """The highest doses, which carry the mechanism in the table; lower ones are unlabelled."""
    weeks: int = Field(10, ge=1, le=10)
    """Batches; a compound lives in one of them, taxol in all."""
    plate_sets: int = Field(18, ge=1)
    """Sets of plates with the same layout, dealt out over the weeks."""
    replicates: int = Field(3, ge=1)
    """Plates in a set."""
    sites: int = Field(4, ge=1, le=9)
    """Fields in a well."""
    dmso_wells: int = Field(6, ge=1, le=6)
    """Wells of DMSO on each plate."""
    control_wells: int = Field(6, ge=1, le=6)
    """Wells of taxol, the positive control, on each plate."""
    fill: bool = True
    """Fill the wells that are left with unlabelled compounds of no effect, as most of the real plates are."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.size_px) < 32:
            raise ValueError(f"size_px is {self.size_px}; allowed are at least 32 pixels in height and width")
        if self.labelled_concentrations > self.concentrations:
            raise ValueError(
                f"labelled_concentrations is {self.labelled_concentrations}, "
                f"more than the {self.concentrations} concentrations"
            )
        if self.plate_sets < self.weeks:
            raise ValueError(f"plate_sets is {self.plate_sets}; each of the {self.weeks} weeks needs at least one")
        for week in range(self.weeks):
            number, room = len(_compounds_of_week(self, week)), len(_sets_of_week(self, week)) * _series_per_plate(self)
            if number > room:
                raise ValueError(
                    f"Week{week + 1} has {number} compounds and room for {room}: a plate takes "
                    f"{_series_per_plate(self)} with {self.concentrations} concentrations;"
                    f" set plate_sets higher than {self.plate_sets}"
                )
        return self


@dataclass(frozen=True)
class Well:
    """One well of one plate."""

    week: int
    plate: str
    number: int
    replicate: int
    well: str
    compound: str
    moa: str
    """Its mechanism, also where the dose is too low to be labelled; empty for DMSO and for compounds of no effect."""
    concentration: float
    """In micromolar; 0 for DMSO."""


def synth_bbbc021(folder: Path, settings: Bbbc021Synthetic, workers: int | None = None) -> dict[str, Any]:
    """Make a synthetic screen in the raw layout of BBBC021v1.

    Parameters
    ----------
    folder
        A new or empty folder, or one that holds this very screen: a finished one is left alone, an interrupted one
        completed.
    settings
        What is made.
    workers
        Processes; None takes every core.

    Returns
    -------
    dict
        `folder`, `layout`, `digest`, `made` (False when it was already there), `seconds`, and the counts `plates`,
        `weeks`, `wells`, `fields`, `files`, `bytes`, `compounds`, `treatments` and `moas`; the last three of labelled
        wells.

    Raises
    ------
    UsageError
        The folder holds something else, or the disk is too small.
    """
    wells = plan_wells(settings)
    fields = len(wells) * settings.sites
    labelled = _moa_rows(settings, wells)
    facts = {
        "weeks": settings.weeks,
        "plates": len({well.plate for well in wells}),
        "wells": len(wells),
        "fields": fields,
        "files": 3 * fields,
        "bytes": 3 * fields * _tiff_bytes(settings.size_px),
        "compounds": len({compound for compound, _, _ in labelled}),
        "treatments": len(labelled),
        "moas": len({moa for _, _, moa in labelled}),
    }
    tables = {"BBBC021_v1_image.csv": _image_table(settings, wells), "BBBC021_v1_moa.csv": _moa_table(labelled)}
    return write_screen(Path(folder), "bbbc021", settings, facts, tables, wells, _draw_well, workers)


def plan_wells(settings: Bbbc021Synthetic) -> list[Well]:
    """Every well of the screen, sorted by week, plate and well."""
    wells = []
    for week in range(settings.weeks):
        series = _compounds_of_week(settings, week)
        for place, plate_set in enumerate(_sets_of_week(settings, week)):
            layout = _plate_layout(settings, series[place :: len(_sets_of_week(settings, week))], plate_set)
            for replicate in range(1, settings.replicates + 1):
                number = 20000 + 2000 * (week + 1) + 100 * place + 20 * (replicate - 1) + 1
                plate = f"Week{week + 1}_{number}"
                wells += [
                    Well(week + 1, plate, place * settings.replicates + replicate, replicate, well, *layout[well])
                    for well in sorted(layout)
                ]
    return wells


def _compounds_of_week(settings: Bbbc021Synthetic, week: int) -> list[tuple[str, str]]:
    """Names and mechanisms of a week's compounds: those of one mechanism are spread over the weeks."""
    compounds = []
    for j in range(settings.compounds_per_moa):
        for m, moa in enumerate(list(MOAS)[: settings.moas]):
            if (j + m) % settings.weeks == week:
                name = CONTROL if (j, moa) == (0, CONTROL_MOA) else f"synth-{_short(moa)}-{j + 1}"
                compounds.append((name, moa))
    return compounds


def _short(moa: str) -> str:
    """Shorten a mechanism to four letters a word, as `MicrStab` for Microtubule stabilizers."""
    return "".join(word[:4].capitalize() for word in moa.replace("-", " ").split() if word != "inhibitors")


def _sets_of_week(settings: Bbbc021Synthetic, week: int) -> list[int]:
    return list(range(week, settings.plate_sets, settings.weeks))


def _series_per_plate(settings: Bbbc021Synthetic) -> int:
    return len(ROWS) * (len(COLUMNS) // settings.concentrations)


def _plate_layout(
    settings: Bbbc021Synthetic, series: list[tuple[str, str]], plate_set: int
) -> dict[str, tuple[str, str, float]]:
    """Compound, mechanism and concentration of each well of a plate set."""
    layout = {well: (DMSO, "", 0.0) for well in DMSO_WELLS[: settings.dmso_wells]}
    layout |= {well: (CONTROL, CONTROL_MOA, CONTROL_CONCENTRATION) for well in CONTROL_WELLS[: settings.control_wells]}
    if settings.fill:
        missing = _series_per_plate(settings) - len(series)
        series = series + [(f"synth-None-{plate_set + 1}-{k + 1}", "") for k in range(missing)]
    per_row = len(COLUMNS) // settings.concentrations
    for i, (compound, moa) in enumerate(series):
        row, first = ROWS[i // per_row], (i % per_row) * settings.concentrations
        for k, concentration in enumerate(_doses(settings, compound)):
            layout[f"{row}{COLUMNS[first + k]:02d}"] = (compound, moa, concentration)
    return layout


def _doses(settings: Bbbc021Synthetic, compound: str) -> list[float]:
    """Concentrations in micromolar, highest first, on the ladder 1, 3, 10, 30, as in the real screen."""
    ladder = [float(f"{digit}e{power}") for power in range(-6, 6) for digit in (1, 3)]
    lowest_labelled = ladder.index(CONTROL_CONCENTRATION) if compound == CONTROL else _rank(settings, compound)
    highest = lowest_labelled + settings.labelled_concentrations - 1
    return [ladder[highest - k] for k in range(settings.concentrations)]


def _rank(settings: Bbbc021Synthetic, compound: str) -> int:
    """Potency of a compound: the place of its lowest labelled dose on the ladder, 0.1 to 3 micromolar."""
    return int(stream(settings.seed, "potency", compound).integers(10, 14))


def _moa_rows(settings: Bbbc021Synthetic, wells: list[Well]) -> list[tuple[str, float, str]]:
    """Compound, concentration and mechanism of every labelled treatment, sorted."""
    rows = set()
    for well in wells:
        if well.moa and well.concentration in _doses(settings, well.compound)[: settings.labelled_concentrations]:
            rows.add((well.compound, well.concentration, well.moa))
    return sorted(rows)


def _moa_table(labelled: list[tuple[str, float, str]]) -> str:
    lines = ['"compound",concentration,"moa"']
    lines += [f'"{compound}",{concentration:.6f},"{moa}"' for compound, concentration, moa in labelled]
    return "\n".join([*lines, f'"{DMSO}",{0:.6f},"{DMSO}"', ""])


def _image_table(settings: Bbbc021Synthetic, wells: list[Well]) -> str:
    """Write the image table in the columns of BBBC021_v1_image.csv."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [f"Image_{kind}_{channel}" for channel, _ in CHANNELS for kind in ("FileName", "PathName")]
    writer.writerow(
        [
            *("TableNumber", "ImageNumber", *names, "Image_Metadata_Plate_DAPI", "Image_Metadata_Well_DAPI"),
            *("Replicate", "Image_Metadata_Compound", "Image_Metadata_Concentration"),
        ]
    )
    image, week = 0, 0
    for well in wells:
        image, week = (image, week) if well.week == week else (0, well.week)
        for site in range(1, settings.sites + 1):
            image += 1
            files = [part for file in file_names(settings.seed, well, site) for part in (file, _folder_of(well))]
            tail = [well.plate, well.well, well.replicate, well.compound, f"{well.concentration:g}"]
            writer.writerow([well.week % 10, image, *files, *tail])
    return buffer.getvalue()


def _folder_of(well: Well) -> str:
    return f"Week{well.week}/{well.plate}"


def file_names(seed: int, well: Well, site: int) -> list[str]:
    """File names of a field's three channels; as in the real screen all weeks but Week4 have a prefix with a date."""
    prefix = "" if well.week == 4 else f"Week{well.week}_{7 + 2 * well.week:02d}0607_"
    rng = stream(seed, "names", well.plate, well.well, site)
    return [
        f"{prefix}{well.well}_s{site}_w{number}{str(uuid.UUID(bytes=rng.bytes(16), version=4)).upper()}.tif"
        for _, number in CHANNELS
    ]


def _draw_well(folder: Path, settings: Bbbc021Synthetic, well: Well) -> int:
    """Make the files of a well that are missing."""
    for site in range(1, settings.sites + 1):
        paths = [folder / _folder_of(well) / name for name in file_names(settings.seed, well, site)]
        missing = [c for c, path in enumerate(paths) if not is_file(path, _tiff_bytes(settings.size_px))]
        if missing:
            pictures = _draw_field(settings, well, site)
            for c in missing:
                put_file(paths[c], _tiff(pictures[c]))
    return settings.sites


def _tiff(picture: np.ndarray) -> bytes:
    return encoded(
        lambda buffer: tifffile.imwrite(buffer, picture, photometric="minisblack", metadata=None, software="")
    )


@functools.cache
def _tiff_bytes(size_px: tuple[int, int]) -> int:
    return len(_tiff(np.zeros(size_px, np.uint16)))


def _draw_field(settings: Bbbc021Synthetic, well: Well, site: int) -> np.ndarray:
    """Camera counts of one field: uint16 (3, height, width)."""
    look = _well_look(settings, well)
    rng = stream(settings.seed, "field", well.plate, well.well, site)
    look = replace(look, count=look.count * float(np.exp(rng.normal(0, 0.12))))
    signal = draw_cells(look, settings.size_px, settings.cell_px, rng)
    return expose(
        signal,
        _optics(settings.seed, well.week, well.plate),
        settings.cell_px,
        rng,
        highest=65535,
        electrons_per_count=0.5,
    )


def _well_look(settings: Bbbc021Synthetic, well: Well) -> Look:
    """Look of a well: its compound at its dose, and how densely its plate was sown."""
    effect = 0.0
    if well.compound != DMSO:
        lowest_labelled = _doses(settings, well.compound)[settings.labelled_concentrations - 1]
        effect = hill(well.concentration, lowest_labelled / 4)
    look = treated_look(well.moa or None, effect, stream(settings.seed, "compound", well.compound))
    sown = float(np.exp(stream(settings.seed, "sowing", well.plate).normal(0, 0.1)))
    return replace(look, count=look.count * sown)


@functools.cache
def _optics(seed: int, week: int, plate: str) -> Optics:
    """Draw a plate's optics: the week shifts the stain, the plate shifts it again."""
    weekly = np.exp(stream(seed, "week", week).normal(0, 0.15, len(GAIN)))
    return plate_optics(
        stream(seed, "optics", plate), tuple(float(g * f) for g, f in zip(GAIN, weekly, strict=True)), BACKGROUND
    )
