"""Drawing of cells: shapes and textures in polar coordinates, put on a canvas of three channels.

Every cell is a closed outline r(angle) around a centre. Its contents are a small texture over (angle, r / outline), so
that one bilinear look-up per cell draws body, cortex and filaments together, whatever the cell's shape. Nuclei are
drawn in the same way. What a cell looks like is a `Look`; nothing here knows of compounds, plates or cameras.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

ANGLES, RADII, VARIANTS = 256, 64, 8
Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """What the cells of a field look like; every value can be interpolated between two looks.

    Sizes are relative to the nominal cell, intensities to an untreated cell, fractions are of the cells.
    """

    count: float = 1.0
    """Number of cells."""
    clump: float = 0.55
    """Fraction of the cells that settle beside another."""
    size: float = 1.0
    """Diameter of the cell."""
    elongation: float = 0.12
    """Relative amplitude of the outline's second harmonic."""
    ruffle: float = 0.05
    """Relative amplitude of the outline's third to seventh harmonics."""
    spikes: float = 0.0
    """Length of thin processes, in radii of the cell."""
    nucleus: float = 0.46
    """Diameter of the nucleus, in diameters of a nominal cell."""
    nucleus_elongation: float = 0.12
    """Second harmonic of the nucleus."""
    lobes: float = 0.02
    """Third to fifth harmonics of the nucleus."""
    dna: float = 1.0
    """Brightness of the nucleus."""
    speckle: float = 0.15
    """Contrast of the chromatin."""
    fragmented: float = 0.0
    """Fraction of cells whose nucleus has fallen into several micronuclei."""
    binucleate: float = 0.03
    """Fraction of cells with two nuclei."""
    round: float = 0.03
    """Fraction of cells that are rounded up in mitosis."""
    monoaster: float = 0.0
    """In rounded cells: chromosomes in a ring around one aster (1) or in a metaphase plate (0)."""
    tubulin: float = 1.0
    """Brightness of tubulin."""
    network: float = 1.0
    """Weight of the radial network in tubulin."""
    diffuse: float = 0.15
    """Weight of free, diffuse tubulin."""
    bundles: float = 0.0
    """Weight of thick bundles in tubulin."""
    aggresome: float = 0.0
    """Brightness of one spot of tubulin beside the nucleus."""
    inside_nucleus: float = 0.45
    """Tubulin (or the reporter) over the nucleus, relative to the cytoplasm around it."""
    actin: float = 1.0
    """Brightness of actin."""
    cortex: float = 0.8
    """Weight of the cortex in actin."""
    fibres: float = 0.35
    """Weight of stress fibres in actin."""
    foci: float = 0.0
    """Weight of spots in actin."""
    haze: float = 0.3
    """Weight of diffuse actin."""


def draw_cells(look: Look, size_px: tuple[int, int], cell_px: float, rng: np.random.Generator) -> Picture:
    """Draw one field.

    Parameters
    ----------
    look
        What its cells look like.
    size_px
        Height and width of the field.
    cell_px
        Diameter of a nominal cell in pixels; an untreated field is covered by cells to about 60 %.
    rng
        The field's random numbers.

    Returns
    -------
    float32 array (3, height, width)
        DNA, tubulin and actin; 1 is about the brightness of an untreated cell, 0 is empty.
    """
    height, width = size_px
    reach = int(cell_px * 2) + 2
    canvas = np.zeros((3, height + 2 * reach, width + 2 * reach), np.float32)
    places, radii = _settle(look, size_px, cell_px, rng)
    for (y, x), radius in zip(places, radii, strict=True):
        centre = (reach + int(y), reach + int(x))
        if rng.random() < look.round:
            _draw_round_cell(canvas, centre, look, 0.58 * radius, rng)
        else:
            _draw_spread_cell(canvas, centre, look, radius, cell_px, rng)
    return canvas[:, reach:-reach, reach:-reach]


