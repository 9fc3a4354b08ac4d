from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellhpc.pixels import BadField, FieldFormat, file_bytes, probe_field, read_field

SHAPE = (48, 64)
RAW = FieldFormat(*SHAPE, "uint16")
THREE = ("dapi.tif", "tubulin.tif", "actin.tif")


def noise(*shape: int, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.fixture
def three(tmp_path: Path) -> np.ndarray:
    pixels = noise(*SHAPE, 3)
    for channel, name in enumerate(THREE):
        tifffile.imwrite(tmp_path / name, pixels[..., channel], compression="zlib" if channel == 2 else None)
    return pixels


def refused(root: Path, files: tuple[str, ...], expected: FieldFormat = RAW) -> str:
    with pytest.raises(BadField) as fault:
        read_field(root, files, expected)
    return fault.value.reason


def test_a_file_for_each_channel(tmp_path: Path, three: np.ndarray) -> None:
    assert probe_field(tmp_path, THREE) == RAW
    field = read_field(tmp_path, THREE, RAW)
    np.testing.assert_array_equal(field, three)
    assert field.dtype == np.uint16
    assert field[..., 1].flags.c_contiguous  # each channel is a plain picture in memory
    assert file_bytes(tmp_path, THREE) == sum((tmp_path / name).stat().st_size for name in THREE)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_one_tiff_with_a_page_for_each_channel(tmp_path: Path, byteorder: str) -> None:
    pixels = noise(3, *SHAPE)
    tifffile.imwrite(tmp_path / "all.tif", pixels, photometric="minisblack", byteorder=byteorder)
    field = read_field(tmp_path, ("all.tif",) * 3, RAW)
    np.testing.assert_array_equal(field, np.moveaxis(pixels, 0, -1))


def test_ome_tiff_and_rgb_tiff(tmp_path: Path) -> None:
    planes = noise(4, *SHAPE)
    tifffile.imwrite(tmp_path / "f.ome.tif", planes, photometric="minisblack", metadata={"axes": "CYX"})
    np.testing.assert_array_equal(read_field(tmp_path, ("f.ome.tif",) * 4, RAW), np.moveaxis(planes, 0, -1))
    rgb = noise(*SHAPE, 3, dtype="uint8")
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, photometric="rgb")
    np.testing.assert_array_equal(read_field(tmp_path, ("rgb.tif",) * 3, FieldFormat(*SHAPE, "uint8")), rgb)


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_rgb_png_and_bmp(tmp_path: Path, ending: str) -> None:
    rgb = noise(*SHAPE, 3, dtype="uint8")
    Image.fromarray(rgb).save(tmp_path / f"field.{ending}")
    files = (f"field.{ending}",) * 3
    assert probe_field(tmp_path, files) == FieldFormat(*SHAPE, "uint8")
    np.testing.assert_array_equal(read_field(tmp_path, files, FieldFormat(*SHAPE, "uint8")), rgb)


def test_palette_indices_are_the_intensities(tmp_path: Path) -> None:
    grey = noise(*SHAPE, dtype="uint8")
    picture = Image.fromarray(grey, mode="P")
    picture.putpalette([0, 255, 0] * 256)
    picture.save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="palette", colormap=np.zeros((3, 256), np.uint16))
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_field(tmp_path, (name,), FieldFormat(*SHAPE, "uint8"))[..., 0], grey)


def test_16_bit_grey_png(tmp_path: Path) -> None:
    grey = noise(*SHAPE)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_field(tmp_path, ("a.png",), RAW)[..., 0], grey)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("keep", [0, 6, 100, 0.5, 0.98])
def test_truncated_tiff_at_any_length(tmp_path: Path, compression: str | None, keep: float) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(*SHAPE), compression=compression, rowsperstrip=8)
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: keep if keep >= 1 or keep == 0 else int(len(whole) * keep)])
    assert "a.tif: truncated" in refused(tmp_path, ("a.tif",))


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_truncated_png_and_bmp(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise(*SHAPE, dtype="uint8")).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert f"a.{ending}: truncated or unreadable" in refused(tmp_path, (path.name,), FieldFormat(*SHAPE, "uint8"))


def test_every_file_of_the_field_is_named(tmp_path: Path, three: np.ndarray) -> None:
    (tmp_path / "dapi.tif").unlink()
    tifffile.imwrite(tmp_path / "tubulin.tif", noise(48, 60))
    tifffile.imwrite(tmp_path / "actin.tif", noise(*SHAPE, dtype="uint8"))
    assert refused(tmp_path, THREE) == (
        "dapi.tif: missing; tubulin.tif: has 48 x 60 pixels, the other fields have 48 x 64; "
        "actin.tif: is uint8, the other fields are uint16"
    )


def test_wrong_number_of_planes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(2, *SHAPE), photometric="minisblack")
    assert refused(tmp_path, ("a.tif",) * 3) == "a.tif: has 2 planes instead of 3"


def test_a_focus_stack_is_not_taken_for_channels(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "z.ome.tif", noise(3, *SHAPE), photometric="minisblack", metadata={"axes": "ZYX"})
    assert "has the axes ZYX" in refused(tmp_path, ("z.ome.tif",) * 3)


def test_kinds_that_would_lose_or_invent_values_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "float.tif", np.zeros(SHAPE, np.float32))
    assert "float.tif: is float32; allowed are uint8 and uint16" in refused(tmp_path, ("float.tif",))
    (tmp_path / "rgb16.png").write_bytes(png(*SHAPE, depth=16, colour=2))
    assert "kind that is not read here" in refused(tmp_path, ("rgb16.png",) * 3)
    (tmp_path / "a.jpg").write_bytes(b"")
    assert "allowed are .tif, .tiff, .png, .bmp" in refused(tmp_path, ("a.jpg",))


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png(side, side, depth=8, colour=0, data=b""))
    with pytest.raises(BadField, match=r"bomb.png: .*pixels"):
        probe_field(tmp_path, ("bomb.png",))


def png(height: int, width: int, depth: int, colour: int, data: bytes | None = None) -> bytes:
    """A PNG from its specification: signature, header, data, end."""
    planes = {0: 1, 2: 3}[colour]
    rows = b"".join(b"\0" + bytes(width * planes * depth // 8) for _ in range(height)) if data is None else data
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
