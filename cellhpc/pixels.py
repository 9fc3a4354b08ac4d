"""A field's pixels: read from its files, and checked against what its plate holds.

A field is either one file with all channels (a plane each, or RGB) or one single-channel file for each channel. TIFF is
read by tifffile, PNG and BMP by Pillow. Values are never scaled; of palette pictures, the indices are the intensities.
Headers are looked at before anything is decoded, and whatever does not fit is a `BadField` with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from cellhpc.errors import DataError, listing

MOST_PIXELS = 2**27
"""Pixels of one plane above which a header is not believed: 11,585 x 11,585."""

DTYPES = ("uint8", "uint16")
TIFF_ENDINGS = (".tif", ".tiff")
PILLOW_ENDINGS = (".png", ".bmp")

# Pillow's mode of a picture: (planes, dtype).
PILLOW_MODES = {
    "L": (1, "uint8"),
    "P": (1, "uint8"),
    "I;16": (1, "uint16"),
    "I;16B": (1, "uint16"),
    "RGB": (3, "uint8"),
    "RGBA": (4, "uint8"),
}


class BadField(DataError):
    """A field that can't be used; `reason` says in one line which file and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class FieldFormat:
    """Size and type of a field's planes."""

    height: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.height} x {self.width} {self.dtype}"


@dataclass(frozen=True)
class _Picture:
    """A file that was opened: what its header says, and how to decode it to (planes, y, x)."""

    planes: int
    format: FieldFormat
    decode: Callable[[], np.ndarray]


def probe_field(root: Path, files: Sequence[str]) -> FieldFormat:
    """Tell the size and type of a field from the headers of its files, without decoding a pixel.

    Parameters
    ----------
    root
        Folder that the file names start from.
    files
        A file name for each channel; all equal when one file holds all channels.

    Raises
    ------
    BadField
        A file is missing, unreadable or not supported, or the channels differ from each other.
    """
    formats = []
    for name, planes in _planes_by_file(files):
        with _opened(root, name) as picture:
            _check(picture, name, planes, None)
            formats.append(picture.format)
    if len(set(formats)) > 1:
        raise BadField(f"{files[0]}: the channels differ from each other: {listing(set(formats))}")
    return formats[0]


def read_field(root: Path, files: Sequence[str], expected: FieldFormat) -> np.ndarray:
    """Read all channels of a field.

    Parameters
    ----------
    root
        Folder that the file names start from.
    files
        A file name for each channel; all equal when one file holds all channels, plane i being channel i.
    expected
        Size and type that every plane must have.

    Returns
    -------
    ndarray
        (y, x, channel), uint8 or uint16. In memory each channel is contiguous, so ``field[..., c]`` is a plain picture.

    Raises
    ------
    BadField
        A file is missing, truncated or unreadable, or of another size, dtype or number of planes. The reason tells of
        every file of the field.
    """
    planes = np.empty((len(files), expected.height, expected.width), expected.dtype)
    reasons, first = [], 0
    for name, count in _planes_by_file(files):
        try:
            with _opened(root, name) as picture:
                _check(picture, name, count, expected)
                planes[first : first + count] = picture.decode()
        except BadField as fault:
            reasons.append(fault.reason)
        first += count
    if reasons:
        raise BadField("; ".join(reasons))
    return np.moveaxis(planes, 0, -1)


def file_bytes(root: Path, files: Sequence[str]) -> int:
    """Size of a field's files on disk in bytes; a missing file counts 0."""
    return file_state(root, files)[0]


def file_state(root: Path, files: Sequence[str]) -> tuple[int, int]:
    """Size in bytes of a field's files together, and when the last was written, in ns; missing files count 0."""
    size, modified = 0, 0
    for name, _ in _planes_by_file(files):
        with contextlib.suppress(OSError):  # why it can't be read is told when it is read
            state = (root / name).stat()
            size, modified = size + state.st_size, max(modified, state.st_mtime_ns)
    return size, modified


def _planes_by_file(files: Sequence[str]) -> list[tuple[str, int]]:
    """Files to read, and the planes that each must have."""
    if len(set(files)) == 1:
        return [(files[0], len(files))]
    return [(name, 1) for name in files]