def _settle(
    look: Look, size_px: tuple[int, int], cell_px: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres (n, 2) and radii (n,) of the cells, apart from each other where there is room."""
    extent = np.asarray(size_px, float) + cell_px  # half a cell beyond each border, so that cells are cut there
    number = max(2, rng.poisson(0.6 * look.count * extent.prod() / cell_px**2))
    radii = 0.5 * cell_px * look.size * np.exp(rng.normal(0, 0.13, number))
    places = np.empty((number, 2))
    for i in range(number):
        best, best_room = np.zeros(2), -np.inf
        for _ in range(12):
            if i and rng.random() < look.clump:
                mate = rng.integers(i)
                angle = rng.uniform(0, 2 * np.pi)
                step = 0.85 * (radii[i] + radii[mate])
                place = places[mate] + step * np.array([np.sin(angle), np.cos(angle)])
                if (place < -0.5 * cell_px).any() or (place > extent - 0.5 * cell_px).any():
                    continue
            else:
                place = rng.uniform(0, 1, 2) * extent - 0.5 * cell_px
            apart = np.hypot(*(places[:i] - place).T) / (radii[:i] + radii[i]) if i else np.ones(1)
            room = float(apart.min())
            if room > best_room:
                best, best_room = place, room
            if room >= 0.8:
                break
        places[i] = best
    return places, radii


def _draw_spread_cell(
    canvas: Picture, centre: tuple[int, int], look: Look, radius: float, cell_px: float, rng: np.random.Generator
) -> None:
    """Draw an attached cell: body with tubulin and actin, one or more nuclei."""
    outline = radius * _outline(look.elongation, look.ruffle, range(3, 8), rng)
    if look.spikes > 0.02:
        outline += radius * look.spikes * _processes(rng)
    outline = np.minimum(outline, 1.8 * cell_px)
    pieces = _nuclei(look, float(outline.mean()), cell_px, rng)
    half = int(max(outline.max(), *(np.hypot(*offset) + rim.max() for offset, rim in pieces))) + 2
    body = _fill(half, (0, 0), outline, _body_texture(look, rng))
    dna = np.zeros(body.shape[:2], np.float32)
    for offset, rim in pieces:
        np.maximum(dna, _fill(half, offset, rim, _chromatin(look.speckle, rng)), out=dna)
    over = np.minimum(dna * 1.3, 1.0)
    body[..., 0] *= 1 + (look.inside_nucleus - 1) * over
    body[..., 1] *= 1 - 0.35 * over
    gains = np.exp(rng.normal(0, 0.12, 2)) * (look.tubulin, look.actin)
    brightness = look.dna * np.exp(rng.normal(0, 0.13))
    _stamp(canvas, centre, dna * np.float32(brightness), body * gains.astype(np.float32))


def _nuclei(
    look: Look, cell_radius: float, cell_px: float, rng: np.random.Generator
) -> list[tuple[tuple[float, float], NDArray[np.float64]]]:
    """Offset from the cell's centre (y, x) and outline of each nucleus or micronucleus, in pixels."""
    shift = rng.normal(0, 0.12 * cell_radius, 2)
    radius = min(0.5 * cell_px * look.nucleus * np.exp(rng.normal(0, 0.09)), 0.8 * cell_radius)
    number, away, scale = 1, np.zeros(1), np.ones(1)
    fate = rng.random()
    if fate < look.fragmented:
        number = int(rng.integers(3, 7))
        away, scale = radius * rng.uniform(0.45, 0.95, number), rng.uniform(0.28, 0.6, number)
    elif fate < look.fragmented + look.binucleate:
        number, away, scale = 2, np.full(2, 0.8 * radius), np.full(2, 0.8)
    angles = rng.uniform(0, 2 * np.pi) + np.arange(number) * (2 * np.pi / number)
    return [
        (
            (float(shift[0] + away[k] * np.sin(angles[k])), float(shift[1] + away[k] * np.cos(angles[k]))),
            radius * scale[k] * _outline(look.nucleus_elongation, look.lobes, range(2, 6), rng),
        )
        for k in range(number)
    ]


def _draw_round_cell(
    canvas: Picture, centre: tuple[int, int], look: Look, radius: float, rng: np.random.Generator
) -> None:
    """Draw a cell rounded up in mitosis: small, bright, with condensed chromosomes."""
    outline = radius * _outline(0.03, 0.01, range(3, 5), rng)
    half = int(outline.max()) + 2
    u = np.linspace(0, 1, RADII, dtype=np.float32)[None, :].repeat(ANGLES, 0)
    spokes = _bank("network")[rng.integers(VARIANTS)]
    edge = _edge(0.9)
    aster = (0.6 + 2.0 * np.exp(-((u / 0.35) ** 2))) * (0.5 + 0.5 * spokes)
    spindle = 0.9 + 0.5 * np.exp(-((u / 0.6) ** 2)) + 0.2 * spokes
    tubulin = (look.monoaster * aster + (1 - look.monoaster) * spindle) * edge * 1.5
    actin = (0.7 + 0.9 * np.exp(-(((u - 0.88) / 0.1) ** 2))) * edge * (0.4 + 0.6 * look.cortex / 0.8)
    body = _fill(half, (0, 0), outline, np.stack([tubulin, actin], -1))
    if rng.random() < look.monoaster:
        ring = np.exp(-(((u - 0.66) / 0.17) ** 2)) * (0.75 + 0.5 * _bank("bundles")[rng.integers(VARIANTS)])
        dna = _fill(half, (0, 0), np.full(ANGLES, 0.78 * radius) * _outline(0.05, 0.05, range(3, 6), rng), ring * edge)
    else:
        plate = 0.42 * radius * _outline(0.42, 0.05, range(3, 6), rng)
        dna = _fill(half, (0, 0), plate, _chromatin(0.1, rng))
    gains = np.exp(rng.normal(0, 0.12, 2)) * (look.tubulin, look.actin)
    _stamp(canvas, centre, dna * np.float32(2.0 * look.dna), body * gains.astype(np.float32))


def _stamp(canvas: Picture, centre: tuple[int, int], dna: Picture, body: Picture) -> None:
    """Put a cell on the canvas; where cells overlap, the brighter is seen."""
    half = dna.shape[0] // 2
    y, x = centre[0] - half, centre[1] - half
    rows = slice(max(y, 0), min(y + dna.shape[0], canvas.shape[1]))
    columns = slice(max(x, 0), min(x + dna.shape[1], canvas.shape[2]))
    inner = (slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x))
    for channel, patch in enumerate((dna, body[..., 0], body[..., 1])):
        part = canvas[channel, rows, columns]
        np.maximum(part, patch[inner], out=part)


def _fill(half: int, offset: tuple[float, float], outline: NDArray[np.float64], texture: Picture) -> Picture:
    """Look a polar texture (ANGLES, RADII[, c]) up over a patch of side 2 half + 1; zero outside the outline."""
    angle, distance = _polar(half, int(offset[0]), int(offset[1]))
    scale = ((RADII - 1) / np.maximum(outline, 1.0)).astype(np.float32)
    radius = distance * cv2.LUT(angle.astype(np.uint8), scale)
    wrapped = np.concatenate([texture, texture[:1]]).astype(np.float32)
    picture: Picture = cv2.remap(
        wrapped, radius, angle, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0
    )
    return picture


@functools.lru_cache(maxsize=4)
def _polar_grid(half: int) -> tuple[Picture, Picture]:
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    angle = (np.arctan2(y, x) / (2 * np.pi) % 1.0 * ANGLES).astype(np.float32)
    return np.minimum(angle, ANGLES - 0.001), np.hypot(y, x)


def _polar(half: int, dy: int, dx: int) -> tuple[Picture, Picture]:
    """Angle (0 to ANGLES) and distance in pixels from a centre shifted by (dy, dx)."""
    reach = 128 * (1 + (half + max(abs(dy), abs(dx))) // 128)
    angle, distance = _polar_grid(reach)
    rows, columns = (slice(reach - half - d, reach + half + 1 - d) for d in (dy, dx))
    return np.ascontiguousarray(angle[rows, columns]), distance[rows, columns]


def _outline(elongation: float, roughness: float, harmonics: range, rng: np.random.Generator) -> NDArray[np.float64]:
    """Relative radius over the angle: an ellipse-like second harmonic and random higher ones."""
    angles = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    outline = 1 + abs(elongation * rng.normal(1, 0.35)) * np.cos(2 * (angles - rng.uniform(0, np.pi)))
    for k in harmonics:
        outline += roughness * rng.normal() * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    return np.maximum(outline, 0.25)


def _processes(rng: np.random.Generator) -> NDArray[np.float64]:
    """Three to six narrow lobes over the angle, of height about 1."""
    angles = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    lobes = np.zeros(ANGLES)
    for _ in range(int(rng.integers(3, 7))):
        away = np.angle(np.exp(1j * (angles - rng.uniform(0, 2 * np.pi))))
        lobes = np.maximum(lobes, rng.uniform(0.5, 1.4) * np.exp(-((away / 0.16) ** 2)))
    return lobes


def _body_texture(look: Look, rng: np.random.Generator) -> Picture:
    """Tubulin and actin of one cell over (angle, relative radius): (ANGLES, RADII, 2)."""

    def pick(style: str) -> Picture:
        return np.roll(_bank(style)[rng.integers(VARIANTS)], int(rng.integers(ANGLES)), axis=0)

    tubulin = look.network * pick("network") + look.bundles * pick("bundles") + look.diffuse * _profile()
    if look.aggresome > 0.02:
        tubulin = tubulin + look.aggresome * pick("spot")
    actin = look.cortex * pick("cortex") + look.fibres * pick("fibres") + look.haze
    if look.foci > 0.02:
        actin = actin + look.foci * pick("foci")
    return np.stack([tubulin, actin], -1) * _edge(0.93)[..., None]


def _chromatin(contrast: float, rng: np.random.Generator) -> Picture:
    texture = np.roll(_bank("chromatin")[rng.integers(VARIANTS)], int(rng.integers(ANGLES)), axis=0)
    return (0.8 + contrast * texture) * _edge(0.86)


@functools.cache
def _edge(begin: float) -> Picture:
    """One inside, falling to zero at the outline from the relative radius `begin` on."""
    u = np.linspace(0, 1, RADII)
    fall = np.clip((1 - u) / (1 - begin), 0, 1)
    return np.tile((fall * fall * (3 - 2 * fall)).astype(np.float32), (ANGLES, 1))


@functools.cache
def _profile() -> Picture:
    """Thickness of a spread cell: high around the nucleus, flat outside."""
    u = np.linspace(0, 1, RADII)
    return np.tile((0.35 + 0.65 * np.exp(-((u / 0.55) ** 2))).astype(np.float32), (ANGLES, 1))


@functools.cache
def _bank(style: str) -> Picture:
    """Variants of one polar texture: (VARIANTS, ANGLES, RADII), about 0 to 1.5. The same in every process."""
    rng = np.random.default_rng([2019, *style.encode()])
    return np.stack([_STYLES[style](rng) for _ in range(VARIANTS)]).astype(np.float32)


def _streaks(rng: np.random.Generator, across: float, along: float) -> NDArray[np.float64]:
    """Gaussian noise of zero mean and unit variance, `across` the angle and `along` the radius wide (in cells)."""
    noise = rng.normal(size=(3 * ANGLES, RADII))
    noise[:ANGLES] = noise[ANGLES : 2 * ANGLES]
    noise[2 * ANGLES :] = noise[ANGLES : 2 * ANGLES]
    smooth = cv2.GaussianBlur(noise, (0, 0), sigmaX=along, sigmaY=across, borderType=cv2.BORDER_REFLECT)
    smooth = smooth[ANGLES : 2 * ANGLES]
    return (smooth - smooth.mean()) / smooth.std()


def _spots(rng: np.random.Generator, number: int, width: float, near: float, far: float) -> NDArray[np.float64]:
    """Gaussian spots at relative radii from `near` to `far`."""
    x, y = _disc()
    spots = np.zeros((ANGLES, RADII))
    for _ in range(number):
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(near, far)
        square = (x - radius * np.cos(angle)) ** 2 + (y - radius * np.sin(angle)) ** 2
        spots = np.maximum(spots, rng.uniform(0.6, 1.2) * np.exp(-square / width**2))
    return spots


def _disc() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cartesian coordinates, -1 to 1, of the polar texture's cells."""
    u = np.linspace(0, 1, RADII)[None, :]
    angles = (np.arange(ANGLES) * (2 * np.pi / ANGLES))[:, None]
    return u * np.cos(angles), u * np.sin(angles)


def _network(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.clip(1 + 0.3 * _streaks(rng, 2.2, 6), 0.15, 2) * _profile()


def _bundles(rng: np.random.Generator) -> NDArray[np.float64]:
    x, y = _disc()
    bundles = np.zeros((ANGLES, RADII))
    for _ in range(9):  # bent strands that pass beside the nucleus
        turn, aside, bend = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.7), rng.uniform(-0.1, 0.6)
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        strand = np.exp(-(((across - aside + bend * along**2) / rng.uniform(0.05, 0.1)) ** 2))
        bundles = np.maximum(bundles, rng.uniform(0.7, 1.3) * strand)
    return 1.2 * bundles


def _cortex(rng: np.random.Generator) -> NDArray[np.float64]:
    u = np.linspace(0, 1, RADII)[None, :]
    return np.clip(1 + 0.35 * _streaks(rng, 10, 30), 0.2, 2) * np.exp(-(((u - 0.88) / 0.1) ** 2)) * 1.05


def _fibres(rng: np.random.Generator) -> NDArray[np.float64]:
    x, y = _disc()
    bend = x + 0.15 * np.sin(2 * y + rng.uniform(0, 6))
    return np.clip(np.cos(bend * rng.uniform(14, 20) + rng.uniform(0, 6)), 0, 1) ** 2 * (
        1.0 + 0.3 * _streaks(rng, 8, 8)
    )


_STYLES = {
    "network": _network,
    "bundles": _bundles,
    "spot": lambda rng: 2.2 * _spots(rng, 1, 0.22, 0.42, 0.55),
    "cortex": _cortex,
    "fibres": _fibres,
    "foci": lambda rng: 1.6 * _spots(rng, 9, 0.12, 0.2, 0.9),
    "chromatin": lambda rng: np.clip(_streaks(rng, 12, 5), -2, 2),
}