def _check(picture: _Picture, name: str, planes: int, expected: FieldFormat | None) -> None:
    found, reasons = picture.format, []
    if found.height * found.width > MOST_PIXELS:
        raise BadField(
            f"{name}: its header claims {found.height} x {found.width} pixels; at most {MOST_PIXELS:,} are read"
        )
    if picture.planes != planes:
        reasons.append(f"has {picture.planes} planes instead of {planes}")
    if found.dtype not in DTYPES:
        reasons.append(f"is {found.dtype}; allowed are {' and '.join(DTYPES)}")
    elif expected and found.dtype != expected.dtype:
        reasons.append(f"is {found.dtype}, the other fields are {expected.dtype}")
    if expected and (found.height, found.width) != (expected.height, expected.width):
        reasons.append(
            f"has {found.height} x {found.width} pixels, the other fields have {expected.height} x {expected.width}"
        )
    if reasons:
        raise BadField(f"{name}: {', '.join(reasons)}")


@contextlib.contextmanager
def _opened(root: Path, name: str) -> Iterator[_Picture]:
    """Open a picture; whatever goes wrong, here or while it is decoded, is a `BadField`."""
    path = root / name
    ending = path.suffix.lower()
    if ending not in TIFF_ENDINGS + PILLOW_ENDINGS:
        allowed = ", ".join(TIFF_ENDINGS + PILLOW_ENDINGS)
        raise BadField(f"{name or '(no file name)'}: no kind of picture that is read here; allowed are {allowed}")
    try:
        with _tiff(path, name) if ending in TIFF_ENDINGS else _pillow(path, name) as picture:
            yield picture
    except FileNotFoundError:
        raise BadField(f"{name}: missing") from None
    except (BadField, MemoryError):
        raise
    except Exception as fault:  # decoders fail on broken files in every way: struct.error, zlib.error, IndexError, ...
        raise BadField(f"{name}: truncated or unreadable ({type(fault).__name__}: {fault})") from None


@contextlib.contextmanager
def _tiff(path: Path, name: str) -> Iterator[_Picture]:
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series
        if len(series) != 1:
            raise BadField(f"{name}: holds {len(series)} pictures of different kinds; expected one")
        axes, shape = series[0].axes, series[0].shape
        sizes = dict(zip(axes, shape, strict=True))
        stacked = [axis for axis in axes if axis not in "YX" and sizes[axis] > 1]
        # C: channels, S: samples (RGB), I and Q: a plain series of pages. Z and T would be a focus or time series.
        if not {"Y", "X"} <= set(axes) or len(stacked) > 1 or set(stacked) - set("CSIQ"):
            raise BadField(f"{name}: has the axes {axes} of sizes {shape}; expected Y and X, and perhaps channels")

        def decode() -> np.ndarray:
            _check_segments(series[0], name)
            pixels = series[0].asarray().reshape([sizes[axis] for axis in axes if axis in (*stacked, "Y", "X")])
            return np.moveaxis(pixels, -1, 0) if stacked == ["S"] and axes.endswith("S") else pixels

        planes = sizes[stacked[0]] if stacked else 1
        yield _Picture(planes, FieldFormat(sizes["Y"], sizes["X"], np.dtype(series[0].dtype).name), decode)


def _check_segments(series: tifffile.TiffPageSeries, name: str) -> None:
    """Refuse a TIFF whose strips or tiles are not all there: tifffile fills what is missing with zeros."""
    for number, page in enumerate(series.pages):
        if page is None:
            raise BadField(f"{name}: plane {number} is missing")
        segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        there = page.parent.filehandle.size
        needed = max((offset + count for offset, count in segments), default=0)
        if needed > there:
            raise BadField(f"{name}: truncated: {there:,} bytes of at least {needed:,} are there")
        stored = sum(count for _, count in segments)
        if not all(count for _, count in segments) or (page.compression == 1 and stored < page.nbytes):
            raise BadField(f"{name}: strips of plane {number} are missing")


@contextlib.contextmanager
def _pillow(path: Path, name: str) -> Iterator[_Picture]:
    try:
        image = Image.open(path, formats=("PNG", "BMP"))
    except Image.DecompressionBombError as fault:
        raise BadField(f"{name}: {fault}") from None
    with image:
        # Pillow would halve the bits of 16-bit RGB without a word.
        if image.mode not in PILLOW_MODES or (image.mode[0] == "R" and ";16" in str(image.tile[0].args)):
            raise BadField(
                f"{name}: its pixels are of a kind that is not read here ({image.mode}, {image.tile[0].args}); "
                "allowed are 8- and 16-bit grey, and 8-bit RGB. Save it as TIFF."
            )
        planes, dtype = PILLOW_MODES[image.mode]

        def decode() -> np.ndarray:
            pixels = np.asarray(image)
            return pixels if planes == 1 else np.moveaxis(pixels, -1, 0)

        yield _Picture(planes, FieldFormat(image.height, image.width, dtype), decode)
